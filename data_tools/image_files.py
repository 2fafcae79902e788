"""Image files of a corpus: inside their folder, readable, and where the written records can name them."""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from pathlib import Path

from PIL import Image

from data_tools.conversation import DropError


class ImageFiles:
    """Finds images below `folder` and names them relative to `out`, the folder of the JSONL file to be written.

    copy: bring images into out/images (hard links where the file system allows). Without it `folder` must lie in
    `out`; raises ValueError otherwise, because records may not name files outside their own folder.
    """

    def __init__(self, folder: Path, out: Path, *, copy: bool = False) -> None:
        self.folder = folder.resolve()
        self.out = out.resolve()
        self.copy = copy
        if not self.folder.is_dir():
            raise ValueError(f"--images: expected a folder, got {folder}")
        if not copy and not self.folder.is_relative_to(self.out):
            raise ValueError(
                f"--images {folder} is not inside the folder of --out ({out}): write the records beside the images, "
                "or pass --copy-images"
            )
        self._size = lru_cache(maxsize=65536)(self._read_size)

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) in pixels from the file's header. Raises DropError with the reason."""
        size = self._size(name)
        if isinstance(size, str):
            raise DropError(size)
        return size

    def _read_size(self, name: str) -> tuple[int, int] | str:
        path = (self.folder / name.lstrip("/")).resolve()
        if not path.is_relative_to(self.folder):
            return "image outside the image folder"
        if not path.is_file():
            return "image missing"
        try:
            with Image.open(path) as image:
                return image.size
        except (OSError, ValueError, Image.DecompressionBombError):
            return "image unreadable"

    def relative(self, name: str) -> str:
        """The path to write, with forward slashes; copies the file first where asked to."""
        path = (self.folder / name.lstrip("/")).resolve()
        if not self.copy:
            return path.relative_to(self.out).as_posix()
        target = self.out / "images" / path.relative_to(self.folder)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(path, target)
        return target.relative_to(self.out).as_posix()
