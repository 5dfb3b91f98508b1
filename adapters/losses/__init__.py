"""Training objectives: one objective, one file, pure torch."""

from .elk import ExpectedLikelihoodKernel
from .hedged_gaussian import HedgedGaussian
from .hedged_instance import HedgedInstance
from .contrastive_metric import ContrastiveMetric
from .decoupled_uniformity import DecoupledUniformity
from .loss_ranking import LossMSE, LossRanking
from .mcinfonce import MCInfoNCE
from .pfe import MutualLikelihood
from .tau import TaU

__all__ = [
    "ExpectedLikelihoodKernel",
    "HedgedGaussian",
    "HedgedInstance",
    "ContrastiveMetric",
    "DecoupledUniformity",
    "LossMSE",
    "LossRanking",
    "MCInfoNCE",
    "MutualLikelihood",
    "TaU",
]
