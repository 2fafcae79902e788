"""PNGs decoded without Pillow's pixels, against Pillow."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from pixelprune.images.image import ImageError, decode_image, decode_pixels
from pixelprune.images.image_file import open_image
from pixelprune.images.png import png_pixels
from pixelprune.settings import ResizeSettings
from tests.samples import encode

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def paeth(left: int, up: int, corner: int) -> int:
    """As the standard has it: the neighbour nearest to left + up - corner, in that order."""
    guess = left + up - corner
    return min((left, up, corner), key=lambda neighbour: abs(guess - neighbour))


def filtered(pixels: np.ndarray, kinds) -> bytes:
    """Rows behind the number of their filter, byte by byte."""
    height, size = pixels.shape[0], pixels.shape[1] * 3
    rows, out = np.zeros((height + 1, size + 3), int), b""
    rows[1:, 3:] = pixels.reshape(height, size)
    for y in range(height):
        row = []
        for i in range(3, size + 3):
            left, up, corner = (int(n) for n in (rows[y + 1, i - 3], rows[y, i], rows[y, i - 3]))
            predicted = (0, left, up, (left + up) // 2, paeth(left, up, corner))[kinds[y] % 5]
            row.append((int(rows[y + 1, i]) - predicted) % 256)
        out += bytes([kinds[y], *row])
    return out


def png(picture: Image.Image, kinds, *, more: bytes = b"", behind: bytes = b"", num_parts: int = 3) -> bytes:
    width, height = picture.size
    packed = zlib.compress(filtered(np.asarray(picture), kinds) + more)
    size = -(-len(packed) // num_parts)
    parts = [chunk(b"IDAT", packed[i : i + size]) for i in range(0, len(packed), size)]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(parts) + behind + chunk(b"IEND", b"")


def taken(data: bytes) -> np.ndarray | None:
    return png_pixels(data, open_image(io.BytesIO(data), "a picture"))


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, "mixed"])
@pytest.mark.parametrize("size", [(53, 37), (1, 1), (1, 5), (7, 1)])
def test_every_filter_is_undone_as_pillow_does(kind, size):
    pytest.importorskip("deflate")
    picture = NOISE.crop((0, 0, *size))
    kinds = [y % 5 if kind == "mixed" else kind for y in range(size[1])]
    data = png(picture, kinds)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture))
    np.testing.assert_array_equal(taken(data), np.asarray(picture))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags.tobytes()


def turned_by_xmp() -> PngInfo:
    note = PngInfo()
    note.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>')
    return note


GREY = NOISE.convert("L")
PLAIN = png(NOISE, [0] * NOISE.height)
OTHERS = {
    "alpha": encode(NOISE.convert("RGBA")),
    "palette": encode(NOISE.quantize(16)),
    "grey": encode(GREY),
    "16 bits": encode(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)),
    "a colour that is transparent": encode(NOISE, transparency=(1, 2, 3)),
    "turned": encode(NOISE, exif=exif(6)),
    "turned behind the pixels": png(NOISE, [0] * NOISE.height, behind=chunk(b"eXIf", exif(6)[6:])),
    "turned by XMP": encode(NOISE, pnginfo=turned_by_xmp()),
    "an animation": encode(NOISE, save_all=True, append_images=[NOISE.rotate(180)]),
    "an unknown filter": png(NOISE, [9] * NOISE.height),
    "more pixels than it says": png(NOISE, [0] * NOISE.height, more=b"more"),
    "cut": PLAIN[:-200],
    "cut behind its pixels": PLAIN[:-6],
    "damaged": PLAIN[:200] + bytes(50) + PLAIN[250:],
    "a JPEG": encode(NOISE, "JPEG"),
}


def read(decode, data: bytes):
    """Pixels and their shape, or what is refused and why."""
    try:
        pixels = np.asarray(decode(data, ResizeSettings()))
    except ImageError as error:
        return error.reason, str(error)
    return pixels.shape, pixels.tobytes()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_of_another_kind_is_left_to_pillow(name):
    data = OTHERS[name]
    assert taken(data) is None
    one, other = (read(decode, data) for decode in (decode_image, decode_pixels))
    assert one == other


def test_pixels_are_those_of_the_picture_from_files_too(tmp_path):
    (tmp_path / "a.png").write_bytes(PLAIN)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), PLAIN, Image.open(io.BytesIO(PLAIN))):
        np.testing.assert_array_equal(decode_pixels(source, ResizeSettings()), np.asarray(NOISE))
    with pytest.raises(ImageError) as caught:
        decode_pixels(PLAIN, ResizeSettings(max_decoded_pixels=NOISE.width * NOISE.height - 1))
    assert caught.value.reason == "decompression_bomb"
