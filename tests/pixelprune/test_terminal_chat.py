"""The chat of the terminal: what it prints is what the conversation answers, and nothing that is said ends it."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from pixelprune.__main__ import main
from pixelprune.command import plain_console
from pixelprune.command.terminal_chat import _Printer, as_text, chat
from pixelprune.conversation import Conversation
from tests.conftest import screen


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a screen.png"
    Image.fromarray(screen(8, 9, seed=1)).save(path)
    return path


def said(folder, images, lines: str, **options) -> list[str]:
    console = plain_console(width=200)
    console.file = io.StringIO()
    chat(str(folder), images, lines=io.StringIO(lines), console=console, max_new_tokens=4, **options)
    return console.file.getvalue().splitlines()


def test_answers_are_the_conversations_and_kept_blocks_are_said(toy_folder, toy_model, picture, capsys):
    conversation = Conversation(toy_model, str(toy_folder))
    image = {"type": "image", "image": str(picture)}
    answers = [
        conversation.ask([image, {"type": "text", "text": "Where?"}], max_new_tokens=4).text,
        conversation.ask([{"type": "text", "text": "And?"}], max_new_tokens=4).text,
    ]
    lines = said(toy_folder, [picture], f"Where?\n\n/image {picture.parent}/gone.png\n/what\nAnd?\n/quit\nnever read\n")
    text = "\n".join(lines)
    assert f"> Where?\n{as_text(answers[0])}\n" in text
    assert f"> And?\n{as_text(answers[1])}\n" in text
    (kept,) = [line for line in lines if "blocks kept" in line]
    (shown,) = conversation.images
    assert kept.startswith(f"{picture}: {shown.selection.num_kept} of {shown.num_full_blocks} blocks kept (")
    facts = [line for line in lines if "tokens in all" in line]
    assert facts[-1].startswith(f"{conversation.num_tokens} tokens in all; first token after ")
    assert "never read" not in text
    errors = capsys.readouterr().err
    assert "there is no" in errors
    assert "/what: expected /image PATH..." in errors


def test_a_bad_turn_goes_by_and_new_starts_over(toy_folder, picture, tmp_path, capsys):
    (tmp_path / "no.png").write_text("no image")
    first = said(toy_folder, [], f"/image {picture}\nWhere?\n")
    lines = said(toy_folder, [], f"/image {tmp_path}/no.png\nBroken?\n/new\n/image {picture}\nWhere?\n", strategy=None)
    assert "error:" in capsys.readouterr().err
    assert first[-3:-1] == lines[-3:-1], "the same answer and kept blocks"
    full = said(toy_folder, [picture], "Where?\n", strategy="none")
    assert "72 of 72 blocks kept (100.0%)" in "\n".join(full)


def test_a_run_stands_for_its_export_and_what_is_no_model_is_refused(tmp_path, toy_folder, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(toy_folder)
    assert said(tmp_path / "run", [], "")[0] == f"loading {tmp_path}/run/export"
    assert main(["chat", str(tmp_path)]) == 2
    assert "is not a loadable model folder" in capsys.readouterr().err
    assert main(["chat", str(toy_folder), str(tmp_path / "gone.png")]) == 2
    assert "there is no image" in capsys.readouterr().err


def test_what_a_terminal_would_obey_is_shown_and_half_characters_wait(tokenizer):
    assert as_text("a\x1b[2J\tb\r\n\u202e") == "a\\x1b[2J\tb\\x0d\n\\x202e"
    out = io.StringIO()
    printer = _Printer(tokenizer, out)
    ids = tokenizer("né ☃!", add_special_tokens=False)["input_ids"]
    printer.put(torch.tensor([[1, 2, 3]]))
    for number in ids:
        printer.put(torch.tensor([number]))
        assert "\ufffd" not in out.getvalue()
    printer.end()
    assert out.getvalue() == "né ☃!"
    assert printer.num_tokens == len(ids)
