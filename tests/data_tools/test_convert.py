"""Converters on fixtures of each published format: fields as published, contents made here and checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.convert import json_stream
from data_tools.convert.json_stream import iter_json
from data_tools.convert.leniency import plain_row
from pixelprune.images.image import decode_image
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef
from pixelprune.settings import ResizeSettings

SIZE = (2000, 1000)  # one relative unit is 2 pixels across and 1 pixel down


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "shots").mkdir()
    Image.new("RGB", SIZE, (200, 210, 220)).save(tmp_path / "shots" / "a.png")
    Image.new("RGB", SIZE).save(tmp_path / "shots" / "drawing.eps")
    whole = (tmp_path / "shots" / "a.png").read_bytes()
    (tmp_path / "shots" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "shots" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return tmp_path


def sharegpt(*turns: str, image: str = "shots/a.png", **more: Any) -> dict[str, Any]:
    names = ["human", "gpt"] * (len(turns) // 2)
    return {
        "image": image,
        "conversations": [{"from": n, "value": v} for n, v in zip(names, turns, strict=True)],
        **more,
    }


def run(command: str, corpus: Path, records: Any, *options: str) -> list[dict[str, Any]]:
    source = corpus / "in.json"
    source.write_text(json.dumps(records), encoding="utf-8")
    out = corpus / "out.jsonl"
    assert main([command, str(source), "--images", str(corpus), "--out", str(out), "--sheet", "0", *options]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def answers(records: list[dict[str, Any]]) -> list[list[str]]:
    return [[m["content"][0]["text"] for m in r["messages"] if m["role"] == "assistant"] for r in records]


TOOL_CALL = (
    '<tool_call>\n{"name": "computer_use", '
    '"arguments": {"action": "left_click", "coordinate": [1024, 87]}}\n</tool_call>'
)


def test_jedi_coordinates_become_relative_to_the_original_image(corpus: Path) -> None:
    made = run(
        "jedi",
        corpus,
        [
            sharegpt("<image>\nClick Send", "pyautogui.click(x=1024, y=87)", id="one"),
            sharegpt("<image>\nClick Send", TOOL_CALL),
            sharegpt("<image>\nWhere is Send?", "[100, 200, 300, 401]"),
            sharegpt("<image>\nWhere is Send?", "(1024, 87)"),
        ],
    )
    assert answers(made) == [["(512, 87)"], ["(512, 87)"], ["[50, 200, 150, 401]"], ["(512, 87)"]]
    assert made[0]["id"] == "one"
    assert made[0]["messages"][0]["content"] == [
        {"type": "image", "image": "shots/a.png"},
        {"type": "text", "text": "\nClick Send"},
    ]
    assert made[0]["metadata"]["point"] == [1024, 87]
    assert made[2]["metadata"]["bbox"] == [100, 200, 300, 401]
    assert all(record["metadata"]["image_size"] == [2000, 1000] for record in made)


@pytest.mark.parametrize(
    ("answer", "point"),
    [
        ("pyautogui.click(x=20, y=30)\npyautogui.write('12 34')", [20, 30]),
        ("pyautogui.click(x=20, y=30)\npyautogui.press('f5', presses=2, interval=0.5)", [20, 30]),
        ("pyautogui.doubleClick(20, 30, interval=0.1)", [20, 30]),
        ("pyautogui.moveTo(20, 30, duration=0.5)\npyautogui.click()", [20, 30]),
        ("pyautogui.rightClick(20, y=30)", [20, 30]),
        ("pyautogui.click(100, 200, 2, 0.25)", [100, 200]),
        ("pyautogui.click(clicks=2, interval=0.1, x=20, y=30, button='left')", [20, 30]),
        ("pyautogui.dragTo(x=20, y=30, duration=1, button='left')", [20, 30]),
        ("pyautogui.scroll(-500, x=20, y=30)", [20, 30]),
    ],
)
def test_a_place_is_what_a_pointer_goes_to(corpus: Path, answer: str, point: list[int]) -> None:
    made = run("jedi", corpus, [sharegpt("<image>\nGo", answer)])
    assert made[0]["metadata"]["point"] == point


@pytest.mark.parametrize(
    "call", ["scroll(10, 20)", "write('12, 34')", "press('f5', presses=2, interval=1)", "sleep(1, 2)"]
)
def test_other_numbers_are_no_place(corpus: Path, call: str) -> None:
    good = sharegpt("<image>\nClick", "pyautogui.click(x=1, y=2)")
    assert len(run("jedi", corpus, [sharegpt("<image>\nGo", f"pyautogui.{call}"), good])) == 1
    assert json.loads((corpus / "out.report.json").read_text())["dropped"]["records"] == {"no coordinates": 1}


def test_jedi_answers_can_be_written_as_tool_calls(corpus: Path) -> None:
    made = run("jedi", corpus, [sharegpt("<image>\nClick", "pyautogui.click(1024, 87)")], "--answer", "tool_call")
    call = json.loads(answers(made)[0][0].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert call["arguments"]["coordinate"] == [512, 87]


def test_jedi_keeps_the_exchanges_that_give_a_place_and_their_image(corpus: Path) -> None:
    record = sharegpt(
        "<image>\nDescribe the window.", "A dialog (2 of 3) with 4, 5 buttons.",
        "Click OK", "pyautogui.click(x=200, y=500)",
        "Type it", "pyautogui.write('3, 4')",
        "Click Cancel", "pyautogui.click(x=400, y=600)",
    )  # fmt: skip
    record["conversations"].insert(0, {"from": "system", "value": "The screen is 2000x1000."})
    made = run("jedi", corpus, [record])
    assert answers(made) == [["(100, 500)", "(200, 600)"]]
    assert [m["role"] for m in made[0]["messages"]] == ["user", "assistant", "user", "assistant"]
    assert made[0]["messages"][0]["content"][0] == {"type": "image", "image": "shots/a.png"}
    assert "bbox" not in made[0]["metadata"]


@pytest.mark.parametrize(
    ("system", "question", "answer", "asked", "answered", "places"),
    [
        # OS-Atlas: words around the place; several places with their names
        ("relative", "Task: open the tile", "thoughts:\nIt is in view.\nactions:\nCLICK <point>[[192,123]]</point>",
         "Task: open the tile", "thoughts:\nIt is in view.\nactions:\nCLICK (192, 123)", [(384, 123)]),
        ("relative", "Boxes of <ref>item 0</ref>, <ref>item 1</ref>",
         "<ref>item 0</ref><box>[[114,85,270,160]]</box>\n<ref>item 1</ref><box>[[297,271,453,346]]</box>",
         "Boxes of <ref>item 0</ref>, <ref>item 1</ref>",
         "<ref>item 0</ref>[114, 85, 270, 160]\n<ref>item 1</ref>[297, 271, 453, 346]", [(384, 122.5), (750, 308.5)]),
        ("absolute", "What is at <point>100 200</point>?", "A button <box>(100, 200), (300, 401)</box>.",
         "What is at (50, 200)?", "A button [50, 200, 150, 401].", [(200, 300.5)]),
        ("absolute", "All", "<box>[[100, 200, 300, 400], [0, 0, 2000, 1000]]</box>, and no more (3, 4)",
         "All", "[50, 200, 150, 400], [0, 0, 1000, 1000], and no more (3, 4)", [(200, 300), (1000, 500)]),
        ("absolute", "All", "<point>[[100, 200], [300, 400]]</point> it is", "All", "(50, 200), (150, 400) it is",
         [(100, 200), (300, 400)]),
        ("absolute", "All", "<box>[[100, 200], [300, 400]]</box> it is", "All", "[50, 200, 150, 400] it is",
         [(200, 300)]),
        ("absolute", "All", "See <|box_start|>(100,200),(300,400)<|box_end|>", "All", "See [50, 200, 150, 400]",
         [(200, 300)]),
        # JSON of Qwen-VL, labels and all
        ("absolute", "All", '```json\n[{"bbox_2d": [100, 200, 300, 400], "label": "No"}, {"point_2d": [20, 30]}]\n```',
         "All", '```json\n[{"bbox_2d": [50, 200, 150, 400], "label": "No"}, {"point_2d": [10, 30]}]\n```',
         [(200, 300), (20, 30)]),
        ("absolute", "All", '{"label": "tile", "points": [[100, 100], [200, 100], [200, 200], [100, 200]]}',
         "All", '{"label": "tile", "point_2d": [75, 150]}', [(150, 150)]),
        ("absolute", "All", '{"label": "a tile", "polygon": [[0, 0], [300, 0], [0, 300]]}',
         "All", '{"label": "a tile", "point_2d": [50, 100]}', [(100, 100)]),
        ("fraction", "Go", "CLICK <point>[[0.25, 0.5]]</point>", "Go", "CLICK (250, 500)", [(500, 500)]),
    ],
)  # fmt: skip
def test_places_marked_among_words_are_written_anew_where_they_stand(
    corpus: Path, system: str, question: str, answer: str, asked: str, answered: str, places: list
) -> None:
    options = ["--source", "any", "--coordinates", system]
    (made,) = run("convert", corpus, [sharegpt(f"<image>\n{question}", answer)], *options)
    assert made["messages"][0]["content"][1]["text"] == f"\n{asked}"
    assert answers([made]) == [[answered]]
    if len(places) == 1:
        assert made["metadata"]["point"] == pytest.approx(places[0])
    else:
        assert "point" not in made["metadata"], "several: none of them is the place"
    report = json.loads((corpus / "out.report.json").read_text())
    assert report["answers rewritten"] == len(places)


@pytest.mark.parametrize(
    ("answer", "reason", "options"),
    [
        ("Go <point>[[3000, 4]]</point> now", "coordinates outside the image", []),
        ("Go <point>near 3, 4</point> now", "coordinates not understood", []),
        ("Go <box>[1, 2, 3]</box> now", "coordinates not understood", []),
        ("Go <box>[[1, 2, 3, 4], 5]</box> now", "coordinates not understood", []),
        ("Go <point>[0.5, 0.5]</point> now", "fractions 0-1 where others were expected (see --coordinates)", []),
        ('Go {"bbox_2d": "1, 2, 3, 4", "label": "a"} now', "coordinates not understood", []),
        ('Go {"points": [1, 2, 3, 4], "label": "a"} now', "coordinates not understood", []),
        ("Go <point>[3, 4]</point> now", "words or several places, which a tool call leaves no room for",
         ["--answer", "tool_call"]),
        ("Go <point>[3, 4]</point> now", "a point where a box was wanted", ["--answer", "box"]),
    ],
)  # fmt: skip
def test_a_marked_place_that_cannot_be_written_anew_drops_the_exchange(
    corpus: Path, answer: str, reason: str, options: list[str]
) -> None:
    rows = [sharegpt("<image>\nGo", answer), sharegpt("<image>\nGo", "[1, 2, 3, 4]" if "box" in options else "(1, 2)")]
    made = run("convert", corpus, rows, "--source", "any", "--coordinates", "absolute", *options)
    assert len(made) == 1
    assert json.loads((corpus / "out.report.json").read_text())["dropped"]["records"] == {reason: 1}


BAD = {
    "no coordinates": sharegpt("<image>\nWhat is it?", "A window (3, 4) of 2026."),
    "several coordinates in one answer": sharegpt("<image>\nDrag", "pyautogui.moveTo(1, 2)\npyautogui.dragTo(30, 40)"),
    "coordinates outside the image": sharegpt("<image>\nClick", "pyautogui.click(x=2100, y=87)"),
    "fractions 0-1 where others were expected (see --coordinates)": sharegpt(
        "<image>\nClick", "pyautogui.click(x=0.5, y=0.25, clicks=2)"
    ),
    "image missing": sharegpt("<image>\nClick", "pyautogui.click(x=1, y=2)", image="shots/gone.png"),
    "image unreadable": sharegpt("<image>\nClick", "pyautogui.click(x=1, y=2)", image="shots/broken.png"),
    "image unreadable    ": sharegpt("<image>\nClick", "(1, 2)", image="shots/cut.png"),
    "image unreadable ": sharegpt("<image>\nClick", "(1, 2)", image="shots/a\0.png"),
    "image unreadable  ": sharegpt("<image>\nClick", "(1, 2)", image="a" * 5000),
    "image unreadable   ": sharegpt("<image>\nClick", "(1, 2)", image="shots/drawing.eps"),
    "not valid Unicode": sharegpt("<image>\nClick \ud800", "(1, 2)"),
    "not valid Unicode ": sharegpt("<image>\nClick", "(1, 2) \udfff"),
    "not valid Unicode  ": sharegpt("<image>\nClick", "(1, 2)", image="shots/\ud800.png"),
    "not valid Unicode   ": sharegpt("<image>\nClick", "(1, 2)", id="\ud800"),
    "image outside the image folder": sharegpt("<image>\nClick", "(1, 2)", image="../../../../etc/hostname"),
    "image_count": sharegpt("<image><image>\nClick", "pyautogui.click(x=1, y=2)"),
    "unknown_format": {"image": "shots/a.png"},
    "not_an_object": "text",
    "no image": {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "(1, 2)"}]},
    "unknown_role": {"image": "shots/a.png", "conversations": [{"from": "robot", "value": "x"}]},
    "unread_key": sharegpt("<image>\nClick", "(1, 2)", functions=[{"name": "click"}]),
    "tools or reasoning, beside which coordinates are not rewritten": sharegpt(
        "<image>Click", "(1, 2)", tools=[{"name": "click"}]
    ),
    "two_systems": {
        "system": "One.",
        "conversations": [
            {"from": "system", "value": "Two."},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "(1, 2)"},
        ],
        "image": "shots/a.png",
    },
    "bad_weight": sharegpt("<image>\nClick", "(1, 2)", weight="high"),
    "bad_weight ": {
        "image": "shots/a.png",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "(1, 2)", "loss": -0.5}],
    },
    "the stated image size is not the file's": sharegpt("<image>\nClick", "(1, 2)", width=1920, height=1080),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_dropped_is_counted_under_its_reason(corpus: Path, reason: str) -> None:
    good = sharegpt("<image>\nClick", "pyautogui.click(x=1, y=2)")
    assert len(run("jedi", corpus, [BAD[reason], good])) == 1
    report = json.loads((corpus / "out.report.json").read_text())
    assert report["dropped"]["records"] == {reason.rstrip(): 1}  # spaces tell records of one reason apart
    assert (report["read"], report["written"]) == (2, 1)


def test_bytes_that_are_no_text_cost_one_line(corpus: Path) -> None:
    lines = [json.dumps(sharegpt(f"<image>\nClick {i}", "(1, 2)")).encode() for i in range(4)]
    lines[1] = lines[1].replace(b"Click", b"Cl\xffck")
    lines[2] = b"\xff\xfe"
    (corpus / "in.jsonl").write_bytes(b"\n".join(lines))
    out = corpus / "out.jsonl"
    assert main(["jedi", str(corpus / "in.jsonl"), "--images", str(corpus), "--out", str(out), "--sheet", "0"]) == 0
    texts = [json.loads(line)["messages"][0]["content"][1]["text"] for line in out.read_text().splitlines()]
    assert texts == ["\nClick 0", "\nClick 3"]
    report = json.loads((corpus / "out.report.json").read_text())
    assert report["dropped"]["records"] == {"not valid Unicode": 1, "not_an_object": 1}


def test_nothing_written_is_an_error(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "in.json").write_text("[]")
    out = corpus / "out.jsonl"
    assert main(["jedi", str(corpus / "in.json"), "--images", str(corpus), "--out", str(out)]) == 2
    assert "no record was written" in capsys.readouterr().err
    assert not out.exists()


def test_fractions_and_relative_numbers_are_read_when_asked_for(corpus: Path) -> None:
    fraction = [sharegpt("<image>\nClick", "pyautogui.click(x=0.512, y=0.087)")]
    assert answers(run("convert", corpus, fraction, "--coordinates", "fraction")) == [["(512, 87)"]]
    relative = [sharegpt("<image>\nClick", "(512, 87)")]
    assert answers(run("convert", corpus, relative, "--coordinates", "relative", "--overwrite")) == [["(512, 87)"]]


def test_messages_in_every_common_shape_become_typed_content(corpus: Path) -> None:
    image = {"type": "image", "image": "shots/a.png"}
    question = {"type": "text", "text": "What?"}
    shapes = [
        {"messages": [{"role": "user", "content": "<image>What?"}], "images": ["shots/a.png"]},
        {"messages": [{"role": "user", "content": "What?"}], "images": ["shots/a.png"]},
        {"messages": [{"role": "user", "content": [image, question]}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, question]}], "images": [{"path": "shots/a.png"}]},
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "file://shots/a.png"}}, question]}]},
        {"conversations": [{"from": "human", "value": "<image>What?"}], "image": "shots/a.png"},
    ]  # fmt: skip
    for shape in shapes:
        if "messages" in shape:
            shape["messages"].append({"role": "assistant", "content": "A grey (1, 2) screen."})
        else:
            shape["conversations"].append({"from": "gpt", "value": "A grey (1, 2) screen."})
    made = run("convert", corpus, shapes)
    assert len(made) == len(shapes)
    for record in made:
        assert record["messages"] == [
            {"role": "user", "content": [image, question]},
            {"role": "assistant", "content": [{"type": "text", "text": "A grey (1, 2) screen."}]},
        ]


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Grey."}], **more}


AS_THE_TRAINER_READS = [
    sharegpt("<img>shots/a.png</img>What?", "Grey.", image=None),
    sharegpt("Left <img> shots/a.png </img>, right <image>", "Grey."),
    sharegpt("<image>\nWhat?", "Grey.", system="Answer in one word."),
    sharegpt("<image>What?", "Grey.", messages=None),
    sharegpt("<image>What?", "Grey.", images=None),
    {**user("<image>What?", image="shots/a.png", images=None), "conversations": None},
    user("<img>shots/a.png</img>What?"),
    user("<image>What?", images=[None, {"bytes": None, "path": "shots/a.png"}]),
    user([{"type": "image", "text": None, "image": "shots/a.png"}, {"type": "text", "text": "A </b>?", "image": None}]),
    user([{"type": "image", "image": "shots/a.png"}, {"type": "text", "text": ""}, {"type": "text", "text": "What?"}]),
    user("<image>\n\nWhat?\n<image>", images=["shots/a.png", "shots/a.png"]),
    user([{"image": "shots/a.png"}, {"text": "What does <image> or <img>x</img> do in HTML?"}, "Say."]),
    {"messages": [{"role": "user", "content": "Hi", "from": None}, {"role": "assistant", "content": "Ho"}]},
    {"conversations": [{"from": "human", "role": None, "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(AS_THE_TRAINER_READS)))
def test_converted_records_are_those_that_the_trainer_reads_directly(corpus: Path, number: int) -> None:
    record = AS_THE_TRAINER_READS[number]
    made = run("convert", corpus, [record])
    assert parse_record(made[0]).messages == parse_record(record).messages


A, B = "image shots/a.png", "image shots/b.png"
LENIENT = [
    (user("What?", images=["shots/a.png"]), [A, "What?"]),
    (user("One <image> two", images=["shots/a.png", "shots/b.png"]), [B, "One ", A, " two"]),
    (user([{"type": "text", "text": "One <image> two"}], images=["shots/a.png"]), ["One ", A, " two"]),
    (user([{"type": "text", "text": "<image>, <image>?"}], images=["shots/a.png"]), [A, ", <image>?"]),
    (user("<img>shots/b.png</img>What?", images=["shots/a.png"]), [A, B, "What?"]),
    (user([{"type": "image_url", "image_url": {"url": "file://shots/a.png"}}, "What?"]), [A, "What?"]),
    (user("<image>What?", images=[{"image": "shots/a.png"}]), [A, "What?"]),
    (
        {
            "conversations": [{"role": "USER", "content": "<image>What?"}, {"from": "Model", "value": "Grey."}],
            "image": "shots/a.png",
        },
        [A, "What?"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(LENIENT)))
def test_leniency_gives_every_image_its_place(number: int) -> None:
    record, expected = LENIENT[number]
    first, answer = parse_record(plain_row(record)).messages
    assert (first.role, answer.role) == ("user", "assistant")
    assert [f"image {part.source}" if isinstance(part, ImageRef) else part for part in first.parts] == expected


@pytest.mark.parametrize("number", range(len(AS_THE_TRAINER_READS)))
def test_leniency_leaves_what_the_reader_takes_as_it_is(number: int) -> None:
    record = AS_THE_TRAINER_READS[number]
    assert parse_record(plain_row(record)) == parse_record(record)


def test_an_absolute_path_into_the_folder_is_that_file(corpus: Path) -> None:
    made = run("convert", corpus, [user("<image>A?", images=[str(corpus / "shots" / "a.png")])])
    assert made[0]["messages"][0]["content"][0] == {"type": "image", "image": "shots/a.png"}


def test_what_a_record_says_of_itself_is_kept(corpus: Path) -> None:
    """Its system prompt, weight, metadata, and which answers are not trained on; what the conversion knows wins."""
    record = {
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "<image>Hi"},
            {"role": "assistant", "content": "Ho", "weight": 0},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "So", "loss": True},
            {"role": "user", "content": "Then?"},
            {"role": "assistant", "content": "Thus", "loss_scale": 0.25},
        ],
        "images": ["shots/a.png"],
        "weight": 0.5,
        "metadata": {"subset": "mail", "source": "theirs", "bbox": [1, 2, 3, 4]},
    }
    made = run("convert", corpus, [record])
    read = parse_record(made[0])
    assert read.messages == parse_record(record).messages
    assert read.messages[0].text == "Be brief."
    assert [message.supervised for message in read.messages if message.role == "assistant"] == [False, True, True]
    assert read.messages[-1].weight == 0.25
    assert read.weight == 0.5
    assert {key: read.metadata[key] for key in ("subset", "source", "bbox")} == {
        "subset": "mail", "source": "convert", "bbox": [1, 2, 3, 4],
    }  # fmt: skip


def test_dropped_records_are_named_with_their_file_and_reason(corpus: Path) -> None:
    """As the trainer's quarantine names them; and the list is no data, neither for the trainer nor for `convert`."""
    records = [user("<image>Hi", images=["shots/a.png"]), user("Hi", mood="good"), user("<image>", images=["gone.png"])]
    run("convert", corpus, records)
    lines = [json.loads(line) for line in (corpus / "out.dropped.jsonl").read_text().splitlines()]
    assert [(line["record"], line["file"], line["reason"]) for line in lines] == [
        ("convert:1", f"{corpus / 'in.json'}, record 2", "unread_key"),
        ("convert:2", f"{corpus / 'in.json'}, record 3", "image missing"),
    ]
    assert "'mood'" in lines[0]["detail"]
    run("convert", corpus, records[:1], "--overwrite")
    assert not (corpus / "out.dropped.jsonl").exists(), "nothing was dropped this time"


def test_a_sheet_names_the_record_and_the_picture_that_it_cannot_draw(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = corpus / "d.jsonl"
    records.write_text(json.dumps(user([{"type": "image", "image": "shots/cut.png"}], id="seven")) + "\n")
    assert main(["sheet", str(records), "--out", str(corpus / "s.png")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "record 'seven'" in said
    assert "cut.png" in said


def test_keys_that_nobody_reads_drop_the_record_unless_they_are_named(corpus: Path) -> None:
    records = [user("<image>Hi", images=["shots/a.png"], mood="good"), user("Hi")]
    assert len(run("convert", corpus, records)) == 1
    report = json.loads((corpus / "out.report.json").read_text())
    assert report["dropped"]["records"] == {"unread_key": 1}
    assert "'mood'" in report["examples"]["unread_key"]
    made = run("convert", corpus, records, "--ignore-keys", "mood", "--overwrite")
    assert len(made) == 2
    assert "mood" not in made[0]["metadata"]


def test_folders_are_searched_for_json_in_any_case(corpus: Path) -> None:
    folder = corpus / "parts"
    folder.mkdir()
    for name in ("a.JSON", "b.jsonl", "c.txt"):
        text = json.dumps({"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "x"}]})
        (folder / name).write_text(f"[{text}]" if name == "a.JSON" else text)
    out = corpus / "out.jsonl"
    assert main(["convert", str(folder), "--images", str(corpus), "--out", str(out), "--sheet", "0"]) == 0
    asked = [json.loads(line)["messages"][0]["content"][0]["text"] for line in out.read_text().splitlines()]
    assert asked == ["a.JSON", "b.jsonl"]


def test_a_table_s_nulls_do_not_hide_a_path_under_another_key(corpus: Path) -> None:
    made = run("convert", corpus, [user("<image>What?", images=[{"path": None, "url": "shots/a.png"}])])
    assert made[0]["messages"][0]["content"][0] == {"type": "image", "image": "shots/a.png"}


def test_text_only_conversations_are_kept(corpus: Path) -> None:
    made = run(
        "convert", corpus, [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    )
    assert made[0]["messages"][1]["content"] == [{"type": "text", "text": "Ho"}]


V2 = {"img_filename": "shots/a.png", "bbox": [100, 200, 50, 30], "instruction": "close the window",
      "data_type": "icon", "data_source": "macos"}  # fmt: skip
PRO = {"img_filename": "shots/a.png", "bbox": [100, 200, 150, 230], "instruction": "open the menu",
       "instruction_cn": "打开菜单", "id": "blender_windows_0", "application": "blender", "platform": "windows",
       "img_size": [2000, 1000], "ui_type": "text", "group": "Creative"}  # fmt: skip


def test_screenspot_v2_boxes_are_corner_and_size(corpus: Path) -> None:
    made = run(
        "screenspot", corpus, [V2, {**V2, "data_source": "gitlab", "data_type": "text"}, {**V2, "data_source": "ios"}]
    )
    assert made[0]["metadata"] == {
        "source": "screenspot-v2", "subset": "desktop", "bbox": [100, 200, 150, 230], "image_size": [2000, 1000],
        "element": "icon", "data_source": "macos",
    }  # fmt: skip
    assert [record["metadata"]["subset"] for record in made] == ["desktop", "web", "mobile"]
    assert made[0]["messages"][0]["content"][1]["text"] == "close the window"
    assert answers(made)[0] == ["(63, 215)"]  # centre (125, 215) of 2000x1000: 62.5 rounds up


def test_screenspot_pro_boxes_are_two_corners(corpus: Path) -> None:
    made = run("screenspot", corpus, [PRO])
    assert made[0]["id"] == "blender_windows_0"
    assert made[0]["metadata"] == {
        "source": "screenspot-pro", "subset": "Creative", "bbox": [100, 200, 150, 230], "image_size": [2000, 1000],
        "element": "text", "application": "blender", "platform": "windows",
    }  # fmt: skip
    chinese = run("screenspot", corpus, [PRO], "--language", "cn", "--overwrite")
    assert chinese[0]["messages"][0]["content"][1]["text"] == "打开菜单"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({**PRO, "img_size": [1920, 1080]}, "the stated image size is not the file's"),
        ({**PRO, "bbox": [150, 200, 100, 230]}, "empty box"),
        ({**PRO, "bbox": [2100, 200, 2200, 230]}, "box outside the image"),
        ({**PRO, "ui_type": "video"}, "element type is neither text nor icon"),
        ({**V2, "bbox": [1, 2]}, "bbox is not 4 numbers of pixels"),
        ({**V2, "img_filename": "gone.png"}, "image missing"),
        ({**V2, "bbox": [10**400, 0, 1, 1]}, "bbox is not 4 numbers of pixels"),
        ({**V2, "bbox": [float("nan"), 0, 1, 1]}, "bbox is not 4 numbers of pixels"),
        ({**PRO, "img_size": 3}, "the stated image size is not the file's"),
        ({**V2, "instruction": "Click \ud800"}, "not valid Unicode"),
        ({**PRO, "application": "\udc00"}, "not valid Unicode"),
        ({"bbox": [1, 2, 3, 4]}, "neither data_type (v2) nor ui_type (pro)"),
    ],
)
def test_screenspot_drops_are_counted(corpus: Path, entry: dict[str, Any], reason: str) -> None:
    assert len(run("screenspot", corpus, [entry, PRO])) == 1
    report = json.loads((corpus / "out.report.json").read_text())
    assert report["dropped"]["entries"] == {reason: 1}


def test_records_may_not_name_images_outside_their_folder(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "in.json").write_text(json.dumps([sharegpt("<image>\nClick", "(100, 200)")]))
    out = corpus / "elsewhere" / "out.jsonl"
    command = ["jedi", str(corpus / "in.json"), "--images", str(corpus), "--out", str(out)]
    assert main(command) == 2
    assert "--copy-images" in capsys.readouterr().err
    assert main([*command, "--copy-images"]) == 0
    record = json.loads(out.read_text())
    assert record["messages"][0]["content"][0]["image"] == "images/shots/a.png"
    assert (out.parent / "images" / "shots" / "a.png").read_bytes() == (corpus / "shots" / "a.png").read_bytes()
    assert (out.parent / "out.sheet.png").is_file()
    assert main(command) == 2  # exists already
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_never_stands_for_another_corpus_image(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no hard links here")))
    colours = {"one": (1, 2, 3), "two": (9, 8, 7), "same": (1, 2, 3)}
    for name, colour in colours.items():
        (corpus / name).mkdir()
        Image.new("RGB", SIZE, colour).save(corpus / name / "0001.png")
        (corpus / name / "in.json").write_text(json.dumps([sharegpt("<image>\nClick", "(100, 200)", image="0001.png")]))

    def convert(name: str) -> int:
        out = corpus / "all" / f"{name}.jsonl"
        return main(["jedi", str(corpus / name / "in.json"), "--out", str(out), "--copy-images", "--sheet", "0"])

    (corpus / "all" / "images").mkdir(parents=True)
    (corpus / "all" / "images" / ".0001.png.partial").write_bytes(b"cut short by a kill")
    assert convert("one") == 0
    assert convert("same") == 0
    assert convert("two") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert str(corpus / "two" / "0001.png") in said
    assert str(corpus / "all" / "images" / "0001.png") in said
    assert [path.name for path in (corpus / "all" / "images").iterdir()] == ["0001.png"]
    with Image.open(corpus / "all" / "images" / "0001.png") as image:
        assert image.getpixel((0, 0)) == colours["one"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_sizes_are_those_of_upright_images_and_coordinates_of_turned_ones_are_refused(
    corpus: Path, suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", SIZE).save(corpus / f"turned.{suffix}", exif=exif)
    turned = sharegpt("<image>\nClick", "(100, 200)", image=f"turned.{suffix}")
    good = sharegpt("<image>\nClick", "(100, 200)")
    made = run("convert", corpus, [turned])
    assert made[0]["metadata"]["image_sizes"] == [[1000, 2000]]
    assert decode_image(corpus / f"turned.{suffix}", ResizeSettings()).size == (1000, 2000)
    assert len(run("jedi", corpus, [turned, good], "--overwrite")) == 1
    reason = {"image rotated by EXIF: coordinates could mean either frame": 1}
    assert json.loads((corpus / "out.report.json").read_text())["dropped"]["records"] == reason
    spot = {**V2, "img_filename": f"turned.{suffix}"}
    assert len(run("screenspot", corpus, [spot, V2], "--overwrite")) == 1
    assert json.loads((corpus / "out.report.json").read_text())["dropped"]["entries"] == reason


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_are_read_the_same_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    values = [{"a": [1, 2, {"b": 'ü ] , [ " \\'}]}, 12345, "x", [], {}, None, -1.5e3]
    path = tmp_path / "values.json"
    path.write_text("\n " + json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    assert [value for value, _ in iter_json(path)] == values


def test_lines_that_are_no_json_are_handed_on_as_text(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('\n{"a": 1}\nnot json\n\n{"a": 2}', encoding="utf-8")
    assert [value for value, _ in iter_json(path)] == [{"a": 1}, "not json\n", {"a": 2}]


@pytest.mark.parametrize("text", ["[1, 2", "[1, oops]", '[{"a": 1}, {"a": '])
def test_a_broken_array_says_where(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="at character"):
        list(iter_json(path))
