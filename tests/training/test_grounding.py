"""Scoring: verdicts on hand-made answers, sums that do not depend on order or grouping, failures as misses."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pixelprune.records.reader import parse_record
from training.evaluation.scoring import Prediction, failed, judge, summarise, to_row
from training.evaluation.targets import TargetError, target_of

SIZE = (2000, 500)
"""A wide image: a mix-up of width and height, or of the axes, moves every point out of its box."""
BOX = (1000, 100, 1200, 200)


def record(**metadata):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Click Save."}]},
        {"role": "assistant", "content": "(550, 300)"},
    ]
    return parse_record({"messages": messages, "metadata": metadata})


TARGET = target_of(record(bbox=list(BOX), image_size=list(SIZE), subset="web", element="icon"))

VERDICTS = {
    "(550, 300)": True,  # 1100, 150
    "(500, 200)": True,  # on the corner 1000, 100
    "(499, 300)": False,  # 998, 150
    "(300, 550)": False,  # axes swapped
    '<tool_call>\n{"name": "computer_use", "arguments": {"coordinate": [550, 300]}}\n</tool_call>': True,
    "[500, 200, 600, 400]": True,  # a box: its centre counts
    "I cannot see it": False,
    "": False,
}


@pytest.mark.parametrize("text", VERDICTS)
def test_verdicts(text):
    prediction = judge("r:0", TARGET, text, SIZE, "auto")
    assert prediction.hit is VERDICTS[text]
    assert prediction.text == text
    assert (prediction.point is None) == bool(prediction.problem)


def test_absolute_answers_are_read_as_pixels_where_the_format_says_so():
    assert not judge("r:0", TARGET, "(990, 150)", SIZE, "point").hit
    assert judge("r:0", TARGET, "(1100, 150)", SIZE, "point_absolute").hit
    assert judge("r:0", TARGET, "(1000, 100)", SIZE, "point_absolute").hit, "borders are in"


def test_targets_come_from_the_metadata():
    assert TARGET.box == BOX
    assert TARGET.image_size == SIZE
    assert (TARGET.subset, TARGET.element) == ("web", "icon")
    assert target_of(record(bbox=[0, 0, 5, 5], source="pages")).subset == "pages"
    with pytest.raises(TargetError, match=r"no metadata\.bbox, polygon, refusal or scorer"):
        target_of(record())
    with pytest.raises(TargetError, match="x1 < x2 and y1 < y2"):
        target_of(record(bbox=[10, 10, 10, 20]))
    with pytest.raises(TargetError, match="holds 2 boxes"):
        target_of(record(bbox=[[0, 0, 5, 5], [1, 1, 6, 6]]))


NO_SIZES = [{"width": 9, "height": 9}, [9], 9, "99", [9, 0], [9, -9], [9.5, 9], [True, 9], [9, None], [], [9, 1e999]]


@pytest.mark.parametrize("size", NO_SIZES, ids=str)
def test_an_image_size_that_is_none_is_refused(size):
    with pytest.raises(TargetError, match=r"expected \[width, height\], two positive whole numbers"):
        target_of(record(bbox=[0, 0, 5, 5], image_size=size))


def test_whole_numbers_may_be_written_as_floats():
    assert target_of(record(bbox=[0, 0, 5, 5], image_size=[9.0, 8.0])).image_size == (9, 8)


def predictions() -> list[Prediction]:
    """Six records: 2 of 3 icons hit, 1 of 2 texts hit, one failed without an element."""
    facts = {"kept_blocks": 10, "full_blocks": 40, "num_generated": 8}
    rows = []
    for number, (text, element, seconds) in enumerate(
        [
            ("(550, 300)", "icon", 0.2),
            ("(550, 301)", "icon", 0.2),
            ("(0, 0)", "icon", 0.9),
            ("(550, 300)", "text", 0.9),
            ("nothing", "text", 0.9),
        ]
    ):
        target = dataclasses.replace(TARGET, element=element, subset=f"s{number % 2}")
        rows.append(judge(f"r:{number}", target, text, SIZE, "auto", first_token_s=seconds, **facts))
    lost = dataclasses.replace(TARGET, element="", subset="s1")
    return [*rows, failed("r:5", lost, "OutOfMemoryError: no", kept_blocks=50, full_blocks=100)]


def test_sums_by_group():
    result = summarise(predictions())
    overall = result["overall"]["all"]
    assert overall["num"] == 6
    assert overall["accuracy"] == 3 / 6
    assert overall["num_unparsed"] == 1
    assert overall["num_failed"] == 1
    assert overall["retain_ratio"] == 100 / 300, "sum over sum, not a mean of ratios"
    assert overall["tokens_per_answer"] == 40 / 5
    assert overall["first_token_s"] == 0.9
    assert result["element"]["icon"]["accuracy"] == 2 / 3
    assert result["element"]["text"]["accuracy"] == 1 / 2
    assert result["subset"]["s1"]["num"] == 3
    assert result["subset"]["s1"]["accuracy"] == 2 / 3
    assert sum(score["num"] for score in result["subset"].values()) == 6


def test_order_does_not_matter_and_predictions_survive_json():
    rows = predictions()
    again = [Prediction.from_dict(json.loads(json.dumps(to_row(row)))) for row in reversed(rows)]
    assert list(reversed(again)) == rows
    assert summarise(again) == summarise(rows)


def test_a_failure_is_a_miss_without_an_answer():
    lost = predictions()[-1]
    assert not lost.hit
    assert lost.text == ""
    assert lost.point is None
    assert "OutOfMemoryError" in lost.error


def test_nothing_to_divide_by_is_none():
    score = summarise([])["overall"]["all"]
    assert score["num"] == 0
    assert [score[key] for key in ("accuracy", "retain_ratio", "tokens_per_answer", "first_token_s")] == [None] * 4
