"""The description of a prompt set: what the manifest keeps, and warnings a reader needs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .encode import Encoder
from .sources import Source
from .spec import Prompt

FIRST_TOKENS = 5


@dataclass(frozen=True)
class Options:
    """How documents become prompts; see `load_prompts`."""

    n: int | None
    seq_len: int | None
    pack: bool
    min_tokens: int
    seed: int


@dataclass
class Tally:
    """What happened to the documents on the way. `longest` is in tokens; for packing it is their sum."""

    documents: int = 0
    truncated: int = 0
    dropped_short: int = 0
    longest: int = 0
    leftover_tokens: int = 0


def describe(
    prompts: tuple[Prompt, ...], source: Source, encoder: Encoder, options: Options, tally: Tally
) -> dict[str, Any]:
    """Plain data about the prompts; the keys are those of `PromptSet`.

    `bos_added` is true if every prompt starts with a BOS; `first_tokens` counts the most frequent first
    tokens; `sha256` is of the token ids, so equal inputs are recognised whatever file they came from.
    """
    return description(prompts, source.name, encoder, options, tally, source.notes)


def description(
    prompts: tuple[Prompt, ...],
    name: str,
    encoder: Any,
    options: Options,
    tally: Tally,
    notes: Sequence[str],
    *,
    extra: Sequence[str] = (),
) -> dict[str, Any]:
    """As `describe`, for any encoder with a tokenizer, a BOS policy and a chat template.

    Args:
        extra: What the prompts hold besides tokens (hashes of pictures); part of their `sha256`.
    """
    lengths = [len(prompt) for prompt in prompts]
    first = Counter(prompt.pieces[0] for prompt in prompts)
    ids: list[Any] = [prompt.token_ids for prompt in prompts]
    hashed = [ids, list(extra)] if extra else ids
    domains = Counter(prompt.domain for prompt in prompts if prompt.domain)
    return {
        "source": name,
        "n_prompts": len(prompts),
        "n_tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "domains": dict(sorted(domains.items())),
        "seq_len": options.seq_len,
        "min_tokens": options.min_tokens,
        "truncated": tally.truncated,
        "dropped_short": tally.dropped_short,
        "packed": options.pack,
        "leftover_tokens": tally.leftover_tokens,
        "seed": options.seed,
        "bos": encoder.bos,
        "bos_added": all(_starts_with_bos(prompt, encoder) for prompt in prompts),
        "first_tokens": dict(first.most_common(FIRST_TOKENS)),
        "chat_template": encoder.chat_template,
        "tokenizer": _tokenizer_name(encoder.tokenizer),
        "sha256": hashlib.sha256(json.dumps(hashed).encode()).hexdigest(),
        "warnings": [*notes, *_warnings(prompts, encoder, options, tally)],
    }


def _starts_with_bos(prompt: Prompt, encoder: Any) -> bool:
    return encoder.bos_id is not None and prompt.token_ids[0] == encoder.bos_id


def _tokenizer_name(tokenizer: Any) -> dict[str, Any] | None:
    """Name, class and size. Of a local folder only the last part: manifests are shared."""
    if tokenizer is None:
        return None
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    local = Path(name).is_absolute() or Path(name).exists()
    return {
        "name": Path(name).name if local else name,
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
    }


def _warnings(prompts: tuple[Prompt, ...], encoder: Any, options: Options, tally: Tally) -> list[str]:
    found = [*_bos_warnings(prompts, encoder), *_template_warnings(encoder)]
    if tally.dropped_short:
        of = f"{tally.dropped_short} of {tally.documents} prompts"
        found.append(f"{of} were dropped: they have fewer than {options.min_tokens} tokens.")
    if options.n is not None and len(prompts) < options.n:
        unit = "windows" if options.pack else "prompts"
        found.append(f"Asked for {options.n} {unit}, but the source has only {len(prompts)}.")
    return found


def _bos_warnings(prompts: tuple[Prompt, ...], encoder: Any) -> list[str]:
    if encoder.tokenizer is None or encoder.bos == "on":
        return []
    if encoder.bos_id is None:
        return ["The tokenizer has no BOS token, so position 0 holds an ordinary token."]
    twice = sum(len(prompt) > 1 and prompt.token_ids[:2] == (encoder.bos_id,) * 2 for prompt in prompts)
    if twice:
        return [
            f"{twice} of {len(prompts)} prompts start with two BOS tokens; --bos on makes it exactly one."
        ]
    missing = sum(not _starts_with_bos(prompt, encoder) for prompt in prompts)
    if encoder.bos == "off" or not missing:
        return []
    count = "" if missing == len(prompts) else f" of {missing} of {len(prompts)} prompts"
    cause = (
        "The chat template gives no BOS"
        if encoder.chat_template
        else "The tokenizer has a BOS token but adds none"
    )
    return [f"{cause}, so position 0{count} holds another token; --bos on puts a BOS there."]


def _template_warnings(encoder: Any) -> list[str]:
    if encoder.chat_template or not getattr(encoder.tokenizer, "chat_template", None):
        return []
    return [
        "The tokenizer has a chat template that was not applied; "
        "an instruction-tuned model may behave otherwise with it."
    ]
