"""Image files of a corpus: inside their folder, readable, and where the written records can name them."""

from __future__ import annotations

import filecmp
import io
import os
import shutil
from functools import lru_cache
from pathlib import Path

from data_tools.convert.dropped import DropError
from pixelprune.files import whole_file, write_whole
from pixelprune.images.image import ImageError, decode_image, open_image, read_size
from pixelprune.settings import ResizeSettings


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
        self._copied: set[Path] = set()
        self._size = lru_cache(maxsize=65536)(self._read_size)

    def size(self, name: str, *, has_coordinates: bool = False) -> tuple[int, int]:
        """(width, height) in pixels of the upright image, from the file's header. Raises DropError with the reason.

        has_coordinates: refuse images that EXIF turns or mirrors. Training and evaluation see them upright, but
        whoever wrote coordinates may have seen the stored pixels.
        """
        found = self._size(name)
        if isinstance(found, str):
            raise DropError(found)
        width, height, orientation = found
        if has_coordinates and orientation != 1:
            raise DropError("image rotated by EXIF: coordinates could mean either frame")
        return width, height

    def _read_size(self, name: str) -> tuple[int, int, int] | str:
        """(width, height, EXIF orientation 1-8) of the upright image, or why there is none."""
        try:
            path = self._path(name)
            if not path.is_relative_to(self.folder):
                return "image outside the image folder"
            if not path.is_file():
                return "image missing"
            decode_image(path, ResizeSettings())  # to the last pixel: a header says nothing of a file that was cut off
            return read_size(path)
        except (OSError, ValueError, RuntimeError):
            # ValueError: a NUL in the name, or no image; RuntimeError: a loop of symlinks.
            return "image unreadable"

    def add(self, stem: str, data: bytes) -> str:
        """A picture that was no file, written below the folder as the bytes it is; returns its name. Raises DropError.

        stem: its name without suffix, which the picture's format gives.
        """
        try:
            with open_image(io.BytesIO(data), stem) as image:
                name = f"{stem}.{str(image.format).lower()}"
        except (ImageError, OSError, ValueError) as error:
            raise DropError("image is no picture") from error
        target = self._path(name)
        if not target.is_relative_to(self.folder):
            raise DropError("image outside the image folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != data:
            write_whole(target, data)
        return name

    def _path(self, name: str) -> Path:
        """An absolute path into the folder means itself; else it starts at the folder, as some corpora write theirs."""
        path = Path(name)
        if path.is_absolute() and path.resolve().is_relative_to(self.folder):
            return path.resolve()
        return (self.folder / name.lstrip("/")).resolve()

    def relative(self, name: str) -> str:
        """The path to write, with forward slashes; copies the file first where asked to.

        Raises ValueError when another image has the name of the copy already.
        """
        path = self._path(name)
        if not self.copy:
            return path.relative_to(self.out).as_posix()
        target = self.out / "images" / path.relative_to(self.folder)
        if path not in self._copied:
            self._copy(path, target)
            self._copied.add(path)
        return target.relative_to(self.out).as_posix()

    def _copy(self, path: Path, target: Path) -> None:
        if target.exists():
            if not (target.samefile(path) or filecmp.cmp(path, target, shallow=False)):
                raise ValueError(
                    f"--copy-images: {path} would be copied to {target}, which is another image; "
                    "write this corpus to another folder"
                )
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # A copy that a kill cut short must not be taken for one. Waiting for the disk would cost more than the copy.
        with whole_file(target, is_durable=False) as partial:
            try:
                os.link(path, partial)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(path, partial)
