"""One session: screenshots in the order of time, and what was done on each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from data_tools.render.browser import PageError
from data_tools.walk.action import FINISHED, Action
from data_tools.walk.person import Person
from data_tools.walk.screen import Screen, Sight

StepKind = Literal["click", "type", "menu", "modal", "tab", "scroll", "navigate", "idle", "end"]
"""What an action did, told from the page before and after it: opened or closed a menu or a dialog, chose a tab, led to
another page; a click that did none of these; waiting, or nothing that can be seen (idle)."""


@dataclass(frozen=True)
class Step:
    """One screenshot, uint8 (height, width, 3), the page it shows, what is done on it, and what came of that."""

    image: np.ndarray
    page: str
    action: Action
    kind: StepKind

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.shape[1], self.image.shape[0]


def walk(screen: Screen, page: str, num_steps: int, rng: random.Random, *, pointer: bool) -> list[Step]:
    """A session of at most `num_steps` steps that begins on `page`; the last step says that everything is done.

    Shorter where nothing more can be done. Raises PageError and its kinds, also for a page on which nothing can.
    """
    person = Person(rng)
    screen.open(page)
    before = screen.look()
    steps: list[Step] = []
    picture = _pointed(before.image, screen) if pointer else before.image
    while len(steps) < num_steps - 1 and (action := person.next(before)) is not None:
        screen.do(action)
        after = screen.look()
        steps.append(Step(picture, before.page, action, _kind(action, before, after)))
        before, picture = after, _pointed(after.image, screen) if pointer else after.image
    if not steps:
        raise PageError("nothing on it can be acted on")
    return [*steps, Step(picture, before.page, FINISHED, "end")]


def _kind(action: Action, before: Sight, after: Sight) -> StepKind:
    if action.name == "wait":
        return "idle"
    if before.page != after.page:
        return "navigate"
    if before.dialogs != after.dialogs:
        return "modal"
    if before.menus != after.menus:
        return "menu"
    if before.image.shape == after.image.shape and np.array_equal(before.image, after.image):
        return "idle"
    if action.name == "left_click":
        return "tab" if action.role == "tab" else "click"
    return {"type": "type", "key": "type", "scroll": "scroll"}.get(action.name, "click")  # type: ignore[return-value]


def _pointed(image: np.ndarray, screen: Screen) -> np.ndarray:
    """The image with an arrow where the mouse is, which headless browsers do not draw."""
    x, y = screen.pointer
    size = screen.viewport.scale
    corners = ((0, 0), (0, 16), (3.8, 12.5), (6.3, 18.2), (8.8, 17), (6.3, 11.5), (11.5, 11.5))
    picture = Image.fromarray(image)
    outline = [(round(x + size * dx), round(y + size * dy)) for dx, dy in corners]
    ImageDraw.Draw(picture).polygon(outline, fill=(0, 0, 0), outline=(255, 255, 255))
    return np.asarray(picture)


def windows(num_steps: int, history: int) -> Iterator[tuple[int, int]]:
    """(first, last) step of the window of every step: itself and up to `history` before it."""
    return ((max(0, last - history), last) for last in range(num_steps))


def stretches(num_steps: int, length: int) -> Iterator[tuple[int, int]]:
    """(first, last) step of stretches that follow each other without overlap."""
    return ((first, min(first + length, num_steps) - 1) for first in range(0, num_steps, length))
