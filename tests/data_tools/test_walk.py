"""Sessions walked in a real Chromium: what was done is what the next picture shows, and the same again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.render.browser import Browser, PageError, find_chromium
from data_tools.render.site import Site
from data_tools.render.view import Viewport
from data_tools.walk.action import Action
from data_tools.walk.conversations import conversations
from data_tools.walk.screen import Screen
from data_tools.walk.session import Step, stretches, windows
from pixelprune.answers import parse_answer
from pixelprune.records.presets import get_preset
from pixelprune.records.reader import parse_record

pytest.importorskip("websocket", reason="websocket-client is not installed (pip install pixelprune[screens])")
needs_chromium = [
    pytest.mark.chromium,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium on PATH (apt-get install chromium)"),
]
APPS = Path(__file__).parents[2] / "data_tools" / "apps"
SESSIONS = Path(__file__).parents[2] / "data_tools" / "session_samples"
HEAD = "<!doctype html><meta charset=utf-8><style>body{margin:0;font:14px sans-serif}button{display:block}</style>"


def step(number: int, kind: str = "click") -> Step:
    action = Action("left_click", f"Click the button {number}.", (30.0, 60.0), (20.0, 50.0, 40.0, 70.0), target="B")
    return Step(np.zeros((100, 200, 3), np.uint8), "a.html", action, kind)  # type: ignore[arg-type]


def test_windows_hold_every_step_once_as_what_is_learnt() -> None:
    assert list(windows(4, 2)) == [(0, 0), (0, 1), (0, 2), (1, 3)]
    assert list(stretches(5, 2)) == [(0, 1), (2, 3), (4, 4)]


@pytest.mark.parametrize("supervise", ["last", "every"])
def test_a_window_is_asked_as_the_published_agents_ask(supervise: Any) -> None:
    steps = [step(number) for number in range(6)]
    images = [f"images/{number}.png" for number in range(6)]
    made = conversations("s", steps, images, history=2, supervise=supervise, about={"source": "x"})
    record = made[3] if supervise == "last" else made[1]
    parsed = parse_record(record)
    first = 1 if supervise == "last" else 3
    assert [image.source for image in parsed.images] == images[first : first + 3]
    asked = parsed.messages[0].text
    assert asked.startswith("Please generate the next move according to the UI screenshot, instruction and previous")
    assert "\n\nInstruction: Do these steps in their order: 1. Click the button 0. 2. " in asked
    told = "\n".join(f"Step {i + 1}: Click the button {i}." for i in range(first))
    assert asked.endswith(f"\n\nPrevious actions:\n{told}")
    assert [message.text for message in parsed.messages[2::2]] == ["", ""]
    assert [m.supervised for m in parsed.messages[1::2]] == [supervise == "every"] * 2 + [True]
    assert len(made) == (6 if supervise == "last" else 2)
    answer = parsed.messages[-1].text
    assert answer.startswith(f"Action: Click the button {first + 2}.\n<tool_call>\n")
    assert parse_answer(answer, image_size=(200, 100), format="tool_call").point == pytest.approx((30, 60), abs=0.2)
    prompted = get_preset("computer_use_agent").apply(parsed)
    assert prompted.messages[0].role == "system"
    assert "`left_click`" in prompted.messages[0].text
    assert "Previous actions:\nNone" in made[0]["messages"][0]["content"][1]["text"]


def test_the_committed_sessions_are_whole_and_small() -> None:
    sessions = [json.loads(line) for line in (SESSIONS / "sessions.jsonl").open(encoding="utf-8")]
    records = {s: [json.loads(x) for x in (SESSIONS / f"{s}.jsonl").open(encoding="utf-8")] for s in ("train", "eval")}
    assert len(sessions) >= 24
    assert all(5 <= len(session["steps"]) <= 12 for session in sessions)
    assert {path.stem for path in APPS.glob("*.html")} == {session["page"] for session in sessions}
    assert sum(path.stat().st_size for path in SESSIONS.rglob("*") if path.is_file()) < 12_000_000
    kinds = {step["kind"] for session in sessions for step in session["steps"]}
    assert kinds == {"click", "type", "menu", "modal", "tab", "scroll", "navigate", "idle", "end"}
    assert len(records["train"]) + len(records["eval"]) == sum(len(session["steps"]) for session in sessions)
    splits = {name: {record["metadata"]["episode_id"] for record in records[name]} for name in records}
    assert splits["train"].isdisjoint(splits["eval"])
    for session in sessions:
        for one, after in zip(session["steps"], session["steps"][1:], strict=False):
            width, height = Image.open(SESSIONS / one["image"]).size
            assert one["kind"] == "idle" or one["image"] != after["image"]
            if "place" in one:
                (x, y), box = one["place"], one.get("bbox", [0, 0, width, height])
                assert 0 <= box[0] <= x <= box[2] <= width
                assert 0 <= box[1] <= y <= box[3] <= height
                coordinate = np.array(one["coordinate"]) / 1000 * (width, height)
                assert np.abs(coordinate - one["place"]).max() <= max(width, height) / 1000


@pytest.fixture(scope="module")
def browser() -> Any:
    with Browser() as running:
        yield running


def opened(browser: Browser, folder: Path, html: str, **options: Any) -> Screen:
    (folder / "page.html").write_text(HEAD + html, encoding="utf-8")
    tab = browser.new_tab()
    tab.start_clock(300)
    screen = Screen(tab, Site(folder), Viewport(400, 300), "light", **{"caret": True, "seed": 3, **options})
    screen.open("page.html")
    return screen


def click(screen: Screen, name: str) -> Action:
    element = next(c.element for c in screen.look().controls if c.element.name == name)
    x1, y1, x2, y2 = element.box
    return Action("left_click", "", ((x1 + x2) / 2, (y1 + y2) / 2))


class TestScreen:
    pytestmark = needs_chromium

    def test_the_clock_of_a_page_goes_on_with_actions_alone(self, browser: Browser, tmp_path: Path) -> None:
        html = """<button onclick="setTimeout(() => { a.textContent = 'soon' }, 400);
            setTimeout(() => { b.textContent = 'later' }, 700)">Go</button><p id=a>-</p><p id=b>-</p><p id=c></p>
            <script>c.textContent = [new Date().getFullYear(), Math.random(), performance.now() < 500].join(" ")
            </script>"""
        screens = [opened(browser, tmp_path, html) for _ in range(2)]
        clocks = []
        for screen in screens:
            screen.do(click(screen, "Go"))
            assert screen.view.evaluate("a.textContent + b.textContent") == "soon-"
            screen.do(Action("wait", ""))
            assert screen.view.evaluate("a.textContent + b.textContent") == "soonlater"
            clocks.append(screen.view.evaluate("c.textContent + Date.now()"))
        assert clocks[0] == clocks[1]
        assert str(clocks[0]).startswith("2026 0.")

    def test_typing_keys_scrolls_and_links_do_what_a_person_means(self, browser: Browser, tmp_path: Path) -> None:
        (tmp_path / "next.html").write_text(f"{HEAD}<title>Next</title><button>There</button>")
        html = """<form onsubmit="return false"><input aria-label=Field onkeydown="key = event.key"></form>
            <a href="next.html">Onward</a><a href="http://example.com/">Away</a><script>key = ""</script>
            <div id=box style="height:100px;overflow:auto"><p style="height:500px">Tall</p></div>"""
        screen = opened(browser, tmp_path, html)
        screen.do(click(screen, "Field"))
        field = next(c for c in screen.look().controls if c.kind == "field")
        assert field.focused
        blank = screen.look().image
        screen.do(Action("type", "", text="hello"))
        assert next(c for c in screen.look().controls if c.kind == "field").value == "hello"
        assert (screen.look().image != blank).any()
        screen.do(Action("key", "", keys=("enter",)))
        area = screen.look().areas[-1]
        assert (area.up, area.height) == (0, 100)
        screen.do(Action("scroll", "", area.place, pixels=-60))
        assert screen.look().areas[-1].up == 60
        assert {c.element.name: c.href for c in screen.look().controls}["Away"] == "elsewhere"
        screen.do(click(screen, "Onward"))
        assert screen.look().page == "next.html"
        assert [c.element.name for c in screen.look().controls] == ["There"]
        screen.do(Action("wait", ""))

    def test_a_page_that_leaves_the_folder_is_held(self, browser: Browser, tmp_path: Path) -> None:
        screen = opened(browser, tmp_path, "<button onclick=\"location.href = 'http://example.com/'\">Leave</button>")
        screen.do(click(screen, "Leave"))
        assert screen.look().page == "page.html"
        assert screen.view.blocked["navigation"] == 1

    def test_the_caret_is_steady_or_absent(self, browser: Browser, tmp_path: Path) -> None:
        pictures = {}
        for caret in (True, False):
            screen = opened(browser, tmp_path, "<input aria-label=Field style='caret-color:#f00'>", caret=caret)
            screen.do(click(screen, "Field"))
            shown = [screen.look().image]
            for _ in range(3):
                screen.do(Action("wait", ""))
                shown.append(screen.look().image)
            assert all((image == shown[0]).all() for image in shown)
            pictures[caret] = ((shown[0][..., 0] > 200) & (shown[0][..., 1] < 60)).sum()
        assert pictures[True] > 8
        assert pictures[False] == 0

    def test_a_page_without_anything_to_act_on_is_named(self, browser: Browser, tmp_path: Path) -> None:
        from data_tools.walk.session import walk

        screen = opened(browser, tmp_path, "<p>Nothing</p>")
        with pytest.raises(PageError, match="nothing on it"):
            walk(screen, "page.html", 5, random.Random(0), pointer=False)


class TestCommand:
    pytestmark = needs_chromium

    def test_equal_seeds_give_equal_files_and_the_training_format(self, tmp_path: Path) -> None:
        outs = [tmp_path / name for name in ("one", "two")]
        for out in outs:
            options = ["--sessions", "2", "--steps", "4", "--viewports", "640x480", "--eval-fraction", "0.5"]
            assert main(["sessions", str(APPS), "--out", str(out), "--sheet", "2", *options]) == 0
        files = sorted(path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file())
        assert {"train.jsonl", "eval.jsonl", "sessions.jsonl", "report.json", "sheet.png"} < {str(p) for p in files}
        for name in files:
            assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
        for record in (json.loads(line) for line in (outs[0] / "train.jsonl").open()):
            for image in parse_record(record).images:
                assert Image.open(outs[0] / str(image.source)).size == (640, 480)

    def test_held_out_pages_are_never_shown_in_a_session_to_train_on(self, tmp_path: Path) -> None:
        """Four links lead from every page to the others, and little else can be done; a script goes there, too."""
        site, names = tmp_path / "site", ["a", "b", "c"]
        site.mkdir()
        for name in names:
            links = "".join(f"<a href={other}.html style=display:block>Go to {other}</a>" for other in names)
            script = f"<button onclick=\"location='{'b' if name == 'a' else name}.html'\">Leap</button>"
            (site / f"{name}.html").write_text(f"{HEAD}<h1>{name}</h1>{links}{script}<button>Stay</button>")
        out = tmp_path / "out"
        options = [
            "--sessions",
            "9",
            "--steps",
            "6",
            "--viewports",
            "400x300",
            "--sheet",
            "0",
            "--eval-pages",
            "b.html",
        ]
        assert main(["sessions", str(site), "--out", str(out), *options]) == 0
        sessions = [json.loads(line) for line in (out / "sessions.jsonl").open(encoding="utf-8")]
        shown = {split: {step["page"] for s in sessions if s["split"] == split for step in s["steps"]}
                 for split in ("train", "eval")}  # fmt: skip
        assert shown == {"train": {"a", "c"}, "eval": {"b"}}
        assert any(len({step["page"] for step in session["steps"]}) > 1 for session in sessions), "links are followed"
        dropped = json.loads((out / "report.json").read_text())["dropped_sessions"].values()
        assert all("it led to b.html, a page of the other split" in reason for reason in dropped)
        assert len(sessions) + len(dropped) == 9

    def test_wrong_options_and_failing_pages_are_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.html").write_text("<p>nothing to do</p>")
        command = ["sessions", str(tmp_path), "--out", str(tmp_path / "o"), "--sessions", "1"]
        assert main([*command, "--steps", "9-3"]) == 2
        assert "--steps" in capsys.readouterr().err
        assert main([*command, "--eval-pages", "b.html"]) == 2
        assert "--eval-pages: expected some of a.html, got b.html" in capsys.readouterr().err
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "nothing on it can be acted on" in told
        assert "no session was made" in told
