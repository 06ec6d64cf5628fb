"""One readable string per token, for tables and the token viewer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def display_pieces(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, ...]:
    """Display strings of the tokens, one each, never empty and never failing.

    Byte-level markers become the text they stand for (`Ġfox` is ` fox`), SentencePiece's `▁` a space. A token
    that is only part of a UTF-8 character shows its bytes (`\\xe2\\x96`). Special and added tokens stay as
    they are. Without a tokenizer, and for ids it does not know, the id itself is shown.
    """
    return piece_reader(tokenizer)(token_ids)


def piece_reader(tokenizer: Any) -> Callable[[Sequence[int]], tuple[str, ...]]:
    """`display_pieces` for many prompts: what depends on the tokenizer alone is looked up once."""
    if tokenizer is None:
        return lambda token_ids: tuple(str(token_id) for token_id in token_ids)
    fixed = set(getattr(tokenizer, "all_special_tokens", ())) | set(
        getattr(tokenizer, "get_added_vocab", dict)()
    )
    readable = _from_bytes if is_byte_level(tokenizer) else _from_sentencepiece

    def show(token_id: int, token: str | None) -> str:
        if not token:
            return f"<{token_id}>"
        return token if token in fixed else readable(token)

    def read(token_ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(map(show, token_ids, _raw_tokens(tokenizer, token_ids)))

    return read


def is_byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary is written in GPT-2's byte alphabet."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_decoder")
    decoder = backend.decoder
    return decoder is not None and b"ByteLevel" in decoder.__getstate__()


def _raw_tokens(tokenizer: Any, token_ids: Sequence[int]) -> list[str | None]:
    try:
        return list(tokenizer.convert_ids_to_tokens(list(token_ids)))
    except (IndexError, KeyError, OverflowError, ValueError):
        return [_raw_token(tokenizer, token_id) for token_id in token_ids]


def _raw_token(tokenizer: Any, token_id: int) -> str | None:
    try:
        return tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, OverflowError, ValueError):
        return None


def _from_bytes(token: str) -> str:
    table = byte_alphabet()
    if any(char not in table for char in token):
        return token
    return bytes(table[char] for char in token).decode("utf-8", errors="backslashreplace")


def _from_sentencepiece(token: str) -> str:
    found = _BYTE_TOKEN.fullmatch(token)
    if found:
        return bytes([int(found[1], 16)]).decode("utf-8", errors="backslashreplace")
    return token.replace("▁", " ")


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: each byte as one printable character.

    Bytes that are printable and not blank in Latin-1 stand for themselves; the others, in order, are the
    characters from U+0100 on (so the space, the 33rd of them, is U+0120).
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
