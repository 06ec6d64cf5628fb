"""The files that a model was opened from: their commit, hashes and sizes, in a folder or in the hub's cache."""

from __future__ import annotations

import json
from pathlib import Path

from .catalog import Source
from .checkpoint import INDEX, SINGLE, cache_hashes, check_weights, folder_hashes


def commit_of(source: Source) -> str | None:
    """The commit that the hub's cache holds for the revision asked for: the name of its snapshot folder."""
    from huggingface_hub import try_to_load_from_cache

    if source.folder is not None:
        return None
    path = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
    return Path(path).parent.name if isinstance(path, str) else None


def hashes_of(source: Source, commit: str | None) -> dict[str, str]:
    if source.folder is not None:
        return folder_hashes(source.folder, source.id)
    return cache_hashes(_cached(source, commit))


def _cached(source: Source, commit: str | None) -> list[str]:
    """Paths in the hub's cache of the files that were just used."""
    from huggingface_hub import try_to_load_from_cache

    def find(name: str) -> str | None:
        path = try_to_load_from_cache(source.location, name, revision=commit or source.revision)
        return path if isinstance(path, str) else None

    index = find(INDEX)
    shards: set[str] = set()
    if index is not None and find(SINGLE) is None:
        with open(index, encoding="utf-8") as file:
            shards = set(json.load(file).get("weight_map", {}).values())
    return [
        path for name in ("config.json", "tokenizer.json", SINGLE, *sorted(shards)) if (path := find(name))
    ]


def bytes_of(source: Source, commit: str | None) -> int | None:
    """Bytes of the weights: from the headers in a folder, from the index of a hub model, else None."""
    if source.folder is not None:
        return check_weights(source.folder, source.id)
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(source.location, INDEX, revision=commit or source.revision)
        with open(str(path), encoding="utf-8") as file:
            return int(json.load(file)["metadata"]["total_size"])
    except (OSError, KeyError, TypeError, ValueError):
        return None
