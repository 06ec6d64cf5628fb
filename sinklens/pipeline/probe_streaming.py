"""The streaming experiment as one job: long texts read through small caches, with and without its first tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sinklens.core.errors import DataError, UsageError
from sinklens.core.manifest import Clock
from sinklens.evaluation.streaming_cache import BLOCK, CONDITIONS, Texts, streaming_comparison
from sinklens.evaluation.tasks.builtin import SEED, toy
from sinklens.inputs import load_prompts
from sinklens.inputs.spec import PromptSet
from sinklens.models.spec import OpenedModel
from sinklens.models.streaming_cache import streaming_cache
from sinklens.tracers.backends import open_with

from .listener import Listener, Silent
from .options import ProfileOptions
from .probe import Probe, at_least, finished, probe_folder
from .reach import position_limit

START, RECENT, TOKENS, TEXTS = 4, 508, 2048, 8
"""The default cache, the length of a text, and how many of them."""


def probe_streaming(
    model: Any,
    caches: Sequence[tuple[int, int]] = (),
    *,
    options: ProfileOptions,
    tokens: int | None = None,
    chunk: int = 1,
    tokenizer: Any = None,
    out: str | Path | None = None,
    force: bool = False,
    listener: Listener | None = None,
    argv: list[str] | None = None,
) -> Probe:
    """Perplexity over long texts with a cache of bounded size: first tokens kept, dropped, and two controls.

    Args:
        caches: `(start, recent)`, one comparison each; by default 4 and 508, of bundled models 4 and 60: they were
            trained on 64 tokens.
        tokens: Length of a text; by default 2048, or what there is.
        chunk: Tokens per pass.

    Returns:
        Results as of `streaming_comparison`, one per cache.

    Raises:
        ModelError: The model takes no streaming cache.
        DataError: The text is too short for a cache.
    """
    clock, listener = Clock(), listener or Silent()
    at_least("--tokens", TOKENS if tokens is None else tokens, 2)
    for start, recent in caches:
        _sensible(start, recent, chunk)
    with probe_folder(out, force) as store:
        opened = open_with(
            model, tokenizer, dtype=options.dtype, device=options.device, device_map=options.device_map,
            revision=options.revision, trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        listener.opened(opened)
        with streaming_cache(opened):
            pass  # a model that takes none is refused before a text is read for it
        limit, trained = position_limit(opened.plain.config), trained_on(opened)
        ids, inputs = long_texts(opened, options, tokens)
        chosen = list(caches) or [(START, (trained or min(START + RECENT, limit or START + RECENT)) - START)]
        _long_enough(ids.shape[1], chosen)
        results = []
        for start, recent in chosen:
            _sensible(start, recent, chunk)
            listener.stage(
                f"Cache of {start}+{recent}: {ids.shape[0]} texts of {ids.shape[1]} tokens, {len(CONDITIONS)} times"
            )
            found = streaming_comparison(
                opened, ids, start=start, recent=recent, chunk=chunk, progress=listener.progress
            )
            results.append({**found, "verdict": streaming_verdict(found, trained, limit)})
        return finished(
            "streaming", opened, results, inputs=inputs, seed=options.seed, clock=clock, argv=argv, store=store,
            position_limit=limit, trained_on=trained,
        )  # fmt: skip


def _sensible(start: int, recent: int, chunk: int) -> None:
    if start < 1 or recent < 1:
        raise UsageError(
            f"A cache of {start}+{recent} tokens is no comparison: both numbers must be at least 1.",
            hint="For instance: --cache 4+508",
        )
    if not 1 <= chunk <= recent:
        raise UsageError(
            f"--chunk {chunk} does not fit: at least 1, and at most the recent tokens of the cache ({recent})."
        )


def _long_enough(length: int, caches: Sequence[tuple[int, int]]) -> None:
    for start, recent in caches:
        needed = start + recent + 2 * BLOCK + 1
        if length < needed:
            raise DataError(
                f"The text has {length} tokens; a cache of {start}+{recent} needs {needed} to drop and measure some.",
                hint="Give a longer text (--prompts, --tokens), or a smaller cache (--cache).",
            )


def trained_on(opened: OpenedModel) -> int | None:
    """Tokens that a bundled model saw at once in training; None where that is not known."""
    from sinklens.testbeds.recipe import recipes

    name = toy(opened)
    return recipes[name].length if name in recipes else None


def long_texts(
    opened: OpenedModel, options: ProfileOptions, tokens: int | None
) -> tuple[Texts, dict[str, Any]]:
    """Texts of one length as token ids, and their description: new ones of the language of a bundled model, else the
    prompts joined and cut.

    Raises:
        DataError: The prompts joined are shorter than was asked for.
    """
    if options.prompts is None and toy(opened) in ("dense-ind", "moe-ind"):
        from sinklens.testbeds.data import InductionTask

        ids = InductionTask().sample(options.n or TEXTS, tokens or TOKENS, np.random.default_rng(SEED))
        source = "new texts of the language of the bundled models"
        return ids, {"source": source, "n_prompts": len(ids), "n_tokens": ids.size}
    source = options.prompts if options.prompts is not None else opened.default_prompts
    settings: dict[str, Any] = {"bos": options.bos, "seed": options.seed}

    def joined(length: int) -> PromptSet:
        return load_prompts(
            source, opened.tokenizer, n=options.n or TEXTS, seq_len=length, pack=True, **settings
        )

    try:
        found = joined(tokens or TOKENS)
    except DataError:
        if tokens is not None:
            raise
        whole = load_prompts(source, opened.tokenizer, **settings)
        shortest = sum(map(len, whole.prompts)) - 2 * (
            len(whole) - 1
        )  # without what stands around each prompt
        if shortest < 3:
            raise
        found = joined(shortest)
    return np.array([prompt.token_ids for prompt in found.prompts]), found.description


def streaming_verdict(found: Mapping[str, Any], trained: int | None, limit: int | None) -> str:
    """What dropping the first tokens costs, and where reading on without dropping fails.

    Args:
        trained: Tokens that the model saw at once in training, if that is known.
        limit: Positions that its config names.
    """
    kept, dropped, full = (found[name]["after_full"] for name in ("kept", "dropped", "full"))
    added, size = found["dropped"]["added"], found["start"] + found["recent"]
    text = (
        f"Perplexity once the cache was full: {kept:.4g} with the first {found['start']} and the last "
        f"{found['recent']} tokens, {dropped:.4g} with the last {size}"
    )
    if added["low"] is None:
        text += "; too little text for an interval."
    else:
        within = (
            f"{added['mean']:+.3g} nats per token, 95 % interval {added['low']:+.3g} to {added['high']:+.3g}"
        )
        meaning = "no difference can be told"
        if added["low"] > 0 or added["high"] < 0:
            meaning = f"dropping the first ones {'costs' if added['mean'] > 0 else 'helps'}"
        text += f" ({within}): {meaning}."
    if math.isfinite(full) and full > 2 * kept:
        length = f"this model was trained on {trained}" if trained else f"the config names {limit} positions"
        known = f", and {length}" if trained or limit else ""
        text += f" With nothing dropped it is {full:.4g}: a text has {found['tokens'] + 1} tokens{known}."
    return text
