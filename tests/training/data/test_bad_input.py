"""Every kind of bad input has its reason; odd but valid images are read as a viewer shows them."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from pixelprune.images.image import ImageError, decode_image, resize_image
from pixelprune.settings import ResizeSettings
from tests.samples import chat_row, draw_screen, encode, write_jsonl
from training.data.measuring.row import measure_row
from training.data.settings import SourceSettings
from training.data.sources import open_source

SCREEN = draw_screen(3, 96, 64)


def png_that_claims(width: int, height: int) -> bytes:
    """A small file whose header promises a giant image."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def dds_of_unknown_kind() -> bytes:
    data = bytearray(encode(SCREEN, "DDS"))
    data[80:84] = struct.pack("<I", 0)  # pixel format flags: none
    return bytes(data)


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
    "EPS, which Pillow hands to Ghostscript": (encode(SCREEN, "EPS"), "not_an_image"),
    "DDS of a kind that its reader does not know": (dds_of_unknown_kind(), "not_an_image"),
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


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_the_only_limit_on_size_is_ours(monkeypatch, picture_format):
    """Pillow's own refuses at twice its value and warns above it: a host may have set it, and it is no knob of ours."""
    data = encode(SCREEN, picture_format)
    for limit in (SCREEN.width * SCREEN.height - 1, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode_image(data, ResizeSettings()).size == SCREEN.size
    with pytest.raises(ImageError, match="max_decoded_pixels=6143") as caught:
        decode_image(data, ResizeSettings(max_decoded_pixels=SCREEN.width * SCREEN.height - 1))
    assert caught.value.reason == "decompression_bomb"


def test_refused_formats_are_told_the_accepted_ones():
    for picture_format in ("EPS", "PPM", "TGA", "ICO"):
        with pytest.raises(ImageError, match="PNG, JPEG, WEBP, GIF, BMP, TIFF"):
            decode_image(encode(SCREEN, picture_format), ResizeSettings())
    assert decode_image(encode(SCREEN, "MPO", quality=95), ResizeSettings()).size == SCREEN.size


class BrokenDecoder(ImageFile.ImageFile):
    """A picture whose pixels cannot be had, for a reason nobody listed."""

    def __init__(self, error: Exception):
        super().__init__(io.BytesIO(b"x"))
        self.error = error

    def _open(self):
        self._size, self._mode = (32, 32), "RGB"

    def load(self):
        raise self.error


def test_whatever_a_decoder_raises_is_the_image_s_fault():
    for error in (RuntimeError("codec\nsays no"), NotImplementedError(), struct.error("short"), OverflowError("big")):
        with pytest.raises(ImageError, match="damaged") as caught:
            decode_image(BrokenDecoder(error), ResizeSettings())
        assert caught.value.reason == "truncated_image"
        assert "\n" not in str(caught.value)
    with pytest.raises(MemoryError):  # the machine's, not the file's
        decode_image(BrokenDecoder(MemoryError()), ResizeSettings())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("picture_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_a_damaged_exif_costs_the_orientation_not_the_image(picture_format, exif):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(picture_format, {})
    found = decode_image(encode(SCREEN, picture_format, exif=exif, **options), ResizeSettings())
    expected = Image.open(io.BytesIO(encode(SCREEN, picture_format, **options))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_applied_once(orientation):
    """Pillow's own rule; decoding what was decoded (as for a teacher) turns nothing again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(SCREEN, exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    once = decode_image(data, ResizeSettings())
    np.testing.assert_array_equal(np.asarray(once), expected)
    np.testing.assert_array_equal(np.asarray(decode_image(once, ResizeSettings())), expected)


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
    "box beyond any float": (chat_row(None) | {"metadata": {"bbox": [10**400, 0, 1, 1]}}, "bad_box"),
    "an empty box": (chat_row(None) | {"metadata": {"bbox": []}}, "bad_box"),
    "a list of boxes, one of them empty": (chat_row(None) | {"bboxes": [[1, 2, 3, 4], []]}, "bad_box"),
    "no boxes": (chat_row(None) | {"bboxes": []}, ""),
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
    assert bool(measured["detail"]) == bool(reason)
