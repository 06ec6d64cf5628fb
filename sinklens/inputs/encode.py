"""Text to token ids under an explicit BOS policy and, if asked, through the chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from sinklens.core.errors import DataError, UsageError

from .sources import Document, Message

Bos = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with everything that decides about the first tokens.

    Attributes:
        bos: `auto` = what the tokenizer does, `on` = exactly one BOS first, `off` = none.
        prefix: Ids that go before the text under this policy.
        suffix: Ids the tokenizer puts after the text (BERT's `[SEP]`); empty with a chat template.
    """

    tokenizer: Any
    bos: Bos
    chat_template: bool
    bos_id: int | None
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def room(self) -> int:
        """Tokens of every prompt that are not its text."""
        return len(self.prefix) + len(self.suffix)

    def body(self, document: Document) -> tuple[int, ...]:
        """The document's own tokens: no prefix or suffix and, unless `auto`, no BOS at the start."""
        content = document.content
        ids = content if isinstance(content, tuple) else self._encode(self._text(content, document))
        if self.bos != "auto":
            while ids and ids[0] == self.bos_id:
                ids = ids[1:]
        return ids

    def wrap(self, body: tuple[int, ...]) -> tuple[int, ...]:
        return (*self.prefix, *body, *self.suffix)

    def _text(self, content: str | list[Message], document: Document) -> str:
        if not self.chat_template:
            if isinstance(content, str):
                return content
            raise DataError(
                f"{document.source} holds chat messages, which are text only through a chat template.",
                hint="Use --chat-template on (in Python: chat_template=True).",
            )
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        except Exception as err:  # templates raise whatever their author chose
            raise DataError(
                f"The chat template refused {document.source}: {' '.join(str(err).split())[:200]}.",
                hint="Check the roles and their order, or profile the plain text without the template.",
            ) from err
        return cast(str, text)

    def _encode(self, text: str) -> tuple[int, ...]:
        # verbose=False: no "longer than the maximum" log line; lengths are this package's business.
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def make_encoder(tokenizer: Any, bos: Bos, chat_template: bool, *, given_ids: bool = False) -> Encoder:
    """The encoder for a policy.

    Args:
        tokenizer: A transformers tokenizer, or None if all prompts are token ids.
        given_ids: Whether the prompts are token ids already; with `auto` they are taken as they are.

    Raises:
        DataError: If the tokenizer lacks what was asked for: a BOS token or a chat template.
        UsageError: If `bos` is not a policy.
    """
    if bos not in ("auto", "on", "off"):
        raise UsageError(f"Unknown BOS policy {bos!r}.", hint="Use auto, on or off.")
    bos_id = bos_token_id(tokenizer)
    if bos == "on" and bos_id is None:
        raise DataError(
            "A BOS was asked for, but this tokenizer has none." if tokenizer else "A BOS needs a tokenizer.",
            hint="Use --bos auto, or put a token of your choice at the start of each prompt.",
        )
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "This tokenizer has no chat template.",
            hint="Profile the plain text (without --chat-template), or choose the instruction-tuned model.",
        )
    if given_ids and chat_template:
        raise UsageError(
            "A chat template can be applied to text or messages, not to token ids.",
            hint="Leave the chat template off, or pass strings.",
        )
    prefix, suffix = ((), ()) if chat_template or given_ids else _affixes(tokenizer)
    if bos != "auto":
        prefix = tuple(token_id for token_id in prefix if token_id != bos_id)
    if bos == "on" and bos_id is not None:
        prefix = (bos_id, *prefix)
    return Encoder(tokenizer, bos, chat_template, bos_id, prefix, suffix)


def bos_token_id(tokenizer: Any) -> int | None:
    """The id of the beginning-of-sequence token; BERT's `[CLS]` plays that part."""
    found = getattr(tokenizer, "bos_token_id", None)
    return getattr(tokenizer, "cls_token_id", None) if found is None else found


def _affixes(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and after a text, read off one probe."""
    probe = "probe"
    whole = tuple(tokenizer(probe)["input_ids"])
    inner = tuple(tokenizer(probe, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(inner) + 1):
        if inner and whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    raise DataError(
        "This tokenizer changes the text itself when it adds special tokens; no BOS policy can be applied.",
        hint="Tokenise the prompts yourself and pass lists of token ids.",
    )
