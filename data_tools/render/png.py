"""Lossless PNG, as small as zlib makes it: the better of an exact palette and filtered RGB."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode_png(image: np.ndarray, *, level: int = 9) -> bytes:
    """PNG bytes of a uint8 (H, W, 3) image. Up to 256 colours become a palette, which loses nothing.

    Raises ValueError for another shape or type. Source: PNG specification (third edition), sections 7, 9 and 11.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"encode_png: expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    colour = image.astype(np.uint32)
    packed = (colour[..., 0] << 16) | (colour[..., 1] << 8) | colour[..., 2]
    is_used = np.zeros(1 << 24, dtype=bool)
    is_used[packed] = True
    colours = np.flatnonzero(is_used)
    if colours.size <= 256:
        depth = next(bits for bits in (1, 2, 4, 8) if colours.size <= 1 << bits)
        rows = _pack_bits(np.searchsorted(colours, packed).astype(np.uint8), depth)
        palette = np.stack([colours >> 16, colours >> 8, colours], axis=1).astype(np.uint8).tobytes()
        return _file(width, height, depth, 3, [(b"PLTE", palette)], _compress(_with_filter(rows, 0), level))
    rows = image.reshape(height, width * 3)
    data = _compress(_with_filter(rows, 0), level)
    if level == 9 or len(data) > 0.3 * rows.size:  # plain rows win on screenshots, filtered ones on photographs
        data = min(data, _compress(_filtered(rows), level), key=len)
    return _file(width, height, 8, 2, [], data)


def _pack_bits(index: np.ndarray, depth: int) -> np.ndarray:
    """Palette indices (H, W) -> bytes (H, ceil(W * depth / 8)), leftmost pixel in the high bits."""
    if depth == 8:
        return index
    per_byte = 8 // depth
    padded = np.pad(index, ((0, 0), (0, -index.shape[1] % per_byte)))
    parts = padded.reshape(index.shape[0], -1, per_byte)
    shifts = np.arange(per_byte - 1, -1, -1, dtype=np.uint8) * depth
    return np.bitwise_or.reduce(parts << shifts, axis=2).astype(np.uint8)


def _with_filter(rows: np.ndarray, kind: int) -> bytes:
    tags = np.full((rows.shape[0], 1), kind, dtype=np.uint8)
    return np.concatenate([tags, rows], axis=1).tobytes()


def _filtered(rows: np.ndarray) -> bytes:
    """Per row the filter (none, sub, up) with the smallest sum of absolute signed differences: the usual heuristic."""
    left = np.zeros_like(rows)
    left[:, 3:] = rows[:, :-3]
    above = np.zeros_like(rows)
    above[1:] = rows[:-1]
    choices = np.stack([rows, rows - left, rows - above])  # (filter, H, bytes), wraps modulo 256 as the format wants
    cost = np.minimum(choices, 0 - choices).sum(axis=2, dtype=np.int64)
    best = cost.argmin(axis=0)
    chosen = choices[best, np.arange(rows.shape[0])]
    return np.concatenate([best[:, None].astype(np.uint8), chosen], axis=1).tobytes()


def _compress(data: bytes, level: int) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, 15, 9)
    return packer.compress(data) + packer.flush()


def _file(
    width: int, height: int, depth: int, colour_type: int, extra: list[tuple[bytes, bytes]], data: bytes
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return _SIGNATURE + b"".join(parts)
