"""Distil image data sets by maximising mutual information, with contrastive losses anyone can import."""

from . import augment
from .losses import InfoNCELoss, NCELoss, info_nce_loss, nce_loss

__all__ = ["InfoNCELoss", "NCELoss", "augment", "info_nce_loss", "nce_loss"]
__version__ = "0.1.0"
