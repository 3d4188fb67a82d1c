"""Distil image data sets by maximising mutual information, with contrastive losses anyone can import."""

from . import augment, networks, objectives
from .losses import info_nce_loss, info_nce_losses, nce_loss, nce_losses
from .losses.modules import InfoNCELoss, NCELoss
from .objectives import MutualInformation
from .synthetic import SyntheticSet

__all__ = [
    "InfoNCELoss",
    "MutualInformation",
    "NCELoss",
    "SyntheticSet",
    "augment",
    "info_nce_loss",
    "info_nce_losses",
    "nce_loss",
    "nce_losses",
    "networks",
    "objectives",
]
__version__ = "0.1.0"
