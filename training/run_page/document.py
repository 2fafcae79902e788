"""The page of one or several runs: curves, recipes, records, evaluations and what was left out, in one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pixelprune.command.page import build_page
from pixelprune.files import write_whole
from training.run_page import NUM_SAMPLES
from training.run_page.curves import charts_of, curves_of
from training.run_page.run_folder import (
    RECIPE_FILE,
    compare_recipes,
    finite,
    read_answers,
    read_evaluations,
    read_quarantines,
    read_recipe,
)
from training.run_page.samples import sample_groups
from training.tracking.metrics_file import METRICS_FILE, read_metrics
from training.tracking.report import summarise

_READ = (METRICS_FILE, RECIPE_FILE, "quarantine*.jsonl", "grounding/step-*.jsonl", "*-evaluation/*/result.json")


class RunPage:
    """The page of these runs, made anew when one of their files has changed.

    runs: name -> folder. num_samples: records of each source, read and pruned once. refresh_seconds: how often the open
    page asks its server for what is new, 0 for a file that stands alone.
    """

    def __init__(self, runs: Mapping[str, Path], *, num_samples: int = NUM_SAMPLES, refresh_seconds: float = 0):
        self.runs, self.refresh_seconds = runs, refresh_seconds
        self.samples: list[dict[str, Any]] = []
        if num_samples:
            self.samples = sample_groups({name: read_recipe(folder) for name, folder in runs.items()}, num_samples)
        self._seen: list[tuple[str, int, int]] | None = None
        self._page = b""

    def current(self) -> bytes:
        """The whole HTML file. Not for two threads at a time."""
        seen = [one for folder in self.runs.values() for one in _state(folder)]
        if seen != self._seen:
            self._page, self._seen = self._built(), seen
        return self._page

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.current())
        return path

    def _built(self) -> bytes:
        title = ", ".join(self.runs)
        data = {"title": title, "refresh_seconds": self.refresh_seconds, "samples": self.samples, **_content(self.runs)}
        return build_page(title, data, _script(), _style(), asks_its_server=bool(self.refresh_seconds))


def _content(runs: Mapping[str, Path]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for name, folder in runs.items():
        rows = read_metrics(folder)
        summary = {words: finite(value) for words, value in summarise(rows).items()}
        note = "" if rows else "no step is done yet"
        part = {
            "name": name,
            "folder": _shown_path(folder),
            "summary": summary,
            "note": note,
            "curves": curves_of(rows),
        }
        parts.append(part)
    charts, missing = charts_of(part["curves"] for part in parts)
    recipes = [read_recipe(folder) for folder in runs.values()]
    return {
        "runs": parts,
        "charts": charts,
        "missing": missing,
        "recipes": {"rows": compare_recipes(recipes) if any(recipes) else []},
        "evaluations": _of_all(runs, read_evaluations),
        "answers": _of_all(runs, read_answers),
        "quarantine": _of_all(runs, read_quarantines),
    }


def _shown_path(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _of_all(runs: Mapping[str, Path], read: Any) -> list[dict[str, Any]]:
    return [{"run": name, **one} for name, folder in runs.items() for one in read(folder)]


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of what a page is made of."""
    found = []
    for pattern in _READ:
        for path in sorted(folder.glob(pattern)):
            stat = os.stat(path)
            found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return found


@cache
def _script() -> str:
    """The charts' library with the licence that has to come with it, and the page's own."""
    here = Path(__file__).parent
    licence = (here / "uplot" / "LICENSE").read_text()
    library = (here / "uplot" / "uPlot.iife.min.js").read_text()
    return f"/* uPlot:\n{licence}*/\n{library}\n{(here / 'run_page.js').read_text()}"


@cache
def _style() -> str:
    here = Path(__file__).parent
    return (here / "uplot" / "uPlot.min.css").read_text() + (here / "run_page.css").read_text()
