"""The page of runs in a real Chromium, and its server: what it shows and does, and what it lets nobody do."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_tools.render import browser as chromium
from data_tools.render.browser import Tab
from pixelprune.selection import select
from tests.ranks import ROOT
from tests.samples import draw_screen
from tests.training.conftest import need_chromium
from tests.training.opened_page import Opened
from training.config.recipe import config_to_dict, load_recipe
from training.report import main
from training.run_page import curves
from training.run_page.curves import charts_of, curves_of
from training.run_page.document import RunPage
from training.run_page.run_folder import compare_recipes
from training.run_page.server import PageServer

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--"
HOSTILE_NAME = "<img src=x onerror=document.title='owned'>"
STEPS = 30


def losses(scale: float) -> list[float]:
    return [round(scale / step, 4) for step in range(1, STEPS + 1)]


def write_rows(folder: Path, rows: list[dict]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def step_row(step: int, loss: float, retain: float) -> dict:
    speeds = {"samples_per_s": 2.0, "kept_tokens_per_s": 90.0, "step_s": 0.5, "data_wait_share": 0.1}
    return {"step": step, "loss": loss, "ce": loss, "retain_ratio": retain, "peak_memory_gb": 1.0, "mfu": 0.4, **speeds}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder) -> list[Path]:
    """Two runs over one source with a good, a hostile and a bad record; the second one has a hostile name."""
    root = tmp_path_factory.mktemp("runs")
    draw_screen(1, 192, 128).save(root / "a.png")
    shutil.copy(root / "a.png", root / f"{HOSTILE_NAME}.png")
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": text}]},
                      {"role": "assistant", "content": "(500, 250)"}]}
        for name, text in (("a.png", "Click Save"), (f"{HOSTILE_NAME}.png", HOSTILE), ("gone.png", "Click"))
    ]  # fmt: skip
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = []
    for name, scale, strategy in (("pruned", 6.0, "pred2d"), (HOSTILE_NAME, 4.0, "none")):
        folder = root / name
        folder.mkdir()
        overrides = [
            "resize.min_pixels=1024",
            f"model.path={model_folder}",
            f"data.sources.0.path={root / 'data.jsonl'}",
        ]
        config = load_recipe(ROOT / "configs" / "tutorial.yaml", [*overrides, f"prune.strategy={strategy}"])
        (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))
        retain = 1.0 if strategy == "none" else 0.5
        write_rows(folder, [step_row(step, loss, retain) for step, loss in enumerate(losses(scale), 1)])
        write_rows(folder, [{"step": step, "eval_loss": scale / 10 + step / 100} for step in (10, 30)])
        entry = {"record": "data:2", "file": HOSTILE_NAME, "reason": "missing_file", "detail": HOSTILE}
        (folder / "quarantine.jsonl").write_text(json.dumps(entry) + "\n" + '{"half a li')
        folders.append(folder)
    evaluation = folders[0] / "export-evaluation" / "pruned"
    evaluation.mkdir(parents=True)
    score = {"num": 8, "accuracy": 0.25, "retain_ratio": 0.5, "num_failed": 1, "num_unparsed": float("nan")}
    result = {"overall": {"all": score}, "prune": {"strategy": HOSTILE, "threshold": 0}}
    (evaluation / "result.json").write_text(json.dumps(result))
    Image.new("RGB", (300, 200), (10, 200, 10)).save(evaluation / "sheet.png")
    (folders[0] / "grounding").mkdir()
    answers = [{"id": "r1", "score": 1.0, "text": "(1, 2)"}, {"id": HOSTILE_NAME, "score": 0.0, "text": HOSTILE}]
    (folders[0] / "grounding" / "step-00000030.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return folders


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page")
    assert main([*map(str, runs), "--html", "-o", str(out)]) == 0
    return out / "report.html"


def at(opened: Opened, metric: str, step: float) -> tuple[float, float]:
    """Where a chart has a step, at half its height, scrolled into view."""
    chart = f"charts[{json.dumps(metric)}].plot"
    opened.get(f"{chart}.root.scrollIntoView({{block: 'center'}})")
    box = f"{chart}.over.getBoundingClientRect()"
    return opened.get(
        f"(() => {{ const b = {box}; return [b.x + {chart}.valToPos({step}, 'x'), b.y + b.height / 2]; }})()"
    )


def legend(opened: Opened, metric: str) -> list[str]:
    rows = f"charts[{json.dumps(metric)}].plot.root.querySelectorAll('.u-series:not(.mean) .u-value')"
    return opened.get(f"[...{rows}].map((one) => one.textContent)")


def span(opened: Opened, metric: str) -> list[float]:
    return opened.get(f"(({{ min, max }}) => [min, max])(charts[{json.dumps(metric)}].plot.scales.x)")


def test_a_curve_has_every_extreme_and_only_numbers(monkeypatch):
    monkeypatch.setattr(curves, "MAX_POINTS", 50)
    values = np.sin(np.arange(1000) / 7)
    values[[123, 777]] = 9.0, -9.0
    rows = [{"step": step, "ce": float(value), "word": "x", "flag": True} for step, value in enumerate(values)]
    rows += [{"step": 1000, "ce": None}, {"step": 1001, "ce": float("inf")}]
    (curve,) = curves_of(rows).values()
    assert len(curve["steps"]) <= 50
    assert (curve["steps"][0], curve["steps"][-1]) == (0, 999)
    assert sorted(curve["steps"]) == curve["steps"]
    assert {123, 777} <= set(curve["steps"])
    assert all(abs(value - values[step]) < 1e-5 for step, value in zip(*curve.values(), strict=True))


def test_charts_come_in_the_order_of_the_table_and_what_nobody_has_is_named():
    run = {
        name: {"steps": [1, 2], "values": [0, 0.5]} for name in ("retain_ratio", "lr_llm", "eval_loss", "loss", "ce")
    }
    never_used, always_wrong = ({"steps": [1, 2], "values": [0.0, 0.0]} for _ in range(2))
    charts, missing = charts_of([run, run | {"shared_prefix": never_used, "eval_accuracy": always_wrong}])
    assert [(chart["name"], chart["is_first"]) for chart in charts] == [
        ("ce", True), ("eval_loss", True), ("eval_accuracy", True), ("retain_ratio", True),
        ("loss", False), ("lr_llm", False), ("shared_prefix", False)
    ]  # fmt: skip
    assert "MFU on kept tokens" in missing
    assert "retain ratio" not in missing


def test_recipes_are_compared_setting_by_setting():
    recipes = [
        {"optim": {"lr": 1e-5}, "data": {"sources": [{"path": "a", "weight": 1.0}]}},
        {"optim": {"lr": 2e-5}, "data": {"sources": [{"path": "a", "weight": 3.0}, {"path": "b"}]}, "old": {"key": 1}},
    ]
    rows = {row["key"]: row for row in compare_recipes(recipes)}
    assert rows["optim.lr"]["values"] == ["1e-05", "2e-05"]
    assert rows["optim.lr"]["differs"]
    assert rows["data.sources.0.weight"] == {
        "key": "data.sources.0.weight", "default": "1.0", "values": ["1.0", "3.0"], "differs": True, "is_set": True
    }  # fmt: skip
    assert rows["data.sources.1.path"]["values"] == [None, "b"]
    assert not rows["data.sources.0.path"]["differs"]
    assert rows["old.key"] == {
        "key": "old.key",
        "default": None,
        "values": [None, "1"],
        "differs": True,
        "is_set": True,
    }


def test_the_charts_library_is_as_it_was_published():
    folder = ROOT / "training" / "run_page" / "uplot"
    stated = dict(re.findall(r"^sha256 (\S+) +(\w{64})$", (folder / "README.md").read_text(), re.MULTILINE))
    assert set(stated) == {"uPlot.iife.min.js", "uPlot.min.css"}
    for name, digest in stated.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert "MIT License" in (folder / "LICENSE").read_text()


def test_the_licence_goes_with_the_library_and_a_page_is_the_same_twice(runs, page):
    written = page.read_bytes()
    assert b"Permission is hereby granted, free of charge" in written
    assert b"connect-src" not in written, "a file asks nobody"
    assert RunPage({folder.name: folder for folder in runs}).current() == written


@pytest.mark.chromium
def test_curves_are_overlaid_hovered_zoomed_and_hidden(tab, page):
    opened = Opened(tab, page.as_uri())
    first = opened.texts(".charts h3")[:3]
    assert first == ["training cross-entropy per token", "held-out cross-entropy per token", "samples/s"]
    colours = "[...new Set(charts.ce.plot.series.slice(1).map((one) => one.stroke()))]"
    assert opened.get(colours) == ["#2b5bd7", "#d9480f"]
    # Both runs' colours are in the picture of the chart.
    drawn = """(() => {
      const canvas = charts.ce.plot.ctx.canvas, found = [0, 0];
      const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
      copy.drawImage(canvas, 0, 0);
      const pixels = copy.getImageData(0, 0, canvas.width, canvas.height).data;
      for (let i = 0; i < pixels.length; i += 4)
        [[0x2b, 0x5b, 0xd7], [0xd9, 0x48, 0x0f]].forEach((colour, run) => {
          found[run] += colour.every((part, k) => Math.abs(pixels[i + k] - part) < 12) && pixels[i + 3] > 200;
        });
      return found;
    })()"""
    assert min(opened.get(drawn)) > 50
    opened.hover(*at(opened, "ce", 3))
    assert legend(opened, "ce") == ["3", "2", "1.333"], "6 / 3 and 4 / 3"
    assert legend(opened, "retain_ratio") == ["3", "0.5", "1"], "the other charts follow"
    assert span(opened, "ce") == [1, 30]
    opened.drag(at(opened, "ce", 10), at(opened, "ce", 20))
    for metric in ("ce", "retain_ratio", "eval_loss"):
        assert span(opened, metric) == pytest.approx([10, 20], abs=0.2), metric
    opened.click("#whole")
    assert span(opened, "ce") == span(opened, "eval_loss") == [1, 30]
    opened.click(".bar label:nth-of-type(2) input")
    shown = "charts.{}.plot.series.slice(1).map((one) => one.show)"
    assert opened.get(shown.format("ce")) == [True, True, False, False]
    assert opened.get(shown.format("eval_loss")) == [True, False]
    assert opened.get(drawn)[1] == 0
    opened.click("#smooth")
    assert opened.get(shown.format("ce")) == [True, False, False, False]
    # A click on a name in a legend does the same to all charts.
    opened.click(".chart[data-metric='eval_loss'] .u-series:nth-child(3) th")
    assert opened.get(shown.format("ce")) == [True, False, True, False]
    assert opened.broken == []


@pytest.mark.chromium
def test_recipes_records_evaluations_and_quarantine_are_there(tab, page, runs):
    opened = Opened(tab, page.as_uri())
    assert opened.texts(".recipe th:first-child")[1:] == ["prune.strategy"]
    assert opened.texts(".recipe td") == ["pred2d", "pred2d", "none"]
    opened.select("recipe", "everything")
    assert len(opened.texts(".recipe th:first-child")) > 100
    field = "document.getElementById('find')"
    opened.get(f"(() => {{ {field}.value = 'samples_per_step'; {field}.dispatchEvent(new Event('input')); }})()")
    assert opened.texts(".recipe th:first-child")[1:] == ["data.samples_per_step"]
    assert opened.texts(".recipe td.set") == ["16", "16"], "not the default"
    assert opened.texts("article .supervised") == ["(500, 250)<|im_end|>"] * 4
    assert sum("left out: missing_file" in text for text in opened.texts("article .note")) == 2
    keep = select(np.asarray(Image.open(runs[0].parent / "a.png").convert("RGB"))).keep
    visible = "getComputedStyle(document.querySelector('figure .omitted')).visibility"
    assert opened.get(visible) == "visible"
    omitted = np.zeros_like(keep)
    for row, first, count in opened.get("data.samples[0].records[0].pictures[0].mask.omitted"):
        omitted[row, first : first + count] = True
    np.testing.assert_array_equal(omitted, ~keep)
    assert omitted.any()
    opened.click("#veil")
    assert opened.get(visible) == "hidden"
    figures = opened.texts("#evaluations .figures td")
    assert figures == ["25.0%", "50.0%", "8", "1", "-", f"{HOSTILE}, threshold 0"], "NaN is not a figure"
    assert opened.texts("#evaluations .texts th:first-child")[1:] == [HOSTILE_NAME, "r1"], "misses first"
    assert opened.get("document.querySelector('.sheet img').naturalWidth") == 300
    assert opened.texts("#quarantine .texts td") == ["missing_file", HOSTILE, HOSTILE_NAME] * 2
    assert opened.broken == []


@pytest.mark.chromium
def test_hostile_names_and_answers_are_text_and_nothing_is_asked_for(tab, page):
    opened = Opened(tab, page.as_uri())
    opened.get("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert opened.get("document.title") == f"pruned, {HOSTILE_NAME}"
    assert opened.texts("h1") == [f"pruned, {HOSTILE_NAME}"]
    assert opened.texts("#runs th")[:3] == ["", "pruned", HOSTILE_NAME]
    assert any(HOSTILE in text for text in opened.texts("article .plain"))
    assert opened.texts(".chart[data-metric='ce'] .u-label")[1] == "pruned"
    assert HOSTILE_NAME in opened.texts(".chart[data-metric='ce'] .u-label")
    sources = opened.get("[...document.querySelectorAll('img')].map((one) => one.src.slice(0, 15))")
    assert set(sources) == {"data:image/webp"}
    assert [url for url in opened.asked if not url.startswith("data:")] == [page.as_uri()]
    assert opened.broken == []


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[PageServer, Path]]:
    write_rows(tmp_path, [step_row(1, 3.0, 0.5), step_row(2, 2.0, 0.5)])
    page = RunPage({"run": tmp_path}, refresh_seconds=0.2)
    with PageServer(page.current) as server:
        yield server, tmp_path


def ask(server: PageServer, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.body = answer.read()  # type: ignore[attr-defined]
    connection.close()
    return answer


def test_only_who_knows_the_token_sees_the_page_and_only_under_this_machines_name(served):
    server, _ = served
    path = f"/{server.token}"
    answer = ask(server, path)
    assert answer.status == 200
    assert answer.body.startswith(b"<!doctype html>")
    assert b"connect-src 'self'" in answer.body
    assert answer.getheader("Cache-Control") == "no-store"
    assert answer.getheader("Referrer-Policy") == "no-referrer"
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert "frame-ancestors 'none'" in answer.getheader("Content-Security-Policy")
    for host in (f"localhost:{server.port}", "localhost:8080", "127.0.0.1"):
        assert ask(server, path, Host=host).status == 200, "a tunnel has a port of its own"
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "127.0.0.1.evil.example",
        "",
        "localhost:1@evil.example",
    ):
        assert ask(server, path, Host=host).status == 403, host
    wrong = ["/", "/x", f"/{server.token}x", f"/{server.token[:-1]}", f"{path}/..", f"{path}/../../etc/passwd"]
    for other in [*wrong, "/etc/passwd", f"{path}?x", f"/{server.token.swapcase()}", "/\xe9"]:
        assert ask(server, other.replace("\xe9", "%E9")).status == 404, other
    assert ask(server, path, "POST").status == 501
    head = ask(server, path, "HEAD")
    assert (head.status, head.body, head.getheader("Content-Length")) == (200, b"", str(len(answer.body)))
    assert ask(server, path, If_None_Match=answer.getheader("ETag")).status == 304


def test_the_server_is_on_loopback_and_holds_what_is_new(served):
    server, folder = served
    assert server._server.server_address[0] == "127.0.0.1"
    before = ask(server, f"/{server.token}")
    write_rows(folder, [step_row(3, 1.0, 0.5)])
    after = ask(server, f"/{server.token}", If_None_Match=before.getheader("ETag"))
    assert after.status == 200
    assert after.body != before.body


@pytest.fixture
def local_tab(monkeypatch) -> Iterator[Tab]:
    """Of a Chromium that reaches this machine."""
    need_chromium()
    others = ("--proxy-server", "--proxy-bypass-list", "--host-resolver-rules")
    monkeypatch.setattr(chromium, "_FLAGS", tuple(flag for flag in chromium._FLAGS if not flag.startswith(others)))
    with chromium.Browser() as browser:
        yield browser.new_tab()


@pytest.mark.chromium
def test_an_open_page_follows_its_run_and_keeps_what_was_chosen(local_tab, served):
    server, folder = served
    opened = Opened(local_tab, server.address)
    assert opened.get("charts.ce.steps") == [1, 2]
    opened.drag(at(opened, "ce", 1.2), at(opened, "ce", 1.8))
    write_rows(folder, [step_row(3, 1.0, 0.5), {"step": 3, "eval_loss": 0.5}])
    opened.wait_for("charts.eval_loss && charts.ce.steps.length === 3")
    assert opened.get("charts.ce.raw") == [[3, 2, 1]]
    assert span(opened, "ce") == pytest.approx([1.2, 1.8], abs=0.02)
    opened.click("#whole")
    assert span(opened, "ce") == [1, 3]
    assert "live" in opened.texts("#state")[0]
    server._server.shutdown()
    server._server.server_close()
    opened.wait_for("document.getElementById('state').textContent.startsWith('the server does not answer')")
    assert opened.get("charts.ce.steps") == [1, 2, 3]


def test_what_cannot_be_shown_is_said(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--serve"]) == 2
    assert "no such folder; expected the folder of a run" in capsys.readouterr().err
    assert main([str(tmp_path), "--html"]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    write_rows(tmp_path, [step_row(1, 3.0, 0.5)])
    (tmp_path / "config.yaml").write_text("run: {name: x}\nmodel: {path: /gone}\nprune: {surprise: 1}\n")
    (note,) = RunPage({"run": tmp_path}).samples
    assert "surprise" in note["note"]
