"""A page of ours in a tab of a real Chromium: read, clicked and looked at."""

from __future__ import annotations

import json
from typing import Any

from data_tools.render.browser import Tab


class Opened:
    """The page in a tab, freshly loaded; `asked` are the URLs it requested, `broken` what its policy stopped."""

    def __init__(self, tab: Tab, url: str):
        self.tab, self.asked, self.broken = tab, [], []
        tab.start_clock(120)
        tab.handlers["Network.requestWillBeSent"] = lambda event: self.asked.append(event["request"]["url"])
        tab.handlers["Log.entryAdded"] = lambda event: self.broken.append(event["entry"]["text"])
        tab.handlers["Runtime.exceptionThrown"] = lambda event: self.broken.append(str(event))
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.call(f"{domain}.enable")
        size = {"width": 1300, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        tab.call("Emulation.setDeviceMetricsOverride", size)
        self.asked.clear()
        self.broken.clear()
        loads = tab.num_events.get("Page.loadEventFired", 0)
        tab.call("Page.navigate", {"url": url})
        tab.wait_until(lambda: tab.num_events.get("Page.loadEventFired", 0) > loads)
        # Chromium drops what a pointer does before a page's first frames are out.
        frames = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        tab.call("Runtime.evaluate", {"expression": frames, "awaitPromise": True})

    def get(self, expression: str) -> Any:
        result = self.tab.call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        return self.get(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)")

    def middle(self, selector: str) -> tuple[float, float]:
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        self.get(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        return self.get(f"(() => {{ const b = {box}; return [b.x + b.width / 2, b.y + b.height / 2]; }})()")

    def click(self, selector: str) -> None:
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.tab.call("Input.dispatchMouseEvent", event)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        for kind, (x, y), pressed in (
            ("mouseMoved", start, 0), ("mousePressed", start, 1), ("mouseMoved", end, 1), ("mouseReleased", end, 0),
        ):  # fmt: skip
            event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": pressed, "clickCount": 1}
            self.tab.call("Input.dispatchMouseEvent", event)

    def wait_for(self, expression: str) -> None:
        """Until it is true in the page."""
        code = (
            f"new Promise((done) => {{ const look = () => ({expression}) ? done() : setTimeout(look, 20); look(); }})"
        )
        self.tab.call("Runtime.evaluate", {"expression": code, "awaitPromise": True})

    def hover(self, x: float, y: float) -> None:
        self.tab.call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def select(self, name: str, value: str) -> None:
        """As a person's choice in a list, whose window belongs to no page."""
        self.get(
            f"(() => {{ const one = document.getElementById('{name}'); one.value = {json.dumps(value)};"
            "one.dispatchEvent(new Event('change')); })()"
        )
