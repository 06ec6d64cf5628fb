"""`load_prompts`: from a source to a `PromptSet`."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from sinklens.core.errors import DataError, UsageError

from .describe import Options, Tally, describe
from .encode import Bos, Encoder, make_encoder
from .pieces import piece_reader
from .sources import Document, Source, read_source
from .spec import Prompt, PromptSet

T = TypeVar("T")
Encoded = tuple[tuple[int, ...], str, str]  # token ids, source, domain


def load_prompts(
    source: object,
    tokenizer: Any,
    *,
    n: int | None = None,
    seq_len: int | None = None,
    bos: Bos = "auto",
    chat_template: bool = False,
    pack: bool = False,
    min_tokens: int = 1,
    seed: int = 0,
) -> PromptSet:
    """Tokenised prompts from a file, a corpus, a hub dataset or memory.

    Args:
        source: None or `mixed` (all bundled corpora), `corpus:NAME`, a `.txt` path (one prompt per line), a
            `.jsonl` path (field `text`, or `path.jsonl:field`; values may be chat messages),
            `hf:dataset[:config[:split[:field]]]`, or a list of strings, of token id lists, or of chat
            message lists.
        tokenizer: A transformers tokenizer; may be None if `source` is a list of token id lists.
        n: Number of prompts, or all. Fewer than there are: a sample that depends on `seed` only, in the order
            of the source, even over the domains of `mixed`. More than there are: all, and a warning.
        seq_len: Prompts are cut after this many tokens, special tokens included (a suffix such as `[SEP]` is
            kept).
        bos: `auto` = what the tokenizer does, `on` = exactly one BOS at the start, `off` = none.
        chat_template: Whether each prompt goes through the tokenizer's chat template (a string as one user
            message, no generation prompt). The template alone then decides about a BOS, unless `bos` says
            otherwise.
        pack: Whether documents are joined, with EOS (or BOS) between, and cut into windows of exactly
            `seq_len`.
        min_tokens: Prompts with fewer tokens are dropped and counted.
        seed: Of the sample when there are more prompts (with `pack`: documents) than `n`.

    Raises:
        DataError: If the source cannot be read or holds no usable prompt.
        UsageError: If options contradict each other.
    """
    options = Options(n, seq_len, pack, min_tokens, seed)
    _check(options)
    documents = read_source(source, n=n)
    _require_tokenizer(tokenizer, documents)
    encoder = make_encoder(tokenizer, bos, chat_template, given_ids=documents.given_ids)
    if seq_len is not None and seq_len <= encoder.room:
        raise UsageError(
            f"seq_len is {seq_len}, but the special tokens of a prompt alone are {encoder.room}.",
            hint=f"Use --seq-len {encoder.room + 1} or more.",
        )
    tally = Tally()
    stream = _packed if pack else _separate
    encoded = _take(stream(documents, encoder, options, tally), options)
    if not encoded:
        raise _too_short(documents, options, tally)
    pieces = piece_reader(tokenizer)
    prompts = tuple(
        Prompt(i, ids, pieces(ids), where, domain) for i, (ids, where, domain) in enumerate(encoded)
    )
    return PromptSet(prompts, describe(prompts, documents, encoder, options, tally))


def _check(options: Options) -> None:
    for name, value in (("n", options.n), ("seq_len", options.seq_len), ("min_tokens", options.min_tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} must be a whole number from 1, not {value!r}.")
    if options.pack and options.seq_len is None:
        raise UsageError("Packing needs a window length.", hint="Use --seq-len 512 with --pack.")
    if options.seq_len is not None and options.min_tokens > options.seq_len:
        raise UsageError(
            f"No prompt can have {options.min_tokens} tokens when all are cut after {options.seq_len}.",
            hint=f"Use --seq-len {options.min_tokens} or more.",
        )


def _require_tokenizer(tokenizer: Any, source: Source) -> None:
    if tokenizer is None and not source.given_ids:
        raise DataError(
            f"The prompts of {source.name} are text, but the model came without a tokenizer.",
            hint="In Python: give tokenizer=..., or prompts as lists of token ids, prompts=[[1, 15, 27, ...]].",
        )


def _separate(
    source: Source, encoder: Encoder, options: Options, tally: Tally
) -> Iterator[tuple[int, Encoded]]:
    """One prompt per document, as `(place in the source, prompt)`, in the order in which they are sampled."""
    queues = [_usable(queue, source, encoder, options, tally) for queue in _queues(source, options)]
    return interleave(queues)


def _usable(
    places: list[int], source: Source, encoder: Encoder, options: Options, tally: Tally
) -> Iterator[tuple[int, Encoded]]:
    for place in places:
        document = source.documents[place]
        body = encoder.body(document)
        tally.documents += 1
        length = len(body) + encoder.room if body else 0
        tally.longest = max(tally.longest, length)
        too_long = options.seq_len is not None and length > options.seq_len
        ids = encoder.wrap(body[: options.seq_len - encoder.room] if too_long and options.seq_len else body)
        if not body or len(ids) < options.min_tokens:
            tally.dropped_short += 1
            continue
        tally.truncated += too_long
        yield place, (ids, document.source, document.domain)


def _packed(
    source: Source, encoder: Encoder, options: Options, tally: Tally
) -> Iterator[tuple[int, Encoded]]:
    """Windows of exactly `seq_len` over the joined documents; an incomplete last window is left over."""
    assert options.seq_len is not None
    width = options.seq_len - encoder.room
    between = separator(encoder)
    buffer: list[tuple[int, Document]] = []
    made = 0
    for place in interleave(map(iter, _queues(source, options))):
        document = source.documents[place]
        ids = encoder.body(document)
        tally.documents += 1
        tally.longest += len(ids)
        buffer += [(token_id, document) for token_id in ((*between, *ids) if tally.documents > 1 else ids)]
        whole = len(buffer) - len(buffer) % width
        for start in range(0, whole, width):
            window = buffer[start : start + width]
            yield made, (encoder.wrap(tuple(token_id for token_id, _ in window)), *_origin(window))
            made += 1
        buffer = buffer[whole:]
    tally.leftover_tokens = len(buffer)


def _origin(window: list[tuple[int, Document]]) -> tuple[str, str]:
    first, last = window[0][1], window[-1][1]
    domains = {document.domain for _, document in window}
    source = first.source if first is last else f"{first.source} … {last.source}"
    return source, domains.pop() if len(domains) == 1 else ""


def separator(encoder: Encoder) -> tuple[int, ...]:
    """What stands between packed documents: EOS, else BERT's `[SEP]`, else BOS, else nothing."""
    names = ("eos_token_id", "sep_token_id", "bos_token_id")
    found = (getattr(encoder.tokenizer, name, None) for name in names)
    return next(((token_id,) for token_id in found if token_id is not None), ())


def _queues(source: Source, options: Options) -> list[list[int]]:
    """Places in the order they are tried. Queues are served in turn, so a sample is even over domains."""
    places = list(range(len(source.documents)))
    if options.n is None:
        return [places]
    groups: dict[str, list[int]] = {}
    for place in places:
        groups.setdefault(source.documents[place].domain if source.groups else "", []).append(place)
    rng = random.Random(options.seed)
    for group in groups.values():
        rng.shuffle(group)
    return list(groups.values())


def interleave(queues: Iterable[Iterator[T]]) -> Iterator[T]:
    """One item of each queue in turn, until all are empty."""
    waiting = deque(queues)
    while waiting:
        queue = waiting.popleft()
        for item in queue:
            yield item
            waiting.append(queue)
            break


def _take(stream: Iterator[tuple[int, Encoded]], options: Options) -> list[Encoded]:
    """The first `n` of the stream, back in the order of the source."""
    taken: list[tuple[int, Encoded]] = []
    for item in stream:
        taken.append(item)
        if len(taken) == options.n:
            break
    return [encoded for _, encoded in sorted(taken, key=lambda item: item[0])]


def _too_short(source: Source, options: Options, tally: Tally) -> DataError:
    if options.pack:
        return DataError(
            f"All of {source.name} has {tally.longest} tokens, less than one window of {options.seq_len}.",
            hint=f"Use --seq-len {max(1, tally.longest)} or less, or more text.",
        )
    if tally.longest == 0:
        return DataError(
            f"All {tally.documents} prompts of {source.name} are empty.", hint="Give prompts with text."
        )
    return DataError(
        f"All {tally.documents} prompts of {source.name} are shorter than {options.min_tokens} tokens.",
        detail=f"The longest has {tally.longest} tokens.",
        hint=f"Use --min-tokens {max(1, tally.longest)}, longer prompts, or join them with --pack.",
    )
