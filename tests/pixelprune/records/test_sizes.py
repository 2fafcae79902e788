"""Sizes that a record states for its images, against the published rule and Pillow, on every way a record takes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data_tools.convert.converter import Converter, ConvertSettings
from data_tools.convert.image_files import ImageFiles
from pixelprune.hf import prepare
from pixelprune.images.image import gather_blocks
from pixelprune.images.sizing import SizeWish, wished_size
from pixelprune.prompter import Prompter
from pixelprune.records.keys import KeyRules
from pixelprune.records.prepare import PrepareSettings, hash_content
from pixelprune.records.reader import parse_record
from pixelprune.records.record import RecordError
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import draw_screen, write_jsonl
from training.data.index_builder import build_index
from training.data.inspection import inspect
from training.data.settings import SourceSettings
from training.evaluation.answering import prepare_task, read_tasks

RESIZE = ResizeSettings(min_pixels=16384, max_pixels=65536)
LEAST, MOST = 4 * 32 * 32, 16384 * 32 * 32  # of qwen_vl_utils, where an image states no limit of its own
ALL = PruneSettings(strategy="none")

# A 640 x 480 picture: what the record says, and the limits that the published rule is then called with.
STATED = [
    ({}, (16384, 65536)),
    ({"max_pixels": 16384}, (16384, 16384)),
    ({"max_pixels": 8192}, (LEAST, 8192)),  # below the recipe's minimum, which gives way
    ({"min_pixels": 640000}, (640000, MOST)),  # above the recipe's maximum, which gives way
    ({"min_pixels": 32768}, (32768, 65536)),
    ({"min_pixels": 200000, "max_pixels": 400000}, (200000, 400000)),
    ({"max_pixels": 200000.0}, (16384, 200000)),  # a table's column with gaps
]


def expected_size(stated, limits):
    if "resized_height" in stated:
        return smart_resize(stated["resized_height"], stated["resized_width"], 32, LEAST, MOST)
    return smart_resize(480, 640, 32, *limits)


RESIZED = [
    {"resized_height": 128, "resized_width": 192},
    {"resized_height": 140, "resized_width": 210},
    {"resized_height": 32, "resized_width": 40},
    {"resized_height": 256, "resized_width": 32, "max_pixels": 4096},  # alone decisive, as published
]
CASES = STATED + [(stated, None) for stated in RESIZED]


def row_of(**stated):
    question = [{"type": "image", "image": "a.png", **stated}, {"type": "text", "text": "Describe."}]
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Tiles."}],
        "metadata": {"bbox": [10, 10, 60, 60]},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("sizes")
    draw_screen(3, 640, 480).save(made / "a.png")
    write_jsonl(made / "train.jsonl", [row_of(**stated) for stated, _ in CASES])
    return made


@pytest.mark.parametrize(("stated", "limits"), CASES)
def test_an_image_has_the_published_size_and_pillows_pixels_in_training_and_inference(
    stated, limits, folder, model_folder
):
    height, width = expected_size(stated, limits)
    pixels = np.asarray(Image.open(folder / "a.png").resize((width, height), Image.Resampling.BICUBIC))
    blocks = gather_blocks(pixels, np.ones((height // 32, width // 32), dtype=bool))
    settings = PrepareSettings(str(model_folder), ALL, RESIZE, with_full=True)
    trained = settings.build().prepare(row_of(**stated), folder)
    prompter = Prompter.load(str(model_folder), prune=ALL, resize=RESIZE)
    question = row_of(**stated)["messages"][0]
    question["content"][0]["image"] = folder / "a.png"
    inferred = prepare(prompter, [question])
    for sample in (trained.sample, inferred.samples[0]):
        (image,) = sample.images
        assert np.array_equal(image.blocks, blocks)
        assert image.original_size == (480, 640)
    assert len(trained.full.input_ids) == len(trained.sample.input_ids)


def test_index_and_evaluation_size_images_as_training_does(folder, model_folder):
    expected = [np.prod(expected_size(*case)) // 32**2 for case in CASES]
    assert len(set(expected)) > 6, "sizes that differ"
    source = SourceSettings(path=str(folder / "train.jsonl"))
    index = build_index([source], PrepareSettings(str(model_folder), PruneSettings(), RESIZE))
    assert index.quarantined == []
    assert index.full_blocks.tolist() == expected
    assert len(set(index.content_hash.tolist())) == len(CASES)
    prompter = Prompter.load(str(model_folder), resize=RESIZE)
    tasks, refused = read_tasks([source])
    assert refused == {}
    assert [prepare_task(task, prompter, {}).num_blocks for task in tasks] == expected
    assert len({task.fingerprint for task in tasks}) == len(CASES)


def test_inspect_draws_the_image_at_the_size_that_was_stated(folder, model_folder, tmp_path):
    console = Console(file=io.StringIO(), width=300)
    source = SourceSettings(path=str(folder / "train.jsonl"))
    inspect([source], PrepareSettings(str(model_folder), PruneSettings(), RESIZE), console, tmp_path, num=len(CASES))
    said = console.file.getvalue()
    for number, (stated, limits) in enumerate(CASES):
        height, width = expected_size(stated, limits)
        with Image.open(tmp_path / f"train-{number}-image1.png") as picture:
            assert picture.size == (width, height)
        assert f"640 x 480 pixels, resized to {width} x {height}" in said
    assert "part image 11, max_pixels 5, min_pixels 3, resized_height 4, resized_width 4, text 11, type 22" in said


def test_conversion_keeps_what_is_stated(folder):
    converter = Converter(ImageFiles(folder, folder), ConvertSettings("sizes"))
    for stated, _ in CASES:
        made = converter.convert(row_of(**stated))
        assert parse_record(json.loads(json.dumps(made))).messages == parse_record(row_of(**stated)).messages


def test_a_size_may_stand_in_the_part_or_in_the_image_object():
    wish = SizeWish(max_pixels=16384)
    answer = {"role": "assistant", "content": "b"}
    ways = [
        {"messages": [{"role": "user", "content": [{"type": "image", "max_pixels": 16384}]}, answer], "images": ["a"]},
        {"messages": [{"role": "user", "content": "<image>"}, answer], "images": [{"path": "a", "max_pixels": 16384}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": {"path": "a", "max_pixels": 16384}}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}, "max_pixels": 16384}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "image", "image": b"a", "max_pixels": 16384}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "base64": "YQ==", "max_pixels": 16384}]}]},
    ]
    for row in ways:
        assert [ref.wish for ref in parse_record(row).images] == [wish], row
    assert parse_record(row_of(max_pixels=16384), rules=KeyRules.ignoring(["max_pixels"])).images[0].wish == SizeWish()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"resized_height": 128}, r"both 32 pixels or more, got \(128, 0\)"),
        ({"resized_height": 128, "resized_width": 31}, r"got \(128, 31\)"),
        ({"min_pixels": 5, "max_pixels": 4}, "min_pixels <= max_pixels"),
        ({"max_pixels": "1280*28*28"}, "whole number of pixels"),
        ({"max_pixels": 0}, "whole number of pixels"),
        ({"max_pixels": True}, "whole number of pixels"),
        ({"max_pixels": float("nan")}, "whole number of pixels"),
        ({"max_pixels": 1.5}, "whole number of pixels"),
        ({"max_pixels": 10**400}, "whole number of pixels"),
        ({"image": {"path": "a.png", "max_pixels": 9000}, "max_pixels": 9001}, "max_pixels is both 9001 and 9000"),
    ],
)
def test_a_size_that_is_none_is_refused(stated, message):
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(row_of(**stated))
    assert caught.value.reason == "bad_size"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"min_pixels": MOST + 1}, "min_pixels <= max_pixels"),
        ({"max_pixels": LEAST - 1}, "min_pixels <= max_pixels"),
        ({"min_pixels": 200_000_000, "max_pixels": 200_000_000}, "resize.max_decoded_pixels=100000000"),
        ({"resized_height": 32, "resized_width": 32 * 201}, "aspect ratio"),
    ],
)
def test_a_size_that_no_image_may_have_quarantines_the_record(stated, message, folder, model_folder):
    with pytest.raises(RecordError, match=message) as caught:
        PrepareSettings(str(model_folder), PruneSettings(), RESIZE).build().prepare(row_of(**stated), folder)
    assert caught.value.reason == "bad_size"


def test_detail_is_read_where_it_leaves_the_size_to_the_model_and_refused_elsewhere(model_folder):
    for place in ({"image": "a.png"}, {"image": {"url": "a.png"}}):
        inner = place["image"] if isinstance(place["image"], dict) else place
        inner["detail"] = "auto"
        assert parse_record(row_of(**place)).images[0].wish == SizeWish()
        inner["detail"] = "low"
        with pytest.raises(RecordError, match=r"'detail', .*give the size in pixels \(max_pixels\)") as caught:
            parse_record(row_of(**place))
        assert caught.value.reason == "unread_key"
        with pytest.raises(ValueError, match=r"'detail'.*give the size in pixels"):
            Prompter.load(str(model_folder)).render([row_of(**place)["messages"][0]])


def test_records_that_differ_in_a_size_have_hashes_of_their_own():
    """The hash names what a sample is made of; it keys the cache of teacher targets."""
    hashes = {hash_content(parse_record(row_of(**stated)), [b"png"]) for stated, _ in CASES}
    assert len(hashes) == len(CASES)


def test_a_wish_changes_nothing_where_it_says_nothing():
    for size in ((480, 640), (30, 5), (4000, 6000)):
        resize = ResizeSettings()
        assert wished_size(*size, resize) == smart_resize(*size, 32, resize.min_pixels, resize.max_pixels)


def test_decoded_pictures_of_the_same_bytes_have_hashes_of_their_own():
    """A picture that comes decoded is its bytes and what they mean: shape, palette, transparency, orientation."""
    wide, high = (Image.fromarray(np.zeros(shape, np.uint8)) for shape in ((32, 64, 3), (64, 32, 3)))
    dark, light = Image.new("P", (64, 32)), Image.new("P", (64, 32))
    light.putpalette([255] * 768)
    clear = dark.copy()
    clear.info["transparency"] = 0
    turned = wide.copy()
    turned.getexif()[0x0112] = 6
    grey = Image.new("L", (64, 32))
    pictures = [wide, high, dark, light, clear, turned, grey]
    hashes = [hash_content(parse_record(row_of()), [picture]) for picture in pictures]
    assert len(set(hashes)) == len(pictures)
    assert hash_content(parse_record(row_of()), [wide.copy()]) == hashes[0]
