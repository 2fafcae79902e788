"""`python -m pixelprune stats` and `show`, through their entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelprune.__main__ import main
from pixelprune.selection import registry, select
from pixelprune.selection.baselines import budget_size
from pixelprune.selection.overlay import draw_overlay
from pixelprune.sessions import select_session
from tests.pixelprune.selection_reference import page
from tests.samples import draw_walk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        Image.fromarray(page(320, 640, seed=seed)).save(folder / f"page{seed}.png")
    return folder


def test_stats_as_json(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    arguments = ["stats", str(folder), "--json", "--strategies", "pred2d", "raster", "--thresholds", "0", "0.05"]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["num_images"] == 3
    assert summary["num_blocks"] == 3 * 200
    kept = [select(page(320, 640, seed=seed)).num_kept for seed in range(3)]
    near = [select(page(320, 640, seed=seed), strategy="raster", threshold=0.05).num_kept for seed in range(3)]
    assert [image["kept_blocks"]["pred2d"] for image in summary["images"]] == kept
    assert summary["retain_ratio"]["pred2d"] == sum(kept) / 600
    assert summary["retain_ratio"]["raster max <= 0.05"] == sum(near) / 600
    assert [Path(entry["path"]).name for entry in summary["unreadable"]] == ["broken.png"]


def test_stats_as_tables(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (folder / "broken.png").write_bytes(b"")
    assert main(["stats", str(folder), "--extremes", "1"]) == 0
    text = capsys.readouterr().out
    kept = [select(page(320, 640, seed=seed)).num_kept for seed in range(3)]
    assert "3 images, 600 blocks; mean size 640 x 320 as stored" in text
    assert f"{sum(kept) / 600:.2%}" in text
    best, worst = min(range(3), key=kept.__getitem__), max(range(3), key=kept.__getitem__)
    assert f"page{best}.png" in text
    assert f"page{worst}.png" in text
    assert text.rstrip().endswith("broken.png: the file is empty")
    assert "1 could not be read" in text


def test_stats_of_one_image_lists_it(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["stats", str(folder / "page1.png")]) == 0
    assert "1 images, 200 blocks" in capsys.readouterr().out


def test_stats_without_any_readable_image_fails(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["stats", str(tmp_path / "gone.png")]) == 2
    assert "gone.png: no such file" in capsys.readouterr().out
    assert main(["stats", str(tmp_path)]) == 2
    assert "no PNG, JPEG or WebP image below" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--thresholds", "5"], "expected 0..1"),
        (["--threads", "0"], "--threads"),
        (["--min-pixels", "0"], "min_pixels"),
    ],
)
def test_wrong_values_are_one_clear_line(folder: Path, extra: list[str], words: str, capsys) -> None:
    code = main(["stats", str(folder), *extra])
    captured = capsys.readouterr()
    if words == "min_pixels":  # the size rule refuses each image, so each is listed with the reason
        assert code == 2
        assert captured.out.count("min_pixels") == 3
    else:
        assert code == 2
        assert words in captured.err
        assert captured.err.count("\n") == 1


def test_show_draws_every_rule(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image, path, output = page(), tmp_path / "page.png", tmp_path / "sheet.png"
    Image.fromarray(image).save(path)
    arguments = ["show", str(path), "-o", str(output), "--strategies", "pred2d", "none", "--min-pixels", "1024"]
    assert main([*arguments, "--thresholds", "0", "0.05"]) == 0
    assert "sheet.png" in capsys.readouterr().out.replace("\n", "")
    sheet = np.asarray(Image.open(output))
    for panel in (draw_overlay(image, select(image)), draw_overlay(image, select(image, threshold=0.05)), image):
        height, width = panel.shape[:2]
        corners = np.argwhere((sheet[:-height, :-width] == panel[0, 0]).all(axis=-1))
        assert any(np.array_equal(sheet[r : r + height, c : c + width], panel) for r, c in corners)


def test_a_folder_and_the_images_shown_are_sessions_for_pred3d(tmp_path: Path, capsys) -> None:
    walks = {"a": draw_walk(3, 1), "b": draw_walk(2, 2)}
    for name, pictures in walks.items():
        (tmp_path / name).mkdir()
        for step, picture in enumerate(pictures):
            picture.save(tmp_path / name / f"{step}.png")
    (tmp_path / "a" / "1-broken.png").write_bytes(b"no picture")
    sizes = ["--min-pixels", "1024", "--strategies", "pred3d", "pred2d", "--directions", "backward", "forward"]
    assert main(["stats", str(tmp_path), "--json", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["unreadable"]) == 1
    expected = {}
    for direction in ("backward", "forward"):
        options = {"direction": direction, "keep_replaced": direction == "forward"}
        expected[direction] = [
            one for pictures in walks.values() for one in select_session(list(map(np.asarray, pictures)), **options)
        ]
        kept = [image["kept_blocks"][f"pred3d {direction}"] for image in found["images"]]
        assert kept == [one.num_kept for one in expected[direction]]
        assert sum(kept) < sum(image["kept_blocks"]["pred2d"] for image in found["images"])
    sheet, shown = tmp_path / "sheet.png", [str(tmp_path / "a" / f"{step}.png") for step in range(3)]
    assert main(["show", *shown, "-o", str(sheet), *sizes[:4], "--directions", "forward"]) == 0
    pixels = np.asarray(Image.open(sheet))
    for picture, one in zip(walks["a"], expected["forward"], strict=False):
        panel = draw_overlay(np.asarray(picture), one)
        corners = np.argwhere((pixels[: -panel.shape[0], : -panel.shape[1]] == panel[0, 0]).all(axis=-1))
        assert any(np.array_equal(pixels[r : r + panel.shape[0], c : c + panel.shape[1]], panel) for r, c in corners)
    capsys.readouterr()
    assert main(["stats", str(tmp_path), "--directions", "forward"]) == 2
    assert "--directions: belongs to --strategies pred3d" in capsys.readouterr().err


def test_records_of_a_file_are_measured_and_drawn_with_their_conversations(tmp_path: Path, capsys) -> None:
    pictures = draw_walk(3, 1)
    (tmp_path / "images").mkdir()
    for step, picture in enumerate(pictures):
        picture.save(tmp_path / "images" / f"{step}.png")

    def line(*parts: dict) -> str:
        return json.dumps({"messages": [{"role": "user", "content": list(parts)}]}) + "\n"

    images = [{"type": "image", "image": f"{step}.png"} for step in range(3)]
    cut = [images[0], images[1], {**images[2], "new_session": True}]
    lines = [line(*images), "{broken\n", line(*cut), line({"type": "text", "text": "no image"})]
    (tmp_path / "records.jsonl").write_text("".join(lines))
    sizes = ["--min-pixels", "1024", "--strategies", "pred3d", "pred2d", "--directions", "forward"]
    root = ["--root", str(tmp_path / "images")]
    assert main(["stats", str(tmp_path / "records.jsonl"), "--json", *sizes, *root]) == 0
    found = json.loads(capsys.readouterr().out)
    session = list(map(np.asarray, pictures))
    whole, parted = (
        select_session(session, direction="forward", keep_replaced=True, borders=borders) for borders in ([], [2])
    )
    assert [image["kept_blocks"]["pred3d forward"] for image in found["images"]] == [
        one.num_kept for one in (*whole, *parted)
    ]
    assert [image["path"].split()[-1] for image in found["images"]] == ["0.png", "1.png", "2.png"] * 2
    assert len(found["unreadable"]) == 1
    assert "line 2: not a line of JSON" in found["unreadable"][0]["reason"]
    sheet = tmp_path / "sheet.png"
    assert main(["show", str(tmp_path / "records.jsonl"), "--line", "3", "-o", str(sheet), *sizes, *root]) == 0
    pixels, panel = np.asarray(Image.open(sheet)), draw_overlay(session[1], parted[1])
    corners = np.argwhere((pixels[: -panel.shape[0], : -panel.shape[1]] == panel[0, 0]).all(axis=-1))
    assert any(np.array_equal(pixels[r : r + panel.shape[0], c : c + panel.shape[1]], panel) for r, c in corners)
    capsys.readouterr()
    for wrong, said in (
        (["show", str(tmp_path / "records.jsonl"), "--line", "9", "-o", str(sheet)], "no record in line 9"),
        (["show", str(tmp_path / "records.jsonl"), "--line", "4", "-o", str(sheet)], "the record has no image"),
        (["show", str(tmp_path / "images" / "0.png"), "-o", str(sheet), *root], "--root: belongs to JSONL files"),
    ):
        assert main(wrong) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_every_registered_strategy_is_offered(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that a file of its own adds; `resize`, which has no mask, keeps the blocks that fit pred2d's budget."""
    monkeypatch.setattr(registry, "_STRATEGIES", {**registry._STRATEGIES})
    registry.register("half")(lambda image, settings, block: select(image, strategy="none", block=block))
    names = registry.strategy_names()
    assert {"half", "resize", "pred2d"} <= set(names)
    assert main(["stats", str(folder), "--json", "--strategies", *names]) == 0
    for seed, image in enumerate(json.loads(capsys.readouterr().out)["images"]):
        kept = image["kept_blocks"]
        assert list(kept) == names
        pixels = page(320, 640, seed=seed)
        rows, cols = (side // 32 for side in budget_size(320, 640, select(pixels).num_kept))
        assert kept["resize"] == rows * cols <= kept["pred2d"] < kept["none"] == kept["half"] == 200


def test_show_draws_what_resize_leaves_at_the_size_of_the_others(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "sheet.png"
    assert main(["show", str(folder / "page0.png"), "-o", str(output), "--strategies", "resize"]) == 0
    plain = Image.fromarray(page(320, 640))
    height, width = budget_size(320, 640, select(np.asarray(plain)).num_kept)
    shrunk = plain.resize((width, height), Image.Resampling.BICUBIC).resize((640, 320), Image.Resampling.BICUBIC)
    assert shrunk != plain
    sheet, panel = np.asarray(Image.open(output)), np.asarray(shrunk)
    corners = np.argwhere((sheet[: -320 + 1, : -640 + 1] == panel[0, 0]).all(axis=-1))
    assert any(np.array_equal(sheet[r : r + 320, c : c + 640], panel) for r, c in corners)


def test_show_refuses_what_it_cannot_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = str(tmp_path / "sheet.png")
    assert main(["show", str(folder / "gone.png"), "-o", output]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["show", str(folder / "page0.png"), "-o", output, "--panel-width", "3"]) == 2
    assert not Path(output).exists()
    capsys.readouterr()
    assert main(["show", str(folder / "page0.png"), "-o", str(folder / "page1.png" / "sheet.png")]) == 2
    err = capsys.readouterr().err
    assert "page1.png" in err
    assert err.count("\n") == 1


def test_the_module_runs_and_names_its_choices() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pixelprune", "stats", "x", "--strategies", "zip"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pred2d" in done.stderr
