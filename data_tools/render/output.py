"""The folder that a rendering run writes: images/*.png and JSONL files that bear their names only when complete."""

from __future__ import annotations

import io
import json
import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from PIL import Image

from data_tools.render.png import encode_png
from pixelprune.files import PARTIAL, whole_file

ImageFormat = Literal["png", "webp"]
"""Both lossless; WebP takes about half of the bytes."""


def prepare_out(out: Path, *, overwrite: bool) -> None:
    """Make the output folder. Raises ValueError when it holds records already and `overwrite` is not set."""
    names = [f"{split}.jsonl{end}" for split in ("train", "eval") for end in ("", PARTIAL)]
    old = [out / name for name in (*names, "sessions.jsonl", "report.json", "sheet.png", "images")]
    present = [path.name for path in old if path.exists()]
    if present and not overwrite:
        raise ValueError(f"--out {out}: holds {', '.join(present)} already; choose another folder or pass --overwrite")
    for path in old:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / "images").mkdir(parents=True)


class RenderOutput:
    """Writes images in two threads (compressing runs while Chromium draws) and records line by line.

    The JSONL files bear `.partial` in their names until the run is complete; a killed run leaves them so.
    """

    def __init__(self, out: Path, splits: Sequence[str], png_level: int, file_format: ImageFormat = "png") -> None:
        self._out = out
        self._format: ImageFormat = file_format
        self._png_level = png_level
        self._open = ExitStack()
        self._files = {}
        for split in splits:
            partial = self._open.enter_context(whole_file(out / f"{split}.jsonl", in_sight=True))
            self._files[split] = self._open.enter_context(partial.open("w", encoding="utf-8"))
        self._pool = ThreadPoolExecutor(2)
        self._writes: deque[Future[int]] = deque()

    def __enter__(self) -> RenderOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        self._open.__exit__(kind, error, trace)

    def add_image(self, name: str, image: np.ndarray) -> None:
        """Write one screenshot, uint8 (height, width, 3). Raises OSError, also for an earlier one."""
        if len(self._writes) > 8:  # bounds the pixels in memory
            self._writes.popleft().result()
        path = self._out / "images" / f"{name}.{self._format}"
        self._writes.append(self._pool.submit(lambda: path.write_bytes(self._encoded(image))))

    def _encoded(self, image: np.ndarray) -> bytes:
        if self._format == "png":
            return encode_png(image, level=self._png_level)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=80, method=4)
        return buffer.getvalue()

    def add_records(self, split: str, records: list[dict[str, Any]]) -> None:
        """Write records of a split, a line each."""
        for record in records:
            self._files[split].write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """Wait for every image. Raises OSError when one could not be written."""
        for write in self._writes:
            write.result()
