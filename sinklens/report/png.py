"""A PNG encoder of thirty lines: palette images only, which is all a heat map needs."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

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
    rows = np.concatenate([np.zeros((height, 1), np.uint8), indices], axis=1)  # filter byte 0 before each row
    colours = b"".join(bytes(colour) for colour in [*palette, (0, 0, 0)])
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", colours),
            _chunk(b"tRNS", b"\xff" * len(palette) + b"\x00"),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
