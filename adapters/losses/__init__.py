"""Training objectives: one objective, one file, pure torch."""

from .loss_ranking import LossMSE, LossRanking
from .mcinfonce import MCInfoNCE
from .tau import TaU

__all__ = ["LossMSE", "LossRanking", "MCInfoNCE", "TaU"]
