"""Pages to look at: one self-contained HTML file, whose data may come from strangers.

Answers of models, questions and file names are text that nobody has checked. So data stands in the page as JSON without
a single `<`, the page's script sets it as text (page.js has what scripts share), a content policy forbids every script
and style but the page's own and every source of a picture but the page itself, and pictures are encoded anew from their
pixels.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["build_page", "embedded_picture", "omitted_runs"]

_QUALITY = 85


def build_page(title: str, data: Any, script: str, style: str, *, asks_its_server: bool = False) -> bytes:
    """A whole HTML file. script: finds `data` in a constant of this name, and the functions of page.js.

    data: what JSON can say; the same data gives the same bytes. script, style: the page's own, by us, never made from
    data. asks_its_server: the script may ask where the page came from, and nobody else, for what is new.
    Raises ValueError for numbers that JSON does not have, and for a script or style that would end its element.
    """
    script = f"{Path(__file__).with_suffix('.js').read_text()}{script}"
    for name, text in (("script", script), ("style", style)):
        if f"</{name}" in text.lower() or "<!--" in text:
            raise ValueError(f"page: the {name} would end its own element")
    # `<` alone could end the element, or begin a comment in which the end is not seen.
    content = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    asked = "connect-src 'self'; " if asks_its_server else ""
    policy = (
        f"default-src 'none'; img-src data:; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        f"{asked}base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style></head>\n<body>\n"
        f'<script type="application/json" id="data">{content}</script>\n<script>{script}</script>\n</body></html>\n'
    ).encode(errors="replace")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded_picture(picture: Image.Image, max_side: int = 1024) -> str:
    """A data: URL of the picture's pixels, scaled down to max_side; nothing else of the file it came from is kept."""
    small = picture.convert("RGB")
    small.thumbnail((max_side, max_side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=_QUALITY, exif=b"", icc_profile=b"")
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def omitted_runs(keep: np.ndarray) -> dict[str, Any]:
    """Omitted blocks as page.js draws them: runs of (row, first column, number of columns). keep: bool (rows, cols)."""
    edges = np.diff(np.pad(~keep, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    runs = [[int(row), int(first), int(end - first)] for (row, first), (_, end) in zip(starts, ends, strict=True)]
    return {"rows": keep.shape[0], "cols": keep.shape[1], "omitted": runs}
