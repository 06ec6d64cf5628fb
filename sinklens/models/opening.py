"""Opening a model, whatever it is given as: a name, a folder, a hub id, or a module in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sinklens.core.errors import ModelError, SinklensError, UsageError

from .anatomy import find_anatomy
from .catalog import Source, locate
from .checkpoint import stored_shapes
from .failures import explain
from .files import bytes_of, commit_of, hashes_of
from .loading import (
    check_complete,
    check_finite,
    load_config,
    load_tokenizer,
    load_weights,
    parse_dtype,
    placement,
    quantisation,
    without_weights,
)
from .processors import load_processor
from .quantised import (
    dequantising,
    format_of,
    packed_format,
    planned_shapes,
    refuse_ragged,
    scratch_bytes,
)
from .spec import Anatomy, ModelInfo, OpenedModel
from .spread import refuse_spread, refuse_unspreadable, spread_of
from .streamable import refuse_unstreamable
from .streaming import StreamedBlocks, open_streamed
from .streaming.expected import bytes_per_token

PROMPTS = "sinklens_prompts.jsonl"
PICTURES = "sinklens_pictures.jsonl"
"""Prompts with pictures that came with a checkpoint; they go before texts that came with it."""


@dataclass(frozen=True)
class ModelDescription:
    """What is known about a model before its weights are loaded.

    Attributes:
        stored_bytes: Weights as they are stored; estimated from the config if the files are not at hand.
        loaded_bytes: Weights in memory at the dtype asked for.
        estimated: Whether `stored_bytes` is an estimate.
        block_bytes, shell_bytes: The largest block of the main tower and everything outside its blocks, in memory.
        handed_bytes: What is handed on between two blocks, per token and at most: states, and what goes beside them.
        dequantised: The format that the weights are stored in and dequantised from; None for all others.
        scratch_bytes: What dequantising the largest parameter takes beside it.
        packed: The format of packed weights, which only streaming dequantises; None for all others.
    """

    info: ModelInfo
    anatomy: Anatomy
    stored_bytes: int
    loaded_bytes: int
    estimated: bool = False
    block_bytes: int = 0
    shell_bytes: int = 0
    handed_bytes: float = 0.0
    dequantised: str | None = None
    scratch_bytes: int = 0
    packed: str | None = None


def open_model(
    spec: Any = None,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    quantization: Any = None,
    stream: bool = False,
    spread: int | None = None,
) -> OpenedModel:
    """Opens a model for tracing, in eval mode.

    Args:
        spec: None for the default bundled checkpoint, `bundled:name`, an alias (`qwen3-30b-a3b`), `org/name`, both
            also with `@revision`, a folder, or a transformers model in memory.
        tokenizer: For a model in memory, or instead of the model's own: an object, a folder or an id.
        processor: The same for pictures: an object of transformers. Its tokenizer is taken if there is no other.
        dtype: `auto` for the checkpoint's own, or `bf16`, `fp16`, `fp32`, `fp64`.
        device: Where to put the model; by default the first GPU if there is one.
        device_map: As in transformers, instead of `device`.
        trust_remote_code: Whether code that comes with the model may run.
        quantization: `4bit`, `8bit` or a config of transformers.
        stream: Leave the blocks of the main tower on disk and load each one when it runs.
        spread: Spread the weights by the model's tensor-parallel plan over so many processes, each of which calls this.
            A model in memory must be spread already; without this it is refused then.

    Raises:
        ModelError: The model cannot be used; each cause has its own message.
        UsageError: The arguments contradict each other or the model.
        ResourceError: It does not fit into memory.
    """
    if isinstance(spec, OpenedModel):
        return spec
    if isinstance(spec, nn.Module):
        _only_in_memory(
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            quantization=quantization,
            stream=stream or None,
        )
        return _in_memory(spec, tokenizer, processor, spread is not None)
    source = locate(_name(spec), revision)
    wanted, where, quantised = parse_dtype(dtype), placement(device, device_map), quantisation(quantization)
    if stream:
        refuse_unstreamable(device_map, quantised)
    config = load_config(source, trust_remote_code)
    unpacks = None if quantised is not None else dequantising(source, config, wanted)
    anatomy = _refuse_early(source, config, trust_remote_code, unpacks, spread, quantised)
    own_tokenizer = load_tokenizer(source, tokenizer, _reads_text(anatomy), trust_remote_code)
    options: dict[str, Any] = {"dtype": wanted, "trust_remote_code": trust_remote_code}
    if spread is not None:
        where, options["spread"] = None, spread  # transformers puts each process on its own device
    module, anatomy, blocks = _loaded(source, config, stream, where, quantised or unpacks, options)
    over = spread_of(module)
    check_finite(module, source.id, over)
    commit = commit_of(source)
    info = _info(module, anatomy, source.id, commit, hashes_of(source, commit))
    return OpenedModel(
        module,
        own_tokenizer,
        anatomy,
        info,
        own_prompts(source),
        processor=processor,
        load_processor=lambda: load_processor(source, trust_remote_code),
        blocks=blocks,
        dequantised=format_of(config) if unpacks is not None else packed_format(config) if stream else None,
        spread=over,
    )


def _loaded(
    source: Source, config: Any, stream: bool, where: Any, stored_as: Any, options: dict[str, Any]
) -> tuple[nn.Module, Anatomy, StreamedBlocks | None]:
    """The model with its weights, none of which are missing; with its blocks, where those stay on disk.

    Args:
        where: As `placement` says.
        stored_as: How weights are quantised while they are loaded, or were and are dequantised.
    """
    blocks = None
    if stream:
        device = where and where[""]
        module, blocks, missing = open_streamed(
            source, config, device=device, dequantising=stored_as, **options
        )
    else:
        module, missing = load_weights(source, config, device_map=where, quantization=stored_as, **options)
    anatomy = find_anatomy(module)
    check_complete(source, anatomy, missing)
    return module, anatomy, blocks


def own_prompts(source: Source) -> str | None:
    """Path of the prompts that came with a checkpoint, those with pictures first; None if it has none."""
    paths = [] if source.folder is None else [source.folder / name for name in (PICTURES, PROMPTS)]
    return next((str(path) for path in paths if path.is_file()), None)


def describe_model(
    spec: Any = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    spread: int | None = None,
) -> ModelDescription:
    """What a model is, from its config and the headers of its files, or why it is refused; no weights are read."""
    wanted = parse_dtype(dtype)
    if isinstance(spec, OpenedModel | nn.Module):
        opened = open_model(spec)
        held = sum(p.numel() * p.element_size() for p in opened.module.parameters())
        return ModelDescription(opened.info, opened.anatomy, held, held)
    source = locate(_name(spec), revision)
    config = load_config(source, trust_remote_code)
    shell = _shell(source, config, trust_remote_code)
    anatomy = find_anatomy(shell)
    refuse_unspreadable(shell, anatomy, spread, source.id)
    stored_dtype = next(
        (c.dtype for c in (config, _text(config)) if getattr(c, "dtype", None)), torch.float32
    )
    kept = wanted if isinstance(wanted, torch.dtype) else stored_dtype
    commit = commit_of(source)
    info = _info(shell, anatomy, source.id, commit, {}, kept)
    stored = bytes_of(source, commit)
    unpacks = dequantising(source, config, wanted)
    by_block = [
        kept.itemsize * sum(p.numel() for p in shell.get_submodule(block.path).parameters())
        for block in anatomy.main.blocks
    ]
    found = ModelDescription(
        info=info,
        anatomy=anatomy,
        stored_bytes=info.parameters * stored_dtype.itemsize if stored is None else stored,
        loaded_bytes=info.parameters * kept.itemsize,
        estimated=stored is None,
        block_bytes=max(by_block),
        shell_bytes=info.parameters * kept.itemsize - sum(by_block),
        handed_bytes=bytes_per_token(shell, anatomy, kept.itemsize) or info.hidden_size * kept.itemsize,
        dequantised=None if unpacks is None else format_of(config),
        scratch_bytes=scratch_bytes(config, _dequantised_shapes(config, shell, anatomy), kept.itemsize),
        packed=packed_format(config),
    )
    _refuse_ragged(source, config, shell, unpacks)
    return found


def _dequantised_shapes(config: Any, shell: nn.Module, anatomy: Anatomy) -> Iterable[tuple[int, ...]]:
    """The shapes of the parameters that may be stored quantised. Packed formats leave tables as they are."""
    parts = [shell.get_submodule(block.path) for tower in anatomy.towers for block in tower.blocks]
    within = parts if packed_format(config) else [shell]
    return (tuple(p.shape) for part in within for p in part.parameters())


def stored_bytes(spec: Any, revision: str | None = None) -> int | None:
    """Bytes of a model's weight files, from their headers or the hub's index; None if that takes more."""
    source = locate(_name(spec), revision)
    return bytes_of(source, commit_of(source))


def open_shell(
    spec: Any = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> OpenedModel:
    """A model by name without its weights (they are on the meta device), with its tokenizer: for plans, not to run."""
    described = describe_model(spec, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    source = locate(_name(spec), revision)
    config = load_config(source, trust_remote_code)
    return OpenedModel(
        _shell(source, config, trust_remote_code),
        load_tokenizer(source, None, True, trust_remote_code),
        described.anatomy,
        described.info,
        own_prompts(source),
        load_processor=lambda: load_processor(source, trust_remote_code),
    )


def _name(spec: Any) -> str | os.PathLike[str] | None:
    if spec is None or isinstance(spec, str | os.PathLike):
        return spec
    raise ModelError(
        f"A model cannot be opened from a {type(spec).__name__}.",
        hint="Give an alias, org/name, a folder, or a transformers model with its tokenizer.",
    )


def _only_in_memory(**given: Any) -> None:
    chosen = [name for name, value in given.items() if value is not None and value != "auto"]
    if chosen:
        raise UsageError(
            f"{', '.join(chosen)} cannot be chosen for a model that is in memory already.",
            hint="Change the model before you pass it: model.to(...).",
        )


def _in_memory(module: nn.Module, tokenizer: Any, processor: Any, spread: bool) -> OpenedModel:
    """A module of the user: it is put into eval mode and otherwise left alone."""
    if not spread:
        refuse_spread(module)
    anatomy = find_anatomy(module)
    name = getattr(module.config, "_name_or_path", "") or type(module).__name__
    over = spread_of(module)
    refuse_unspreadable(module, anatomy, over and over.size, name)
    check_finite(module, name, over)
    source = Source(name, name)
    tokenizer = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
    own = load_tokenizer(source, tokenizer, wanted=False, trust_remote_code=False)
    return OpenedModel(
        module.eval(),
        own,
        anatomy,
        _info(module, anatomy, name, None, {}),
        processor=processor,
        spread=over,
    )


def described_module(
    module: nn.Module, tokenizer: Any, name: str, commit: str | None, *, backend: str, handle: Any
) -> OpenedModel:
    """A model whose weights are elsewhere: what its structure tells."""
    anatomy = find_anatomy(module)
    info = _info(module, anatomy, name, commit, {})
    return OpenedModel(module, tokenizer, anatomy, info, backend=backend, handle=handle)


def _shell(source: Source, config: Any, trust_remote_code: bool) -> nn.Module:
    """The model without weights, or a message why its config cannot be built."""
    try:
        return without_weights(config, trust_remote_code)
    except SinklensError:
        raise
    except Exception as error:
        raise explain(error, source, "config") from error


def _refuse_early(
    source: Source, config: Any, trust_remote_code: bool, unpacks: Any, spread: int | None, quantised: Any
) -> Anatomy | None:
    """The anatomy without weights, so that an unreadable family is refused before gigabytes are loaded.

    Code that comes with a model may not be able to build on the meta device; it is then judged after loading.
    """
    try:
        shell = _shell(source, config, trust_remote_code)
    except ModelError:
        if trust_remote_code:
            return None
        raise
    anatomy = find_anatomy(shell)
    refuse_unspreadable(shell, anatomy, spread, source.id, quantised)
    _refuse_ragged(source, config, shell, unpacks)
    return anatomy


def _refuse_ragged(source: Source, config: Any, shell: nn.Module, unpacks: Any) -> None:
    """Refuse float8 blocks of several sizes: by the files of a folder, else by what the config says.

    Args:
        shell: The model without weights; it is used up.
    """
    if unpacks is not None and source.folder is not None:
        refuse_ragged(source.id, stored_shapes(source.folder, source.id), config)
    elif unpacks is not None:
        refuse_ragged(source.id, planned_shapes(shell, config, unpacks), config)


def _reads_text(anatomy: Anatomy | None) -> bool:
    return anatomy is None or any(tower.embedding for tower in anatomy.towers)


def _info(
    module: nn.Module,
    anatomy: Anatomy,
    name: str,
    commit: str | None,
    hashes: dict[str, str],
    dtype: torch.dtype | None = None,
) -> ModelInfo:
    tower, config = anatomy.main, module.config
    kept = dtype or _dtype(module.parameters())
    return ModelInfo(
        id=name,
        revision=commit,
        family=anatomy.family,
        layers=len(tower.blocks),
        heads=tower.heads,
        kv_heads=tower.kv_heads,
        hidden_size=tower.hidden_size,
        experts=tower.n_experts,
        dtype=str(kept).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        vocab_size=getattr(_text(config), "vocab_size", None) or 0,
        files_sha256=hashes,
    )


def _text(config: Any) -> Any:
    """The config of the language model inside a config, or the config itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _dtype(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    """The floating dtype of most weights."""
    counts: dict[torch.dtype, int] = {}
    for parameter in parameters:
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
