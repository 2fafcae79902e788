"""Pages in, screenshots and grounding records out: one run over a site, its viewports, themes and scroll positions."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.render.browser import Browser, BrowserError, PageError
from data_tools.render.output import RenderOutput
from data_tools.render.shot import RenderSettings, Shot, shot_records
from data_tools.render.site import Site
from data_tools.render.view import PageView, Viewport
from pixelprune.files import write_whole

log = logging.getLogger(__name__)


@dataclass
class RenderReport:
    """What a run made and what it left out, every number with its reason."""

    num_pages: int = 0
    num_images: int = 0
    num_records: Counter[str] = field(default_factory=Counter)
    dropped_pages: dict[str, str] = field(default_factory=dict)
    dropped_images: Counter[str] = field(default_factory=Counter)
    dropped_elements: Counter[str] = field(default_factory=Counter)
    blocked_requests: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    browser: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For report.json: the counts, without the time, so that equal runs write equal files."""
        counts = {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}
        del counts["seconds"]
        return counts


class Renderer:
    """Keeps one Chromium, and starts another when it hangs, crashes or goes away."""

    def __init__(self, site: Site, settings: RenderSettings, report: RenderReport, chromium: str | None = None) -> None:
        self.site = site
        self.settings = settings
        self.report = report
        self._chromium = chromium
        self._browser: Browser | None = None
        self._view: PageView | None = None

    def __enter__(self) -> Renderer:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _open(self) -> PageView:
        if self._view is None:
            self._browser = Browser(self._chromium)
            self._browser.__enter__()
            self.report.browser = self._browser.version
            self._view = PageView(self._browser.new_tab(), self.site, javascript=self.settings.javascript)
        return self._view

    def _close(self) -> None:
        if self._view is not None:
            self.report.blocked_requests += self._view.blocked
        if self._browser is not None:
            self._browser.close()
        self._browser = self._view = None

    def shots(self, page: str, number: int) -> Iterator[Shot]:
        """Every screenshot of one page. A page that fails is counted with its reason and ends here, not the run."""
        try:
            for column, viewport in enumerate(self.settings.viewports):
                themes = self.settings.themes
                if self.settings.alternate_themes:
                    themes = (themes[(number + column) % len(themes)],)
                for theme in themes:
                    yield from self._shots_of(page, viewport, theme)
        except (PageError, BrowserError, OSError) as error:
            self.report.dropped_pages[page] = f"{type(error).__name__}: {error}"
            log.warning("%s: %s", page, error)
            self._close()

    def _shots_of(self, page: str, viewport: Viewport, theme: str) -> Iterator[Shot]:
        view = self._open()
        view.tab.start_clock(self.settings.page_timeout)
        view.show(page, viewport, theme)
        height = view.page_height() if self.settings.num_scrolls > 1 else viewport.height
        position = -1.0
        for scroll in range(self.settings.num_scrolls):
            top = min(scroll * 0.9 * viewport.height, max(0.0, height - viewport.height))
            reached = view.scroll_to(top) if self.settings.num_scrolls > 1 else 0.0
            if reached <= position:
                break
            position = reached
            image, elements, dropped = view.capture(viewport)
            yield Shot(page, viewport, theme, scroll, image, elements, dropped)


def split_pages(pages: list[str], *, eval_pages: list[str], eval_fraction: float, seed: int) -> set[str]:
    """Pages of the evaluation split: those named (with or without suffix), or a share drawn by hash of their path.

    Raises ValueError for a name that is no page, and for a fraction outside [0, 1).
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"--eval-fraction: expected a number from 0 up to 1, got {eval_fraction}")
    if eval_pages:
        stems = {page.rsplit(".", 1)[0]: page for page in pages}
        unknown = [name for name in eval_pages if name not in stems and name not in pages]
        if unknown:
            raise ValueError(f"--eval-pages: no such page: {', '.join(unknown)}; pages: {', '.join(pages[:20])}")
        return {stems.get(name, name) for name in eval_pages}
    order = sorted(pages, key=lambda page: hashlib.sha256(f"{seed}|{page}".encode()).digest())
    return set(order[: round(eval_fraction * len(pages))])


def render(
    site: Site,
    pages: list[str],
    out: Path,
    settings: RenderSettings,
    eval_set: set[str],
    *,
    chromium: str | None = None,
) -> Iterator[RenderReport]:
    """Render `pages` into `out` (made by `prepare_out`); yields the running report after each page.

    Writes images/*.png, train.jsonl, eval.jsonl where there are evaluation pages, and report.json.
    """
    report = RenderReport()
    started = time.monotonic()
    seen: set[bytes] = set()
    splits = ("train", "eval") if eval_set else ("train",)
    with (
        RenderOutput(out, splits, settings.png_level) as output,
        Renderer(site, settings, report, chromium) as renderer,
    ):
        for number, page in enumerate(pages):
            split = "eval" if page in eval_set else "train"
            for shot in renderer.shots(page, number):
                digest = hashlib.sha256(repr(shot.image.shape).encode() + shot.image.tobytes()).digest()
                if digest in seen:
                    report.dropped_images["same pixels as an earlier one"] += 1
                    continue
                seen.add(digest)
                made = shot_records(shot, settings, report.dropped_elements)
                if not made:
                    report.dropped_images["no usable element"] += 1
                    continue
                output.add_image(shot.name, shot.image)
                output.add_records(split, made)
                report.num_images += 1
                report.num_records[split] += len(made)
            report.num_pages += 1
            report.seconds = time.monotonic() - started
            yield report
        output.finish()
    write_whole(out / "report.json", (json.dumps(report.as_dict(), indent=1) + "\n").encode())
    yield report
