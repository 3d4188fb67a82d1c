"""Distil image data sets by maximising mutual information, with contrastive losses anyone can import."""

from . import augment, networks, objectives
from .losses import InfoNCELoss, NCELoss, info_nce_loss, nce_loss
from .objectives import MutualInformation
from .synthetic import SyntheticSet

__all__ = [
    "InfoNCELoss",
    "MutualInformation",
    "NCELoss",
    "SyntheticSet",
    "augment",
    "info_nce_loss",
    "nce_loss",
    "networks",
    "objectives",
]
__version__ = "0.1.0"
