"""Rendering in a real Chromium: boxes against known geometry and pixels, what is left out, and pages that misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.render.browser import Browser, BrowserError, find_chromium
from data_tools.render.pages import render
from data_tools.render.shot import RenderSettings
from data_tools.render.site import Site
from data_tools.render.view import Element, PageView, Viewport

pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium on PATH (apt-get install chromium)"),
]
pytest.importorskip("websocket", reason="websocket-client is not installed (pip install pixelprune[screens])")

HEAD = "<!doctype html><meta charset=utf-8><style>body{margin:0;font:14px sans-serif}button{position:absolute}</style>"
SMALL = Viewport(400, 300)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


def see(
    browser: Browser, folder: Path, html: str, viewport: Viewport = SMALL, *, javascript: bool = False
) -> tuple[np.ndarray, dict[str, Element], Counter[str], PageView]:
    (folder / "page.html").write_text(HEAD + html, encoding="utf-8")
    view = PageView(browser.new_tab(), Site(folder), javascript=javascript)
    view.tab.start_clock(60)
    view.show("page.html", viewport, "light")
    image, elements, dropped = view.capture(viewport)
    return image, {e.name: e for e in elements if e.is_clickable}, dropped, view


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
def test_boxes_and_names_are_where_the_pixels_are(browser: Browser, tmp_path: Path, scale: float) -> None:
    boxes = {"One": (10, 20, 120, 60), "Two": (200, 40, 380, 100), "Three": (40, 200, 200, 280)}
    colours = {"One": (250, 10, 10), "Two": (10, 250, 10), "Three": (10, 10, 250)}
    html = "".join(
        f'<button aria-label="{name}" style="left:{x1}px;top:{y1}px;width:{x2 - x1}px;height:{y2 - y1}px;border:0;'
        f'border-radius:0;background:rgb{colours[name]}"></button>'
        for name, (x1, y1, x2, y2) in boxes.items()
    )
    image, elements, _, _ = see(browser, tmp_path, html, Viewport(400, 300, scale))
    assert image.shape == (300 * scale, 400 * scale, 3)
    assert set(elements) == set(boxes)
    for name, box in boxes.items():
        assert elements[name].box == pytest.approx([side * scale for side in box])
        assert elements[name].role == "button"
        assert elements[name].kind == "icon"
        rows, cols = np.nonzero((image == colours[name]).all(axis=2))
        seen = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
        assert elements[name].box == pytest.approx(seen, abs=0.51)


def test_elements_that_a_person_could_not_click_are_left_out_and_counted(browser: Browser, tmp_path: Path) -> None:
    html = """
      <button style="left:5px;top:5px;width:90px;height:30px">Plain</button>
      <button style="left:100px;top:5px;width:90px;height:30px">Covered</button>
      <div style="position:absolute;left:100px;top:5px;width:90px;height:30px;background:#ccc"></div>
      <button style="left:200px;top:5px;width:90px;height:30px">Half</button>
      <div style="position:absolute;left:200px;top:5px;width:40px;height:30px;background:#ccc"></div>
      <button style="left:300px;top:5px;width:3px;height:30px;padding:0;border:0">Thin</button>
      <button style="left:5px;top:50px;width:90px;height:30px" disabled>Off</button>
      <button style="left:100px;top:50px;width:90px;height:30px;visibility:hidden">Hidden</button>
      <button style="left:200px;top:50px;width:90px;height:30px;opacity:0">Clear</button>
      <button style="left:5px;top:285px;width:90px;height:30px">Edge</button>
      <button style="left:5px;top:500px;width:90px;height:30px">Below</button>
      <div style="position:absolute;left:5px;top:100px;width:60px;height:60px;overflow:hidden">
        <a href="#x" style="position:absolute;left:40px;top:5px;width:90px">Clipped</a></div>
      <a href="#card" style="position:absolute;left:100px;top:100px;width:90px;height:60px;background:#eee">Card
        <span role="button" style="position:absolute;left:20px;top:20px;width:50px;height:20px">Inner</span></a>
    """
    _, elements, dropped, _ = see(browser, tmp_path, html)
    assert set(elements) == {"Plain", "Inner"}
    assert dropped == {
        "occluded at its centre": 2,  # Covered, and the card whose middle is another button
        "partly covered": 1,
        "too small": 1,
        "disabled": 1,
        "hidden": 2,
        "cut off at an edge": 2,
        "outside the viewport": 1,
    }


def test_names_roles_kinds_and_headings_come_from_the_page(browser: Browser, tmp_path: Path) -> None:
    html = """<style>button{position:static}</style>
      <section><h2>Mail</h2><label for=q>Find</label><input id=q>
      <button title="Delete for ever"><svg width=20 height=20><rect width=20 height=20 /></svg></button>
      <button><svg width=20 height=20><title>Archive</title><rect width=20 height=20 /></svg></button>
      <button><span style="position:absolute;width:1px;height:1px;overflow:hidden">Star it</span>&#9733;</button>
      <a href="#n">Read more</a></section><label><input type=checkbox>Agree</label>"""
    _, elements, _, _ = see(browser, tmp_path, html)
    seen = {name: (e.role, e.kind, e.heading, e.function) for name, e in elements.items()}
    assert seen["Find"] == ("textbox", "icon", "Mail", "")
    assert seen["Delete for ever"] == ("button", "icon", "Mail", "Delete for ever")
    assert seen["Archive"][:2] == ("button", "icon")
    assert seen["Star it ★"][:2] == ("button", "icon")
    assert seen["Read more"] == ("link", "text", "Mail", "")
    assert seen["Agree"] == ("checkbox", "icon", "", "")


def test_a_page_reaches_neither_the_network_nor_other_files(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "link.css").symlink_to(tmp_path / "secret.txt")
    Image.new("RGB", (50, 50), (1, 200, 3)).save(folder / "inside.png")
    html = f"""<img src="inside.png"><img src="http://127.0.0.1:1/x.png"><img src="http://example.com/y.png">
      <img src="file://{tmp_path}/secret.txt"><img src="../secret.txt"><link rel=stylesheet href="link.css">
      <iframe src="http://example.org/"></iframe><script>document.body.innerHTML = "gone"</script>"""
    image, _, _, view = see(browser, folder, html)
    assert (image == (1, 200, 3)).all(axis=2).sum() == 2500
    assert view.blocked["outside the folder"] == 3
    assert view.blocked["missing file"] == 2  # ../secret.txt is resolved to /secret.txt; and the symbolic link
    assert "gone" not in str(view.evaluate("document.body.innerText"))


def test_the_network_is_dead_below_the_interception_too(browser: Browser, tmp_path: Path) -> None:
    """Without the request interception Chromium itself must still find no host: names, addresses and proxies."""
    tab = browser.new_tab()
    tab.start_clock(30)
    tab.call("Page.enable")
    for url in ("http://example.com/", "http://127.0.0.1:1/", "http://[::1]:1/", "https://1.1.1.1/"):
        assert tab.call("Page.navigate", {"url": url})["errorText"].startswith("net::ERR_")


def test_scripts_run_only_when_asked_for_and_cannot_leave_the_page(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text("<p>other</p>")
    html = """<button id=b style="width:90px;height:40px">Before</button><script>b.textContent = "After";
      setTimeout(() => { location.href = "other.html" }, 0); alert("stop");</script>"""
    assert set(see(browser, tmp_path, html)[1]) == {"Before"}
    _, elements, _, view = see(browser, tmp_path, html, javascript=True)
    assert set(elements) == {"After"}
    assert view.blocked["navigation"] >= 1


def _settings(**more: object) -> RenderSettings:
    return RenderSettings(viewports=(SMALL,), themes=("light",), **more)  # type: ignore[arg-type]


def test_a_page_that_hangs_or_crashes_is_listed_and_the_rest_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "site", tmp_path / "out"
    (out / "images").mkdir(parents=True)
    folder.mkdir()
    for name in ("a", "d"):
        (folder / f"{name}.html").write_text(f"{HEAD}<button style='width:80px;height:40px'>Go {name}</button>")
    (folder / "b.html").write_text(f"{HEAD}<script>for (;;) {{}}</script>")
    (folder / "c.html").write_text(f"{HEAD}<p>crash</p>")
    show = PageView.show

    def crash(view: PageView, page: str, viewport: Viewport, theme: str) -> None:
        show(view, page, viewport, theme)
        if page == "c.html":
            view.tab.call("Page.crash")

    monkeypatch.setattr(PageView, "show", crash)
    site = Site(folder)
    report = list(render(site, site.crawl(), out, _settings(javascript=True, page_timeout=4.0), set()))[-1]
    assert set(report.dropped_pages) == {"b.html", "c.html"}
    assert report.dropped_pages["b.html"].startswith("PageTimeoutError")
    assert report.dropped_pages["c.html"].startswith("PageCrashedError")
    assert report.num_pages == 4
    assert [json.loads(line)["metadata"]["name"] for line in (out / "train.jsonl").open()] == ["Go a", "Go d"]


def test_themes_scrolls_duplicates_and_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "site", tmp_path / "out"
    folder.mkdir()
    links = "".join(f"<p style='height:60px;margin:0'><a href='#{i}'>Link {i}</a></p>" for i in range(12))
    dark = "<style>@media(prefers-color-scheme:dark){body{background:#111}}</style>"
    (folder / "index.html").write_text(
        f"{HEAD}{dark}{links}<a href='plain.html'>Plain page</a><a href='../up.html'>Up</a>"
    )
    (folder / "plain.html").write_text(f"{HEAD}<a href='index.html'>Back to the start</a>")
    (folder / "unlinked.html").write_text(f"{HEAD}<a href='index.html'>Never seen</a>")
    command = [
        "render",
        str(folder),
        "--out",
        str(out),
        "--start",
        "index.html",
        "--viewports",
        "400x300",
        "--scrolls",
        "3",
    ]
    command += ["--eval-pages", "plain", "--max-elements", "50", "--sheet", "4"]
    assert main(command) == 0
    train = [json.loads(line) for line in (out / "train.jsonl").open()]
    held_out = [json.loads(line) for line in (out / "eval.jsonl").open()]
    report = json.loads((out / "report.json").read_text())
    assert {r["metadata"]["page"] for r in train} == {"index"}
    assert {r["metadata"]["page"] for r in held_out} == {"plain"}
    assert {(r["metadata"]["theme"], r["metadata"]["scroll"]) for r in train} == {
        (theme, scroll) for theme in ("light", "dark") for scroll in range(3)
    }
    assert report["dropped_images"] == {"same pixels as an earlier one": 1}  # plain.html knows no dark
    assert (out / "sheet.png").is_file()
    background = {}
    for record in train:
        with Image.open(out / record["messages"][0]["content"][0]["image"]) as image:
            background[record["metadata"]["theme"]] = image.convert("RGB").getpixel((399, 299))
    assert background == {"light": (255, 255, 255), "dark": (17, 17, 17)}
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_rendering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    pages = Path(__file__).parents[2] / "data_tools" / "pages"
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        options = ["--viewports", "390x844@2", "--max-pages", "2", "--sheet", "0", "--out", str(out)]
        assert main(["render", str(pages), *options]) == 0
    files = sorted(path.relative_to(outs[0]) for path in outs[0].rglob("*") if path.is_file())
    assert len(files) == 2 * 2 + 2
    for name in files:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name


def _chromium_processes(profile: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            if profile.encode() in line:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_chromium_ends_with_the_run_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    program = (
        "import signal, sys, time\nfrom data_tools.render.browser import Browser\n"
        "from data_tools.cli import _terminate\n"
        "signal.signal(signal.SIGTERM, _terminate)\n"
        "with Browser() as b:\n    print(b._profile, flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    profile = process.stdout.readline().strip()
    assert _chromium_processes(profile)
    os.kill(process.pid, how)
    process.wait(30)
    process.stdout.close()
    deadline = time.monotonic() + 20
    while _chromium_processes(profile) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _chromium_processes(profile)
    assert Path(profile).exists() == (how == signal.SIGKILL)


def test_a_missing_or_broken_chromium_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.html").write_text("<button>x</button>")
    assert main(["render", str(tmp_path), "--out", str(tmp_path / "o"), "--chromium", "/bin/false"]) == 2
    assert "/bin/false ended with code 1 while starting" in capsys.readouterr().err
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec sleep 60\n")
    mute.chmod(0o755)
    with pytest.raises(BrowserError, match="gave no DevTools port"), Browser(str(mute), start_timeout=0.2):
        pass


def test_pages_whose_names_differ_in_signs_only_keep_apart(tmp_path: Path) -> None:
    folder, out = tmp_path / "site", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    names = ["a b.html", "a-b.html", "A-B.html", "a-b.htm", "sub/a-b.html"]
    for number, name in enumerate(names):
        (folder / name).write_text(f"{HEAD}<button style='width:80px;height:40px'>Go {number}</button>")
    assert main(["render", str(folder), "--out", str(out), "--viewports", "400x300", "--sheet", "0"]) == 0
    records = [json.loads(line) for line in (out / "train.jsonl").open()]
    assert len({r["messages"][0]["content"][0]["image"] for r in records}) == len(names)
    assert len({r["id"] for r in records}) == len(names)
    assert len(list((out / "images").iterdir())) == len(names)


def test_a_killed_run_leaves_no_file_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.html").write_text(f"{HEAD}<button style='width:80px;height:40px'>Go {name}</button>")
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    site = Site(tmp_path)
    running = render(site, site.crawl(), out, _settings(), set())
    next(running)
    running.close()  # what SystemExit and KeyboardInterrupt do to it as well
    assert not (out / "train.jsonl").exists()
    assert [json.loads(line)["metadata"]["name"] for line in (out / "train.jsonl.partial").open()] == ["Go a"]
    assert main(["render", str(tmp_path), "--out", str(out)]) == 2


def test_what_is_covered_while_it_is_read_is_left_out(browser: Browser, tmp_path: Path, monkeypatch) -> None:
    places = {"Open": 10, "Close": 250}
    html = "".join(
        f'<button style="left:{x}px;top:20px;width:110px;height:40px">{n}</button>' for n, x in places.items()
    )
    (tmp_path / "page.html").write_text(HEAD + html, encoding="utf-8")
    view = PageView(browser.new_tab(), Site(tmp_path))
    view.tab.start_clock(60)
    view.show("page.html", SMALL, "light")
    screenshot = view.screenshot

    def covered_first() -> np.ndarray:
        cover = '<div style="position:fixed;left:0;top:0;width:200px;height:100px;background:red"></div>'
        view.tab.call("Runtime.evaluate", {"expression": f"document.body.insertAdjacentHTML('beforeend', '{cover}')"})
        return screenshot()

    monkeypatch.setattr(view, "screenshot", covered_first)
    image, elements, dropped = view.capture(SMALL)
    assert tuple(image[40, 60]) == (255, 0, 0), "the cover is in the picture"
    assert [element.name for element in elements if element.is_clickable] == ["Close"]
    assert dropped["moved or covered while it was read"] == 1
