"""AndroidControl's episodes, written by the protobuf library in the published messages."""

import gzip
import io
import json
import struct
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from data_tools.cli import main
from data_tools.convert.corpora.tfrecord import iter_examples
from pixelprune.records.reader import parse_record

FIELD = descriptor_pb2.FieldDescriptorProto


def messages():
    """tf.train.Example, put together from its published fields."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = (("BytesList", FIELD.TYPE_BYTES), ("FloatList", FIELD.TYPE_FLOAT), ("Int64List", FIELD.TYPE_INT64))
    for name, kind in kinds:
        message = file.message_type.add(name=name)
        message.field.add(name="value", number=1, type=kind, label=FIELD.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    for number, (name, _) in enumerate(kinds, start=1):
        feature.field.add(
            name=f"list{number}", number=number, type=FIELD.TYPE_MESSAGE, type_name=f".t.{name}",
            label=FIELD.LABEL_OPTIONAL,
        )  # fmt: skip
    entry = file.message_type.add(name="Entry")  # what a map is on the wire
    entry.field.add(name="key", number=1, type=FIELD.TYPE_STRING, label=FIELD.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=FIELD.TYPE_MESSAGE, type_name=".t.Feature", label=FIELD.LABEL_OPTIONAL)
    for name, inner in (("Features", "Entry"), ("Example", "Features")):
        label = FIELD.LABEL_REPEATED if inner == "Entry" else FIELD.LABEL_OPTIONAL
        message = file.message_type.add(name=name)
        message.field.add(name="feature", number=1, type=FIELD.TYPE_MESSAGE, type_name=f".t.{inner}", label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


EXAMPLE = messages()


def encoded(fields: dict) -> bytes:
    example = EXAMPLE()
    for name, values in fields.items():
        entry = example.feature.feature.add(key=name)
        kind = "list3" if isinstance(values[0], int) else "list2" if isinstance(values[0], float) else "list1"
        getattr(entry.value, kind).value.extend(values)
    return example.SerializeToString()


def write_records(path: Path, examples: list[bytes]) -> Path:
    framed = b"".join(struct.pack("<QI", len(data), 0) + data + b"\0" * 4 for data in examples)
    path.write_bytes(gzip.compress(framed))
    return path


def screenshot(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (200, 400), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


ACTIONS = [
    {"action_type": "click", "x": 100, "y": 100},
    {"action_type": "input_text", "text": "Käse (x=1)"},
    {"action_type": "long_press", "x": 50, "y": 400},
]


def episode(number: int = -7, actions=ACTIONS, **more) -> bytes:
    fields = {
        "episode_id": [number],
        "goal": [b"Buy cheese."],
        "screenshots": [screenshot(shade) for shade in range(len(actions) + 1)],
        "accessibility_trees": [b"\x08\x01"],
        "screenshot_widths": [200] * (len(actions) + 1),
        "actions": [json.dumps(action).encode() for action in actions],
        "step_instructions": [f"Step {i}".encode() for i in range(len(actions))],
        "weights": [0.5, 1.5],
    }
    return encoded(fields | more)


def test_examples_are_what_the_library_wrote(tmp_path):
    values = {"ids": [0, 1, -1, 2**62, 300], "names": [b"", b"a" * 300], "none": [1.5]}
    ((read, position),) = iter_examples(write_records(tmp_path / "r", [encoded(values)]))
    assert read == values | {"none": []}
    assert position == (tmp_path / "r").stat().st_size


DAMAGED = [
    b"text",
    gzip.compress(b"x" * 5),
    gzip.compress(struct.pack("<QI", 1 << 40, 0)),
    gzip.compress(struct.pack("<QI", 9, 0) + b"abc"),
    gzip.compress(struct.pack("<QI", 3, 0) + b"\x0a\x7fab1234"),
]


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_files_are_named(data, tmp_path):
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(ValueError, match="r: damaged, or no TFRecord"):
        list(iter_examples(tmp_path / "r"))


def run(folder: Path, examples: list[bytes], *options: str) -> tuple[list[dict], dict]:
    write_records(folder / "android_control-00000-of-00020", examples)
    out = folder / "out.jsonl"
    command = ["android-control", str(folder / "android_control-00000-of-00020"), "--out", str(out), "--overwrite"]
    assert main([*command, "--sheet", "1", *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return rows, json.loads(out.with_suffix(".report.json").read_text())


def test_an_episode_is_a_conversation_with_its_history(tmp_path):
    (row,), report = run(tmp_path, [episode()])
    record = parse_record(row)
    assert [message.text for message in record.messages] == [
        "Task: Buy cheese.",
        '{"action_type": "click", "x": 500, "y": 250}',
        "",
        '{"action_type": "input_text", "text": "Käse (x=1)"}',
        "",
        '{"action_type": "long_press", "x": 250, "y": 1000}',
    ]
    assert all(message.supervised for message in record.messages if message.role == "assistant")
    assert [(tmp_path / image.source).read_bytes() for image in record.images] == [screenshot(i) for i in range(3)]
    assert row["metadata"]["episode_id"] == "-7"
    assert report["read"] == report["written"] == 1


def test_long_episodes_are_cut_and_say_what_was_done(tmp_path):
    (first, second), _ = run(tmp_path, [episode()], "--max-steps", "2", "--with-instructions")
    texts = [message.text for message in parse_record(first).messages if message.role == "user"]
    assert texts == ["Task: Buy cheese.\nStep: Step 0", "Step: Step 1"]
    (question, _) = parse_record(second).messages
    assert question.text == "Task: Buy cheese.\nSteps done:\n1. Step 0\n2. Step 1\nStep: Step 2"
    assert len(parse_record(second).images) == 1
    assert first["id"] != second["id"]


def test_what_cannot_be_read_is_counted(tmp_path):
    outside = [ACTIONS[1], {"action_type": "click", "x": 201, "y": 0}, ACTIONS[1]]
    rows, report = run(
        tmp_path,
        [
            episode(1, outside),
            episode(2, outside[1:]),
            episode(3, screenshots=[b"no picture"] * 4),
            episode(4, step_instructions=[b"one"]),
            episode(5, goal=[b"\xff"]),
            encoded({"episode_id": [6]}),
        ],
    )
    assert [len(row["messages"]) for row in rows] == [2]
    assert report["dropped"] == {
        "entries": {
            "coordinates outside the image": 1,
            "image unreadable": 1,
            "screenshots, actions and step instructions do not match": 1,
            "not valid Unicode": 1,
            "no goal": 1,
        },
        "parts of kept entries": {"coordinates outside the image (with the steps behind it)": 1},
    }
