"""Where the answer of a prompt stands, if its text ends with it."""

from __future__ import annotations

from typing import Any


def answer_tokens(tokenizer: Any, ids: tuple[int, ...], text: str, answer: str | None) -> slice | None:
    """The tokens of `ids` that spell the answer.

    They are counted by tokenising the text with and without it, and looked up from the end of the prompt, after which
    a tokenizer may have put marks of its own.

    Args:
        ids: The whole prompt.
        text: What was tokenised, placeholders of pictures not yet spread out.

    Returns:
        None if the text does not end with the answer, or if its first token also holds a part of what stands before it.
    """
    whole = text.rstrip()
    if not answer or not answer.strip() or not whole.endswith(answer.strip()):
        return None
    before = whole[: -len(answer.strip())].rstrip()
    full, prefix = (tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (whole, before))
    own = full[len(prefix) :]
    if not own or full[: len(prefix)] != prefix:
        return None
    for end in range(len(ids), len(own) - 1, -1):
        if ids[end - len(own) : end] == own:
            return slice(end - len(own), end)
    return None
