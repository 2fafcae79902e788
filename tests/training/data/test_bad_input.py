"""Every kind of bad input has its reason; odd but valid images are read as a viewer shows them."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pixelprune.image import decode_image, resize_image
from pixelprune.settings import ResizeSettings
from training.data.index_builder import measure_row
from training.data.settings import SourceSettings
from training.data.sources import open_source

from .samples import chat_row, draw_screen, encode, write_jsonl

SCREEN = draw_screen(3, 96, 64)


def png_that_claims(width: int, height: int) -> bytes:
    """A small file whose header promises a giant image."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


PNG, JPEG = encode(SCREEN), encode(SCREEN, "JPEG", quality=95)
BAD_IMAGES = {
    "truncated PNG": (PNG[: len(PNG) // 2], "truncated_image"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated_image"),
    "zero bytes": (b"", "empty_file"),
    "60,000 x 60,000": (png_that_claims(60_000, 60_000), "decompression_bomb"),
    "extreme aspect ratio": (encode(Image.new("RGB", (8200, 40))), "aspect_ratio"),
    "text": (b"this is no image", "not_an_image"),
    "HTML of an error page": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
    "header only": (PNG[:33], "not_an_image"),
}


def measure(preparer, folder, row) -> dict:
    path = write_jsonl(folder / "one.jsonl", [row])
    return measure_row(preparer, open_source(SourceSettings(str(path))), 0)


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(preparer, tmp_path, name):
    data, reason = BAD_IMAGES[name]
    (tmp_path / "a.png").write_bytes(data)
    measured = measure(preparer, tmp_path, chat_row("a.png"))
    assert measured["reason"] == reason, measured["detail"]
    assert "a.png" in measured["detail"]
    assert "\n" not in measured["detail"]


@pytest.mark.parametrize("side", [60_000, 12_000])
def test_bomb_is_refused_before_its_pixels_are_decoded(preparer, tmp_path, monkeypatch, side):
    """Above Pillow's own limit and below it."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    (tmp_path / "a.png").write_bytes(png_that_claims(side, side))
    measured = measure(preparer, tmp_path, chat_row("a.png"))
    assert measured["reason"] == "decompression_bomb"
    assert "max_decoded_pixels" in measured["detail"]


def cmyk() -> tuple[bytes, Image.Image]:
    picture = SCREEN.convert("CMYK")
    return encode(picture, "TIFF"), picture.convert("RGB")


def palette() -> tuple[bytes, Image.Image]:
    picture = SCREEN.quantize(16)
    return encode(picture), picture.convert("RGB")


def sixteen_bit() -> tuple[bytes, Image.Image]:
    values = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    return encode(Image.fromarray(values)), Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def alpha() -> tuple[bytes, Image.Image]:
    picture = SCREEN.convert("RGBA")
    pixels = np.array(picture)
    pixels[:32, :, 3] = 0
    expected = np.array(SCREEN)
    expected[:32] = 255
    return encode(Image.fromarray(pixels)), Image.fromarray(expected)


def transparent_palette() -> tuple[bytes, Image.Image]:
    picture = Image.new("P", (96, 64), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(0, (0, 0, 48, 64))
    expected = Image.new("RGB", (96, 64), (0, 0, 255))
    expected.paste((255, 255, 255), (0, 0, 48, 64))
    return encode(picture, transparency=0), expected


def exif_rotated() -> tuple[bytes, Image.Image]:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    return encode(SCREEN, exif=exif.tobytes()), SCREEN.transpose(Image.Transpose.ROTATE_270)


def grey() -> tuple[bytes, Image.Image]:
    return encode(SCREEN.convert("L")), SCREEN.convert("L").convert("RGB")


def animated() -> tuple[bytes, Image.Image]:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (96, 64), color) for color in ("red", "blue")]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue(), frames[0]


@pytest.mark.parametrize(
    "make", [cmyk, palette, sixteen_bit, alpha, transparent_palette, exif_rotated, grey, animated]
)  # fmt: skip
def test_odd_images_are_read_as_a_viewer_shows_them(make, preparer, tmp_path):
    data, expected = make()
    limits = ResizeSettings(min_pixels=32 * 32)
    found = resize_image(decode_image(data, limits), limits)
    assert found.shape == (expected.height, expected.width, 3)
    np.testing.assert_array_equal(found, np.asarray(expected))
    (tmp_path / "a.png").write_bytes(data)
    measured = measure(preparer, tmp_path, chat_row("a.png"))
    assert measured["reason"] == ""
    assert measured["full_blocks"] == [expected.width * expected.height // 1024]


QUESTION = [{"type": "text", "text": "q"}]
BAD_RECORDS = {
    "invalid JSON line": ('{"messages": [', "invalid_json"),
    "empty conversation": ({"messages": []}, "empty_conversation"),
    "no supervised token": ({"messages": [{"role": "user", "content": "q"}]}, "no_supervised_token"),
    "fewer placeholders than images": (chat_row(None) | {"images": ["a.png"]}, "image_count"),
    "more placeholders than images": (chat_row(None, "<image>x") | {"images": []}, "ok"),
    "more placeholders in ShareGPT": (
        {"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}],
         "images": ["a.png"]},
        "image_count",
    ),
    "unknown role": ({"messages": [{"role": "critic", "content": "q"}, *chat_row(None)["messages"]]}, "unknown_role"),
    "NaN box": ('{"metadata": {"bbox": [NaN, 0, 1, 1]}, ' + json.dumps(chat_row(None))[1:], "bad_box"),
    "missing file": (chat_row("missing.png"), "missing_file"),
    "path out of the root by ..": (chat_row("../a.png"), "outside_root"),
    "absolute path": (chat_row("/etc/hostname"), "outside_root"),
    "symlink out of the root": (chat_row("link.png"), "outside_root"),
    "forged image token": (chat_row(None, "look: <|image_pad|>"), "special_token"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records(preparer, tmp_path, name):
    row, reason = BAD_RECORDS[name]
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "a.png").write_bytes(PNG)
    (root / "a.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "a.png")
    measured = measure(preparer, root, row)
    if reason == "ok":  # typed content is taken literally: "<image>" in a text part is text
        assert measured["reason"] == ""
        assert measured["kept_blocks"] == []
        return
    assert measured["reason"] == reason, measured["detail"]
    assert measured["detail"]
