"""Answers: what is written can be read and means the same place, and nothing a model says breaks the parser."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelprune.answers import (
    FORMATS,
    MAX_TEXT_LEN,
    format_box,
    format_point,
    parse_answer,
    to_absolute,
    to_relative,
)

SIZE = (2000, 1000)  # one relative unit is 2 pixels across and 1 pixel down
sizes = st.tuples(st.integers(1, 8192), st.integers(1, 8192))


@st.composite
def places(draw: st.DrawFn) -> tuple[float, float, tuple[int, int]]:
    width, height = draw(sizes)
    return draw(st.floats(0, width)), draw(st.floats(0, height)), (width, height)


@given(places())
def test_absolute_to_relative_and_back_is_within_half_a_unit(place: tuple[float, float, tuple[int, int]]) -> None:
    x, y, (width, height) = place
    rx, ry = to_relative(x, y, (width, height))
    assert 0 <= rx <= 1000
    assert 0 <= ry <= 1000
    back_x, back_y = to_absolute(rx, ry, (width, height))
    assert abs(back_x - x) <= 0.5 * width / 1000 + 1e-9
    assert abs(back_y - y) <= 0.5 * height / 1000 + 1e-9


@given(places(), st.sampled_from(["point", "point_absolute", "tool_call", "tool_call_absolute"]), st.booleans())
def test_a_written_point_is_read_within_half_a_unit(
    place: tuple[float, float, tuple[int, int]], form: str, strict: bool
) -> None:
    x, y, size = place
    answer = parse_answer(format_point(x, y, size, format=form), image_size=size, format=form, strict=strict)
    assert answer.point is not None, answer
    unit_x, unit_y = (1, 1) if form.endswith("absolute") else (size[0] / 1000, size[1] / 1000)
    assert abs(answer.point[0] - x) <= unit_x / 2 + 1e-9
    assert abs(answer.point[1] - y) <= unit_y / 2 + 1e-9


@given(places(), places(), st.sampled_from(["box", "box_absolute"]), st.booleans())
def test_a_written_box_is_read_within_half_a_unit(one: tuple, other: tuple, form: str, strict: bool) -> None:
    size = one[2]
    xs = sorted((one[0], other[0] / other[2][0] * size[0]))
    ys = sorted((one[1], other[1] / other[2][1] * size[1]))
    box = (xs[0], ys[0], xs[1], ys[1])
    answer = parse_answer(format_box(box, size, format=form), image_size=size, format=form, strict=strict)
    assert answer.box is not None, answer
    units = (1, 1) if form.endswith("absolute") else (size[0] / 1000, size[1] / 1000)
    for index, meant in enumerate(box):
        assert abs(answer.box[index] - meant) <= units[index % 2] / 2 + 1e-9


@pytest.mark.parametrize(
    ("text", "format", "point"),
    [
        ("(512, 87)", "auto", (1024, 87)),
        ("[512, 87]", "auto", (1024, 87)),
        ("512, 87", "auto", (1024, 87)),
        ("Sure! I would click at (512, 87).", "point", (1024, 87)),
        ("First (1, 2), no: (512,87)", "point", (1024, 87)),
        ("<think>maybe (1, 2)</think>\n(512, 87)", "point", (1024, 87)),
        ('{"point_2d": [512, 87], "label": "Send"}', "point", (1024, 87)),
        ('```json\n[{"point_2d": [512, 87], "label": "a [1, 2]"}]\n```', "point", (1024, 87)),
        ('<tool_call>\n{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [512, 87]}}\n'
         "</tool_call>", "tool_call", (1024, 87)),
        ('<tool_call>{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [512, 87]}}'
         "</tool_call>", "tool_call_absolute", (512, 87)),
        ("pyautogui.click(x=512, y=87)", "point_absolute", (512, 87)),
        ("pyautogui.click(512, 87)", "point_absolute", (512, 87)),
        ("pyautogui.doubleClick(512, 87, interval=0.1)", "point_absolute", (512, 87)),
        ("pyautogui.moveTo(512, 87, duration=0.5)\npyautogui.click()", "point", (1024, 87)),
        ("pyautogui.click(x=0.256, y=0.087)", "auto", (512, 87)),
        ("click(start_box='(512,87)')", "point", (1024, 87)),
        ("<point>512 87</point>", "point", (1024, 87)),
        ("(0.5, 0.25)", "auto", (1000, 250)),
        ("(1, 1)", "auto", (2, 1)),
        ("The corner is at (1, 1).", "auto", (2, 1)),
        ("(1500, 87)", "auto", (1500, 87)),
        ("x: 512, y: 87", "point", (1024, 87)),
    ],
)  # fmt: skip
def test_points_are_read_in_every_usual_shape(text: str, format: str, point: tuple[float, float]) -> None:
    answer = parse_answer(text, image_size=SIZE, format=format)
    assert answer.point == pytest.approx(point), answer
    assert answer.box is None
    assert answer.text == text


@pytest.mark.parametrize(
    ("text", "format", "box"),
    [
        ("[100, 200, 300, 400]", "box", (200, 200, 600, 400)),
        ('[{"bbox_2d": [100, 200, 300, 400], "label": "Send"}]', "box", (200, 200, 600, 400)),
        ("<|box_start|>(100,200),(300,400)<|box_end|>", "box", (200, 200, 600, 400)),
        ("<box>(100, 200), (300, 400)</box>", "box_absolute", (100, 200, 300, 400)),
        ("(100, 200), (300, 400)", "box", (200, 200, 600, 400)),
        ("[[100, 200], [300, 400]]", "box", (200, 200, 600, 400)),
        ("[300, 400, 100, 200]", "box", (200, 200, 600, 400)),
    ],
)
def test_boxes_are_read_in_every_usual_shape(text: str, format: str, box: tuple[float, ...]) -> None:
    answer = parse_answer(text, image_size=SIZE, format=format)
    assert answer.box == pytest.approx(box), answer
    assert answer.point == pytest.approx(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ('{"polygon": [[0, 0], [300, 0], [0, 300]]}', (200, 100)),
        ('{"polygon": [0, 0, 300, 0, 0, 300], "label": "x"}', (200, 100)),
        # an L of three squares: the centre of its area, not the mean of its corners
        ('{"polygon": [[0, 0], [200, 0], [200, 100], [100, 100], [100, 200], [0, 200]]}', (500 / 3, 250 / 3)),
        ('{"polygon": [[10, 10], [20, 20], [30, 30]]}', (40, 20)),  # without an area
        ('{"polygon": [[0, 0], [0, 100], [100, 100], [100, 0]]}', (100, 50)),
    ],
)
def test_a_polygon_means_its_centre(text: str, point: tuple[float, float]) -> None:
    answer = parse_answer(text, image_size=SIZE, format="point")
    assert answer.point == pytest.approx(point), answer
    assert answer.box is None


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ("Click (512, 87)", "point"),
        ("[512, 87]", "point"),
        ("(512, 87)", "box"),
        ("[1, 2, 3, 4]", "point"),
        ("(512, 1087)", "point"),
        ("(-1, 5)", "point"),
        ("(2001, 5)", "point_absolute"),
        ("[300, 400, 100, 200]", "box"),
        ('{"name": "computer_use", "arguments": {"coordinate": [1, 2]}}', "tool_call"),
        ('<tool_call>{"name": "computer_use", "arguments": {"coordinate": [1, 2, 3, 4]}}</tool_call>', "tool_call"),
        ("<tool_call>{broken}</tool_call>", "tool_call"),
    ],
)
def test_strict_mode_takes_the_canonical_shape_alone(text: str, format: str) -> None:
    answer = parse_answer(text, image_size=SIZE, format=format, strict=True)
    assert not answer.is_parsed
    assert answer.problem
    assert answer.text == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "I cannot see it.",
        "(12, )",
        "(NaN, 3)",
        '{"point_2d": [NaN, Infinity]}',
        '{"point_2d": [true, false]}',
        '{"point_2d": [1e999, 3]}',
        "[" * 5000,
        '{"a":' * 3000,
        "(" + "9" * 5000 + ", 1)",
        "(1" + " " * 15000 + "2",
        "version 3.11, 2022",
        None,
        17,
        b"(1, 2)",
        "\ud800(",
    ],
)
def test_what_cannot_be_read_is_a_miss_with_its_text_and_reason(text: object) -> None:
    for format in FORMATS:
        for strict in (False, True):
            answer = parse_answer(text, image_size=SIZE, format=format, strict=strict)
            assert not answer.is_parsed
            assert answer.problem
            assert isinstance(answer.text, str)


fragments = st.sampled_from(
    ["(", ")", "[", "]", "{", "}", '"point_2d"', '"coordinate"', ":", ",", " ", "\n", "<tool_call>", "</tool_call>",
     "<box>", "</box>", "<point>", "x=", "y=", "12", "3.5", "-7", "1e400", "</think>", "click(", "NaN", "null", "é"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(fragments, max_size=40).map("".join)), st.sampled_from(FORMATS), st.booleans())
def test_no_text_raises(text: str, format: str, strict: bool) -> None:
    answer = parse_answer(text, image_size=SIZE, format=format, strict=strict)
    assert answer.is_parsed != bool(answer.problem)
    if strict and answer.point is not None:
        assert 0 <= answer.point[0] <= SIZE[0]
        assert 0 <= answer.point[1] <= SIZE[1]


def test_only_the_end_of_a_babbling_answer_is_read() -> None:
    assert parse_answer("(1, 1) " + "bla " * MAX_TEXT_LEN + "(512, 87)", image_size=SIZE).point == (1024, 87)


def test_mistakes_of_the_caller_are_errors() -> None:
    with pytest.raises(ValueError, match="auto, point, box"):
        parse_answer("(1, 2)", image_size=SIZE, format="points")
    with pytest.raises(ValueError, match="image_size"):
        parse_answer("(1, 2)", image_size=(0, 5))
    with pytest.raises(ValueError, match="format_point"):
        format_point(1, 2, SIZE, format="box")
    with pytest.raises(ValueError, match="format_box"):
        format_box((1, 2, 3, 4), SIZE, format="point")


def test_the_tool_call_is_the_json_that_qwen_writes() -> None:
    text = format_point(1024, 87, SIZE, format="tool_call")
    body = text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(body) == {"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [512, 87]}}


@pytest.mark.parametrize(
    ("corners", "image_size", "point"),
    [
        ([100, 100, 200, 100, 200, 200, 100, 200], (1000, 1000), (150, 150)),
        ([[100, 100], [200, 100], [200, 200], [100, 200]], (1000, 1000), (150, 150)),
        ([[100, 0], [200, 100], [100, 200], [0, 100]], (2000, 500), (200, 50)),
        ([[800, 0], [1100, 0], [1100, 100], [800, 100]], (4000, 1000), (950, 50)),  # pixels: one is over 1000
        ([[0.2, 0.1], [0.4, 0.1], [0.4, 0.3], [0.2, 0.3]], (1000, 1000), (300, 200)),
    ],
)
@pytest.mark.parametrize("key", ["quad_2d", "points"])
def test_four_corners_mean_their_centre(key, corners, image_size, point):
    for value in ({key: corners}, [{"label": "tile", key: corners}]):
        answer = parse_answer(json.dumps(value), image_size=image_size)
        assert answer.point == pytest.approx(point)
        assert answer.box is None
        assert not answer.problem
