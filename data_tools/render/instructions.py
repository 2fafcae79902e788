"""From an element to an instruction that means it and nothing else on the screenshot."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from data_tools.render.view import ROLE_WORDS, Element

MAX_NAME_LEN = 80
"""Names longer than this many characters are paragraphs, not names."""
_TYPED = ("textbox", "searchbox", "combobox", "spinbutton", "Date")


@dataclass(frozen=True)
class Instruction:
    """text: what is asked; template: name, role_name, function or heading."""

    text: str
    template: str


def _by_name(element: Element, rng: random.Random) -> str:
    name = element.name
    if element.role in ("textbox", "searchbox", "spinbutton", "Date"):
        return rng.choice(
            (f'Click into the field "{name}".', f'Put the cursor in "{name}".', f'Select the field "{name}".')
        )
    return rng.choice((f'Click "{name}".', f'Click on "{name}".', f'Select "{name}".', f'Press "{name}".'))


def _by_role_and_name(element: Element, rng: random.Random) -> str:
    word = ROLE_WORDS[element.role]
    return rng.choice(
        (
            f'Click the {word} "{element.name}".',
            f'Click the "{element.name}" {word}.',
            f'Where is the {word} "{element.name}"?',
            f'Point to the {word} named "{element.name}".',
        )
    )


def _by_function(element: Element, rng: random.Random) -> str:
    function = element.function.rstrip(".!?")
    return rng.choice(
        (
            f'Click the control for "{function}".',
            f'Which control is for "{function}"?',
            f'I am looking for "{function}". Where do I click?',
        )
    )


def _by_heading(element: Element, rng: random.Random) -> str:
    return rng.choice(
        (
            f'Under "{element.heading}", click "{element.name}".',
            f'In the part "{element.heading}", find "{element.name}".',
            f'Click "{element.name}" below the heading "{element.heading}".',
        )
    )


_TEMPLATES: dict[str, Callable[[Element, random.Random], str]] = {
    "name": _by_name,
    "role_name": _by_role_and_name,
    "function": _by_function,
    "heading": _by_heading,
}
TEMPLATES = tuple(_TEMPLATES)


class Instructor:
    """Writes instructions for the elements of one screenshot; knows which words would mean two of them."""

    def __init__(self, elements: list[Element]) -> None:
        self._names = Counter(e.name.casefold() for e in elements)
        self._roles = Counter((e.role, e.name.casefold()) for e in elements)
        self._headings = Counter((e.heading.casefold(), e.name.casefold()) for e in elements)
        self._functions = Counter(text for e in elements for text in {e.function.casefold(), e.name.casefold()} if text)

    def refusal(self, element: Element) -> str | None:
        """Why no instruction can be written for this element, or None."""
        if not any(character.isalnum() for character in element.name):
            return "no name"
        if len(element.name) > MAX_NAME_LEN:
            return "name too long"
        return None if self.templates(element) else "ambiguous name"

    def templates(self, element: Element) -> list[str]:
        """The templates that mean this element alone."""
        name = element.name.casefold()
        fits = {
            "name": self._names[name] == 1,
            "role_name": element.role in ROLE_WORDS and self._roles[element.role, name] == 1,
            "function": bool(element.function) and self._functions[element.function.casefold()] == 1,
            "heading": 0 < len(element.heading) <= MAX_NAME_LEN
            and element.heading.casefold() != name
            and self._headings[element.heading.casefold(), name] == 1,
        }
        return [template for template, fit in fits.items() if fit]

    def instructions(self, element: Element, rng: random.Random, count: int) -> list[Instruction]:
        """Up to `count` instructions of different templates, in an order drawn from `rng`."""
        templates = self.templates(element)
        rng.shuffle(templates)
        return [Instruction(_TEMPLATES[t](element, rng), t) for t in templates[:count]]
