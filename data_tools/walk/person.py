"""A person at a screen: what is done next is drawn from what can be seen, with the habits of somebody at work."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from data_tools.render.instructions import Instructor
from data_tools.render.shot import MAX_AREA
from data_tools.render.view import ROLE_WORDS, Element
from data_tools.walk.action import Action
from data_tools.walk.screen import Control, ScrollArea, Sight

WEIGHTS = {"field": 3.0, "opener": 4.0, "tab": 2.0, "other": 3.0, "link": 1.2, "scroll": 4.0, "wait": 0.4}
"""How likely each kind of action is, where it is possible."""
STAYS = 0.85
"""How likely an open dialog or menu is what is acted on next."""
_PHRASES = (
    "quarterly review", "window seat", "blue paint", "spare keys", "train to Ghent", "second draft", "garden fence",
    "invoice 2041", "room 14", "summer plan", "two copies", "call the dentist", "new filters", "north wall",
)  # fmt: skip
_BY_NAME = (
    (("e-mail", "recipient"), ("ana@example.org", "tomasz@example.org", "mei@example.org")),
    (("phone",), ("+32 2 555 01 42", "+49 30 555 0177")),
    (("amount", "price", "number", "guests", "quantity", "age"), ("3", "12", "48", "250")),
    (("password",), ("correct horse", "staple battery")),
    (("name",), ("Ada Moreau", "Jonas Beck", "Mei Tanaka")),
)


class Person:
    """Draws actions with `rng`; remembers what was acted on last, so as not to do the same again."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._recent: deque[tuple[str, str]] = deque(maxlen=4)
        self._may_enter = False

    def next(self, sight: Sight) -> Action | None:
        """The next action, or None where nothing can be done that words could tell."""
        action = self._with_keys(sight) or self._in_front(sight)
        self._may_enter = action is not None and action.name == "type"
        if action is not None and action.target:
            self._recent.append((action.role, action.target))
        return action

    def _with_keys(self, sight: Sight) -> Action | None:
        rng = self._rng
        focused = next((c for c in sight.controls if c.focused and c.kind == "field"), None)
        if focused is not None and not focused.value and rng.random() < 0.9:
            text = self._text(focused.element)
            return Action("type", f'Type "{text}".', text=text, box=focused.element.box)
        if focused is not None and self._may_enter and rng.random() < 0.35:
            return Action("key", "Press Enter.", keys=("enter",))
        if (sight.menus or sight.dialogs) and rng.random() < 0.1:
            return Action("key", "Press Escape.", keys=("esc",))
        return None

    def _in_front(self, sight: Sight) -> Action | None:
        """An action on what lies in front: an open dialog, else an open menu, else the page."""
        rng, instructor = self._rng, Instructor([control.element for control in sight.controls])
        area = sight.size[0] * sight.size[1]
        usable = [c for c in sight.controls if _is_usable(c, area) and not instructor.refusal(c.element)]
        front = next((f for name in ("dialog", "menu") if (f := [c for c in usable if c.layer == name])), [])
        if front and rng.random() < STAYS:
            usable = front
        groups = {kind: [c for c in usable if c.kind == kind] for kind in WEIGHTS}
        groups["link"] = [c for c in groups["link"] if _leads_elsewhere(c, sight)]
        groups["other"] += [c for c in usable if c.kind == "link" and not _leads_elsewhere(c, sight)]
        groups["field"] = [c for c in groups["field"] if not c.value and not c.focused]
        groups = {kind: self._fresh(members) for kind, members in groups.items()}
        may_scroll = bool(sight.areas) and usable is not front
        possible = [k for k in WEIGHTS if groups[k] or (k == "scroll" and may_scroll) or (k == "wait" and usable)]
        if not possible:
            return None
        kind = rng.choices(possible, [WEIGHTS[name] for name in possible])[0]
        if kind == "scroll":
            return self._scroll(sight.areas)
        if kind == "wait":
            return Action("wait", "Wait a moment.")
        return self._click(rng.choice(groups[kind]).element, instructor)

    def _fresh(self, controls: list[Control]) -> list[Control]:
        return [c for c in controls if (c.element.role, c.element.name) not in self._recent]

    def _click(self, element: Element, instructor: Instructor) -> Action:
        x1, y1, x2, y2 = element.box
        name = f'"{element.name}"'
        words = {
            "name": f"Click {name}.",
            "role_name": f"Click the {ROLE_WORDS.get(element.role, '')} {name}.",
            "heading": f'Under "{element.heading}", click {name}.',
            "function": f'Click the control for "{element.function}".',
        }
        template = next(t for t in ("role_name", "name", "heading", "function") if t in instructor.templates(element))
        place = ((x1 + x2) / 2, (y1 + y2) / 2)
        return Action("left_click", words[template], place, element.box, target=element.name, role=element.role)

    def _scroll(self, areas: Sequence[ScrollArea]) -> Action:
        area = self._rng.choice(areas)
        goes_down = area.down > 8 and (area.up <= 8 or self._rng.random() < 0.75)
        way = min(area.down if goes_down else area.up, self._rng.choice((0.4, 0.6, 0.8)) * area.height)
        words = f"Scroll {'down' if goes_down else 'up'} by {round(way)} pixels."
        return Action("scroll", words, area.place, pixels=round(-way if goes_down else way))

    def _text(self, element: Element) -> str:
        name = set(element.name.casefold().split())
        choices = next((texts for words, texts in _BY_NAME if name & set(words)), _PHRASES)
        return self._rng.choice(choices)


def _is_usable(control: Control, area: float) -> bool:
    x1, y1, x2, y2 = control.element.box
    is_foreign = control.kind == "native" or control.href == "elsewhere"
    is_target = control.element.is_clickable and not is_foreign and not control.chosen
    return is_target and (x2 - x1) * (y2 - y1) <= MAX_AREA * area


def _leads_elsewhere(control: Control, sight: Sight) -> bool:
    return bool(control.href) and not control.href.partition("#")[0].endswith(f"/{sight.page}")
