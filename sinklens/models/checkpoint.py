"""The files of a checkpoint in a folder: are they all there and whole, how large are they, what are their hashes."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinklens.core.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HASHED_BYTES = 2 * 1024**3
SAMPLE_BYTES = 4096
"""Read from the middle of every tensor of weights that are too large to be hashed whole."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "vocab.bpe", "qwen.tiktoken", "tiktoken.model",
)  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """One entry of a safetensors header: shape, bytes of data, and where in the file they begin."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """`config.json` as a dictionary.

    Raises:
        ModelError: It is missing, is not JSON, or the folder holds an adapter instead of a model.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{name!r} holds an adapter (LoRA), not a model.",
                hint="Merge it into its base model (peft: merge_and_unload, then save_pretrained) and open that.",
            )
        found = ", ".join(sorted(item.name for item in folder.iterdir())[:5]) or "nothing"
        raise ModelError(
            f"The folder {name!r} has no config.json.",
            detail=f"A model folder has config.json and *.safetensors; found: {found}.",
            hint="Give the folder that save_pretrained wrote, or org/name of the hub.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path.name} in {name!r} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path.name} in {name!r} is not a JSON object.")
    return config


def weight_files(folder: Path, name: str) -> list[Path]:
    """The weight files of a model folder, all present; safetensors before pickles.

    Raises:
        ModelError: No weights, or a shard that the index names is missing.
    """
    index = next(
        (path for path in (folder / INDEX, folder / "pytorch_model.bin.index.json") if path.is_file()), None
    )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if index is not None:
        shards = sorted(set(_weight_map(index, name).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(
                f"{len(missing)} of {len(shards)} weight files are missing from {name!r}: {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}.",
                detail=f"They are named in {index.name}.",
                hint="Copy or download the folder again.",
            )
        return [folder / shard for shard in shards]
    other = folder / "pytorch_model.bin"
    if other.is_file():
        return [other]
    raise ModelError(
        f"The folder {name!r} has a config.json but no weights.",
        detail=f"Expected {SINGLE}, or {INDEX} and its shards.",
        hint="Copy or download the folder again (Git LFS: git lfs pull).",
    )


def _weight_map(index: Path, name: str) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(value) for key, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index.name} in {name!r} is damaged: {type(error).__name__}: {error}.",
            hint="Copy or download the folder again.",
        ) from error


def read_header(path: Path, name: str) -> dict[str, TensorHeader]:
    """The header of a safetensors file, after checking that the file is as long as the header says.

    The format is eight bytes with the header's length, a JSON header with offsets, and the data
    (https://huggingface.co/docs/safetensors, "Format").

    Raises:
        ModelError: The file is cut off, is a Git LFS pointer, or is not a safetensors file.
    """
    size = path.stat().st_size
    again = "Copy or download the file again."
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ModelError(
                f"{path.name} in {name!r} is a Git LFS pointer, not the weights.",
                hint="Run git lfs pull in the folder.",
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else math.inf
        if length > size - 8:
            raise ModelError(
                f"{path.name} in {name!r} is truncated or not a safetensors file.",
                detail=f"It has {size:,} bytes, fewer than its header alone.",
                hint=again,
            )
        raw = file.read(int(length))
    try:
        entries = {key: value for key, value in json.loads(raw).items() if key != "__metadata__"}
        header = {
            key: TensorHeader(
                item["dtype"],
                tuple(item["shape"]),
                item["data_offsets"][1] - item["data_offsets"][0],
                8 + int(length) + item["data_offsets"][0],
            )
            for key, item in entries.items()
        }
        end = max((item["data_offsets"][1] for item in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{path.name} in {name!r} is corrupt: its safetensors header cannot be read.",
            detail=f"{type(error).__name__}: {error}",
            hint=again,
        ) from error
    expected = 8 + int(length) + end
    if size != expected:
        raise ModelError(
            f"{path.name} in {name!r} is {'truncated' if size < expected else 'corrupt: it is too long'}.",
            detail=f"Its header describes {expected:,} bytes, the file has {size:,}.",
            hint=again,
        )
    return header


def check_weights(folder: Path, name: str) -> int:
    """Checks that all weight files are present and whole; returns the bytes of weights they hold."""
    files = weight_files(folder, name)
    safe = [path for path in files if path.suffix == ".safetensors"]
    held = sum(header.nbytes for path in safe for header in read_header(path, name).values())
    return held + sum(path.stat().st_size for path in files if path not in safe)


def stored_shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in the safetensors files of a folder."""
    files = [path for path in weight_files(folder, name) if path.suffix == ".safetensors"]
    return {key: header.shape for path in files for key, header in read_header(path, name).items()}


def check_tokenizer(folder: Path, name: str) -> None:
    """Transformers builds an empty tokenizer from nothing for some families, so the files are looked for first."""
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(
            f"The folder {name!r} has no tokenizer.",
            detail="Expected tokenizer.json, tokenizer.model or a vocabulary beside config.json.",
            hint="Save it there (tokenizer.save_pretrained(folder)), or pass tokenizer=... in Python.",
        )


def folder_hashes(folder: Path, name: str) -> dict[str, str]:
    """sha256 of config and tokenizer, and of the weights: of 2 GiB or more only of a sample, and named so."""
    weights = weight_files(folder, name)
    small = [folder / file for file in ("config.json", "tokenizer.json") if (folder / file).is_file()]
    found = {path.name: _sha256(path) for path in small}
    if sum(path.stat().st_size for path in weights) < HASHED_BYTES:
        return found | {path.name: _sha256(path) for path in weights}
    return found | {f"{path.name} (sample)": _sample_sha256(path, name) for path in weights}


def cache_hashes(paths: list[str]) -> dict[str, str]:
    """sha256 of files in the hub's cache: large files are stored under their hash, small ones are read."""
    found: dict[str, str] = {}
    for path in map(Path, paths):
        stored = path.resolve().name
        by_name = len(stored) == 64 and all(letter in "0123456789abcdef" for letter in stored)
        if by_name or path.stat().st_size < 64 * 1024**2:
            found[path.name] = stored if by_name else _sha256(path)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample_sha256(path: Path, name: str) -> str:
    """sha256 of a file's size and header and of a piece of each tensor; of a pickle, of evenly spaced pieces."""
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        header = read_header(path, name)
        digest = hashlib.sha256(f"{size} {sorted(header.items())}".encode())
        middles = sorted(tensor.start + (tensor.nbytes - SAMPLE_BYTES) // 2 for tensor in header.values())
    else:
        digest = hashlib.sha256(str(size).encode())
        middles = [size * piece // 1024 for piece in range(1024)]
    with path.open("rb") as file:
        for middle in middles:
            file.seek(max(0, middle))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
