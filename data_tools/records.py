"""The record format every tool of this package writes: messages with typed content, images relative to the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pixelprune.files import whole_file


def grounding_record(
    record_id: str, image: str, instruction: str, answer: str, metadata: dict[str, Any]
) -> dict[str, Any]:
    """One question about one image and its answer. `image`: path relative to the JSONL file's folder."""
    return question_record(record_id, [image], instruction, answer, metadata)


def question_record(
    record_id: str, images: Sequence[str], question: str, answer: str | None, metadata: dict[str, Any]
) -> dict[str, Any]:
    """One question behind its images, and its answer; None for a question that comes without one.

    images: paths relative to the JSONL file's folder.
    """
    parts: list[dict[str, str]] = [{"type": "image", "image": image} for image in images]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": record_id, "messages": messages, "metadata": metadata}


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object per line; the file appears under its name only when complete. Returns the count."""
    count = 0
    with whole_file(path, in_sight=True) as partial, partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file. Raises ValueError with the line's number for what is no JSON object."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
            yield record


def first_image(record: dict[str, Any]) -> str | None:
    """Path of the record's first image as written, or None."""
    for message in record.get("messages", []):
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if part.get("type") == "image" and isinstance(part.get("image"), str):
                return part["image"]
    return None
