"""The committed sample set: what the demo and other tests rest on."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

SAMPLES = Path(__file__).parents[2] / "data_tools" / "samples"
PAGES = Path(__file__).parents[2] / "data_tools" / "pages"


def _records(split: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict]]:
    return {split: _records(split) for split in ("train", "eval")}


def test_there_is_enough_and_it_is_small(records: dict[str, list[dict]]) -> None:
    images = list((SAMPLES / "images").glob("*.png"))
    assert len(images) >= 48
    assert len(list(PAGES.glob("*.html"))) >= 12
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 8_000_000
    assert 300 <= len(records["train"]) <= 450
    assert len(records["eval"]) >= 150
    viewports = {record["metadata"]["viewport"] for record in records["train"]}
    assert viewports == {record["metadata"]["viewport"] for record in records["eval"]}
    assert len(viewports) >= 4


def test_a_third_of_the_pages_is_in_evaluation_only(records: dict[str, list[dict]]) -> None:
    pages = {split: {record["metadata"]["page"] for record in records[split]} for split in records}
    assert pages["train"].isdisjoint(pages["eval"])
    assert pages["train"] | pages["eval"] == {path.stem for path in PAGES.glob("*.html")}
    assert len(pages["eval"]) * 3 == len(pages["train"] | pages["eval"])


def test_every_answer_lies_in_its_box_and_every_box_in_its_image(records: dict[str, list[dict]]) -> None:
    sizes: dict[str, tuple[int, int]] = {}
    for record in records["train"] + records["eval"]:
        image = record["messages"][0]["content"][0]["image"]
        if image not in sizes:
            with Image.open(SAMPLES / image) as file:
                assert file.format == "PNG"
                sizes[image] = file.size
        width, height = sizes[image]
        assert record["metadata"]["image_size"] == [width, height]
        x1, y1, x2, y2 = record["metadata"]["bbox"]
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        match = re.fullmatch(r"\((\d+), (\d+)\)", record["messages"][1]["content"][0]["text"])
        assert match is not None
        assert x1 <= int(match[1]) * width / 1000 <= x2
        assert y1 <= int(match[2]) * height / 1000 <= y2
    assert set(sizes) == {f"images/{path.name}" for path in (SAMPLES / "images").glob("*.png")}


def test_no_two_elements_of_a_screenshot_are_asked_for_in_the_same_words(records: dict[str, list[dict]]) -> None:
    asked: dict[str, list[str]] = defaultdict(list)
    for record in records["train"] + records["eval"]:
        image, text = record["messages"][0]["content"]
        asked[image["image"]].append(text["text"].casefold())
    assert all(len(texts) == len(set(texts)) for texts in asked.values())
    ids = [record["id"] for record in records["train"] + records["eval"]]
    assert len(ids) == len(set(ids))


def test_both_kinds_of_element_are_there(records: dict[str, list[dict]]) -> None:
    for split in records:
        kinds = [record["metadata"]["element"] for record in records[split]]
        assert set(kinds) == {"text", "icon"}
        assert min(kinds.count("text"), kinds.count("icon")) > len(kinds) / 4
