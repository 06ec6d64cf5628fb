"""One picture, whatever it was given as: 8-bit RGB, upright, with a note of everything that was changed."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from sinklens.core.errors import DataError

from ..spans import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 448
"""Longest side of the small copies that a run keeps, in pixels."""
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_ADDRESS = re.compile(r"^[a-z][a-z0-9+.-]+://|^data:image/", re.IGNORECASE)
# PNG, JPEG, GIF, TIFF (both byte orders), BMP, WebP
_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\x00", b"MM\x00*", b"BM", b"RIFF")
_HOW = (
    "Pictures are files that Pillow reads (PNG, JPEG, WebP, GIF, TIFF, ...), PIL images, or arrays of uint8."
)


@dataclass(frozen=True, eq=False)
class Decoded:
    """A picture in memory.

    Attributes:
        notes: What was done to it, each a clause: `only the first of 12 frames`.
    """

    name: str
    pixels: UInt8[np.ndarray, "height width 3"]
    notes: tuple[str, ...] = ()

    @property
    def picture(self) -> Picture:
        height, width = self.pixels.shape[:2]
        digest = hashlib.sha256(f"{width}x{height}:".encode() + self.pixels.tobytes()).hexdigest()
        return Picture(self.name, width, height, digest)

    def image(self) -> Image:
        from PIL import Image

        return Image.fromarray(self.pixels)


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture that is decoded when it is needed: a path, a PIL image, or an array `[height, width(, channel)]`."""

    item: Any
    name: str

    def open(self) -> Decoded:
        """The decoded picture.

        Raises:
            DataError: It is no picture, is damaged, or is of a kind that has no 8-bit RGB form.
        """
        if isinstance(self.item, Path):
            return _from_file(self.item, self.name)
        if isinstance(self.item, np.ndarray):
            return _from_array(self.item, self.name)
        return _from_image(self.item, self.name)


def refer(item: Any, name: str, beside: Path | None = None) -> Reference:
    """A reference to what the caller gave as a picture.

    Args:
        item: A path, a PIL image, an array or tensor.
        name: What it is called if it has no file name of its own.
        beside: Folder that relative paths start from.

    Raises:
        DataError: An address on the network, a video, a missing file, or not a picture at all.
    """
    if isinstance(item, str | PathLike):
        return _refer_to_file(fspath(item), beside)
    if hasattr(item, "detach"):  # a tensor
        item = item.detach().cpu().numpy()
    if isinstance(item, np.ndarray) or (hasattr(item, "convert") and hasattr(item, "getbands")):
        return Reference(item, name)
    raise DataError(f"{name} is not a picture but {type(item).__name__}.", detail=_HOW)


def _refer_to_file(text: str, beside: Path | None) -> Reference:
    if _ADDRESS.match(text):
        raise DataError(
            f"{text[:80]!r} is an address: pictures are read from files, never from the network.",
            hint="Save the picture and give its path.",
        )
    path = Path(text) if beside is None or Path(text).is_absolute() else beside / text
    if path.suffix.lower() in VIDEOS:
        raise DataError(
            f"{path.name!r} is a video; sinklens reads pictures only.",
            hint="Save some of its frames as PNG files and give their folder.",
        )
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"The picture {text!r} {what}.",
            hint="Paths in a JSONL file are relative to the file's folder." if beside is not None else None,
        )
    return Reference(path, path.name)


def _from_file(path: Path, name: str) -> Decoded:
    from PIL import Image, UnidentifiedImageError

    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"The picture {name!r} cannot be read: {error.strerror}.") from error
    if not data:
        raise DataError(f"The picture {name!r} is empty: the file has 0 bytes.")
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            return _from_image(image, name)
    except UnidentifiedImageError as error:
        if any(data.startswith(start) for start in _STARTS):  # cut off before its header ends
            raise _damaged(name, data, "it ends before its header does") from error
        raise DataError(
            f"{name!r} is not a picture that Pillow knows, whatever its extension {path.suffix!r} says.",
            detail=f"It starts with the bytes {data[:8].hex(' ')}. {_HOW}",
            hint="Open it in a viewer and save it as PNG.",
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name!r} has too many pixels to be opened safely: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise _damaged(name, data, str(error) or type(error).__name__) from error


def _damaged(name: str, data: bytes, why: str) -> DataError:
    return DataError(
        f"The picture {name!r} is damaged: {why}.",
        detail=f"The file has {len(data)} bytes.",
        hint="Copy it again from where it came from, or leave it out.",
    )


def _from_image(image: Image, name: str) -> Decoded:
    """Upright 8-bit RGB. Transparency is laid on white, 16 bits keep their upper 8, animations their first frame."""
    from PIL import ImageOps

    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        image.seek(0)
        notes.append(f"only the first of {frames} frames")
    turned = ImageOps.exif_transpose(image)
    if turned.size != image.size or image.getexif().get(0x0112, 1) not in (0, 1):
        notes.append("turned upright as its EXIF data says")
    return Decoded(name, np.ascontiguousarray(_as_rgb(turned, name, notes)), tuple(notes))


def _as_rgb(image: Image, name: str, notes: list[str]) -> np.ndarray:
    from PIL import Image

    mode = image.mode
    if mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise DataError(f"{name!r} has values from {deep.min()} to {deep.max()}, which no picture has.")
        notes.append("16 bits cut to their upper 8")
        return np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if mode == "F":
        raise DataError(
            f"{name!r} holds floating-point values, whose black and white are not known.",
            hint="Convert it to 8 bits.",
        )
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        above = image.convert("RGBA")
        if above.getchannel("A").getextrema()[0] < 255:  # pyright: ignore[reportOperatorIssue]
            notes.append("transparent parts laid on white")
            white = Image.new("RGBA", above.size, (255, 255, 255, 255))
            return np.asarray(Image.alpha_composite(white, above).convert("RGB"))
        return np.asarray(above.convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _from_array(array: np.ndarray, name: str) -> Decoded:
    """Arrays `[height, width]`, `[height, width, 1 | 3 | 4]` or, with colours first, `[3, height, width]`."""
    from PIL import Image

    first = array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4)
    laid = array.transpose(1, 2, 0) if first else array
    if laid.ndim not in (2, 3) or (laid.ndim == 3 and laid.shape[2] not in (1, 3, 4)) or not laid.size:
        raise DataError(
            f"{name} has the shape {array.shape}; a picture has (height, width) or (height, width, 1 | 3 | 4)."
        )
    notes: list[str] = []
    if laid.dtype.kind == "f":
        if not np.isfinite(laid).all() or laid.min() < 0 or laid.max() > 1:
            raise DataError(
                f"{name} holds floating-point values from {laid.min():g} to {laid.max():g}; expected 0 to 1.",
                hint="Give uint8 values from 0 to 255, before any normalisation.",
            )
        laid = np.round(laid * 255).astype(np.uint8)
    elif laid.dtype == np.uint16:
        notes.append("16 bits cut to their upper 8")
        laid = (laid >> 8).astype(np.uint8)
    elif laid.dtype == np.bool_:
        laid = laid.astype(np.uint8) * 255
    elif laid.dtype != np.uint8:
        if laid.dtype.kind not in "iu" or laid.min() < 0 or laid.max() > 255:
            raise DataError(f"{name} holds {laid.dtype} values; expected uint8 from 0 to 255.")
        laid = laid.astype(np.uint8)
    flat = laid[..., 0] if laid.ndim == 3 and laid.shape[2] == 1 else laid
    return Decoded(name, np.ascontiguousarray(_as_rgb(Image.fromarray(flat), name, notes)), tuple(notes))


def thumbnail(decoded: Decoded, longest: int = THUMBNAIL) -> np.ndarray:
    """The picture, made smaller if its longest side is above `longest`; small ones are kept pixel for pixel."""
    height, width = decoded.pixels.shape[:2]
    if max(height, width) <= longest:
        return decoded.pixels
    from PIL import Image

    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(decoded.image().resize(size, Image.Resampling.LANCZOS))
