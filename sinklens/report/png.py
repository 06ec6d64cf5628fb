"""A small PNG encoder: palette images for heat maps, true colour for tiny pictures without loss."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

RGB = tuple[int, int, int]


def encode(levels: Int[np.ndarray, "y x"], palette: Sequence[RGB]) -> bytes:
    """A PNG of `palette[level]` per pixel; level -1 is transparent.

    Args:
        levels: Palette indices, -1 to `len(palette) - 1`.
        palette: At most 255 colours, 0 to 255 per channel.
    """
    height, width = levels.shape
    if not height or not width:
        raise ValueError(f"a PNG needs at least one pixel, got {height} x {width}")
    if len(palette) > 255 or levels.min() < -1 or levels.max() >= len(palette):
        raise ValueError(f"levels must lie in [-1, {len(palette)}) and the palette in 255 colours")
    indices = np.where(levels < 0, len(palette), levels).astype(np.uint8)
    colours = b"".join(bytes(colour) for colour in [*palette, (0, 0, 0)])
    tables = [_chunk(b"PLTE", colours), _chunk(b"tRNS", b"\xff" * len(palette) + b"\x00")]
    return _file(width, height, 3, tables, indices)


def encode_rgb(pixels: UInt8[np.ndarray, "y x 3"]) -> bytes:
    """A PNG of these colours, without loss."""
    height, width, _ = pixels.shape
    return _file(width, height, 2, [], np.ascontiguousarray(pixels).reshape(height, 3 * width))


def _file(width: int, height: int, kind: int, tables: list[bytes], rows: np.ndarray) -> bytes:
    filtered = np.concatenate(
        [np.zeros((height, 1), np.uint8), rows], axis=1
    )  # filter byte 0 before each row
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)),
            *tables,
            _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
