"""The variants of `--sensitivity`: the run's prompts read or made in other ways, and its model in other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sinklens.core.errors import DataError, ResourceError, UsageError
from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel

from .cost import available_memory, size
from .options import ProfileOptions
from .prepare import Prepared, longest_input, read_prompts

LENGTHS = (64, 128, 256, 512, 1024, 2048)
DTYPES = ("float32", "bfloat16", "float16")
PROMPTS, TOKENS, FEWEST = 16, 4096, 4
"""A variant runs this many prompts, fewer where that would be more than so many tokens, but not fewer than four."""

Prompts = tuple[Prompt, ...]


@dataclass(frozen=True)
class Material:
    """What variants are made from.

    Attributes:
        base: The run's prompts that all variants are compared with.
    """

    prepared: Prepared
    options: ProfileOptions
    base: Prompts
    seed: int

    @property
    def length(self) -> int:
        return max(map(len, self.base))

    def read(self, *, n: int = PROMPTS, **changes: Any) -> Prompts:
        """The run's source read again with other options, as many prompts as the base has.

        A sample of fewer prompts than the run's is another sample, so the run's own number is read and then cut.
        """
        opened = self.prepared.opened
        options = replace(self.options, **changes)
        found = read_prompts(options, opened.tokenizer, opened.default_prompts, opened.module.config)
        return found.prompts[:n]


@dataclass(frozen=True)
class Variant:
    """One way to look again.

    Attributes:
        group: `BOS`, `chat template`, `text`, `length` or `dtype`.
        make: The prompts.
        open: The model; None takes the run's own.
        votes: Whether the loss of the sink counts for the verdict.
        note: What is special about it, in words.
    """

    group: str
    label: str
    make: Callable[[], Prompts]
    open: Callable[[], OpenedModel] | None = None
    votes: bool = True
    note: str = ""


def variants(material: Material) -> Iterator[Variant]:
    """All variants; whether one can be run is told by calling it."""
    yield _bos(material)
    yield _template(material)
    yield Variant("text", "with random tokens", partial(random_tokens, material))
    yield Variant(
        "text",
        "with one token repeated",
        partial(repeated_token, material),
        votes=False,
        note="No position differs from the others, so the share of any one falls although each may carry the sink's "
        "hidden state; this variant has no vote.",
    )
    for length in LENGTHS:
        if length != material.length:
            yield Variant("length", f"at {length} tokens", partial(of_length, material, length))
    own = material.prepared.opened.info.dtype
    for dtype in DTYPES:
        if dtype != own:
            same = partial(_same, material.base)
            yield Variant("dtype", f"in {dtype}", same, partial(in_dtype, material, dtype))


def planned_tokens(prompts: Prompts) -> tuple[int, int]:
    """About how many passes over the prompts all variants take, and how many tokens: some will not be run."""
    base = sum(map(len, base_prompts(prompts)))
    of_lengths = [length * min(PROMPTS, max(FEWEST, TOKENS // length)) for length in LENGTHS]
    others = 1 + 4 + len(DTYPES) - 1
    return others + len(LENGTHS), others * base + sum(of_lengths)


def base_prompts(prompts: Prompts) -> Prompts:
    """The first prompts of the run, as many as all variants are to have."""
    chosen: list[Prompt] = []
    for prompt in prompts[:PROMPTS]:
        if len(chosen) >= FEWEST and sum(map(len, chosen)) + len(prompt) > TOKENS:
            break
        chosen.append(prompt)
    return tuple(chosen)


def _same(prompts: Prompts) -> Prompts:
    return prompts


def _bos(material: Material) -> Variant:
    added = bool(material.prepared.prompts.description.get("bos_added"))
    label = "without BOS" if added else "with BOS"
    return Variant("BOS", label, partial(_changed, material, bos="off" if added else "on"))


def _template(material: Material) -> Variant:
    used = material.options.chat_template
    label = "without chat template" if used else "with chat template"
    return Variant("chat template", label, partial(_changed, material, chat_template=not used))


def _changed(material: Material, **changes: Any) -> Prompts:
    """The source under other options.

    Raises:
        DataError: The tokens are the same as before, or the tokenizer has no such thing.
    """
    found = material.read(n=len(material.base), **changes)
    if [p.token_ids for p in found] == [p.token_ids for p in material.base]:
        raise DataError("The prompts are the same with it.")
    return found


def special_ids(tokenizer: Any) -> set[int]:
    return set(getattr(tokenizer, "all_special_ids", None) or ())


def vocabulary(material: Material) -> np.ndarray:
    """Token ids that are no special tokens.

    Raises:
        DataError: The model reads no token ids.
    """
    count = material.prepared.opened.info.vocab_size
    special = special_ids(material.prepared.opened.tokenizer)
    ids = np.array([i for i in range(count) if i not in special])
    if not len(ids):
        raise DataError("The model's vocabulary is not known.")
    return ids


def random_tokens(material: Material) -> Prompts:
    """Every token of the text drawn anew; special tokens at either end stay."""
    generator = np.random.default_rng(material.seed)
    ids, special = vocabulary(material), special_ids(material.prepared.opened.tokenizer)
    made = []
    for prompt in material.base:
        drawn = generator.choice(ids, len(prompt))
        new = tuple(
            old if old in special else int(token) for old, token in zip(prompt.token_ids, drawn, strict=True)
        )
        made.append(_with_tokens(prompt, new))
    return tuple(made)


def repeated_token(material: Material) -> Prompts:
    """One drawn token in all positions, the first included (no BOS)."""
    generator = np.random.default_rng(material.seed)
    ids = vocabulary(material)
    return tuple(_with_tokens(p, (int(generator.choice(ids)),) * len(p)) for p in material.base)


def _with_tokens(prompt: Prompt, ids: tuple[int, ...]) -> Prompt:
    return replace(
        prompt, token_ids=ids, pieces=tuple(str(i) for i in ids), source=f"made from {prompt.source}"
    )


def of_length(material: Material, length: int) -> Prompts:
    """Prompts of exactly this length: the source cut, or joined where its texts are shorter.

    Raises:
        DataError: The model has no such positions, or the source not enough text.
    """
    limit = longest_input(material.prepared.opened)
    if limit is not None and length > limit:
        raise DataError(f"The model is made for at most {limit} tokens.")
    n = min(PROMPTS, max(FEWEST, TOKENS // length))
    cut = [prompt for prompt in material.read(n=PROMPTS, seq_len=length) if len(prompt) == length]
    if len(cut) >= min(n, len(material.base)):
        return tuple(cut[:n])
    try:
        joined = material.read(n=n, seq_len=length, pack=True)
    except (DataError, UsageError):
        joined = ()
    best = max((tuple(cut), joined), key=len)
    if not best:
        raise DataError("The prompts have not enough text.")
    return best


def in_dtype(material: Material, dtype: str) -> OpenedModel:
    """The model in another dtype, beside the one that is open.

    Raises:
        ResourceError: Two models do not fit.
    """
    info, free = material.prepared.opened.info, available_memory()
    needed = info.parameters * (4 if dtype == "float32" else 2)
    on_cpu = next(material.prepared.opened.module.parameters()).device.type == "cpu"
    if on_cpu and free is not None and needed > 0.8 * free:
        raise ResourceError(f"A second copy of the model needs {size(needed)}; {size(free)} are free.")
    return material.prepared.reopen(dtype)
