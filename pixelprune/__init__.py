"""PixelPrune: leave out pixel-redundant blocks of an image before the vision transformer (arXiv 2604.00886).

Importing this loads neither torch nor transformers; numba is loaded by the first selection.
"""

from pixelprune.codec import Compressed, decode, encode
from pixelprune.images.sizing import fit_size
from pixelprune.selection import Selection, select
from pixelprune.sessions import SessionSelection, decode_session, encode_session, select_session
from pixelprune.settings import PruneSettings, ResizeSettings

__version__ = "0.1.0"

__all__ = [
    "Compressed",
    "PruneSettings",
    "ResizeSettings",
    "Selection",
    "SessionSelection",
    "__version__",
    "decode",
    "decode_session",
    "encode",
    "encode_session",
    "fit_size",
    "select",
    "select_session",
]
