"""Training corpora in their published shapes: every place is where the corpus says, and every word stays."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.convert.corpora.calls import rewrite_calls
from data_tools.convert.dropped import DropError
from pixelprune.answers import parse_answer
from pixelprune.records.reader import parse_record

SIZE = (640, 480)


def run(folder: Path, command: str, entries: list, *options: str) -> tuple[list[dict], dict]:
    """The records that a command makes, and its report."""
    (folder / "shots").mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", SIZE, "white").save(folder / "shots" / name)
    (folder / "train.json").write_text(json.dumps(entries))
    out = folder / "out.jsonl"
    images = ["--images", str(folder / "shots"), "--sheet", "2", "--overwrite"]
    assert main([command, str(folder / "train.json"), "--out", str(out), *images, *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert all((folder / image.source).is_file() for image in parse_record(row).images)
    return rows, json.loads(out.with_suffix(".report.json").read_text())


def answers(row: dict) -> list[str]:
    return [message.text for message in parse_record(row).messages if message.role == "assistant"]


WEB = {
    "img_filename": "a.png",
    "url": "https://example.org",
    "elements": [
        {"instruction": " Sign in ", "bbox": [0.1, 0.2, 0.3, 0.4], "data_type": "text"},
        {"instruction": "Empty", "bbox": [0.3, 0.2, 0.3, 0.4], "data_type": "hover"},
        {"instruction": "Pixels", "bbox": [10, 20, 30, 40], "data_type": "hover"},
        {"instruction": "", "bbox": [0.1, 0.2, 0.3, 0.4]},
        {"instruction": "Cart", "bbox": [0, 0, 1, 0.5], "data_type": "hover"},
    ],
}


def test_seeclick_web_and_mobile(tmp_path):
    mobile = {"img_filename": "b.png", "instruction": "go back", "bbox": [0.0, 0.0, 0.1, 0.1]}
    captions = {"img_filename": "b.png", "captions": ["a page"]}
    rows, report = run(tmp_path, "seeclick", [WEB, mobile, captions, {**mobile, "img_filename": "c.png"}])
    web, one = rows
    assert [m.text for m in parse_record(web).messages] == ["Sign in", "(200, 300)", "Cart", "(500, 250)"]
    assert len(parse_record(web).images) == 1
    assert web["metadata"]["bboxes"] == [[64, 96, 192, 192], [0, 0, 640, 240]]
    assert one["metadata"]["bbox"] == [0, 0, 64, 48]
    assert answers(one) == ["(50, 50)"]
    assert report["read"] == 4
    assert report["written"] == 2
    assert sum(report["dropped"]["entries"].values()) == 2
    parts = report["dropped"]["parts of kept entries"]
    assert parts == {
        "empty box": 1,
        "bbox is outside the image, or no fractions of it": 1,
        "instruction is no text": 2,  # one of them the entry with captions
    }
    (boxes, _), _ = run(tmp_path, "seeclick", [WEB, mobile], "--answer", "box")
    assert answers(boxes) == ["[100, 200, 300, 400]", "[0, 0, 1000, 500]"]


def test_showui_takes_its_own_point(tmp_path):
    entry = {
        "img_url": "a.png",
        "img_size": list(SIZE),
        "element": [
            {"instruction": "Galerie", "bbox": [0.6, 0.3, 0.7, 0.4], "data_type": "icon", "point": [0.61, 0.4]}
        ],
        "element_size": 1,
    }
    rows, report = run(tmp_path, "showui", [entry, {**entry, "img_size": [10, 10]}])
    assert answers(rows[0]) == ["(610, 400)"]
    assert rows[0]["metadata"]["element"] == "icon"
    assert report["dropped"]["entries"] == {"the stated image size is not the file's": 1}


def said(value: str, recipient: str = "os", **more) -> dict:
    return {"from": "gpt", "value": value, "recipient": recipient, "end_turn": recipient == "os", **more}


def asked(value: str) -> dict:
    return {"from": "human", "value": value}


def test_aguvis_thought_and_action_are_one_turn_with_its_words(tmp_path):
    entries = [
        {
            "image": "a.png",
            "conversations": [
                {"from": "system", "value": "You are a GUI agent."},
                asked("<image>\nTask: open it"),
                said("Thought: it is at x=3, y=4.\nAction: Click it.\n", "all"),
                said("pyautogui.click(x=0.4812, y=0.25)"),
            ],
        },
        {
            "image": ["a.png", "b.png"],
            "conversations": [
                asked("<image><image>\nWhat next?"),
                said("mobile.swipe(from_coord=[0.5, 0.75], to_coord=[0.5, 0.25])"),
                asked("And?"),
                said("pyautogui.write(message='x=0.5, y=0.5')\npyautogui.scroll(page=-0.1)"),
            ],
        },
        {"image": "a.png", "conversations": [asked("<image>\nbox"), said("pyautogui.click(x=0.5, y=0.5)",
                                                                        bbox_gt=[0.25, 0.25, 0.75, 0.75])]},
        {"image": "a.png", "conversations": [asked("<image>\npixels"), said("pyautogui.click(x=300, y=200)")]},
        {"image": "a.png", "conversations": [asked("no image"), said("pyautogui.click(x=0.5, y=0.5)", mood="good")]},
    ]  # fmt: skip
    rows, report = run(tmp_path, "aguvis", entries)
    assert [message.role for message in parse_record(rows[0]).messages] == ["system", "user", "assistant"]
    thought = "Thought: it is at x=3, y=4.\nAction: Click it.\n"
    assert answers(rows[0]) == [thought + "pyautogui.click(x=481, y=250)"]
    assert rows[0]["metadata"]["point"] == [pytest.approx(0.4812 * 640, abs=1e-3), 120]
    assert answers(rows[1]) == [
        "mobile.swipe(from_coord=[500, 750], to_coord=[500, 250])",
        "pyautogui.write(message='x=0.5, y=0.5')\npyautogui.scroll(page=-0.1)",
    ]
    assert rows[2]["metadata"]["bbox"] == [160, 120, 480, 360]
    assert len(rows) == 3
    assert report["dropped"]["entries"] == {
        "no fractions 0-1 where they were expected (see --coordinates)": 1,
        "unread_key": 1,
    }


ATLAS = [
    {
        "id": 19,
        "image": "/cpfs01/user/someone/playground/shots/a.png",
        "conversations": [
            asked(
                "Actions look like CLICK <point>[[101, 872]]</point>\nScreenshot: <image>\nTask: open the first tile"
            ),
            {"from": "gpt", "value": "thoughts:\nThe tile is in view.\nactions:\nCLICK <point>[[192,123]]</point>"},
        ],
    },
    {
        "id": 20,
        "image": "a.png",
        "conversations": [
            asked("<image>\nOpen it"),
            {"from": "gpt", "value": "thoughts:\nopen the app.\nactions:\nOPEN_APP [Reader 2]"},
        ],
    },
]


def test_os_atlas_keeps_words_and_finds_images_by_the_end_of_their_path(tmp_path):
    rows, report = run(tmp_path, "os-atlas", [*ATLAS, {**ATLAS[0], "image": "../a.png"}, {**ATLAS[0], "image": 3}])
    assert [answers(row) for row in rows] == [[entry["conversations"][1]["value"]] for entry in ATLAS]
    assert rows[0]["messages"][0]["content"][1]["image"] == "shots/a.png"
    assert rows[0]["messages"][0]["content"][0]["text"].startswith(
        "Actions look like CLICK <point>[[101, 872]]</point>"
    )
    assert rows[0]["metadata"]["point"] == [pytest.approx(122.88), pytest.approx(59.04)]
    assert parse_answer(answers(rows[0])[0], image_size=SIZE).point == pytest.approx((122.88, 59.04))
    assert report["dropped"]["entries"] == {"image missing": 1, "bad_image": 1}


def test_convert_leaves_a_questions_examples_that_are_no_place(tmp_path):
    """OS-Atlas's prompt explains the form of an action with words where numbers belong."""
    question = "format: CLICK <point>[[x-axis, y-axis]]</point>\n<image>\nOpen it"
    entry = {"image": "a.png", "conversations": [asked(question), ATLAS[0]["conversations"][1]]}
    (row,), _ = run(tmp_path, "convert", [entry], "--coordinates", "relative")
    assert parse_record(row).messages[0].text == question.replace("<image>", "")
    assert "CLICK (192, 123)" in answers(row)[0]


@pytest.mark.parametrize(
    ("text", "system", "reason"),
    [
        ("pyautogui.click(192, 1230)", "relative", "outside"),
        ("pyautogui.click(x=-1, y=3)", "absolute", "outside"),
        ("pyautogui.click(0.5, 0.5)", "relative", "fractions"),
        ("pyautogui.click(5, 0.5)", "fraction", "no fractions"),
        ("mobile.swipe(from_coord=[1, 2, 3], to_coord=[1, 2])", "relative", "3 numbers"),
        ("pyautogui.click(y=0.5, x=0.4)", "fraction", "not understood"),
        ("pyautogui.scroll(-3, 0.5, 0.5)", "fraction", "not understood"),
        ("pyautogui.click(x=0.5, y=0.4", "fraction", "not understood"),
    ],
)
def test_numbers_that_are_no_place_are_refused(text, system, reason):
    with pytest.raises(DropError, match=reason):
        rewrite_calls(text, SIZE, system)


def test_what_is_no_pointer_call_is_text():
    text = "Click (3, 4) at [5, 6]: pyautogui.click(7, 8); pyautogui.press('x=1, y=2'); pyautogui.moveTo(7, 8, 2)"
    called, places = rewrite_calls(text, SIZE, "absolute")
    assert called == text.replace("7, 8", "11, 17")
    assert places == [[7, 8], [7, 8]]
    select = "browser.select_option(x=0.5, y=0.4, value='a) or (b 0.1')"
    assert rewrite_calls(select, SIZE, "fraction")[0] == select.replace("0.5", "500").replace("0.4", "400")
    tuples = "mobile.swipe(from_coord=(0.5, 0.7), to_coord=(0.5, 0.25))"
    assert rewrite_calls(tuples, SIZE, "fraction")[0] == "mobile.swipe(from_coord=(500, 700), to_coord=(500, 250))"


def odyssey(name: str, *steps: tuple, **more) -> dict:
    return {
        "episode_id": name,
        "task_info": {"instruction": "Look it up and share it.", "category": "Multi_Apps"},
        "step_length": len(steps),
        "steps": [
            {"step": i, "screenshot": f"{'ab'[i % 2]}.png", "action": action, "info": info, "ps": "",
             "low_level_instruction": f"do {action.lower()}"}
            for i, (action, info) in enumerate(steps)
        ],
    } | more  # fmt: skip


def test_gui_odyssey_episodes_as_its_own_converter_writes_them(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    (tmp_path / "shots").mkdir()
    for name in "ab":
        Image.new("RGB", SIZE, "white").save(tmp_path / "shots" / f"{name}.png")
    steps = (
        ("CLICK", [[683, 321]]),
        ("CLICK", "KEY_HOME"),
        ("SCROLL", [[500, 700], [480, 300]]),
        ("SCROLL", [[100, 300], [480, 300]]),
        ("TEXT", "news"),
        ("LONG_PRESS", [[1000, 0]]),
        ("COMPLETE", ""),
    )
    files = {
        "1.json": odyssey("1", *steps),
        "2.json": odyssey("2", ("CLICK", [[1001, 3]])),
        "3.json": odyssey("3", ("CLICK", [[1, 3]]), ("WINK", ""), ("COMPLETE", "")),
        "4.json": odyssey("4", ("INCOMPLETE", ""), task_info=None),
        "5.json": [1],
        "6.json": odyssey("6", ("COMPLETE", "")),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=4))
    (tmp_path / "split.json").write_text(json.dumps({"train": list(files)[:5], "test": ["6.json"]}))
    out = tmp_path / "out.jsonl"
    command = ["gui-odyssey", str(folder), "--images", str(tmp_path / "shots"), "--out", str(out), "--sheet", "0"]
    assert main([*command, "--split-file", str(tmp_path / "split.json"), "--max-steps", "4"]) == 0
    first, second, cut = map(json.loads, out.read_text().splitlines())
    assert answers(first) == ["CLICK: (683, 321)", "PRESS_HOME", "SCROLL: UP", "SCROLL: RIGHT"]
    assert answers(second) == ["TYPE: news", "LONG_PRESS: (1000, 0)", "COMPLETE"]
    asked_first = parse_record(second).messages[0].text
    assert asked_first == (
        "Task: Look it up and share it.\nSteps done:\n1. do click\n2. do click\n3. do scroll\n4. do scroll"
    )
    assert [image.source for image in parse_record(first).images] == [f"shots/{name}.png" for name in "abab"]
    assert answers(cut) == ["CLICK: (1, 3)"]
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert report["dropped"] == {
        "entries": {
            "coordinates outside the image": 1, "instruction is no text": 1, "steps is no list of objects": 1,
        },
        "parts of kept entries": {"an action of another kind (with the steps behind it)": 1},
    }  # fmt: skip
    (tmp_path / "other.json").write_text(json.dumps({"train": ["none.json"]}))
    assert main([*command, "--split-file", str(tmp_path / "other.json"), "--overwrite"]) == 2


def test_showui_navigation_shows_its_history_and_learns_the_last_action(tmp_path):
    tap = {"img_url": "a", "action_type": "tap", "action_value": None, "point": [0.65, 0.37]}
    swipe = {"img_url": "b", "action_type": "swipe", "action_value": None, "point": [[0.5, 0.75], [0.5, 0.25]]}
    several = [
        {"action_type": "input", "action_value": "Käse", "point": None},
        {"action_type": "enter", "action_value": "ignored", "point": [0.1, 0.1]},
    ]
    aitw = {"img_url": "a", "action_type_id": 4, "action_type_text": "click", "touch": [0.5, 0.2], "lift": [0.5, 0.3]}
    typed = {"img_url": "b", "action_type_id": 3, "action_type_text": "type", "type_text": "news"}
    entries = [
        {"task": "Buy it", "img_url": "a", "step_history": [tap, swipe], "step": several},
        {"task": "Read", **typed, "step_history": [aitw]},
        {"task": "Out", "img_url": "a", "step_history": [], "step": {**tap, "point": [1.5, 0.1]}},
        {"task": "Gone", "img_url": "c", "step_history": [], "step": tap},
    ]
    (first, second), report = run(tmp_path, "showui-navigation", entries, "--history", "1")
    messages = parse_record(first).messages
    tapped = '{"action": "TAP", "value": null, "position": [650, 370]}'
    assert [message.text for message in messages] == [
        f"Task: Buy it\nActions before:\n{tapped}",
        '{"action": "SWIPE", "value": null, "position": [[500, 750], [500, 250]]}',
        "",
        '{"action": "INPUT", "value": "Käse", "position": null}\n{"action": "ENTER", "value": null, "position": null}',
    ]
    assert [message.supervised for message in messages] == [False, False, False, True]
    assert [image.source for image in parse_record(first).images] == ["shots/b.png", "shots/a.png"]
    assert answers(second) == [
        '{"action": "CLICK", "value": null, "position": [500, 250]}',
        '{"action": "TYPE", "value": "news", "position": null}',
    ]
    assert report["dropped"]["entries"] == {
        "a place is outside the image, or no fractions of it": 1,
        "image missing": 1,
    }
