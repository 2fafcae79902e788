"""A page as it is seen: one page of a site in one viewport and theme, its screenshot and its clickable elements."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.render.browser import PageError, Tab
from data_tools.render.site import Site

MIN_SIDE = 4.0
"""Elements narrower or lower than this many CSS pixels are left out."""
_SCRIPT = (Path(__file__).parent / "elements.js").read_text(encoding="utf-8")
# Animations stop and fonts arrive; then the page is drawn hidden once, so that what is shown is painted anew: Chromium
# keeps tiles of earlier, incomplete states where it can, and then pixels depend on the order in which things arrived.
_HIDE = """(async () => {
  const style = (text) => {
    const element = document.createElement('style');
    element.textContent = text;
    (document.head || document.documentElement).append(element);
    return element;
  };
  style(`*, *::before, *::after { animation: none !important; transition: none !important;
    CARET !important; scroll-behavior: auto !important }`);
  await document.fonts.ready;
  globalThis.pixelpruneHidden = style('html { display: none !important }');
})()"""
_CARETS = {False: "caret-color: transparent", True: "caret-animation: manual"}
_UNHIDE = "globalThis.pixelpruneHidden.remove()"
# Input fields, and the roles ARIA gives to things that are chosen or switched.
ROLE_WORDS = {
    "button": "button",
    "link": "link",
    "textbox": "text field",
    "searchbox": "search field",
    "checkbox": "checkbox",
    "radio": "radio button",
    "switch": "switch",
    "combobox": "drop-down list",
    "listbox": "list",
    "option": "option",
    "tab": "tab",
    "menuitem": "menu item",
    "slider": "slider",
    "spinbutton": "number field",
    "treeitem": "tree item",
    "DisclosureTriangle": "expander",
    "ColorWell": "colour picker",
    "Date": "date field",
}


@dataclass(frozen=True)
class Viewport:
    """width and height in CSS pixels; scale = image pixels per CSS pixel."""

    width: int
    height: int
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Viewport:
        """`1366x768` or `390x844@2`. Raises ValueError for anything else."""
        size, _, scale = text.partition("@")
        try:
            width, height = (int(part) for part in size.lower().split("x"))
            viewport = cls(width, height, float(scale) if scale else 1.0)
        except ValueError as error:
            raise ValueError(f"--viewports: expected WIDTHxHEIGHT[@SCALE] like 390x844@2, got {text!r}") from error
        if not (32 <= width <= 8192 and 32 <= height <= 8192 and 0.25 <= viewport.scale <= 4):
            raise ValueError(f"--viewports: sides must be 32 to 8192 and the scale 0.25 to 4, got {text!r}")
        return viewport

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"@{self.scale:g}" if self.scale != 1 else "")


@dataclass(frozen=True)
class Element:
    """A clickable element as it is visible: box (x1, y1, x2, y2) in image pixels, accessible name and role."""

    box: tuple[float, float, float, float]
    name: str
    role: str
    kind: str
    """`text` when its words can be read inside the box, else `icon` (widgets without words included)."""
    heading: str
    function: str
    """What title or aria-label say it does, where that is not its visible text; else empty."""
    is_clickable: bool = True
    """False for what is covered, cut off or disabled: no target, but its name is taken."""


class PageView:
    """Shows pages of `site` in a tab. Foreign pages run no script unless `javascript` is set.

    Every request is answered from the site's folder or refused; requests refused are counted in `blocked`.
    follow: the page may go to other pages of the site. caret: text fields show a caret, which does not blink.
    """

    def __init__(
        self, tab: Tab, site: Site, *, javascript: bool = False, follow: bool = False, caret: bool = False
    ) -> None:
        self.tab = tab
        self.site = site
        self.blocked: Counter[str] = Counter()
        self.report: dict[str, Any] = {}
        """What elements.js said before the last picture was taken."""
        self._follow = follow
        self._hide = _HIDE.replace("CARET", _CARETS[caret])
        self._wanted = ""
        self._shown = ""
        self._main_frame = ""
        self._num_stops = 0
        tab.handlers["Fetch.requestPaused"] = self._answer
        tab.handlers["Page.frameStoppedLoading"] = self._stopped
        tab.call("Page.enable")
        tab.call("Inspector.enable")
        tab.call("Fetch.enable", {"patterns": [{"urlPattern": "*"}]})
        tab.call("Network.enable")
        tab.call("Network.setCacheDisabled", {"cacheDisabled": True})
        tab.call("Emulation.setScriptExecutionDisabled", {"value": not javascript})
        tab.call("Emulation.setFocusEmulationEnabled", {"enabled": False})
        self._main_frame = tab.call("Page.getFrameTree")["frameTree"]["frame"]["id"]

    def _stopped(self, event: dict) -> None:
        self._num_stops += event["frameId"] == self._main_frame

    def _answer(self, event: dict) -> None:
        url = event["request"]["url"].partition("#")[0]
        request = event["requestId"]
        is_main = event.get("resourceType") == "Document" and event.get("frameId") == self._main_frame
        if is_main and self._follow and self.site.page_of(url) is not None:
            self._wanted = url
        if is_main and url != self._wanted:  # a refresh or a script that would leave the page we measure
            self.blocked["navigation"] += 1
            self.tab.notify("Fetch.failRequest", {"requestId": request, "errorReason": "Aborted"})
            return
        path = self.site.file(url)
        if path is None or event["request"]["method"] != "GET":
            if url != self.site.url("favicon.ico"):  # the browser's own wish, not the page's
                outside = not url.startswith(self.site.url(""))
                self.blocked["outside the folder" if outside else "missing file"] += 1
            self.tab.notify("Fetch.failRequest", {"requestId": request, "errorReason": "BlockedByClient"})
            return
        body, kind = self.site.content(path)
        self.tab.notify(
            "Fetch.fulfillRequest",
            {
                "requestId": request,
                "responseCode": 200,
                "responseHeaders": [{"name": "Content-Type", "value": kind}],
                "body": base64.b64encode(body).decode("ascii"),
            },
        )

    def show(self, page: str, viewport: Viewport, theme: str) -> None:
        """Load `page`, wait until it is complete, and make it stand still. Raises PageError and its kinds."""
        self.load(page, viewport, theme)
        self.prepare()

    def load(self, page: str, viewport: Viewport, theme: str) -> None:
        """Load `page` and wait until it is complete."""
        tab = self.tab
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            {"width": viewport.width, "height": viewport.height, "deviceScaleFactor": viewport.scale, "mobile": False},
        )
        media = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        tab.call("Emulation.setEmulatedMedia", {"features": media})
        self._wanted = self.site.url(page)
        loaded = tab.num_events.get("Page.loadEventFired", 0)
        blocked, stops = self.blocked["navigation"], self._num_stops
        answer = tab.call("Page.navigate", {"url": self._wanted})
        if answer.get("errorText"):
            raise PageError(f"navigation failed: {answer['errorText']}")
        # A page that tries to leave while it loads is kept, but fires no load event any more.
        tab.wait_until(
            lambda: (
                tab.num_events.get("Page.loadEventFired", 0) > loaded
                or (self.blocked["navigation"] > blocked and self._num_stops > stops)
            )
        )

    def prepare(self) -> None:
        """Make a page that has loaded stand still, and draw it anew."""
        self._shown = self._wanted
        self._world = self.tab.call(
            "Page.createIsolatedWorld",
            {"frameId": self._main_frame, "worldName": "pixelprune", "grantUniveralAccess": False},
        )["executionContextId"]
        self.evaluate(self._hide)
        self.tab.call("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": True})
        self.evaluate(_UNHIDE)

    @property
    def page(self) -> str:
        """The page of the site that is shown."""
        return self.site.page_of(self._wanted) or ""

    def is_leaving(self, event: dict) -> bool:
        """Whether a navigation (Page.frameRequestedNavigation) leaves the document that is shown, be it for itself."""
        url, hash_mark, _ = event["url"].partition("#")
        return event["frameId"] == self._main_frame and not (hash_mark and url == self._shown)

    def evaluate(self, expression: str) -> object:
        answer = self.tab.call(
            "Runtime.evaluate",
            {"expression": expression, "contextId": self._world, "returnByValue": True, "awaitPromise": True},
        )
        if "exceptionDetails" in answer:
            raise PageError(f"script failed: {answer['exceptionDetails'].get('text')}")
        return answer["result"].get("value")

    def page_height(self) -> float:
        """Scrollable height of the page, CSS pixels."""
        value = self.evaluate("Math.max(document.documentElement.scrollHeight, innerHeight)")
        return float(str(value))

    def scroll_to(self, top: float) -> float:
        """Scroll, let lazy images load, and return where the page came to stand (CSS pixels)."""
        value = self.evaluate(
            f"(async () => {{ scrollTo(0, {top}); await Promise.all([...document.images].filter(i => !i.complete && "
            "i.getBoundingClientRect().top < innerHeight).map(i => i.decode().catch(() => 0))); return scrollY; })()"
        )
        return float(str(value))

    def screenshot(self) -> np.ndarray:
        """Pixels of the viewport, uint8 (H, W, 3)."""
        data = self.tab.call("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": True})["data"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            return np.asarray(image.convert("RGB"))

    def boxes(self) -> tuple[dict, str]:
        """What elements.js reports now, and the handle of its result object."""
        answer = self.tab.call(
            "Runtime.evaluate",
            {"expression": f"({_SCRIPT})({MIN_SIDE})", "contextId": self._world, "returnByValue": False},
        )
        if "exceptionDetails" in answer:
            raise PageError(f"script failed: {answer['exceptionDetails'].get('text')}")
        handle = answer["result"]["objectId"]
        report = self._property(handle, "report")["value"]
        return json.loads(report), handle

    def _property(self, handle: str, name: str) -> dict:
        properties = self.tab.call("Runtime.getProperties", {"objectId": handle, "ownProperties": True})["result"]
        return next(p["value"] for p in properties if p["name"] == name)

    def capture(self, viewport: Viewport) -> tuple[np.ndarray, list[Element], Counter[str]]:
        """Screenshot, its elements (also those that are no targets), and how many were left out for which reason.

        Boxes are read before and after the picture is taken; what moved or was covered meanwhile is left out.
        """
        before, handle = self.boxes()
        self.report = before
        image = self.screenshot()
        expected = (round(viewport.height * viewport.scale), round(viewport.width * viewport.scale))
        if image.shape[:2] != expected:
            raise PageError(
                f"the screenshot is {image.shape[1]}x{image.shape[0]}, expected {expected[1]}x{expected[0]}"
            )
        names = self._names(handle, len(before["found"]))
        after, _ = self.boxes()
        if after["href"].partition("#")[0] != self._wanted:
            raise PageError("the page went elsewhere while it was read")
        dropped = Counter(before["dropped"])
        still = {tuple(entry["box"]) for entry in after["found"] if not entry["reason"]}
        elements = []
        for entry, (name, role) in zip(before["found"], names, strict=True):
            is_clickable = not entry["reason"] and tuple(entry["box"]) in still
            if not is_clickable and not entry["reason"]:
                dropped["moved or covered while it was read"] += 1
            elements.append(_element(entry, name, role, viewport.scale, is_clickable=is_clickable))
        return image, elements, dropped

    def _names(self, handle: str, count: int) -> list[tuple[str, str]]:
        """Accessible (name, role) of each reported element, as Chromium computes them for assistive technology."""
        array = self._property(handle, "elements")["objectId"]
        properties = self.tab.call("Runtime.getProperties", {"objectId": array, "ownProperties": True})["result"]
        handles = [p["value"]["objectId"] for p in properties if p["name"].isdigit()]
        if len(handles) != count:
            raise PageError(f"{count} boxes but {len(handles)} elements")
        answers = self.tab.call_many(
            [("Accessibility.getPartialAXTree", {"objectId": h, "fetchRelatives": False}) for h in handles]
        )
        names = []
        for answer in answers:
            node = answer["nodes"][0] if isinstance(answer, dict) and answer["nodes"] else {}
            name = str(node.get("name", {}).get("value", ""))
            names.append((" ".join(name.split()), str(node.get("role", {}).get("value", ""))))
        return names


def _element(entry: dict, name: str, role: str, scale: float, *, is_clickable: bool) -> Element:
    x1, y1, x2, y2 = (side * scale for side in entry["box"])
    readable = any(character.isalnum() for character in entry["text"])
    described = next((text for text in (entry["title"], entry["aria"]) if text and text != entry["text"]), "")
    return Element(
        box=(x1, y1, x2, y2),
        name=name,
        role=role,
        kind="text" if readable else "icon",
        heading=entry["heading"],
        function=described,
        is_clickable=is_clickable,
    )
