"""The pictures of a report: small copies, each in the page once, and how much room they and their maps may take."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup

from sinklens.core.pictures import PictureRef

from . import png
from .svg import tag

LARGEST_SIDE, LOSSLESS_SIDE = 448, 64
"""Pictures are shrunk to the first; those up to the second keep every pixel."""

QUALITY = 80
BUDGET_BYTES, BUDGET_VALUES = 5_000_000, 700_000
"""All pictures together, and all numbers of cells that are drawn; what goes beyond is left out, with a note."""


class Album:
    """Pictures by the hash of their pixels.

    Args:
        pictures: RGB copies; None if the report must not hold pictures.
    """

    def __init__(self, pictures: Mapping[str, np.ndarray] | None) -> None:
        self.pictures = dict(pictures or {})
        self.allowed = pictures is not None
        self.values_left = BUDGET_VALUES
        self._bytes_left = BUDGET_BYTES
        self._names: dict[str, str] = {}
        self._written: list[Markup] = []

    @property
    def definitions(self) -> list[Markup]:
        """The pictures that were asked for, as elements of unit size."""
        return self._written

    def name(self, ref: PictureRef) -> tuple[str, bool] | None:
        """Id of the picture's element and whether its pixels are exact; None if the page has no copy of it."""
        pixels = self.pictures.get(ref.sha256)
        if pixels is None:
            return None
        exact = max(pixels.shape[:2]) <= LOSSLESS_SIDE
        if ref.sha256 not in self._names:
            source = data_uri(pixels)
            if len(source) > self._bytes_left:
                return None
            self._bytes_left -= len(source)
            identifier = f"picture-{len(self._names)}"
            self._names[ref.sha256] = identifier
            self._written.append(
                tag("image", id=identifier, width=1, height=1, preserveAspectRatio="none", href=source)
            )
        return self._names[ref.sha256], exact

    def room_for(self, values: int) -> bool:
        """Whether that many numbers may still be drawn; if so, they count as drawn."""
        if values > self.values_left:
            return False
        self.values_left -= values
        return True


def data_uri(pixels: UInt8[np.ndarray, "y x 3"], *, largest: int = LARGEST_SIDE) -> str:
    """A picture as a data address: tiny ones as PNG with every pixel, others as WebP."""
    if max(pixels.shape[:2]) <= min(largest, LOSSLESS_SIDE):
        return png.data_uri(png.encode_rgb(pixels))
    from PIL import Image, features

    image = Image.fromarray(pixels)
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    if not features.check("webp"):
        return png.data_uri(png.encode_rgb(np.asarray(image)))
    held = io.BytesIO()
    image.save(held, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(held.getvalue()).decode("ascii")
