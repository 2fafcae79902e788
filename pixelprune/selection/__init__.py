"""Which blocks of an image are kept: strategies, their registry, compiled kernels, and pictures of their work."""

from pixelprune.selection.selection import METRICS, Selection, check_image, check_settings
from pixelprune.selection.selector import select

__all__ = ["METRICS", "Selection", "check_image", "check_settings", "select"]
