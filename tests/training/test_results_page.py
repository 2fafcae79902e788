"""The results page in a real Chromium: what it shows and does, and that nothing a stranger wrote runs in it."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixelprune.command.page import build_page, embedded_picture, omitted_runs
from pixelprune.images.image import decode_image
from pixelprune.prompter import Prompter
from pixelprune.selection import select
from pixelprune.sessions import select_session
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.conftest import screen
from tests.samples import draw_walk, walk_row
from tests.training.opened_page import Opened
from training.data.settings import SourceSettings
from training.evaluation.answering import read_tasks
from training.evaluation.results_page import ShownPass, _masks, _Sizes, write_results_page
from training.evaluation.scoring import Prediction, failed, judge
from training.evaluation.table_files import Cell

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<!--<script> & \u2028 \ud800"
)
HOSTILE_FILE = "\"><img src=x onerror=document.title='owned'>.png"


def test_data_stands_in_the_page_without_markup_and_comes_back_as_it_was():
    data = {HOSTILE: [HOSTILE, 1.5, None], "title": "</title><script>"}
    page = build_page(data["title"], data, "go()", "p{}").decode()
    (content,) = re.findall(r'<script type="application/json" id="data">(.*)</script>\n<script>', page)
    assert "<" not in content
    assert json.loads(content) == data
    assert page.count("<script") == 2
    assert "<title>&lt;/title&gt;&lt;script&gt;</title>" in page
    assert build_page(data["title"], data, "go()", "p{}").decode() == page


@pytest.mark.parametrize(("script", "style"), [("a</script>", ""), ("", "p{}</STYLE>"), ("x<!--", "")])
def test_what_would_break_the_page_is_refused(script, style):
    with pytest.raises(ValueError, match="would end its own element"):
        build_page("", {}, script, style)
    with pytest.raises(ValueError, match="JSON"):
        build_page("", float("nan"), "", "")


def test_pictures_are_encoded_anew(tmp_path):
    info = PngInfo()
    info.add_text("Comment", "a secret of the file")
    Image.new("RGB", (3000, 1500), (200, 10, 10)).save(tmp_path / "a.png", pnginfo=info)
    with Image.open(tmp_path / "a.png") as picture:
        url = embedded_picture(picture)
    assert url.startswith("data:image/webp;base64,")
    data = base64.b64decode(url.partition(",")[2])
    assert b"secret" not in data
    with Image.open(io.BytesIO(data)) as again:
        assert again.size == (1024, 512)
        assert np.abs(np.asarray(again).astype(int) - (200, 10, 10)).max() <= 4


def row(number: int, image: str, text: str, **metadata: Any) -> dict:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return {"id": f"r{number}", "messages": [{"role": "user", "content": content}], "metadata": metadata}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Two rows of a table over three places, a text question and a record whose image is gone."""
    folder = tmp_path_factory.mktemp("page")
    Image.fromarray(screen(3, 4, seed=1)).save(folder / "a.png")
    Image.fromarray(screen(3, 4, seed=2)).save(folder / HOSTILE_FILE)
    Image.fromarray(screen(3, 4, seed=3)).save(folder / "gone.png")
    place = {"source": "spot", "bbox": [10, 20, 40, 60], "image_size": [128, 96]}
    rows = [
        row(0, "a.png", "Click Save", **place, subset="web", element="text"),
        row(1, HOSTILE_FILE, HOSTILE.replace("\ud800", ""), **place, subset="web", element="icon"),
        row(2, "a.png", "Click Close", **place, subset="mobile", element="icon"),
        row(3, "a.png", "Which?", source="docs", scorer="anls", answers=["sitting"], subset="x"),
        row(4, "gone.png", "Gone", **place, subset="web"),
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    tasks, refused = read_tasks([SourceSettings(str(folder / "data.jsonl"))])
    assert not refused
    (folder / "gone.png").unlink()
    texts = {
        "Full": ["(200, 300)", HOSTILE, "(900, 900)", "kitten"],
        "PixelPrune": ["(200, 300)", "(200, 400)", "(200, 300)", "sitting"],
    }
    passes = []
    for label, answers in texts.items():
        prune = PruneSettings("none") if label == "Full" else PruneSettings()
        prompter = SimpleNamespace(prune=prune, resize=ResizeSettings(min_pixels=1024))
        found: list[Prediction] = [
            judge(task.id, task.target, text, (128, 96), "auto", kept_blocks=7, full_blocks=12)
            for task, text in zip(tasks, answers, strict=False)
        ]
        found.append(failed(tasks[4].id, tasks[4].target, "gone"))
        cells = {"spot": Cell(0.5, 0.25, 0.75, 4, 1), "docs": Cell(None, None, 0.5, 1, 0)}
        passes.append(ShownPass(label, prompter, tasks, found, cells))
    write_results_page(folder / "page.html", f"Table <b>1</b> {HOSTILE_FILE}", passes, 100)
    return folder / "page.html"


def test_the_mask_of_a_session_is_that_of_the_whole_conversation(model_folder, tmp_path):
    walk = draw_walk(3, 1)
    for step, picture in enumerate(walk):
        picture.save(tmp_path / f"{step}.png")
    record = walk_row([f"{step}.png" for step in range(3)]) | {"metadata": {"bbox": [1, 2, 30, 40]}}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    (task,), _ = read_tasks([SourceSettings(str(tmp_path / "data.jsonl"))])
    prune, resize = PruneSettings("pred3d", direction="forward"), ResizeSettings(min_pixels=1024)
    prompter = Prompter.load(model_folder, prune=prune, resize=resize)
    images = [np.asarray(picture) for picture in walk]
    expected = [one.keep for one in select_session(images, direction="forward", keep_replaced=True)]
    for refs, keeps in ((task.record.images, expected), (task.record.images[-1:], expected[-1:])):
        sizes = _Sizes([(decode_image(tmp_path / ref.source, resize), ref) for ref in refs])
        assert _masks(prompter, sizes, task, refs) == [omitted_runs(keep) for keep in keeps]


@pytest.mark.chromium
def test_misses_come_first_and_clicks_and_filters_choose(tab, page):
    opened = Opened(tab, page.as_uri())
    assert opened.texts("article .name") == ["data:4 · r4", "data:3 · r3", "data:1 · r1", "data:2 · r2"], (
        "most-missed first"
    )
    assert opened.texts("article .verdict") == ["failed", "part 0.57", "miss", "miss"]
    assert opened.texts(".cells td") == ["50.0 (75.0)", "- (50.0)"] * 2
    assert opened.texts("#count") == ["4 of 5 records on this page"]
    opened.select("verdict", "")
    assert opened.texts("article .name") == ["data:4 · r4", "data:3 · r3", "data:1 · r1", "data:2 · r2", "data:0 · r0"]
    opened.select("kind", "icon")
    assert opened.texts("article .name") == ["data:1 · r1", "data:2 · r2"]
    opened.select("subset", "mobile")
    assert opened.texts("article .name") == ["data:2 · r2"]
    opened.select("subset", "")
    opened.select("kind", "")
    opened.select("verdict", "misses")
    opened.click('button.cell[data-row="PixelPrune"][data-benchmark="spot"]')
    assert opened.texts("article .name") == ["data:4 · r4"]
    assert opened.texts("button.cell.chosen") == ["50.0 (75.0)"]
    assert opened.get("document.getElementById('row').value") == "PixelPrune"
    opened.select("verdict", "hits")
    assert opened.texts("article .name") == ["data:1 · r1", "data:2 · r2", "data:0 · r0"]
    assert opened.broken == []


@pytest.mark.chromium
def test_places_are_drawn_and_kept_blocks_shown_while_the_pointer_is_there(tab, page):
    opened = Opened(tab, page.as_uri())
    opened.click('button.cell[data-row="PixelPrune"][data-benchmark="spot"]')
    opened.select("verdict", "hits")
    box = "['x', 'y', 'width', 'height'].map((name) => Number(document.querySelector('.box').getAttribute(name)))"
    assert opened.get(box) == [10, 20, 30, 40]
    point = "['cx', 'cy'].map((name) => Number(document.querySelector('.point').getAttribute(name)))"
    assert opened.get(point) == pytest.approx([0.2 * 128, 0.4 * 96])
    keep = select(np.asarray(Image.open(page.parent / HOSTILE_FILE).convert("RGB"))).keep
    assert 0 < keep.sum() < keep.size
    # Under the middle of each of the 3 x 4 blocks: is it veiled?
    veiled = """(() => {
      const figure = document.querySelector("figure"), path = figure.querySelector(".omitted"), found = [];
      for (let row = 0; row < 3; row++) for (let col = 0; col < 4; col++) {
        const at = figure.querySelector("svg").createSVGPoint();
        at.x = 32 * col + 16; at.y = 32 * row + 16;
        found.push(path.isPointInFill(at));
      }
      return found;
    })()"""
    assert opened.get(veiled) == (~keep).ravel().tolist()
    visible = "getComputedStyle(document.querySelector('figure .omitted')).visibility"
    x, y = opened.middle("figure")
    opened.hover(2, 2)
    assert opened.get(visible) == "hidden"
    opened.hover(x, y)
    assert opened.get(visible) == "visible"
    sizes = "(() => { const [a, b] = ['img', '.over'].map((one) => document.querySelector('figure ' + one)"
    sizes += ".getBoundingClientRect()); return [a.width - b.width, a.height - b.height]; })()"
    assert opened.get(sizes) == pytest.approx([0, 0], abs=1), "drawn over the picture as it is shown"


@pytest.mark.chromium
def test_hostile_answers_and_names_are_text_and_nothing_leaves_the_page(tab, page):
    opened = Opened(tab, page.as_uri())
    assert opened.get("document.title") == f"Table <b>1</b> {HOSTILE_FILE}"
    assert opened.texts("h1") == [f"Table <b>1</b> {HOSTILE_FILE}"]
    assert opened.get("data.records.find((one) => one.source_id === 'r1').given.Full.text.isWellFormed()") is False
    opened.select("kind", "icon")
    shown = opened.texts("article:first-of-type dd")
    assert shown[0] == HOSTILE.replace("\ud800", ""), "the question"
    assert shown[1] == "(10, 20) to (40, 60) px"
    assert shown[2].startswith(HOSTILE[:-1]), "the answer"
    assert shown[-1] == HOSTILE_FILE
    opened.select("kind", "")
    sources = opened.get("[...document.querySelectorAll('img')].map((one) => one.src.slice(0, 15))")
    assert sources == ["data:image/webp"] * 3
    (note,) = opened.texts("article .note")
    assert note.startswith("no picture: image 'gone.png'")
    assert [url for url in opened.asked if not url.startswith("data:")] == [page.as_uri()]
    assert opened.broken == [], "nothing that the policy stops is tried by the page itself"
    # What a hole in the page would let in is stopped by its policy.
    opened.get(
        "document.body.insertAdjacentHTML('beforeend', \"<img src='https://example.org/x.png' "
        "onerror='document.title=1'><p onclick='document.title=2' id='trap'>x</p>\");"
        "const own = document.createElement('script'); own.textContent = 'document.title = 3';"
        "document.body.append(own);"
        "document.getElementById('trap').click();"
    )
    tab.wait_until(lambda: len(opened.broken) >= 3)
    assert opened.get("document.title") == f"Table <b>1</b> {HOSTILE_FILE}"
    assert all("Content Security Policy" in text for text in opened.broken), opened.broken
