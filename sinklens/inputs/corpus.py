"""The bundled corpora: four domains, and `mixed`, which is all of them in turn."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files

from sinklens.core.errors import DataError
from sinklens.core.suggest import did_you_mean

from .sources import Document, Source

DOMAINS = ("prose", "code", "mathematics", "dialogue")
CORPORA = {
    "mixed": "all four domains in equal parts",
    "prose": "passages of nine public-domain books",
    "code": "small programs in some twenty languages",
    "mathematics": "worked derivations",
    "dialogue": "conversations, chats, interviews and scenes of a play",
}


@dataclass(frozen=True)
class CorpusInfo:
    """What `sinklens ls corpora` shows. `sha256` is of the corpus's texts, in order."""

    name: str
    description: str
    n_prompts: int
    n_characters: int
    sha256: str


def list_corpora() -> tuple[CorpusInfo, ...]:
    """All bundled corpora, `mixed` first."""
    return tuple(_info(name) for name in CORPORA)


def read_corpus(name: str) -> Source:
    """The documents of a bundled corpus; their source reads `corpus:NAME#INDEX`.

    Raises:
        DataError: If there is no corpus of that name.
    """
    if name not in CORPORA:
        raise DataError(
            f"Unknown corpus {name!r}.",
            detail=did_you_mean(name, CORPORA),
            hint=f"Bundled corpora: {', '.join(CORPORA)}.",
        )
    domains = DOMAINS if name == "mixed" else (name,)
    texts = [(domain, row["text"]) for domain in domains for row in corpus_rows(domain)]
    documents = [Document(text, f"corpus:{name}#{i}", domain) for i, (domain, text) in enumerate(texts)]
    return Source(f"corpus:{name}", documents, groups=name == "mixed")


def corpus_rows(domain: str) -> list[dict[str, str]]:
    """The rows of one domain: `text, domain, title, licence, source`."""
    text = (files("sinklens.inputs") / "corpora" / f"{domain}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _info(name: str) -> CorpusInfo:
    texts = [str(document.content) for document in read_corpus(name).documents]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return CorpusInfo(name, CORPORA[name], len(texts), sum(map(len, texts)), digest)
