"""Prompt presets: what is asked is what the preset says, in training and in evaluation, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pixelprune.prompter import Prompter
from pixelprune.records.prepare import PrepareSettings
from pixelprune.records.presets import PRESETS, Preset, get_preset
from pixelprune.records.reader import parse_record
from pixelprune.records.record import RecordError
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.conftest import screen
from training.data.index_builder import build_index
from training.data.settings import SourceSettings
from training.data.sources import open_sources
from training.evaluation.answering import prepare_task, read_tasks


def row(*texts: str, system: bool = False) -> dict:
    content = [{"type": "image", "image": "a.png"}, *({"type": "text", "text": text} for text in texts)]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    if system:
        messages.insert(0, {"role": "system", "content": "Be short."})
    return {"messages": messages, "metadata": {"scorer": "exact", "answers": ["yes"]}}


def test_a_preset_is_written_around_the_question_and_touches_nothing_else():
    record = parse_record(row("Is {question} it {x}?"))
    asked = Preset("Be kind.", "Q: {question}!").apply(record)
    assert [message.role for message in asked.messages] == ["system", "user", "assistant"]
    assert asked.messages[0].text == "Be kind."
    assert asked.messages[1].text == "Q: Is {question} it {x}?!", "braces of a record are its own"
    assert asked.messages[1].parts[0] is record.messages[0].parts[0]
    assert asked.messages[2] == record.messages[1]
    assert asked.metadata == record.metadata
    assert get_preset("as_recorded").apply(record) == record


def test_what_cannot_be_asked_that_way_is_refused():
    with pytest.raises(RecordError, match="so has its prompt preset"):
        PRESETS["computer_use"].apply(parse_record(row("Click.", system=True)))
    with pytest.raises(RecordError, match="in 2 pieces"):
        PRESETS["short_answer"].apply(parse_record(row("Click", "here")))
    assert PRESETS["as_recorded"].apply(parse_record(row("Click", "here", system=True)))
    with pytest.raises(ValueError, match="prompt: expected one of as_recorded, computer_use"):
        SourceSettings("a.jsonl", prompt="points")
    with pytest.raises(ValueError, match=r"expected \{question\} once"):
        SourceSettings("a.jsonl", template="What?")


def test_the_tool_prompt_holds_a_tool():
    text = PRESETS["computer_use"].system
    tool = json.loads(text.split("<tools>\n")[1].split("\n</tools>")[0])
    assert tool["function"]["name"] == "computer_use"
    assert set(tool["function"]["parameters"]["properties"]) == {"action", "coordinate"}


def test_training_and_evaluation_ask_the_same(toy_folder, tmp_path: Path):
    """The prompt that is answered is what stands in front of the trained answer; the index knows the preset."""
    Image.fromarray(screen(3, 3)).save(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text(json.dumps(row("Is it?")) + "\n")
    resize = ResizeSettings(min_pixels=1024)
    settings = PrepareSettings(str(toy_folder), PruneSettings(), resize)
    preparer = settings.build()
    prompter = Prompter.load(str(toy_folder), prune=PruneSettings(), resize=resize)
    prompts = {}
    for name in ("as_recorded", "short_answer", "computer_use"):
        source = SourceSettings(str(tmp_path / "a.jsonl"), prompt=name)
        tasks, refused = read_tasks([source])
        assert not refused
        asked = prepare_task(tasks[0], prompter, {}).samples[0].input_ids
        opened = open_sources([source])[0]
        trained = preparer.prepare(opened.rows[0], opened.root, preset=source.preset()).sample
        assert trained.input_ids[: len(asked)].tolist() == asked.tolist()
        index = build_index([source], settings, num_workers=0, show_progress=False)
        assert (index.text_tokens + index.kept_blocks).tolist() == [len(trained)]
        prompts[name] = (len(asked), tasks[0].fingerprint)
    assert len(set(prompts.values())) == 3
    assert prompts["computer_use"][0] > prompts["short_answer"][0] > prompts["as_recorded"][0]
