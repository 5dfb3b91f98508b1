"""Training objectives: one objective, one file, pure torch."""

from .aninfonce import AnInfoNCE, AnInfoNCEEnsemble
from .contrastive_metric import ContrastiveMetric
from .decoupled_uniformity import DecoupledUniformity
from .elk import ExpectedLikelihoodKernel
from .hedged_gaussian import HedgedGaussian
from .hedged_instance import HedgedInstance
from .loss_ranking import LossMSE, LossRanking
from .mcinfonce import MCInfoNCE
from .momentum import MomentumContrast
from .ntxent import NTXent
from .pfe import MutualLikelihood
from .tau import TaU
from .tau_moco import TaUMoCo

__all__ = [
    "AnInfoNCE",
    "AnInfoNCEEnsemble",
    "ContrastiveMetric",
    "DecoupledUniformity",
    "ExpectedLikelihoodKernel",
    "HedgedGaussian",
    "HedgedInstance",
    "LossMSE",
    "LossRanking",
    "MCInfoNCE",
    "MomentumContrast",
    "MutualLikelihood",
    "NTXent",
    "TaU",
    "TaUMoCo",
]
