"""Sessions over a site: each begins on a page of its own, in one viewport and theme, and all go into one folder."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.render.browser import Browser, BrowserError, PageError
from data_tools.render.output import ImageFormat, RenderOutput
from data_tools.render.site import Site
from data_tools.render.view import Viewport
from data_tools.walk.conversations import Supervise, conversations, instruction_of
from data_tools.walk.screen import Screen
from data_tools.walk.session import Step, walk
from pixelprune.files import write_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WalkSettings:
    """How many sessions, of which length, and what becomes of them."""

    num_sessions: int = 24
    num_steps: tuple[int, int] = (5, 12)
    """Fewest and most steps of a session, the step that ends it among them."""
    viewports: tuple[Viewport, ...] = (Viewport(1366, 768),)
    themes: tuple[str, ...] = ("light", "dark")
    """Viewports and themes take turns from session to session."""
    history: int = 4
    """Screenshots before the current one."""
    supervise: Supervise = "last"
    eval_fraction: float = 0.0
    """Share of the sessions that go to eval.jsonl."""
    eval_pages: frozenset[str] = frozenset()
    """Pages whose sessions go to eval.jsonl instead; no other session shows them, nor do those show another page."""
    caret: bool = True
    pointer: bool = True
    seed: int = 0
    timeout: float = 120.0
    """Seconds for one session: a page that hangs ends it."""
    source: str = "sessions"
    png_level: int = 6
    file_format: ImageFormat = "png"

    def held_out(self, pages: list[str]) -> set[int]:
        """Numbers of the sessions that go to eval.jsonl; `pages` take turns."""
        if self.eval_pages:
            return {n for n in range(self.num_sessions) if pages[n % len(pages)] in self.eval_pages}
        order = sorted(range(self.num_sessions), key=lambda n: hashlib.sha256(f"{self.seed}|{n}".encode()).digest())
        return set(order[: round(self.eval_fraction * self.num_sessions)])


@dataclass
class WalkReport:
    """What a run made and what it left out, every number with its reason."""

    num_sessions: int = 0
    num_steps: int = 0
    num_images: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    num_records: Counter[str] = field(default_factory=Counter)
    dropped_sessions: dict[str, str] = field(default_factory=dict)
    blocked_requests: Counter[str] = field(default_factory=Counter)
    browser: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}


def run_walks(
    site: Site, pages: list[str], out: Path, settings: WalkSettings, *, chromium: str | None = None
) -> Iterator[WalkReport]:
    """Walk `settings.num_sessions` sessions into `out` (made by `prepare_out`); yields the report after each.

    Writes images/*.png, train.jsonl, eval.jsonl where sessions are held out, sessions.jsonl (what was done on every
    screenshot, and where) and report.json. A session whose page fails is listed with its reason; the run goes on.
    """
    report = WalkReport()
    held_out = settings.held_out(pages)
    lines: list[str] = []
    browser: Browser | None = None
    with RenderOutput(
        out, ("train", "eval") if held_out else ("train",), settings.png_level, settings.file_format
    ) as output:
        try:
            for number in range(settings.num_sessions):
                turn, place = divmod(number, len(pages))
                page = pages[place]
                name = f"{settings.source}-{number:03d}"
                if browser is None:
                    browser = Browser(chromium)
                    browser.__enter__()
                    report.browser = browser.version
                try:
                    steps, about = _walked(browser, site, page, number, turn, settings, report)
                except (PageError, BrowserError, OSError) as error:
                    report.dropped_sessions[f"{name} ({page})"] = f"{type(error).__name__}: {error}"
                    log.warning("%s: %s", page, error)
                    browser.close()
                    browser = None
                else:
                    split = "eval" if number in held_out else "train"
                    lines.append(_written(name, steps, about, output, settings, split, report))
                yield report
        finally:
            if browser is not None:
                browser.close()
        output.finish()
    write_whole(out / "sessions.jsonl", "".join(lines).encode())
    write_whole(out / "report.json", (json.dumps(report.as_dict(), indent=1) + "\n").encode())
    yield report


def _walked(
    browser: Browser, site: Site, page: str, number: int, turn: int, settings: WalkSettings, report: WalkReport
) -> tuple[list[Step], dict[str, Any]]:
    rng = random.Random(f"{settings.seed}|{number}|{page}")
    viewport = settings.viewports[(number + turn) % len(settings.viewports)]
    theme = settings.themes[(number // len(settings.viewports) + turn) % len(settings.themes)]
    tab = browser.new_tab()
    tab.start_clock(settings.timeout)
    closed = _closed_to(page, site, settings)
    screen = Screen(tab, site, viewport, theme, caret=settings.caret, seed=rng.randrange(2**31), closed=closed)
    try:
        steps = walk(screen, page, rng.randint(*settings.num_steps), rng, pointer=settings.pointer)
    finally:
        report.blocked_requests += screen.view.blocked
    browser.close_tab(tab)
    if shown := sorted(closed.intersection(step.page for step in steps)):  # by a script: no link was followed there
        raise PageError(f"it led to {shown[0]}, a page of the other split")
    about = {"source": settings.source, "page": page.rsplit(".", 1)[0], "viewport": str(viewport), "theme": theme}
    return steps, about


def _closed_to(page: str, site: Site, settings: WalkSettings) -> frozenset[str]:
    """Pages that a session on `page` may not show, where the splits share none."""
    if not settings.eval_pages:
        return frozenset()
    return frozenset(site.crawl()) - settings.eval_pages if page in settings.eval_pages else settings.eval_pages


def _written(
    name: str,
    steps: list[Step],
    about: dict[str, Any],
    output: RenderOutput,
    settings: WalkSettings,
    split: str,
    report: WalkReport,
) -> str:
    """Write a session's pictures and records; returns its line of sessions.jsonl."""
    images: list[str] = []
    known: dict[bytes, str] = {}
    for index, step in enumerate(steps):
        digest = hashlib.sha256(repr(step.image.shape).encode() + step.image.tobytes()).digest()
        if digest not in known:  # a step that changed nothing shows the picture before it again
            known[digest] = f"images/{name}-{index:02d}.{settings.file_format}"
            output.add_image(f"{name}-{index:02d}", step.image)
        images.append(known[digest])

    records = conversations(name, steps, images, history=settings.history, supervise=settings.supervise, about=about)
    output.add_records(split, records)
    report.num_sessions += 1
    report.num_steps += len(steps)
    report.num_images += len(known)
    report.kinds.update(step.kind for step in steps)
    report.num_records[split] += len(records)
    told = [
        {"image": image, "page": step.page.rsplit(".", 1)[0], "kind": step.kind, **step.action.as_dict(step.size)}
        for image, step in zip(images, steps, strict=True)
    ]
    session = {"id": name, "split": split, **about, "instruction": instruction_of(steps), "steps": told}
    return json.dumps(session, ensure_ascii=False) + "\n"
