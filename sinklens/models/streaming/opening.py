"""A model whose blocks stay on disk: everything else in memory, the blocks without weights and with gates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sinklens.core.errors import SinklensError

from ..anatomy import find_anatomy
from ..catalog import Source
from ..checkpoint import INDEX, SINGLE, weight_files
from ..failures import explain
from ..loading import model_class
from ..quantised import refuse_ragged
from ..streamable import refuse_unstreamable_source
from .blocks import SHELL, StreamedBlocks
from .recipe import Recipes, put
from .tensors import NUMBERS, StoredTensors
from .unpacked import refuse_lost_biases, turn_inputs_first, unpacked, unquantised


def open_streamed(
    source: Source,
    config: Any,
    *,
    dtype: Any,
    device: Any = None,
    trust_remote_code: bool = False,
    dequantising: Any = None,
) -> tuple[nn.Module, StreamedBlocks, set[str]]:
    """Build a model and load all of it but the blocks of its main tower.

    Args:
        dtype: A torch dtype, or `auto` for the checkpoint's own.
        device: Where the model runs; None for the CPU.
        dequantising: With what transformers dequantises a checkpoint that is stored quantised.

    Returns:
        The model in eval mode, its blocks, and the names of parameters that the checkpoint does not have.

    Raises:
        ModelError: The files cannot be read block by block, or something is wrong with them.
    """
    refuse_unstreamable_source(source, config)
    stored = stored_tensors(source, config, dtype)
    config = unquantised(config)
    if dequantising is not None:
        refuse_ragged(source.id, {key: stored.shape_of(key) for key in stored.where}, config)
    try:
        quantizer, config = _quantizer(config, dequantising)
        module, kept = _without_weights(stored, config, dtype, trust_remote_code, quantizer)
    except SinklensError:
        raise
    except Exception as error:
        raise explain(error, source, "weights") from error
    blocks = find_anatomy(module).main.blocks
    starts = {f"{block.path}.": block.index for block in blocks}

    def group_of(name: str) -> int | str:
        return next((index for start, index in starts.items() if name.startswith(start)), SHELL)

    recipes = Recipes(module, stored, kept, group_of, quantizer)
    turn_inputs_first(module, recipes)
    refuse_lost_biases(recipes)
    put(module, recipes.make(SHELL))
    missing = _missing(module, recipes)
    _complete_shell(module, missing, group_of)
    if quantizer is not None:
        quantizer.postprocess_model(module)  # what runs is not quantised, and its config says so
    place = torch.device(device or "cpu")
    if place.type != "cpu":
        _move_shell(module, place)
    return module.eval(), StreamedBlocks(module, blocks, recipes, place), missing


def stored_tensors(source: Source, config: Any, dtype: Any) -> StoredTensors:
    """The tensors of a model by name; packed weights are dequantised when they are read.

    Args:
        dtype: The dtype asked for, or `auto`.

    Raises:
        ModelError: The files cannot be read block by block, or something is wrong with them.
    """
    return unpacked(StoredTensors.of(checkpoint_files(source), source.id), source, config, dtype)


def checkpoint_files(source: Source) -> list[Path]:
    """The weight files of a model: in its folder, or in the hub's cache, downloaded if they are not there.

    Raises:
        ModelError: There are none, or one is missing.
    """
    if source.folder is not None:
        return weight_files(source.folder, source.id)
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    try:
        whole = cached_file(
            source.location,
            SINGLE,
            revision=source.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        if whole is not None:
            return [Path(whole)]
        index = cached_file(source.location, INDEX, revision=source.revision)
        found, _ = get_checkpoint_shard_files(source.location, str(index), revision=source.revision)
        return [Path(path) for path in found]
    except Exception as error:
        raise explain(error, source, "weights") from error


def _quantizer(config: Any, dequantising: Any) -> tuple[Any, Any]:
    """transformers' object for a quantised checkpoint, None for others, and the config it wants."""
    if dequantising is None:
        return None, config
    from transformers.quantizers.auto import get_hf_quantizer

    return get_hf_quantizer(copy.deepcopy(config), dequantising, None, True, {})[:2]


def _without_weights(
    stored: StoredTensors, config: Any, dtype: Any, trust_remote_code: bool, quantizer: Any
) -> tuple[Any, torch.dtype]:
    """The model as transformers builds it before loading, with real buffers, and its dtype."""
    from accelerate import init_empty_weights
    from transformers import initialization as init
    from transformers.modeling_utils import _get_dtype, local_torch_dtype

    cls = model_class(config, trust_remote_code)
    config = copy.deepcopy(config)
    if dtype == "auto":
        in_files = (stored.dtype_of(key) for key in stored.where)
        dtype = getattr(config, "dtype", None) or next((kind for kind in in_files if kind in NUMBERS), None)
    config, kept = _get_dtype(dtype or torch.float32, None, config, None, None, True, quantizer)
    if hasattr(cls, "from_config"):  # an Auto class, for code that comes with the model
        with init.no_init_weights(), init_empty_weights(include_buffers=False):
            module = cls.from_config(config, dtype=kept, trust_remote_code=trust_remote_code)
            return _prepared(module, kept, quantizer), kept
    with (
        local_torch_dtype(kept, cls.__name__),
        init.no_tie_weights(),
        init.no_init_weights(),
        init_empty_weights(include_buffers=False),
    ):
        return _prepared(cls(config), kept, quantizer), kept


def _prepared(module: Any, dtype: torch.dtype, quantizer: Any) -> Any:
    if quantizer is not None:
        quantizer.preprocess_model(module, dtype=dtype)
    return module


def _missing(module: Any, recipes: Recipes) -> set[str]:
    """Names that the checkpoint has nothing for."""
    made = {target for recipe in recipes.groups.values() for target in recipe.parts}
    for recipe in recipes.groups.values():
        for conversion in recipe.conversions:
            first, *others = conversion.converter.target_patterns
            made.add(conversion.target)
            made |= {conversion.target.replace(first, other) for other in others}
    return set(recipes.shapes) - made


def _complete_shell(module: Any, missing: set[str], group_of: Any) -> None:
    """Tie what is tied, start at random what is missing outside the blocks, compute buffers; as transformers does."""
    module.tie_weights(missing_keys=missing, recompute_mapping=False)
    missing -= set(module.all_tied_weights_keys)
    left = [name for name, p in module.named_parameters() if p.is_meta and group_of(name) == SHELL]
    for name in left:
        path, _, last = name.rpartition(".")
        parameter = module.get_parameter(name)
        owner = module.get_submodule(path)
        owner._parameters[last] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
    module._initialize_missing_keys(False)


def _move_shell(module: nn.Module, device: torch.device) -> None:
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                moved.setdefault(id(parameter), nn.Parameter(parameter.to(device), requires_grad=False))
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
