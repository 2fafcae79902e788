"""What `training.inspect` prints and draws is what is trained on."""

import numpy as np
import pytest
import yaml
from PIL import Image

from pixelprune.images.image import prune_image
from pixelprune.settings import BLOCK, PruneSettings, ResizeSettings
from tests.samples import chat_row, write_jsonl
from training.data.inspection import render_tokens, spread
from training.inspect import main


@pytest.fixture
def recipe(screens, model_folder):
    content = {
        "run": {"folder": str(screens / "runs"), "name": "one"},
        "model": {"path": str(model_folder)},
        "data": {"sources": [{"path": str(screens / "train.jsonl")}]},
        "resize": {"min_pixels": 1024},
    }
    path = screens / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_prints_text_sizes_and_kept_blocks_and_draws_them(recipe, screens, capsys):
    assert main([str(recipe), "--num", "24", "data.num_workers=0"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    selection = prune_image(screens / "screen_0.png", PruneSettings(), ResizeSettings(min_pixels=1024)).selection
    assert f"<|vision_start|>[image 1: {selection.num_kept} tokens]<|vision_end|>Find 0<|im_end|>" in printed
    assert f"{selection.num_kept} of {selection.num_blocks} blocks kept" in printed
    pictures = sorted((screens / "runs" / "one" / "inspect").iterdir())
    assert len(pictures) == 16, "one picture per image"
    drawn = np.asarray(Image.open(screens / "runs" / "one" / "inspect" / "train-0-image1.png"))
    original = np.asarray(Image.open(screens / "screen_0.png"))
    for r in range(selection.keep.shape[0]):
        for c in range(selection.keep.shape[1]):
            where = np.s_[BLOCK * r : BLOCK * (r + 1), BLOCK * c : BLOCK * (c + 1)]
            assert np.array_equal(drawn[where], original[where]) == selection.keep[r, c]


def test_marks_exactly_what_is_supervised(preparer):
    prepared = preparer.prepare(chat_row(None, "Where?", "There."), None)
    text = render_tokens(prepared, preparer)
    marked = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert "".join(marked) == "There.<|im_end|>"
    assert text.plain == "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nThere.<|im_end|>\n"


def test_shows_why_a_record_is_quarantined(recipe, screens, capsys):
    write_jsonl(screens / "train.jsonl", [chat_row("none.png"), chat_row(None)])
    assert main([str(recipe)]) == 0
    assert "quarantined: missing_file" in capsys.readouterr().out


def test_says_which_keys_were_read_ignored_and_refused(recipe, screens, capsys):
    rows = [chat_row(None) | {"id": 1}, chat_row(None) | {"mood": "good"}, chat_row(None) | {"surprise": 1}]
    write_jsonl(screens / "train.jsonl", rows)
    assert main([str(recipe), "data.ignore_keys=[mood]"]) == 0
    printed = capsys.readouterr().out
    assert "train: keys of 3 of 3 records" in printed
    assert "read: record messages 3; turn content 4, role 4; part text 2, type 2" in printed
    assert "ignored: record id 1, mood 1" in printed
    assert "refused: record surprise 1" in printed
    assert main([str(recipe), "data.ignore_keys=[messages]"]) == 2
    assert "data.ignore_keys" in capsys.readouterr().err


def test_user_errors_are_one_line(recipe, capsys):
    assert main([str(recipe), "data.sources.0.path=none.jsonl"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(recipe), "model.path=/none"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_spread_covers_the_source():
    assert spread(100, 3) == [0, 50, 99]
    assert spread(2, 5) == [0, 1]
