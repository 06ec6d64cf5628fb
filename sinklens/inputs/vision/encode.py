"""Pictures and a question through the model's processor, to one `Prompt` with its spans."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sinklens.core.errors import DataError, ModelError, UsageError

from ..encode import Bos, bos_token_id
from ..pieces import piece_reader
from ..spans import Kind
from ..spec import Prompt, Visual
from .again import Store
from .answers import answer_tokens
from .assemble import assemble, image_token_id, marks_around
from .documents import VisualDocument
from .layouts import lay_out
from .masks import object_shares, read_mask
from .pictures import Decoded, thumbnail

GENERIC = "<image>"
"""Stands for a picture in a question whatever the model's own placeholder is."""


def require_vision(config: Any) -> None:
    """Refuse a model that reads no pictures.

    Raises:
        ModelError: Its config has no vision tower, or no token that stands for a picture.
    """
    if image_token_id(config) is None or not hasattr(config, "vision_config"):
        raise ModelError(
            f"This model reads no pictures: {getattr(config, 'model_type', 'it')!r} has no image token.",
            hint="Leave the pictures out, or choose a vision-language model.",
        )


@dataclass(frozen=True)
class PictureEncoder:
    """A model's processor with everything that decides about the tokens."""

    processor: Any
    config: Any
    bos: Bos = "auto"
    chat_template: bool = False
    notes: list[str] = field(default_factory=list)
    store: Store = field(default_factory=Store)

    def __post_init__(self) -> None:
        require_vision(self.config)
        if self.bos not in ("auto", "on", "off"):
            raise UsageError(f"Unknown BOS policy {self.bos!r}.", hint="Use auto, on or off.")
        if self.bos == "on" and self.bos_id is None:
            raise DataError("A BOS was asked for, but this tokenizer has none.", hint="Use --bos auto.")
        if self.chat_template and not getattr(self.processor, "chat_template", None):
            raise DataError(
                "This processor has no chat template.",
                hint="Profile the plain question (without --chat-template).",
            )

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def bos_id(self) -> int | None:
        return bos_token_id(self.tokenizer)

    @cached_property
    def placeholder(self) -> str:
        """What the processor replaces by the tokens of one picture."""
        found = getattr(self.processor, "image_token", None)
        if not isinstance(found, str):
            raise ModelError(
                f"{type(self.processor).__name__} does not say what stands for a picture in a text.",
                detail="Expected an attribute image_token.",
            )
        return found

    @cached_property
    def wrapped(self) -> str:
        """The placeholder with the marks that the model expects around a picture, unless the processor puts them."""
        ids = [getattr(self.config, f"vision_{end}_token_id", None) for end in ("start", "end")]
        if None in ids:
            return self.placeholder
        start, end = self.tokenizer.convert_ids_to_tokens(ids)
        return f"{start}{self.placeholder}{end}"

    @cached_property
    def around(self) -> frozenset[int]:
        return marks_around(self.config, self.processor)

    def encode(self, document: VisualDocument, index: int) -> Prompt:
        """The prompt of one document.

        Raises:
            DataError: A picture cannot be read, or the placeholders do not fit the pictures.
            ModelError: The layout of the tokens is not known.
        """
        decoded = [reference.open() for reference in document.pictures]
        self.notes.extend(f"{one.name}: {note}" for one in decoded for note in one.notes)
        text = self.text(document)
        features = self.process(text, [one.image() for one in decoded], document.source)
        self._require_size(features, decoded, document.source)
        ids = tuple(features.pop("input_ids")[0].tolist())
        ids, features = self._with_bos(ids, features)
        token = image_token_id(self.config)
        assert token is not None
        sizes = [(one.pixels.shape[0], one.pixels.shape[1]) for one in decoded]
        layout = lay_out(self.config, self.processor, features, sizes, sum(i == token for i in ids))
        spans = assemble(ids, layout, [one.picture for one in decoded], image_token=token, around=self.around)
        answer = answer_tokens(self.tokenizer, ids, text, document.answer)
        if answer is not None:
            spans.kinds[answer] = Kind.GENERATED
        masks = [read_mask(mask, one) for mask, one in zip(document.masks, decoded, strict=False)]
        masks += [None] * (len(decoded) - len(masks))
        visual = Visual(
            spans,
            self.store.keep(features, lambda: self._painted(document, text, 0, (0, 0, 0, 0))),
            tuple(map(thumbnail, decoded)),
            object_shares(spans, masks),
            document.question,
            document.answer,
            lambda picture, box: self._painted(document, text, picture, box),
        )
        pieces = piece_reader(self.tokenizer)(ids)
        return Prompt(index, ids, pieces, document.source, document.domain, visual)

    def _require_size(self, features: dict[str, Any], decoded: Sequence[Decoded], where: str) -> None:
        """A processor that does not resize hands on any size, and the tower would stop at it."""
        side = getattr(self.config.vision_config, "image_size", None)
        shape = getattr(features.get("pixel_values"), "shape", ())
        resizes = getattr(self.processor.image_processor, "do_resize", True)
        if resizes or side is None or len(shape) != 4:
            return
        high, wide = side if isinstance(side, list | tuple) else (side, side)
        if tuple(shape[2:]) != (high, wide):
            sizes = ", ".join(f"{one.pixels.shape[1]} x {one.pixels.shape[0]}" for one in decoded)
            raise DataError(
                f"{where}: this model reads pictures of {wide} x {high} pixels only, and its processor does not "
                "resize.",
                detail=f"The prompt has pictures of {sizes} pixels.",
                hint=f"Save them as {wide} x {high} pixels, or choose a model whose processor resizes.",
            )

    def _painted(
        self, document: VisualDocument, text: str, picture: int, box: tuple[int, int, int, int]
    ) -> dict[str, Any]:
        """The inputs of a prompt again, with a box of one of its pictures inverted."""
        images = []
        for index, reference in enumerate(document.pictures):
            pixels = reference.open().pixels.copy()
            if index == picture:
                left, top, right, bottom = box
                pixels[top:bottom, left:right] = 255 - pixels[top:bottom, left:right]
            images.append(Decoded(reference.name, pixels).image())
        features = self.process(text, images, document.source)
        ids = tuple(features.pop("input_ids")[0].tolist())
        return self._with_bos(ids, features)[1]

    def text(self, document: VisualDocument) -> str:
        """The text for the processor, one placeholder per picture."""
        count, content = len(document.pictures), document.content
        if self.chat_template:
            return self._through_template(document)
        if not isinstance(content, str):
            raise DataError(
                f"{document.source} holds chat messages, which are text only through a chat template.",
                hint="Use --chat-template (in Python: chat_template=True).",
            )
        for mark in dict.fromkeys((self.placeholder, GENERIC)):
            found = content.count(mark)
            if found and found != count:
                raise DataError(
                    f"{document.source} has {count} pictures, but its text has {found} placeholders {mark!r}."
                )
            if found:
                return content if mark == self.placeholder else content.replace(mark, self.wrapped)
        return self.wrapped * count + ("\n" if content and self._stands_bare else "") + content

    @cached_property
    def _stands_bare(self) -> bool:
        """Whether nothing would stand between a picture and the text after it."""
        if self.wrapped != self.placeholder:
            return False
        from PIL import Image

        features = self.process(
            f"{self.placeholder}a", [Image.new("RGB", (32, 32))], "a test of the processor"
        )
        ids = features["input_ids"][0]
        last = int((ids == image_token_id(self.config)).nonzero()[-1])
        marks = {self.bos_id, *self.around}
        return last + 1 < len(ids) and int(ids[last + 1]) not in marks

    def _through_template(self, document: VisualDocument) -> str:
        content: Any = document.content
        if isinstance(content, str):
            parts = [{"type": "image"} for _ in document.pictures]
            content = [{"role": "user", "content": [*parts, {"type": "text", "text": content}]}]
        try:
            return str(
                self.processor.apply_chat_template(content, tokenize=False, add_generation_prompt=False)
            )
        except Exception as err:  # templates raise whatever their author chose
            raise DataError(
                f"The chat template refused {document.source}: {' '.join(str(err).split())[:200]}.",
                hint="Check the roles and their order, or profile the plain question without the template.",
            ) from err

    def process(self, text: str, images: Sequence[Any], where: str) -> dict[str, Any]:
        """What the processor makes of one prompt, as tensors."""
        try:
            with warnings.catch_warnings():
                # Of numpy and transformers to each other; nothing a user could do about them.
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                made = self.processor(text=[text], images=[list(images)], return_tensors="pt")
        except Exception as err:  # processors raise whatever their author chose
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise DataError(
                f"{type(self.processor).__name__} refused {where}: {' '.join(str(err).split())[:200]}",
                detail=f"{len(images)} pictures of {sizes} pixels, text {text[:80]!r}.",
                hint="Check the number of placeholders and the size of the pictures.",
            ) from err
        return {name: value for name, value in made.items() if hasattr(value, "shape") and name != "labels"}

    def _with_bos(
        self, ids: tuple[int, ...], features: dict[str, Any]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """The BOS policy at position 0; inputs per token follow. A padding mask of one prompt says nothing."""
        length = len(ids)
        features.pop("attention_mask", None)
        if self.bos == "auto":
            return ids, features
        cut = 0
        while cut < length and ids[cut] == self.bos_id:
            cut += 1
        added = self.bos == "on"
        kept = ids[cut:]
        ids = (self.bos_id, *kept) if added and self.bos_id is not None else kept
        return ids, {name: _shifted(value, length, cut, added) for name, value in features.items()}


def _shifted(value: Any, length: int, cut: int, added: bool) -> Any:
    """A per-token input without its first `cut` entries and, if a BOS was put there, with a 0 for it."""
    if value.ndim != 2 or value.shape != (1, length):
        return value
    import torch

    return torch.nn.functional.pad(value[:, cut:], (int(added), 0))
