"""Distil image data sets by maximising mutual information, with contrastive losses anyone can import."""

from . import augment
from .losses import info_nce_loss, nce_loss, nce_losses
from .modules import InfoNCELoss, NCELoss

__all__ = ["InfoNCELoss", "NCELoss", "augment", "info_nce_loss", "nce_loss", "nce_losses"]
__version__ = "0.1.0"
