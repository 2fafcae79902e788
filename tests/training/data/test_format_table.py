"""Every row of the format table in docs/data.md: its example is read as the row says, or refused as it says."""

import base64
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from pixelprune.records.chat import ChatEncoder
from pixelprune.records.prepare import Preparer
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, RecordError
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.pixelprune.records.agent_templates import TEMPLATES
from tests.samples import draw_screen

DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"
TABLE = DOCUMENT.read_text().partition("## Formats")[2].partition("\n## ")[0]
ROWS = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| `(\{.*\})` \| [^|]+ \|$", TABLE, flags=re.MULTILINE))

IMAGE = "an image"
ASKED = ("user", [IMAGE, "Where?"])
PLAIN = [ASKED, ("assistant", ["There."])]
CALLED = [ASKED, ("assistant", []), ("tool", ["a menu"]), ("assistant", ["There."])]
READ = {
    "messages": PLAIN,
    "messages, OpenAI": PLAIN,
    "messages, Anthropic": PLAIN,
    "messages, marked": PLAIN,
    "messages, images apart": PLAIN,
    "messages, `value` parts": PLAIN,
    "ShareGPT": PLAIN,
    "ShareGPT, inline": PLAIN,
    "prompt and completion": PLAIN,
    "query and response": [("user", ["Hello"]), ("assistant", ["Hi"]), *PLAIN],
    "Alpaca": [("user", [IMAGE, "Where?\nOn the left."]), PLAIN[1]],
    "system prompt": [("system", ["Be brief."]), *PLAIN],
    "tool calls": CALLED,
    "tool turns": CALLED,
    "reasoning": PLAIN,
    "turns left out": [ASKED, ("assistant", ["Here."]), ("user", ["No."]), PLAIN[1]],
    "sizes": PLAIN,
    "objects": [("user", [IMAGE, "Find the menu."]), ("assistant", ["[100, 200, 300, 400]"])],
}
REFUSED = {"preferences": "preference_data", "video, audio": "unread_key"}
"""Row -> the conversation of its example, or the reason that it is refused for."""
_CALL = '<tool_call>\n{"name": "look", "arguments": {"x": 3}}\n</tool_call>'
SUPERVISED = {
    "query and response": ["Hi", "There."],
    "objects": ["[100, 200, 300, 400]"],
    "reasoning": ["On the left.\n</think>\n\nThere."],
    "tool calls": [_CALL, "There."],
    "tool turns": [_CALL, "There."],
}
"""What is trained on, each with its end token; "There." alone in all other rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("formats")
    draw_screen(1).save(made / "a.png")
    return made


def example(name, folder):
    picture = base64.b64encode((folder / "a.png").read_bytes()).decode()
    return json.loads(ROWS[name].replace('"data": "PNG"', f'"data": "{picture}"'))


def conversation(record):
    return [
        (message.role, [IMAGE if isinstance(part, ImageRef) else part for part in message.parts])
        for message in record.messages
    ]


def test_the_table_has_these_rows_and_no_others():
    assert len(re.findall(r"^\| ", TABLE, flags=re.MULTILINE)) == len(ROWS) + 1, "and its head"
    assert set(ROWS) == set(READ) | set(REFUSED)
    assert set(SUPERVISED) <= set(READ)


@pytest.mark.parametrize("name", READ)
def test_an_example_is_read_and_trained_on_as_its_row_says(name, folder, tokenizer, image_token_id):
    chat_template = TEMPLATES["thinking" if name == "reasoning" else "instruct"]
    own = copy.deepcopy(tokenizer)
    own.chat_template = chat_template
    preparer = Preparer(ChatEncoder(own), PruneSettings(), ResizeSettings(min_pixels=32 * 32), image_token_id)
    made = preparer.prepare(example(name, folder), folder)
    assert conversation(made.record) == READ[name]
    ids, supervised = made.sample.input_ids, made.sample.supervised
    edges = np.flatnonzero(np.diff(np.concatenate([[False], supervised, [False]]).astype(int)))
    pieces = [own.decode(ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    assert pieces == [f"{piece}<|im_end|>" for piece in SUPERVISED.get(name, ["There."])]
    assert [image.original_size for image in made.sample.images] == [(128, 192)]
    assert (made.sample.images[0].num_full_blocks == 24) == (name != "sizes"), "192 x 128 pixels, unless sized"
    assert bool(made.record.tools) == name.startswith("tool")
    assert [m.reasoning for m in made.record.messages if m.reasoning] == ["On the left."] * (name == "reasoning")


@pytest.mark.parametrize("name", REFUSED)
def test_an_example_is_refused_as_its_row_says(name, folder):
    with pytest.raises(RecordError) as caught:
        parse_record(example(name, folder))
    assert caught.value.reason == REFUSED[name]
