"""A screen under a person's hands: pages of a site that run their scripts, acted on and looked at.

Time is virtual: the page's clock stands still but for what each action grants it, so what a page does by itself (a
message that goes after three seconds) happens at the same step on every machine, however busy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.render.browser import PageError, PageTimeoutError, Tab
from data_tools.render.site import Site
from data_tools.render.view import Element, PageView, Viewport
from data_tools.walk.action import Action

LOAD_MS = 2000
"""Of the page's time before the first look at it."""
STEP_MS = 500
"""Of the page's time between an action and the look at what it did; an action that waits takes twice as much."""
START_TIME = 1_790_000_000
"""What the page's clock says at first, seconds since 1970."""
# Pages that draw lots draw the same ones every time (mulberry32).
_CHANCE = """(() => { let state = SEED; Math.random = () => {
  state = (state + 0x6D2B79F5) | 0; let t = Math.imul(state ^ (state >>> 15), 1 | state);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t; return ((t ^ (t >>> 14)) >>> 0) / 4294967296; }; })()"""
_DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))"
_SCROLL = """((x, y, top) => {
  const page = document.scrollingElement || document.documentElement;
  let area = document.elementFromPoint(x, y);
  while (area && area !== page && !(area.scrollHeight > area.clientHeight + 8 &&
      /(auto|scroll)/.test(getComputedStyle(area).overflowY))) area = area.parentElement;
  (area || page).scrollBy({ top, behavior: "instant" });
})"""
_KEYS = {"enter": ("Enter", 13, "\r"), "esc": ("Escape", 27, "")}


@dataclass(frozen=True)
class Control:
    """An element as a person would use it.

    kind: field (to type in), tab, opener (of a menu or dialog, or of more text), link, native (a control that the
    browser draws outside the page) or other. layer: dialog or menu, what it stands in, else "". href: where a link
    leads, `elsewhere` out of the folder or to another window. value: what stands in a field. chosen: it is the tab or
    the page that is shown.
    """

    element: Element
    kind: str
    layer: str
    href: str
    value: str
    focused: bool
    chosen: bool


@dataclass(frozen=True)
class ScrollArea:
    """place: its middle. up, down: how far it can still go; height: of what is seen. All in pixels of the image."""

    place: tuple[float, float]
    up: float
    down: float
    height: float


@dataclass(frozen=True)
class Sight:
    """What is on the screen. image: uint8 (height, width, 3). dialogs, menus: how many are open."""

    image: np.ndarray
    page: str
    controls: list[Control]
    areas: list[ScrollArea]
    dialogs: int
    menus: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.shape[1], self.image.shape[0]


class Screen:
    """One tab, driven by actions. `seed` is for what the pages draw by lot, `closed` are pages that no link leads to.

    Raises PageError and its kinds.
    """

    def __init__(
        self,
        tab: Tab,
        site: Site,
        viewport: Viewport,
        theme: str,
        *,
        caret: bool,
        seed: int,
        closed: frozenset[str] = frozenset(),
    ) -> None:
        self.tab, self.viewport, self.theme, self.closed = tab, viewport, theme, closed
        self.view = PageView(tab, site, javascript=True, follow=True, caret=caret)
        self._leaving = 0
        self._pointer = (viewport.width / 2, viewport.height / 2)
        self._is_granted, self._is_loading = False, False
        tab.handlers["Page.frameNavigated"] = self._navigated
        tab.handlers["Page.loadEventFired"] = self._loaded
        tab.handlers["Emulation.virtualTimeBudgetExpired"] = self._expired
        tab.handlers["Page.frameRequestedNavigation"] = self._requested
        tab.call("Emulation.setFocusEmulationEnabled", {"enabled": True})
        tab.call("Page.addScriptToEvaluateOnNewDocument", {"source": _CHANCE.replace("SEED", str(seed % 2**31))})

    @property
    def pointer(self) -> tuple[float, float]:
        """Where the mouse is, in pixels of the screenshot."""
        return self._pointer[0] * self.viewport.scale, self._pointer[1] * self.viewport.scale

    def _requested(self, event: dict) -> None:
        self._leaving += self.view.is_leaving(event)

    def open(self, page: str) -> None:
        """Show a page, and let it do what it does at the start."""
        self.tab.call("Emulation.setVirtualTimePolicy", {"policy": "pause", "initialVirtualTime": START_TIME})
        before = self._counts()
        self.view.load(page, self.viewport, self.theme)
        self._wait_for_arrival(before)
        self._settle(self._counts(), STEP_MS)

    def look(self) -> Sight:
        image, elements, _ = self.view.capture(self.viewport)
        report, scale = self.view.report, self.viewport.scale
        uses = [entry["use"] for entry in report["found"]]
        areas = [
            ScrollArea((area["x"] * scale, area["y"] * scale), *(area[k] * scale for k in ("up", "down", "height")))
            for area in report["scroll"]
        ]
        for use in uses:
            if use["href"] and (self.view.site.page_of(use["href"]) or "") in {"", *self.closed}:
                use["href"] = "elsewhere"
        return Sight(
            image,
            self.view.page,
            [Control(element, **use) for element, use in zip(elements, uses, strict=True)],
            areas,
            report["layers"]["dialogs"],
            report["layers"]["menus"],
        )

    def do(self, action: Action) -> None:
        """Act, then wait until the page has done what it does: drawn, loaded, its granted time run out."""
        before = self._counts()
        if action.place is not None:
            self._pointer = (action.place[0] / self.viewport.scale, action.place[1] / self.viewport.scale)
        if action.name == "left_click":
            self._move()
            for kind in ("mousePressed", "mouseReleased"):
                self._mouse(kind, {"button": "left", "clickCount": 1, "buttons": int(kind == "mousePressed")})
        elif action.name == "type":
            self.tab.call("Input.insertText", {"text": action.text})
        elif action.name == "key":
            self._press(*action.keys)
        elif action.name == "scroll":
            top = -action.pixels / self.viewport.scale
            self._move()
            self.view.evaluate(f"{_SCROLL}({self._pointer[0]}, {self._pointer[1]}, {top})")
        self._settle(before, 2 * STEP_MS if action.name == "wait" else STEP_MS)

    def _mouse(self, kind: str, more: dict[str, Any]) -> None:
        self.tab.call("Input.dispatchMouseEvent", {"type": kind, "x": self._pointer[0], "y": self._pointer[1], **more})

    def _move(self) -> None:
        self._mouse("mouseMoved", {})

    def _press(self, key: str) -> None:
        name, code, text = _KEYS[key]
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code}
        self.tab.call("Input.dispatchKeyEvent", {"type": "keyDown", **common, **({"text": text} if text else {})})
        self.tab.call("Input.dispatchKeyEvent", {"type": "keyUp", **common})

    def _counts(self) -> tuple[int, int, int]:
        """Navigations that were asked for, refused and done, so far."""
        return self._leaving, self.view.blocked["navigation"], self.tab.num_events.get("Page.loadEventFired", 0)

    def _settle(self, before: tuple[int, int, int], milliseconds: int) -> None:
        """Until no navigation is under way, the granted time has run out and two frames were drawn after it."""
        while True:
            try:
                self.view.evaluate("0")  # its answer comes behind the news of a navigation that the action began
                if self._counts()[0] == before[0]:
                    self._grant(milliseconds)
                    # What moved under the pointer learns it now, not at some time of the browser's own.
                    self._move()
                    self.view.evaluate(_DRAWN)
            except PageTimeoutError:
                raise
            except PageError:
                if self._counts()[0] == before[0]:  # else its document went away while it was asked
                    raise
            if self._counts()[0] == before[0]:
                return
            self._wait_for_arrival(before)
            before = self._counts()

    def _wait_for_arrival(self, before: tuple[int, int, int]) -> None:
        """Until a navigation that was asked for is done or refused, and the new page has had its time."""
        self.tab.wait_until(lambda: self._counts()[1:] != before[1:] and not self._is_granted)
        if self._counts()[2] > before[2]:
            self.view.prepare()

    def _grant(self, milliseconds: int) -> None:
        """Let the page's clock go on for so long, and wait until it has; it stands while something is fetched."""
        self._allow(milliseconds)
        self.tab.wait_until(lambda: not self._is_granted)

    def _allow(self, milliseconds: int) -> None:
        self._is_granted = True  # in place of what was left of an earlier grant
        policy = {"policy": "pauseIfNetworkFetchesPending", "budget": milliseconds}
        self.tab.notify("Emulation.setVirtualTimePolicy", policy)

    # A document that has just been committed waits for time, which then stands until all of it is fetched.
    def _navigated(self, event: dict) -> None:
        if "parentId" not in event["frame"]:
            self._is_loading = True
            self._allow(LOAD_MS)

    def _loaded(self, _: dict) -> None:
        self._is_loading = False

    def _expired(self, _: dict) -> None:
        self._is_granted = False
        if self._is_loading:  # a page that loads something late, by a timer of its own
            self._allow(LOAD_MS)
