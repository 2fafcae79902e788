"""What a record may cost: files are looked at before they are read, work is linear, limits come before work."""

import os
import random
import re
import signal
import socket
from contextlib import contextmanager

import pytest

from pixelprune.images.image import decode_image
from pixelprune.images.image_file import ImageError, read_image_file
from pixelprune.records import marks, prepare
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.images import read_image
from pixelprune.records.limits import RecordLimits
from pixelprune.records.marks import image_marks
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, RecordError
from pixelprune.settings import ResizeSettings
from tests.pixelprune.records.agent_templates import TEMPLATES
from tests.pixelprune.records.test_chat import REASONING, REFUSING, REWRITING, by_hand
from tests.samples import draw_screen, encode
from training.composition.toy import build_tokenizer

# ---- files ----


@contextmanager
def not_for_ever(seconds: int = 60):
    """An open that waits for ever ends the test and not the suite; nothing depends on how fast the machine is."""

    def give_up(*_):
        raise AssertionError("still waiting for a file that is none")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def special_files(folder):
    """name -> what a message calls it, for all that this machine allows to be made."""
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket.png"))
    made = {"fifo.png": "a FIFO", "folder.png": "a folder", "socket.png": "a socket"}
    for name, kind, number in (("zero.png", "a character device", (1, 5)), ("disk.png", "a block device", (7, 250))):
        mode = 0o020600 if "character" in kind else 0o060600
        try:
            os.mknod(folder / name, mode, os.makedev(*number))
        except PermissionError:
            continue
        made[name] = kind
    return made


def test_only_regular_files_are_opened(tmp_path):
    with not_for_ever():
        for name, kind in special_files(tmp_path).items():
            for read in (
                lambda name=name: read_image(ImageRef(name), tmp_path),
                lambda name=name: decode_image(tmp_path / name, ResizeSettings()),
            ):
                with pytest.raises(
                    (RecordError, ImageError), match=f"{name}.*it is {kind}, expected a regular file"
                ) as e:
                    read()
                assert e.value.reason == "unreadable_file"


def test_a_file_that_becomes_a_fifo_between_look_and_open_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    regular = os.stat(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    monkeypatch.setattr("pixelprune.images.image_file.os.stat", lambda path: regular)
    with not_for_ever(), pytest.raises(ImageError, match="it is a FIFO"):
        read_image_file(tmp_path / "a.png", "a.png")


def test_size_and_first_bytes_are_looked_at_before_a_file_is_read(tmp_path):
    """Neither file would fit into any memory: had one been read, the reason would be another."""
    png = encode(draw_screen(1))
    for name, content in (("huge.png", png), ("text.png", b"no image at all, ")):
        (tmp_path / name).write_bytes(content)
        os.truncate(tmp_path / name, 1 << 42)
    for name, limit, reason in (
        ("huge.png", 1 << 30, "file_too_large"),
        ("text.png", 1 << 43, "not_an_image"),
    ):
        with pytest.raises(RecordError) as caught:
            read_image(ImageRef(name), tmp_path, limit)
        assert caught.value.reason == reason
    (tmp_path / "a.png").write_bytes(png)
    assert read_image(ImageRef("a.png"), tmp_path, len(png)) == png
    for ref in (ImageRef("a.png"), ImageRef(png)):
        with pytest.raises(RecordError, match=f"data.max_file_bytes={len(png) - 1}") as caught:
            read_image(ref, tmp_path, len(png) - 1)
        assert caught.value.reason == "file_too_large"


# ---- marks ----

OLD_RULE = re.compile(r"<image>|<img>(.*?)</img>", re.DOTALL)
"""What marks meant before they were read in linear time: quadratic in unclosed ones, and the reference for the rest."""


def test_marks_are_those_of_the_rule():
    rng = random.Random(3)
    for _ in range(3000):
        pieces = ["<image>", "<img>", "</img>", "<im", "g>", "</", "a.png", "\n", " "]
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        assert list(image_marks(text)) == [(m.start(), m.end(), m.group(1)) for m in OLD_RULE.finditer(text)], text


class Counted(str):
    """A text that counts the characters that are searched in it."""

    searched = 0

    def find(self, wanted, start=0):
        found = super().find(wanted, start)
        Counted.searched += (found if found >= 0 else len(self)) - start
        return found


class CountedPattern:
    def __init__(self, pattern):
        self.pattern = pattern

    def search(self, text, start=0):
        found = self.pattern.search(text, start)
        Counted.searched += (found.end() if found else len(text)) - start
        return found

    def finditer(self, text, start=0):
        Counted.searched += len(text) - start
        return self.pattern.finditer(text, start)


@pytest.mark.parametrize("unit", ["<img>", "<img>a</img>", "<image>", "<img><image>", "</img><img>", "<img", "x"])
def test_marks_are_found_in_linear_time(monkeypatch, unit):
    for name in ("_MARK", "_TAKES_NEXT"):
        monkeypatch.setattr(marks, name, CountedPattern(getattr(marks, name)))
    text = Counted(unit * 20_000)
    Counted.searched = 0
    for _ in image_marks(text):
        pass
    assert 0 < Counted.searched <= 3 * len(text)


# ---- turns ----


def long_conversation(num_turns: int):
    roles = ["user", "assistant"] * (num_turns // 2)
    return [(role, f"text {i}") for i, role in enumerate(roles)]


def count_renderings(encoder, rendered, monkeypatch):
    """Turns of every rendering, appended to `rendered`."""
    original = encoder._rendering.text
    counted = lambda turns, **options: (rendered.append(len(turns)), original(turns, **options))[1]  # noqa: E731
    monkeypatch.setattr(encoder._rendering, "text", counted)


def test_a_template_renders_many_turns_a_few_times(tokenizer, monkeypatch):
    rendered = []
    encoder = ChatEncoder(tokenizer)
    count_renderings(encoder, rendered, monkeypatch)
    turns = long_conversation(400)
    chat = encoder.encode(parse_record({"messages": [{"role": role, "content": text} for role, text in turns]}))
    ids, supervised = by_hand(tokenizer, turns)
    assert (chat.input_ids.tolist(), chat.supervised.tolist()) == (ids, supervised)
    assert sum(rendered) <= 4 * len(turns), f"{sum(rendered)} turns rendered for {len(turns)}"


CONTENTS = [
    "a",
    " a b ",
    "q",
    "z",
    "\nq\n\n",
    "qz" * 5,
    "</think>",
    "<think>\nso\n</think>\n\nyes",
    "é 🙂",
    "assistant\n",
    "x\n",
]


OWN_TEMPLATES = {"reasoning": REASONING, "rewriting": REWRITING, "refusing": REFUSING}


def agents_turn(rng: random.Random, number: int, *, reasons: bool) -> list[dict]:
    """An answer that calls a tool or reasons, and the tool's answer."""
    call = {"type": "function", "function": {"name": "go", "arguments": {"to": rng.choice(["a", "<b>", number])}}}
    said = {"role": "assistant", "content": rng.choice(["", *CONTENTS]), "loss": rng.random() < 0.8}
    if reasons and rng.random() < 0.5:
        said["reasoning_content"] = rng.choice(["so", " q", "z\n\n", "a\nb"])
    if rng.random() < 0.7:
        return [said | {"tool_calls": [call]}, {"role": "tool", "content": rng.choice(CONTENTS)}]
    return [said, {"role": "user", "content": rng.choice(CONTENTS)}]


@pytest.mark.parametrize("empty_is_supervised", [True, False])
@pytest.mark.parametrize("name", ["toy", *OWN_TEMPLATES, *TEMPLATES])
def test_all_answers_at_once_stand_where_they_stand_one_by_one(tokenizer, monkeypatch, name, empty_is_supervised):
    """Same text and spans, or the same refusal, as from rendering up to each answer and around it."""
    template = {"toy": tokenizer.chat_template, **OWN_TEMPLATES, **TEMPLATES}[name]
    own = build_tokenizer()
    own.chat_template = template
    encoder = ChatEncoder(own, supervise_empty_reasoning=empty_is_supervised)
    rng = random.Random(5)

    def outcome(record):
        try:
            return encoder.render(record)
        except RecordError as error:
            return str(error)

    found = []

    def noted(way: str):
        original = getattr(encoder.places, way)
        return lambda *args: (found.append((way, bool(spans := original(*args)))), spans)[1]

    ways = ("_plain_spans", "_rich_spans")
    for k in range(250):
        messages = [{"role": "system", "content": "s"}] if rng.random() < 0.3 else []
        for number in range(rng.randint(2, 6)):
            if k % 2 and number:
                messages += agents_turn(rng, number, reasons=k % 4 == 1)
                continue
            messages.append({"role": "user", "content": rng.choice(CONTENTS)})
            messages.append({"role": "assistant", "content": rng.choice(CONTENTS), "loss": rng.random() < 0.8})
        if messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": rng.choice(CONTENTS)})
        try:
            record = parse_record({"messages": messages})
        except RecordError:
            continue
        with monkeypatch.context() as patched:
            for way in ways:
                patched.setattr(encoder.places, way, lambda *args: {})
            one_by_one = outcome(record)
        with monkeypatch.context() as patched:
            for way in ways:
                patched.setattr(encoder.places, way, noted(way))
            assert outcome(record) == one_by_one, messages
    if name not in ("rewriting", "refusing"):
        assert found.count(("_plain_spans", True)) >= 20, "the way that is tested was hardly taken"
    if name in TEMPLATES:
        assert found.count(("_rich_spans", True)) >= 20, "the way that is tested was hardly taken"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_session_with_calls_renders_a_few_times(monkeypatch, name):
    own = build_tokenizer()
    own.chat_template = TEMPLATES[name]
    encoder = ChatEncoder(own)
    encoder.encode(parse_record(session(2)))  # the template's own facts are asked once
    rendered = []
    count_renderings(encoder, rendered, monkeypatch)
    record = parse_record(session(200))
    chat = encoder.encode(record)
    assert sum(rendered) <= 8 * len(record.messages), f"{sum(rendered)} turns rendered for {len(record.messages)}"
    written = own.decode(chat.input_ids[chat.supervised])
    assert [written.count(f"say {i}.") for i in range(200)] == [1] * 200
    assert "asked" not in written


def session(num_calls: int) -> dict:
    messages = [{"role": "user", "content": "asked"}]
    for i in range(num_calls):
        call = {"type": "function", "function": {"name": "go", "arguments": {"to": i}}}
        messages.append({"role": "assistant", "content": f"I say {i}.", "tool_calls": [call]})
        messages.append({"role": "tool", "content": f"asked {i}"})
    return {"messages": [*messages, {"role": "assistant", "content": "Done."}]}


# ---- limits ----


def test_limits_come_before_work(preparer, tmp_path, monkeypatch):
    monkeypatch.setattr(ChatEncoder, "encode", lambda *args: pytest.fail("rendered"))
    monkeypatch.setattr(prepare, "read_image", lambda *args: pytest.fail("read"))
    many_images = {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}] * 500}, {"role": "assistant", "content": "b"},
    ]}  # fmt: skip
    many_turns = {"messages": [{"role": role, "content": text} for role, text in long_conversation(2000)]}
    long_text = {"messages": [{"role": "user", "content": "x" * 2_000_001}, {"role": "assistant", "content": "b"}]}
    for row, said in (
        (many_images, "500 images, more than data.max_images=256"),
        (many_turns, "2000 turns, more than data.max_turns=1000"),
        (long_text, "2000002 characters, more than data.max_text_chars=2000000"),
    ):
        with pytest.raises(RecordError, match=said) as caught:
            preparer.prepare(row, tmp_path)
        assert caught.value.reason == "too_large"


def test_a_record_at_its_limits_is_within_them():
    record = parse_record({"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]})
    RecordLimits(max_text_chars=5, max_turns=2, max_images=0).check(record)
    for less in ({"max_text_chars": 4}, {"max_turns": 1}):
        with pytest.raises(RecordError, match=next(iter(less))):
            RecordLimits(**less).check(record)
