"""Real data: a named set, a folder or a file -> one in-memory, device-resident `ImageSet`."""

from .image_set import ImageSet
from .loading import NAMES, load, name_of
from .pixels import measure

__all__ = ["NAMES", "ImageSet", "load", "measure", "name_of"]
