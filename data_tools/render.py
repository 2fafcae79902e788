"""Pages in, screenshots and grounding records out: one run over a site, its viewports, themes and scroll positions."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.browser import Browser, BrowserError, PageError
from data_tools.instructions import Instructor
from data_tools.png import encode_png
from data_tools.records import grounding_record, write_jsonl
from data_tools.site import Site
from data_tools.view import Element, PageView, Viewport
from pixelprune.answers import format_point

log = logging.getLogger(__name__)
MAX_AREA = 0.4
"""Elements that cover more of the screenshot than this are left out: any click hits them."""


@dataclass(frozen=True)
class RenderSettings:
    """What is rendered, and how much of it becomes records."""

    viewports: tuple[Viewport, ...]
    themes: tuple[str, ...] = ("light", "dark")
    alternate_themes: bool = False
    """One theme per page and viewport, in turn, instead of every theme."""
    num_scrolls: int = 1
    """Scroll positions per page and viewport: the top, then one viewport (less a tenth) further each."""
    max_elements: int = 8
    """Elements per screenshot; text and icons alternate while both last."""
    num_instructions: int = 1
    """Instructions per element, each of another template."""
    seed: int = 0
    page_timeout: float = 20.0
    """Seconds for one page in one viewport and theme, all its scroll positions together."""
    javascript: bool = False
    source: str = "render"
    png_level: int = 6


@dataclass(frozen=True)
class Shot:
    """One screenshot: uint8 (H, W, 3), its usable elements, and what was left out for which reason."""

    page: str
    viewport: Viewport
    theme: str
    scroll: int
    image: np.ndarray
    elements: list[Element]
    dropped: Counter[str]

    @property
    def name(self) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", self.page.lower().rsplit(".", 1)[0]).strip("-")[-60:]
        digest = "" if "/" not in self.page else "-" + hashlib.sha256(self.page.encode()).hexdigest()[:8]
        scroll = f"-s{self.scroll}" if self.scroll else ""
        return f"{slug}{digest}-{str(self.viewport).replace('@', 'at')}-{self.theme}{scroll}"


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
        self._open()
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


def usable(shot: Shot) -> tuple[list[Element], Instructor, Counter[str]]:
    """The elements that an instruction can mean, and why the others were left out."""
    instructor = Instructor(shot.elements)
    dropped = Counter(shot.dropped)
    area = shot.image.shape[0] * shot.image.shape[1]
    kept = []
    for element in shot.elements:
        if not element.is_clickable:
            continue
        x1, y1, x2, y2 = element.box
        reason = "too large" if (x2 - x1) * (y2 - y1) > MAX_AREA * area else instructor.refusal(element)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(element)
    return kept, instructor, dropped


def choose(elements: list[Element], count: int, rng: random.Random) -> list[Element]:
    """`count` elements at random, text and icons in turn while both last."""
    shuffled = rng.sample(elements, len(elements))
    kinds = [[e for e in shuffled if e.kind == kind] for kind in ("text", "icon")]
    mixed = [e for pair in itertools.zip_longest(*kinds) for e in pair if e is not None]
    return mixed[:count]


def shot_records(shot: Shot, settings: RenderSettings, dropped: Counter[str]) -> list[dict[str, Any]]:
    """Records of one screenshot; reasons of elements left out are added to `dropped`."""
    elements, instructor, reasons = usable(shot)
    dropped += reasons
    rng = random.Random(f"{settings.seed}|{shot.name}|{shot.page}")
    chosen = choose(elements, settings.max_elements, rng)
    dropped["not drawn (--max-elements)"] += len(elements) - len(chosen)
    height, width = shot.image.shape[:2]
    records: list[dict[str, Any]] = []
    for element in chosen:
        x1, y1, x2, y2 = element.box
        answer = format_point((x1 + x2) / 2, (y1 + y2) / 2, (width, height))
        metadata = {
            "source": settings.source,
            "page": shot.page.rsplit(".", 1)[0],
            "bbox": [round(side) for side in element.box],
            "image_size": [width, height],
            "element": element.kind,
            "name": element.name,
            "role": element.role,
            "viewport": str(shot.viewport),
            "theme": shot.theme,
            "scroll": shot.scroll,
        }
        for instruction in instructor.instructions(element, rng, settings.num_instructions):
            record_id = f"{settings.source}-{shot.name}-{len(records):02d}"
            record = grounding_record(record_id, f"images/{shot.name}.png", instruction.text, answer, metadata)
            record["metadata"] = {**metadata, "template": instruction.template}
            records.append(record)
    return records


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


def prepare_out(out: Path, *, overwrite: bool) -> None:
    """Make the output folder. Raises ValueError when it holds records already and `overwrite` is not set."""
    old = [out / name for name in ("train.jsonl", "eval.jsonl", "report.json", "sheet.png", "images")]
    present = [path.name for path in old if path.exists()]
    if present and not overwrite:
        raise ValueError(f"--out {out}: holds {', '.join(present)} already; choose another folder or pass --overwrite")
    for path in old:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / "images").mkdir(parents=True)


def _write_image(out: Path, shot: Shot, level: int) -> None:
    (out / "images" / f"{shot.name}.png").write_bytes(encode_png(shot.image, level=level))


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
    records: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    writes: deque[Future[None]] = deque()
    # Compressing releases the interpreter lock: it runs while Chromium draws the next picture.
    with ThreadPoolExecutor(2) as pool, Renderer(site, settings, report, chromium) as renderer:
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
                if len(writes) > 8:  # bounds the pixels in memory; raises what the write raised
                    writes.popleft().result()
                writes.append(pool.submit(_write_image, out, shot, settings.png_level))
                report.num_images += 1
                records[split].extend(made)
                report.num_records[split] += len(made)
            report.num_pages += 1
            report.seconds = time.monotonic() - started
            yield report
        for write in writes:
            write.result()
    for split, written in records.items():
        if written or split == "train":
            write_jsonl(out / f"{split}.jsonl", written)
    (out / "report.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    yield report
