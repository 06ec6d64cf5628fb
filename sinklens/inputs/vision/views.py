"""What an image processor makes of a picture: the views that the vision tower reads, found from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sinklens.core.errors import ModelError

from . import geometry
from .geometry import Frame, Size


@dataclass(frozen=True)
class Look:
    """One processed picture: the whole, a tile of it, a thumbnail."""

    view: str
    frame: Frame


class Settings:
    """The settings an image processor works with: those of its processor class first, then its own."""

    def __init__(self, processor: Any) -> None:
        self.pictures = processor.image_processor
        given = getattr(type(processor), "images_kwargs", None)
        self.given: Mapping[str, Any] = given if isinstance(given, Mapping) else {}

    def __getitem__(self, name: str) -> Any:
        value = self.given.get(name)
        return getattr(self.pictures, name, None) if value is None else value

    def size(self, name: str) -> dict[str, int]:
        """A size as a plain mapping without the entries that are not set."""
        value = self[name]
        if value is None:
            return {}
        items = value.items() if isinstance(value, Mapping) else vars(value).items()
        return {key: int(number) for key, number in items if number is not None}


def looks(settings: Settings, size: Size) -> list[Look]:
    """The views of one picture that is not laid out by a list of resolutions, in the order of the tower.

    Raises:
        ModelError: The processor resizes in a way that is not known here.
    """
    whole = Frame(size)
    if settings["crop_to_patches"] and (settings["max_patches"] or 1) > 1:
        return _tiles(settings, whole)
    crops = []
    if settings["do_pan_and_scan"]:
        names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
        smallest, most, ratio = (settings[f"pan_and_scan_{name}"] for name in names)
        crops = geometry.crops_across(size, smallest, most, ratio)
    frames = [whole, *crops]
    return [Look("tile" if i else "whole", simple(settings, frame)) for i, frame in enumerate(frames)]


def simple(settings: Settings, frame: Frame) -> Frame:
    """Padding to a square, resize and centre crop, each if it is switched on."""
    if settings["do_pad"]:
        frame = geometry.padded_to_square(frame)
    if settings["do_resize"]:
        frame = frame.resized(_resized(settings, frame.size))
    crop = settings.size("crop_size")
    if settings["do_center_crop"] and crop:
        frame = geometry.centre_cropped(frame, (crop["height"], crop["width"]))
    return frame


def _resized(settings: Settings, size: Size) -> Size:
    wanted = settings.size("size")
    if "height" in wanted and "width" in wanted:
        return wanted["height"], wanted["width"]
    if set(wanted) == {"shortest_edge"}:
        return geometry.shortest_edge(size, wanted["shortest_edge"])
    raise ModelError(
        f"{type(settings.pictures).__name__} resizes pictures in a way that sinklens does not read.",
        detail=f"Its size is {wanted}; expected height and width, or shortest_edge.",
    )


def _tiles(settings: Settings, whole: Frame) -> list[Look]:
    tall, wide = _resized(settings, whole.size)
    fewest, most = settings["min_patches"] or 1, settings["max_patches"]
    rows, cols = geometry.tile_counts(whole.size, (tall, wide), fewest, most)
    spread = whole.resized((rows * tall, cols * wide))
    places = [(row * tall, col * wide) for row in range(rows) for col in range(cols)]
    if len(places) == 1:
        return [Look("whole", spread)]
    tiles = [Look("tile", spread.moved(top, left, (tall, wide))) for top, left in places]
    return [*tiles, Look("thumbnail", whole.resized((tall, wide)))]
