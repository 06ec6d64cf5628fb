"""`load_pictures`: from pictures and questions to a `PromptSet`."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from sinklens.core.errors import DataError, UsageError

from ..cutting import cut_prompt, least_length
from ..describe import Options, Tally, description
from ..encode import Bos
from ..spec import Prompt, PromptSet
from .documents import VisualSource, read_documents
from .encode import PictureEncoder

NOTES = 5
"""Notes on single pictures that are written out; more of them are counted."""


def load_pictures(
    images: object,
    processor: Any,
    config: Any,
    *,
    prompts: object = None,
    question: str | None = None,
    n: int | None = None,
    seq_len: int | None = None,
    bos: Bos = "auto",
    chat_template: bool = False,
    seed: int = 0,
) -> PromptSet:
    """Prompts with pictures, through the model's own processor.

    Args:
        images: A picture, a folder, a JSONL file (`image` or `images`, `question` or `text`, optional `answer`,
            `mask`, `domain`), one picture in memory (PIL or array), or a list of pictures, of lists of pictures, or of
            such rows.
        processor: Of transformers; has an `image_processor` and a `tokenizer`.
        config: Of the model; says which token stands for pictures and how the vision tower is cut.
        prompts: Instead of `images`: a JSONL file or rows whose lines have pictures.
        question: Asked about every picture that comes without one.
        n: Number of prompts, or all. Fewer than there are: a sample that depends on `seed` only, in order.
        seq_len: Prompts are cut after this many tokens, never inside or before a picture.
        bos, chat_template: As in `load_prompts`; the template is the processor's.

    Raises:
        DataError: Something cannot be read or does not fit; the message names it.
        ModelError: The model reads no pictures, or lays them out in a way that is not known.
    """
    if n is not None and n < 1:
        raise UsageError(f"n must be a whole number from 1, not {n!r}.")
    encoder = PictureEncoder(processor, config, bos, chat_template)
    source = read_documents(images, prompts, question)
    taken = _sample(len(source.documents), n, seed)
    tally = Tally(documents=len(taken))
    loaded: list[Prompt] = []
    for index, place in enumerate(taken):
        prompt = encoder.encode(source.documents[place], index)
        loaded.append(_shortened(prompt, seq_len, tally))
    options = Options(n, seq_len, False, 1, seed)
    return PromptSet(tuple(loaded), _describe(tuple(loaded), source, encoder, options, tally))


def _sample(count: int, n: int | None, seed: int) -> list[int]:
    places = list(range(count))
    if n is None or n >= count:
        return places
    random.Random(seed).shuffle(places)
    return sorted(places[:n])


def _shortened(prompt: Prompt, seq_len: int | None, tally: Tally) -> Prompt:
    tally.longest = max(tally.longest, len(prompt))
    if seq_len is None or len(prompt) <= seq_len:
        return prompt
    least = least_length(prompt)
    if seq_len < least:
        raise DataError(
            f"{prompt.source} has {len(prompt)} tokens, and its last picture ends at token {least}; "
            f"seq_len {seq_len} would cut a picture.",
            hint=f"Use --seq-len {least} or more, or smaller pictures.",
        )
    tally.truncated += 1
    return cut_prompt(prompt, seq_len)


def _describe(
    prompts: tuple[Prompt, ...], source: VisualSource, encoder: PictureEncoder, options: Options, tally: Tally
) -> dict[str, Any]:
    """The keys of every prompt set, and `pictures`: how many, their hashes, views and the processor."""
    spans = [prompt.visual.spans for prompt in prompts if prompt.visual is not None]
    pictures = [picture for one in spans for picture in one.pictures]
    views = Counter(grid.view for one in spans for grid in one.grids)
    described = description(
        prompts,
        source.name,
        encoder,
        options,
        tally,
        [*source.notes, *_notes(encoder.notes)],
        extra=[picture.sha256 for picture in pictures],
    )
    found = type(encoder.processor)
    return {
        **described,
        "pictures": {
            "n": len(pictures),
            "most_per_prompt": max(len(one.pictures) for one in spans),
            "visual_tokens": sum(int(one.visual.sum()) for one in spans),
            "views": dict(sorted(views.items())),
            "processor": found.__name__,
            "image_processor": type(encoder.processor.image_processor).__name__,
            "sha256": [picture.sha256 for picture in pictures],
        },
    }


def _notes(notes: list[str]) -> list[str]:
    shown = [f"{note}." for note in dict.fromkeys(notes)]
    rest = len(shown) - NOTES
    return shown if rest <= 0 else [*shown[:NOTES], f"{rest} more pictures were changed like that."]
