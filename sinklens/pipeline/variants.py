"""The variants of `--sensitivity`: the run's prompts read or made in other ways, and its model in other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sinklens.core.errors import DataError, ResourceError
from sinklens.inputs.encode import bos_token_id
from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel

from .cost import available_memory, size
from .options import ProfileOptions
from .prepare import Prepared, prompts_for
from .reach import longest_input

LENGTHS = (64, 128, 256, 512, 1024, 2048)
DTYPES = ("float32", "bfloat16", "float16")
PROMPTS, TOKENS, FEWEST = 16, 4096, 4
"""A variant runs this many prompts, fewer where that would be more than so many tokens, but not fewer than four."""

CONFIG_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

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
        return self._read(replace(self.options, **changes))[:n]

    def texts(self, length: int, n: int | None = None) -> Prompts:
        """The source's own texts, not joined and each cut after `length` tokens: the run's number of them, or `n`."""
        fewest = max(n or 0, self.options.n or 0) or None
        return self._read(replace(self.options, seq_len=length, pack=False, n=fewest))

    def _read(self, options: ProfileOptions) -> Prompts:
        opened = self.prepared.opened
        return prompts_for(options, opened).prompts

    @property
    def special(self) -> set[int]:
        """Ids that are no text: the tokenizer's special tokens; without a tokenizer those that the config names."""
        opened = self.prepared.opened
        if opened.tokenizer is not None:
            return special_ids(opened.tokenizer)
        return {token for name in CONFIG_TOKENS for token in config_tokens(opened.module.config, name)}

    @property
    def bos(self) -> int | None:
        """The BOS token, of the tokenizer or, without one, of the config."""
        opened = self.prepared.opened
        if opened.tokenizer is not None:
            return bos_token_id(opened.tokenizer)
        return next(iter(config_tokens(opened.module.config, CONFIG_TOKENS[0])), None)


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
    yield Variant("text", "with random tokens", partial(random_tokens, material), note=_first_token(material))
    yield Variant(
        "text",
        "with one token repeated",
        partial(repeated_token, material),
        votes=False,
        note="No position differs from the others, so the share of any one falls although each may carry the same "
        "hidden state; this variant has no vote.",
    )
    several = _several_bos(material)
    for length in LENGTHS:
        if length != material.length:
            make = partial(of_length, material, length)
            yield Variant("length", f"at {length} tokens", make, votes=not several, note=several)
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


def config_tokens(config: Any, name: str) -> tuple[int, ...]:
    """The ids of one kind of special token in a model's config, which may name none, one or several."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, name, None)
    found = found if isinstance(found, list | tuple) else (found,)
    return tuple(int(token) for token in found if isinstance(token, int) and token >= 0)


def _first_token(material: Material) -> str:
    """A note if the prompts share a first token that nothing calls a BOS, so that it is drawn anew as well."""
    first = {prompt.token_ids[0] for prompt in material.base}
    if len(material.base) < 2 or len(first) > 1 or first <= material.special:
        return ""
    return (
        f"All prompts begin with token {first.pop()}, which was replaced as well: neither tokenizer nor config calls "
        "it special."
    )


def _several_bos(material: Material) -> str:
    """A note if the run's own prompts hold BOS tokens after the first position."""
    if not any(material.bos in prompt.token_ids[1:] for prompt in material.base):
        return ""
    return (
        "The run's own prompts hold more than one BOS and prompts of other lengths are made with one, so a difference "
        "need not come from the length; other lengths have no vote."
    )


def vocabulary(material: Material) -> np.ndarray:
    """Token ids that are no special tokens.

    Raises:
        DataError: The model reads no token ids.
    """
    count = material.prepared.opened.info.vocab_size
    special = material.special
    ids = np.array([i for i in range(count) if i not in special])
    if not len(ids):
        raise DataError("The model's vocabulary is not known.")
    return ids


def random_tokens(material: Material) -> Prompts:
    """Every token of the text drawn anew; special tokens stay, a BOS that only the config names too."""
    generator = np.random.default_rng(material.seed)
    ids, special = vocabulary(material), material.special
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
    """Prompts of exactly this length: texts cut, or joined without anything between them where they are shorter.

    A BOS stands at the start where the run's prompts have one, and nowhere else: several of them share what a sink
    receives. So does what the tokenizer puts after a text.

    Raises:
        DataError: The model has no such positions, or the source not enough text.
    """
    limit = longest_input(material.prepared.opened)
    if limit is not None and length > limit:
        raise DataError(f"The model is made for at most {limit} tokens.")
    n = min(PROMPTS, max(FEWEST, TOKENS // length))
    enough = min(n, FEWEST, len(material.base))
    head, tail = edges(material)
    width = length - len(head) - len(tail)
    texts = [inside(prompt, material.bos, tail) for prompt in material.texts(length)]
    cut = [text[:width] for text in texts if len(text) >= width]
    if len(cut) < min(n, len(material.base)):
        wanted = 1 + n * width // max(1, sum(map(len, texts)) // len(texts))
        texts = [inside(prompt, material.bos, tail) for prompt in material.texts(length, wanted)]
        flow = [token for text in texts for token in text]
        joined = [flow[start : start + width] for start in range(0, len(flow) - width + 1, width)]
        cut = max(cut, joined, key=len)
    if len(cut) < enough:
        total = sum(map(len, texts))
        needed = f"{enough} prompts of {length}" if enough > 1 else f"one prompt of {length}"
        raise DataError(f"The prompts have not enough text: {total} tokens in all, too few for {needed}.")
    return tuple(_window([*head, *text, *tail]) for text in cut[:n])


@dataclass(frozen=True)
class Token:
    """A token and where it came from."""

    id: int
    piece: str
    source: str
    domain: str


def edges(material: Material) -> tuple[list[Token], list[Token]]:
    """What stands before and after the text in all of the run's prompts: BOS; EOS or `[SEP]`."""
    tokenizer = material.prepared.opened.tokenizer
    ends = {getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")} - {None}
    first, last = ({prompt.token_ids[at] for prompt in material.base} for at in (0, -1))
    whole = _tokens(material.base[0])
    return whole[:1] if first == {material.bos} else [], whole[-1:] if len(last) == 1 and last <= ends else []


def inside(prompt: Prompt, bos: int | None, tail: list[Token]) -> list[Token]:
    """The tokens of a prompt's text, without BOS and without what the run puts after every text."""
    tokens = _tokens(prompt)
    if tail and tokens[-1].id == tail[0].id:
        tokens.pop()
    return [token for token in tokens if token.id != bos]


def _tokens(prompt: Prompt) -> list[Token]:
    pairs = zip(prompt.token_ids, prompt.pieces, strict=True)
    return [Token(token, piece, prompt.source, prompt.domain) for token, piece in pairs]


def _window(tokens: list[Token]) -> Prompt:
    text = tokens[1:-1] or tokens
    first, last = text[0].source, text[-1].source
    domains = {token.domain for token in text}
    return Prompt(
        0,
        tuple(token.id for token in tokens),
        tuple(token.piece for token in tokens),
        first if first == last else f"{first} … {last}",
        domains.pop() if len(domains) == 1 else "",
    )


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
