"""Records whose videos become images: each video part gives way to its frames, with the times they began at as text."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.convert.dropped import DropError
from data_tools.recording.frames import CONTAINERS, FrameSettings, sample_frames
from data_tools.records import read_jsonl
from pixelprune.files import whole_file

Part = dict[str, Any]


class RecordingReader:
    """Writes frames to `out`/images and names them in records; a video that several records show is read once."""

    def __init__(self, out: Path, settings: FrameSettings, question: str = "") -> None:
        """question: what is asked about a video that is given as a file and not in a record."""
        self.out, self.settings, self.question = out, settings, question
        self.dropped: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()
        self.num_read = 0
        self._parts: dict[Path, list[Part] | DropError] = {}

    def records(self, path: Path) -> Iterator[dict[str, Any]]:
        """The records of a JSON lines file, or the one of a video file. What cannot be used is counted and left out."""
        rows = read_jsonl(path) if path.suffix.lower() == ".jsonl" else iter([self._asked(path)])
        for row in rows:
            self.num_read += 1
            try:
                yield self._with_frames(row, path.parent.resolve())
            except DropError as error:
                self.dropped[str(error)] += 1

    def _asked(self, path: Path) -> dict[str, Any]:
        if path.suffix.lower() not in CONTAINERS:
            raise ValueError(f"{path}: expected .jsonl or one of {', '.join(CONTAINERS)}")
        if not self.question:
            raise ValueError(f"{path}: a video by itself asks nothing: give --question, or records that hold videos")
        content = [{"type": "video", "video": path.name}, {"type": "text", "text": self.question}]
        return {"id": path.stem, "messages": [{"role": "user", "content": content}]}

    def _with_frames(self, row: dict[str, Any], folder: Path) -> dict[str, Any]:
        messages = row.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise DropError("no messages")
        made, num_videos = [], 0
        for message in messages:
            content = message.get("content")
            parts: list[Part] = []
            for part in content if isinstance(content, list) else []:
                is_video = isinstance(part, dict) and part.get("type") == "video"
                num_videos += is_video
                parts += self._frames_of(part, folder) if is_video else [part]
            made.append({**message, "content": parts} if parts else message)
        if not num_videos:
            raise DropError('no part of type "video"')
        return {**row, "messages": made}

    def _frames_of(self, part: Part, folder: Path) -> list[Part]:
        if unread := sorted(part.keys() - {"type", "video"}):
            raise DropError(f"a video part has {unread[0]!r}, which is not read")
        name = part.get("video")
        if not isinstance(name, str):
            raise DropError("a video that is no path")
        path = (folder / name.removeprefix("file://")).resolve()
        if not path.is_relative_to(folder):
            raise DropError("video outside the folder of its records")
        if path not in self._parts:
            try:
                self._parts[path] = self._written(path)
            except DropError as error:
                self._parts[path] = error
        found = self._parts[path]
        if isinstance(found, DropError):
            raise found
        return found

    def _written(self, path: Path) -> list[Part]:
        slug = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[-40:]
        stem = f"{slug}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        parts: list[Part] = []
        (self.out / "images").mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(sample_frames(path, self.settings, self.frames)):
            name = f"images/{stem}-{number:03d}.png"
            with whole_file(self.out / name, in_sight=True) as partial:
                Image.fromarray(frame.image).save(partial, "PNG")
            parts.append({"type": "text", "text": f"<{frame.seconds:.1f} seconds>"})
            parts.append({"type": "image", "image": name})
        return parts
