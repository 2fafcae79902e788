"""Scorers: values computed by hand from the published formulas; the edit distance against its definition."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixelprune.records.reader import parse_record
from training.evaluation.scorers import TEXT_SCORERS, is_in_polygon, levenshtein, read_option, score_answer
from training.evaluation.scoring import failed, judge, summarise
from training.evaluation.targets import SCORERS, Target, TargetError, target_of

OPTIONS = ("a cat", "a dog", "two birds", "none of them")

# (scorer, references, answer, score)
BY_HAND = [
    ("anls", ("hello",), "Hello", 1.0),
    ("anls", ("a b",), "A  b", 1 - 0 / 4),
    ("anls", ("sitting",), "kitten", 1 - 3 / 7),
    ("anls", ("abxy",), "abcd", 0.5),  # the threshold itself counts
    ("anls", ("axyz",), "abcd", 0.0),  # 0.25 is below it
    ("anls", ("axyz", "abce"), "abcd", 0.75),  # the nearest reference
    ("anls", ("x",), "", 0.0),
    ("anls", ("paris",), "<think>london</think> Paris", 1.0),
    ("relaxed", ("100",), "105", 1.0),
    ("relaxed", ("100",), "105.1", 0.0),
    ("relaxed", ("-20",), "-19", 1.0),
    ("relaxed", ("0.12",), "12%", 1.0),
    ("relaxed", ("12%",), "12", 0.0),  # 0.12 against 12
    ("relaxed", ("0",), "0", 1.0),  # no division by nothing: texts are compared
    ("relaxed", ("0",), "0.0", 0.0),
    ("relaxed", ("Blue",), "blue", 1.0),
    ("relaxed", ("Blue",), "blue.", 0.0),
    ("exact", ("Paris",), " paris. ", 1.0),
    ("exact", ("Paris",), "in Paris", 0.0),
    ("contains", ("STOP",), "It says: stop here", 1.0),
    ("contains", ("two lines",), "Two\nlines", 1.0),
    ("contains", ("stop",), "st op", 0.0),
    ("contains_formula", ("x ^ 2",), "= x^ 2 +", 1.0),
    ("contains_formula", ("X ^ 2",), "x^2", 0.0),
    ("option", ("B",), "B", 1.0),
    ("option", ("B",), "(b) a dog", 1.0),
    ("option", ("B",), "A dog", 1.0),  # the option's own text; the capital is a word
    ("option", ("B",), "A.", 0.0),
    ("option", ("C",), "B is wrong, the answer is C.", 1.0),
    ("option", ("A",), "The answer is a dog", 0.0),  # no letter was given
    ("option", ("D",), "It must be (D), I think", 1.0),
    ("option", ("D",), "I cannot say", 0.0),
    ("option", ("B",), "E", 0.0),  # there are four
]


@pytest.mark.parametrize(("scorer", "references", "text", "score"), BY_HAND, ids=str)
def test_scores_by_hand(scorer, references, text, score):
    options = OPTIONS if scorer == "option" else ()
    found = score_answer(text, Target(scorer, references, options), None, "auto")
    assert found.score == pytest.approx(score, abs=1e-12)


def test_an_unread_option_is_said():
    assert score_answer("I cannot say", Target("option", ("A",), OPTIONS), None, "auto").problem == "no option found"
    assert read_option("Answer: **C**", OPTIONS) == "C"


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_the_edit_distance_is_its_definition(one, other):
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = one[i - 1] == other[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (not same))

    assert levenshtein(one, other) == distance(len(one), len(other))


def record(**metadata):
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    return parse_record({"messages": [{"role": "user", "content": question}], "metadata": metadata})


def test_places_are_boxes_polygons_and_refusals():
    triangle = target_of(record(polygon=[[0, 0], [100, 0], [0, 100]]))
    size = (1000, 1000)  # relative coordinates are pixels
    assert judge("a", triangle, "(20, 30)", size, "auto").hit
    assert not judge("a", triangle, "(80, 90)", size, "auto").hit, "in the box around it, not in it"
    assert not judge("a", triangle, "(-1, -1)", size, "auto").hit, "refused although it is there"
    refusal = target_of(record(refusal=True))
    assert judge("a", refusal, "[-1, -1]", size, "auto").hit
    assert not judge("a", refusal, "(20, 30)", size, "auto").hit
    hollow = [(0, 0), (9, 0), (9, 9), (6, 9), (6, 3), (3, 3), (3, 9), (0, 9)]  # an arch
    assert is_in_polygon((1, 8), hollow)
    assert not is_in_polygon((4.5, 8), hollow)
    assert is_in_polygon((4.5, 1), hollow)


REFUSED = [
    ({"scorer": "bleu", "answers": ["a"]}, "expected one of place, anls"),
    ({"scorer": "anls"}, "expects a list of texts"),
    ({"scorer": "anls", "answers": []}, "expects a list of texts"),
    ({"scorer": "anls", "answers": [3]}, "expects a list of texts"),
    ({"scorer": "option", "answers": ["E"], "options": ["a", "b"]}, "letters of 2 options"),
    ({"scorer": "option", "answers": ["A"]}, "expects a list of texts"),
    ({"bbox": [0, 0, 5, 5], "refusal": True}, "metadata has bbox and refusal"),
    ({"refusal": "yes"}, "expected true or false"),
    ({"polygon": [[0, 0], [1, 5]]}, "three or more corners"),
    ({"bbox": [0.1, 0.2, 0.3, 0.4]}, "fractions of the image"),
    ({"polygon": [[0.1, 0.2], [0.3, 0.4], [1, 1]]}, "fractions of the image"),
]


@pytest.mark.parametrize(("metadata", "said"), REFUSED, ids=str)
def test_a_target_that_cannot_be_compared_with_is_refused(metadata, said):
    with pytest.raises(TargetError, match=said):
        target_of(record(**metadata))


def test_every_name_has_a_scorer():
    assert {"place", *TEXT_SCORERS} == set(SCORERS)


def test_the_macro_average_weighs_subsets_alike():
    """As the paper's Avg: subsets of 4 and 1 records, 1/4 and 1 right: 62.5 % beside a micro average of 40 %."""
    rows = []
    for number, (subset, text) in enumerate([("web", "x"), ("web", "x"), ("web", "x"), ("web", "a"), ("icon", "a")]):
        target = target_of(record(scorer="exact", answers=["a"], source="screens", subset=subset))
        rows.append(judge(f"r{number}", target, text, None, "auto"))
    result = summarise(rows)
    assert result["overall"]["all"]["accuracy"] == 2 / 5
    assert result["benchmark"]["screens"]["macro"] == (1 / 4 + 1) / 2
    assert result["benchmark"]["screens"]["accuracy"] == 2 / 5
    assert set(result["subset"]) == {"web", "icon"}
    other = target_of(record(scorer="predictions", source="pages"))
    both = summarise([*rows, judge("p", other, "text", None, "auto"), failed("q", other, "no")])
    assert set(both["subset"]) == {"screens/web", "screens/icon", "pages/pages"}
    assert both["benchmark"]["screens"] == result["benchmark"]["screens"]
    assert (both["benchmark"]["pages"]["accuracy"], both["benchmark"]["pages"]["macro"]) == (None, None)
    assert (both["benchmark"]["pages"]["num"], both["benchmark"]["pages"]["num_failed"]) == (2, 1)
