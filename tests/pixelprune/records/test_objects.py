"""ms-swift's `objects` become the text that a person would have written, or the record is refused by name."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_tools.convert.converter import Converter, ConvertSettings
from data_tools.convert.image_files import ImageFiles
from pixelprune.answers import FORMATS, parse_answer
from pixelprune.model_folder import ModelFolder
from pixelprune.prompter import Prompter
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.keys import KeyRules
from pixelprune.records.objects import ObjectStyle
from pixelprune.records.prepare import PrepareSettings, with_objects_written
from pixelprune.records.reader import parse_record
from pixelprune.records.record import RecordError
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import draw_screen, write_jsonl
from training.config.settings import Config
from training.data.settings import DataSettings, SourceSettings
from training.evaluation.answering import prepare_task, read_tasks
from training.loop.feed import prepare_settings

# A picture of 640 x 480 pixels; the numbers were worked out by hand.
FIRST, SECOND = [73, 41, 173, 77], [190, 130, 290, 166]
TOKENS = [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end")]


def row_of(question, answer, images=("a.png",), **objects):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images), **({"objects": objects} if objects else {})}


CASES = [
    (row_of("<image>Locate <ref-object>.", "<bbox>", ref=["the first tile"], bbox=[FIRST]),
     "Locate the first tile.", "[114, 85, 270, 160]"),
    (row_of("<image>All tiles, please", "<bbox><bbox>", ref=[], bbox=[FIRST, SECOND], bbox_type="real"),
     "All tiles, please", "[114, 85, 270, 160][297, 271, 453, 346]"),
    (row_of("<image>Locate <ref-object>.", "<bbox>", ref=["the second tile"], bbox=[[0.3, 0.27, 0.45, 0.35]],
            bbox_type="norm1"),
     "Locate the second tile.", "[300, 270, 450, 350]"),
    (row_of("<image>What is at <bbox>?", "<ref-object>, and <ref-object> at <bbox>.", ref=["a tile", "another"],
            bbox=[[100, 200, 300, 400], [512, 87]], bbox_type="norm1000"),
     "What is at [100, 200, 300, 400]?", "a tile, and another at (512, 87)."),
    (row_of("<image>Where?", "<bbox>", bbox=[[173, 77, 73, 41]]), "Where?", "[114, 85, 270, 160]"),  # either order
    (row_of("<image><image>Where?", "<bbox> and <bbox>", images=["a.png", "b.png"], bbox=[[64, 48], [80, 60]],
            image_id=[0, 1]), "Where?", "(100, 100) and (100, 100)"),
    (row_of("<image><image>Where?", "<bbox>", images=["a.png", "b.png"], bbox=[[64, 48]]), "Where?", "(100, 100)"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("objects")
    draw_screen(3, 640, 480).save(made / "a.png")
    draw_screen(4, 800, 600).save(made / "b.png")
    return made


def written_texts(row, folder, style=ObjectStyle()):  # noqa: B008
    record = with_objects_written(parse_record(row), folder, style)
    return [message.text for message in record.messages]


@pytest.mark.parametrize(("row", "question", "answer"), CASES)
def test_a_record_with_objects_is_the_record_written_by_hand(row, question, answer, folder, preparer):
    assert written_texts(row, folder) == [question, answer]
    marks = "<image>" * len(row["images"])
    by_hand = preparer.prepare(row_of(marks + question, answer, row["images"]), folder)
    made = preparer.prepare(row, folder)
    assert made.sample.input_ids.tolist() == by_hand.sample.input_ids.tolist()
    assert made.sample.supervised.tolist() == by_hand.sample.supervised.tolist()
    assert made.record.messages == by_hand.record.messages
    assert made.content_hash == by_hand.content_hash
    as_text = preparer.prepare(row | {"objects": json.dumps(row["objects"])}, folder)
    assert as_text.content_hash == made.content_hash
    typed = copy.deepcopy(row)
    for turn in typed["messages"]:
        text = turn["content"].removeprefix(marks)
        images = [{"type": "image"}] * len(row["images"]) if turn["role"] == "user" else []
        turn["content"] = [*images, {"type": "text", "text": text}]
    assert preparer.prepare(typed, folder).content_hash == made.content_hash


def test_images_may_stand_in_their_own_parts(folder, preparer):
    row = CASES[5][0]
    inline = copy.deepcopy(row)
    parts = [{"type": "image", "image": name} for name in inline.pop("images")]
    inline["messages"][0]["content"] = [*parts, {"type": "text", "text": "Where?"}]
    assert preparer.prepare(inline, folder).content_hash == preparer.prepare(row, folder).content_hash


@pytest.mark.parametrize(
    ("style", "question", "box", "point"),
    [
        ("auto", "[100, 250, 400, 500]", "[100, 250, 400, 500]", "(500, 750)"),
        ("box", "[100, 250, 400, 500]", "[100, 250, 400, 500]", None),
        ("point", "[100, 250, 400, 500]", "(250, 375)", "(500, 750)"),
        ("box_absolute", "[64, 120, 256, 240]", "[64, 120, 256, 240]", None),
        ("point_absolute", "[64, 120, 256, 240]", "(160, 180)", "(320, 360)"),
        ("tool_call", "[100, 250, 400, 500]", "[250, 375]", "[500, 750]"),
        ("tool_call_absolute", "[64, 120, 256, 240]", "[160, 180]", "[320, 360]"),
    ],
)
def test_places_are_written_in_the_recipes_format_and_read_back(style, question, box, point, folder):
    corners, spot = [64, 120, 256, 240], [320, 360]
    row = row_of("<image>What is at <bbox>?", "<bbox>", bbox=[corners, corners])
    asked, answered = written_texts(row, folder, ObjectStyle(style))
    assert asked == f"What is at {question}?", "a question names a place, whatever answers look like"
    assert box in answered
    assert answered.startswith("<tool_call>") == style.startswith("tool_call")
    read = parse_answer(answered, image_size=(640, 480), format=style)
    assert read.point == (160, 180)
    row = row_of("<image>Where?", "<bbox>", bbox=[spot])
    if point is None:
        with pytest.raises(RecordError, match=f"a point where the answer format {style} wants a box"):
            written_texts(row, folder, ObjectStyle(style))
    else:
        assert point in written_texts(row, folder, ObjectStyle(style))[1]
    assert style in FORMATS


@pytest.mark.parametrize(
    ("answer", "objects", "reason", "message"),
    [
        ("<bbox>", {"bbox": [FIRST, SECOND]}, "object_count", "1 <bbox> in the text, 2 in objects.bbox"),
        ("<bbox><bbox>", {"bbox": [FIRST]}, "object_count", "2 <bbox> in the text, 1 in objects.bbox"),
        ("<bbox>", {"bbox": [FIRST], "ref": ["a"]}, "object_count", "0 <ref-object> in the text, 1 in objects.ref"),
        ("<bbox>", {"bbox": [FIRST], "bbox_type": "norm"}, "bad_objects", "bbox_type is 'norm', expected one of real"),
        (
            "<bbox>",
            {"bbox": [FIRST], "bbox_type": "norm1"},
            "place_outside",
            "norm1. lies outside the image",
        ),
        ("<bbox>", {"bbox": [[0, 0, 641, 9]]}, "place_outside", "real. lies outside the image of 640x480"),
        ("<bbox>", {"bbox": [[-1, 0, 64, 9]]}, "place_outside", "outside the image"),
        ("<bbox>", {"bbox": [[1, 2, 3]]}, "bad_objects", "expected two or four finite numbers"),
        ("<bbox>", {"bbox": [[1, 2, 3, float("nan")]]}, "bad_objects", "expected two or four finite numbers"),
        ("<bbox>", {"bbox": [[1, 2, 3, True]]}, "bad_objects", "expected two or four finite numbers"),
        ("<bbox>", {"bbox": FIRST}, "bad_objects", "expected two or four finite numbers"),
        ("<bbox>", {"bbox": "1, 2"}, "bad_objects", "objects.bbox is str, expected a list"),
        ("<bbox>", {"bbox": [FIRST], "image_id": [1]}, "bad_objects", "number of an image"),
        ("<bbox>", {"bbox": [FIRST], "image_id": [0, 0]}, "bad_objects", "number of an image"),
        ("<ref-object>", {"ref": [3]}, "bad_objects", "expected texts"),
        ("<bbox>", {"bbox": [FIRST], "mask": [1]}, "unread_key", "objects has 'mask', which is not read"),
    ],
)
def test_objects_that_cannot_be_read_whole_are_refused_by_name(answer, objects, reason, message, folder):
    with pytest.raises(RecordError, match=message) as caught:
        written_texts(row_of("<image>Where?", answer, **objects), folder)
    assert caught.value.reason == reason


def test_objects_of_another_form_or_without_an_image_are_refused():
    for value, message in (("[", "not valid JSON"), ([1], "is list, expected an object"), (3, "is int")):
        with pytest.raises(RecordError, match=message):
            parse_record(row_of("<image>Where?", "<bbox>") | {"objects": value})
    with pytest.raises(RecordError, match="the record has no image"):
        parse_record(row_of("Where?", "<bbox>", images=[], bbox=[FIRST]))


def test_a_mark_where_none_is_read_is_refused_and_a_tools_text_is_text(folder):
    row = row_of("<image>Where?", "<bbox>", bbox=[FIRST])
    row["messages"][1]["reasoning"] = "It is at <bbox>."
    with pytest.raises(RecordError, match="in reasoning or a call, where none is read"):
        parse_record(row)
    row = row_of("<image>Where?", "<bbox>", bbox=[FIRST])
    row["messages"][1:1] = [{"role": "tool", "content": "<bbox>"}]
    assert written_texts(row, folder) == ["Where?", "<bbox>", "[114, 85, 270, 160]"]


def test_without_objects_a_mark_is_text_and_an_ignored_key_is_left_out(folder):
    for row, rules in (
        (row_of("<image>Write HTML", "<bbox>"), KeyRules()),
        (row_of("<image>Write HTML", "<bbox>", ref=[], bbox=[]), KeyRules()),
        (row_of("<image>Write HTML", "<bbox>", bbox=[FIRST]), KeyRules.ignoring(["objects"])),
    ):
        assert parse_record(row, rules=rules).messages[1].parts == ("<bbox>",)


def test_a_picture_that_exif_turns_is_refused_because_its_numbers_mean_either_frame(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_screen(3, 640, 480).save(folder / "turned.jpg", exif=exif)
    with pytest.raises(RecordError, match="turned by EXIF"):
        written_texts(row_of("<image>Where?", "<bbox>", images=["turned.jpg"], bbox=[FIRST]), folder)
    with pytest.raises(RecordError, match=r"missing\.png") as caught:
        written_texts(row_of("<image>Where?", "<bbox>", images=["missing.png"], bbox=[FIRST]), folder)
    assert caught.value.reason == "missing_file"


def test_keys_of_objects_are_counted():
    seen = Counter()
    parse_record(row_of("<image>Where?", "<bbox>", bbox=[FIRST], width=640), rules=KeyRules(seen=seen))
    found = [("record", "objects", "read"), ("object", "bbox", "read"), ("object", "width", "ignored")]
    assert [seen[key] for key in found] == [1, 1, 1]


@pytest.fixture(scope="module")
def grounding_folder(tokenizer, tmp_path_factory) -> Path:
    """A model folder whose tokenizer has the tokens around things and boxes, as the published ones."""
    from training.composition.toy import toy_config

    made = copy.deepcopy(tokenizer)
    made.add_tokens(TOKENS, special_tokens=True)
    folder = tmp_path_factory.mktemp("grounding")
    made.save_pretrained(folder)
    toy_config(made).save_pretrained(folder)
    return folder


def test_things_and_boxes_stand_between_the_models_own_tokens_where_the_setting_says_so(folder, grounding_folder):
    settings = PrepareSettings(str(grounding_folder), PruneSettings(), ResizeSettings(), grounding_tokens=True)
    preparer = settings.build()
    row = row_of("<image>Locate <ref-object>.", "<bbox> or <bbox>", ref=["a tile"], bbox=[FIRST, [64, 48]])
    made = preparer.prepare(row, folder)
    question, answer = (message.text for message in made.record.messages)
    assert question == "Locate <|object_ref_start|>a tile<|object_ref_end|>."
    assert answer == "<|box_start|>(114,85),(270,160)<|box_end|> or <|box_start|>(100,100)<|box_end|>"
    ids = {token: preparer.chat.tokenizer.convert_tokens_to_ids(token) for token in TOKENS}
    found, supervised = made.sample.input_ids.tolist(), made.sample.supervised.tolist()
    assert [found.count(ids[token]) for token in TOKENS] == [1, 1, 2, 2, 0, 0]
    assert all(supervised[i] for i, token in enumerate(found) if token == ids["<|box_start|>"])
    by_hand = preparer.prepare(row_of("<image>" + question, answer), folder)
    assert by_hand.content_hash == made.content_hash
    assert by_hand.sample.input_ids.tolist() == found
    with pytest.raises(RecordError, match="a tool call has no place for box tokens"):
        PrepareSettings(
            str(grounding_folder), PruneSettings(), ResizeSettings(), answer_format="tool_call", grounding_tokens=True
        ).build().prepare(row, folder)


def test_the_tokens_are_refused_in_texts_by_default_and_where_the_tokenizer_has_none(
    folder, grounding_folder, tokenizer
):
    row = row_of("<image>Where?", "<|box_start|>(1,2),(3,4)<|box_end|>")
    plain = PrepareSettings(str(grounding_folder), PruneSettings(), ResizeSettings()).build()
    with pytest.raises(RecordError, match=r"control token; data.grounding_tokens=true") as caught:
        plain.prepare(row, folder)
    assert caught.value.reason == "special_token"
    with pytest.raises(ValueError, match=r"no special token <\|object_ref_start\|> \(data.grounding_tokens\)"):
        ChatEncoder(tokenizer, grounding_tokens=True)
    turns = [{"role": "user", "content": "Locate <|object_ref_start|>a<|object_ref_end|>."}]
    with pytest.raises(ValueError, match="control token"):
        Prompter.load(str(grounding_folder)).render(turns)
    text, _ = Prompter.load(str(grounding_folder), grounding_tokens=True).render(turns)
    assert turns[0]["content"] in text
    with pytest.raises(ValueError, match="control token"):
        Prompter.load(str(grounding_folder), grounding_tokens=True).render([{"role": "user", "content": "<|im_end|>"}])


def test_recipe_and_evaluation_write_objects_alike(folder, grounding_folder):
    config = Config(data=DataSettings(answer_format="point_absolute", grounding_tokens=True))
    settings = prepare_settings(config, ModelFolder.open(str(grounding_folder)))
    assert (settings.answer_format, settings.grounding_tokens) == ("point_absolute", True)
    with pytest.raises(ValueError, match="answer_format: expected one of auto, point"):
        DataSettings(answer_format="polygon")
    row = row_of("<image>What is at <bbox>?", "<ref-object>", ref=["a"], bbox=[FIRST]) | {"bbox": FIRST}
    path = write_jsonl(folder / "eval.jsonl", [row])
    style = ObjectStyle("point_absolute", tokens=True)
    (task,), refused = read_tasks([SourceSettings(path=str(path))], object_style=style)
    assert refused == {}
    trained = settings.build().prepare(row, folder)
    assert trained.record.messages == task.record.messages
    asked = prepare_task(task, Prompter.load(str(grounding_folder), grounding_tokens=True), {})
    assert "What is at <|box_start|>(73,41),(173,77)<|box_end|>?" in asked.texts[0]


def test_the_box_that_an_answer_gives_is_what_evaluation_compares_with(folder):
    path = write_jsonl(folder / "targets.jsonl", [CASES[i][0] for i in (0, 1, 2, 4)])
    tasks, refused = read_tasks([SourceSettings(path=str(path))])
    boxes = [(73, 41, 173, 77), pytest.approx((192, 129.6, 288, 168)), (73, 41, 173, 77)]
    assert [task.target.box for task in tasks] == boxes
    assert list(refused) == ["targets:1"], "two boxes"
    stated = with_objects_written(parse_record(CASES[0][0] | {"bbox": [1, 2, 3, 4]}), folder, ObjectStyle())
    assert stated.metadata["bbox"] == [1, 2, 3, 4]
    for row in (CASES[3][0], CASES[5][0], row_of("<image>What is at <bbox>?", "A tile.", bbox=[FIRST])):
        assert "bbox" not in with_objects_written(parse_record(row), folder, ObjectStyle()).metadata


def test_conversion_writes_objects_as_the_trainer_would(folder):
    for answer in ("auto", "box", "point", "tool_call"):
        converter = Converter(ImageFiles(folder, folder), ConvertSettings("objects", answer=answer))
        row = CASES[0][0]
        made = converter.convert(row)
        texts = [message.text for message in parse_record(made).messages]
        assert texts == written_texts(row, folder, ObjectStyle(answer))
    converter = Converter(ImageFiles(folder, folder), ConvertSettings("objects", coordinates="absolute"))
    assert converter.convert(CASES[0][0]) is None
    assert "convert without --coordinates" in next(iter(converter.report.dropped_records))
