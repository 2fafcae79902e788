"""An instruction means one element of its screenshot; where none can, the element is refused with the reason."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from data_tools.render.instructions import MAX_NAME_LEN, TEMPLATES, Instructor
from data_tools.render.shot import choose
from data_tools.render.view import Element, Viewport

SEND = Element((0, 0, 10, 10), "Send", "button", "text", "Mail", "")


def test_a_unique_element_can_be_asked_for_in_every_way() -> None:
    element = replace(SEND, function="Send this message")
    instructor = Instructor([element])
    assert instructor.templates(element) == list(TEMPLATES)
    made = instructor.instructions(element, random.Random(0), 10)
    assert sorted(i.template for i in made) == sorted(TEMPLATES)
    for instruction in made:
        assert ("Send this message" if instruction.template == "function" else '"Send"') in instruction.text
        assert ("Mail" in instruction.text) == (instruction.template == "heading")
    assert len(instructor.instructions(element, random.Random(0), 2)) == 2


def test_words_that_mean_two_elements_are_not_used() -> None:
    link = replace(SEND, role="link")
    assert Instructor([SEND, link]).templates(SEND) == ["role_name"]  # one heading, one name, two roles
    elsewhere = replace(SEND, heading="Chat")
    assert Instructor([SEND, elsewhere]).templates(SEND) == ["heading"]
    shouting = replace(SEND, name="SEND")
    assert Instructor([SEND, shouting]).refusal(SEND) == "ambiguous name"
    covered = replace(SEND, is_clickable=False)
    assert Instructor([SEND, covered]).refusal(SEND) == "ambiguous name"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "no name"), ("×", "no name"), ("x" * (MAX_NAME_LEN + 1), "name too long"), ("Send", None)],
)
def test_refusals_say_why(name: str, reason: str | None) -> None:
    element = replace(SEND, name=name)
    assert Instructor([element]).refusal(element) == reason


def test_a_title_that_names_another_element_is_not_used() -> None:
    element = replace(SEND, name="Go", function="Reply", heading="")
    other = replace(SEND, name="Reply", heading="")
    assert "function" not in Instructor([element, other]).templates(element)


def test_text_and_icons_take_turns_while_both_last() -> None:
    elements = [replace(SEND, name=f"t{i}") for i in range(9)] + [
        replace(SEND, name=f"i{i}", kind="icon") for i in range(2)
    ]
    kinds = [e.kind for e in choose(elements, 6, random.Random(0))]
    assert kinds == ["text", "icon", "text", "icon", "text", "text"]
    assert choose(elements, 6, random.Random(3)) == choose(elements, 6, random.Random(3))
    assert len(choose(elements, 99, random.Random(0))) == 11


@pytest.mark.parametrize("text", ["", "390", "390x", "390x844@9", "10x10", "ax b", "390x844@nan"])
def test_a_wrong_viewport_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="--viewports"):
        Viewport.parse(text)


def test_viewports_are_written_as_they_are_read() -> None:
    for text in ("390x844@2", "1366x768", "800x600@1.5"):
        assert str(Viewport.parse(text)) == text
