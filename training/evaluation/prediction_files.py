"""The predictions of a pass on disk: one JSONL per rank, continued by any number of ranks, merged at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pixelprune.files import write_whole
from training.errors import UserError
from training.evaluation.scoring import Prediction, to_row

SETTINGS_FILE = "settings.json"
PREDICTIONS_FILE = "predictions.jsonl"


class PredictionFiles:
    """One folder per pass. Only what was made with the same settings is continued."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings

    def start(self, *, retry_failed: bool = False) -> None:
        """The first rank calls this before the others read: make the folder, drop lines that a kill cut short.

        Raises UserError when the folder holds predictions that were made with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path, settings = self.folder / SETTINGS_FILE, json.loads(json.dumps(self.settings))
        if path.exists():
            stored = json.loads(path.read_text())
            changed = [key for key in settings | stored if settings.get(key) != stored.get(key)]
            if changed:
                raise UserError(
                    f"{self.folder} holds predictions made with another {', '.join(changed)}; give another --out or "
                    "delete the folder"
                )
        else:
            write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())
        for part in self._parts():
            rows = _whole_rows(part)
            write_whole(part, _lines(row for row in rows if not (retry_failed and row["error"])))

    def done(self, fingerprints: Mapping[str, str]) -> dict[str, Prediction]:
        """Predictions so far, of all ranks of this and earlier starts, by record id.

        fingerprints: record id -> what the record is now; answers to what it was before are left out.
        """
        rows = (row for part in self._parts() for row in _whole_rows(part))
        return {
            row["id"]: Prediction.from_dict(row) for row in rows if fingerprints.get(row["id"]) == row["fingerprint"]
        }

    def append(self, rank: int, predictions: Iterable[Prediction]) -> None:
        with (self.folder / f"rank{rank:04d}.jsonl").open("ab") as file:
            file.write(_lines(map(to_row, predictions)))

    def merge(self, fingerprints: Mapping[str, str]) -> list[Prediction]:
        """The first rank calls this when all have finished: predictions.jsonl in the order of `fingerprints`."""
        done = self.done(fingerprints)
        predictions = [done[record_id] for record_id in fingerprints]
        write_whole(self.folder / PREDICTIONS_FILE, _lines(map(to_row, predictions)))
        return predictions

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("rank*.jsonl"))


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
