"""Answers on disk: a part for every few prompts, whole or absent, joined into one file per data source at the end.

A part's content depends on its prompts and the settings alone, so that any number of ranks, started any number of
times, ends with the same files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pixelprune.files import whole_file, write_whole
from training.errors import UserError

SETTINGS_FILE, SUMMARY_FILE, REFUSED_FILE = "settings.json", "summary.json", "refused.jsonl"


class AnswerFiles:
    """One folder per pass. Only what was made with the same settings is continued."""

    def __init__(self, folder: Path, settings: dict[str, Any], num_parts: int):
        self.folder, self.settings, self.num_parts = folder, json.loads(json.dumps(settings)), num_parts

    def start(self) -> None:
        """The first rank calls this before the others write. Raises UserError for another pass's folder."""
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        path = self.folder / SETTINGS_FILE
        if not path.exists():
            write_whole(path, (json.dumps(self.settings, indent=2) + "\n").encode())
            return
        stored = json.loads(path.read_text())
        changed = [key for key in self.settings | stored if self.settings.get(key) != stored.get(key)]
        if changed:
            raise UserError(
                f"{self.folder} holds answers made with another {', '.join(changed)}; give another --out or delete the "
                "folder"
            )

    def missing(self) -> list[int]:
        return [part for part in range(self.num_parts) if not self._part(part).exists()]

    def write(self, part: int, lines: Sequence[dict[str, Any]]) -> None:
        """lines: {"source": its name, "record": what is trained on}, or {"id", "reason", "detail"} of one refused."""
        write_whole(self._part(part), "".join(json.dumps(line) + "\n" for line in lines).encode())

    def join(self, sources: Sequence[str]) -> dict[str, Any]:
        """The first rank calls this when all parts are there: a file for each source, the refused, and the summary."""
        files = {name: self.folder / "answers" / f"{name}.jsonl" for name in sources}
        for name, path in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial, partial.open("w") as out:
                out.writelines(
                    json.dumps(line["record"]) + "\n" for line in self._lines() if line.get("source") == name
                )
        with whole_file(self.folder / REFUSED_FILE) as partial, partial.open("w") as out:
            out.writelines(json.dumps(line) + "\n" for line in self._lines() if "reason" in line)
        summary = _summary(self._lines())
        write_whole(self.folder / SUMMARY_FILE, (json.dumps(summary, indent=2) + "\n").encode())
        return summary | {"files": {name: str(path) for name, path in files.items()}}

    def _part(self, part: int) -> Path:
        return self.folder / "parts" / f"part-{part:08d}.jsonl"

    def _lines(self) -> Iterator[dict[str, Any]]:
        for part in range(self.num_parts):
            with self._part(part).open() as file:
                yield from map(json.loads, file)


def _summary(lines: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all parts; log-probability per token over all answers."""
    counts, reasons, log_prob = Counter[str](), Counter[str](), 0.0
    for line in lines:
        if "reason" in line:
            reasons[line["reason"]] += 1
            continue
        if not line["is_new"]:
            counts["num_kept"] += 1
            continue
        facts = line["record"]["metadata"]["answer"]
        counts["num_answers"] += 1
        counts["num_tokens"] += len(line["record"]["messages"][-1]["token_ids"])
        counts["num_cut"] += not facts["has_ended"]
        log_prob += facts["log_prob"]
    return {
        **{name: counts[name] for name in ("num_answers", "num_kept", "num_tokens", "num_cut")},
        "log_prob_per_token": log_prob / counts["num_tokens"] if counts["num_tokens"] else None,
        "num_refused": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
    }
