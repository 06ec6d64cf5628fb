"""Checkpoints whose weights are stored quantised: those that are dequantised while they are read, and all others.

transformers can undo two formats with its own operations, on the CPU and without another library, while it loads:
blocks of float8 with a scale each (`fp8`, DeepSeek and Qwen) and microscaled four-bit floats (`mxfp4`, GPT-OSS). Models
of these formats are opened dequantised wherever they run, in memory or streamed: what is traced are the values that the
stored weights stand for, rounded to the dtype of the config. Activations are not quantised.

Packed weights of other formats (`sinklens.models.packed`) are dequantised where a model is streamed, without their
libraries. In memory they are left to transformers and its libraries, as all other formats are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sinklens.core.errors import ModelError

from .catalog import Source
from .packed import PACKED

SCRATCH = 9
"""Bytes per value while a tensor is dequantised, beside the values that come out: measured 7.6 to 8.6, and what is
stored, 0.5 to 1."""
MXFP4_CHUNK = 2**30
"""Values that transformers dequantises at a time."""

SCALES = ".weight_scale_inv"
"""How the names of float8 scales end, where their weights end with `.weight`."""

EXPERTS = ".experts.down_proj"
"""How transformers calls the maps of all experts together that write; each is stored as a weight of its own."""


def _fp8_scratch(shape: tuple[int, ...], itemsize: int) -> int:
    """One stored tensor at a time; experts are then put side by side, from a second copy."""
    one = math.prod(shape[-2:])
    return SCRATCH * one + ((1 + itemsize) * math.prod(shape) if len(shape) > 2 else 0)


def _mxfp4_scratch(shape: tuple[int, ...], itemsize: int) -> int:
    """A chunk at a time; all values are then transposed, into a second copy."""
    values = math.prod(shape)
    return values + max((SCRATCH - 1) * min(values, MXFP4_CHUNK), itemsize * values)


def _packed_scratch(per_value: int, shape: tuple[int, ...], itemsize: int) -> int:
    """One stored weight at a time, read into its place."""
    return per_value * math.prod(shape[-2:])


@dataclass(frozen=True)
class Format:
    """A format that is dequantised while a model is loaded.

    Attributes:
        scratch: Bytes in memory beside a parameter of some shape and bytes per value, while it is dequantised.
        any_dtype: Whether all weights take the dtype asked for, also those that were stored unquantised.
    """

    scratch: Callable[[tuple[int, ...], int], int]
    any_dtype: bool


FORMATS = {
    "fp8": Format(_fp8_scratch, any_dtype=False),
    "mxfp4": Format(_mxfp4_scratch, any_dtype=True),
}
LIBRARIES = {
    "aqlm": "aqlm", "auto-round": "auto-round", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors", "eetq": "kernels", "fouroversix": "fouroversix",
    "fp_quant": "fp_quant", "gptq": "optimum gptqmodel", "higgs": "flute-kernel", "hqq": "hqq", "metal": "kernels",
    "nvfp4": "kernels", "quanto": "optimum-quanto", "quark": "amd-quark", "sinq": "sinq", "spqr": "spqr_quant[gpu]",
    "torchao": "torchao", "vptq": "vptq",
}  # fmt: skip
"""What transformers needs to load the other formats, as pip calls it."""


def format_of(config: Any) -> str | None:
    """How the config says that the weights are stored (its `quant_method`); None if they are not quantised."""
    found = _stored(config)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if method is None and isinstance(found, dict) and {"load_in_8bit", "load_in_4bit"} & found.keys():
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def _stored(config: Any) -> Any:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)


def dequantising(source: Source, config: Any, dtype: torch.dtype | str) -> Any:
    """The config with which transformers dequantises a checkpoint while it loads it.

    Args:
        dtype: The dtype asked for, or `auto`.

    Returns:
        None for checkpoints that are not quantised, or in a format that is left to transformers and its libraries.

    Raises:
        ModelError: transformers would load other numbers than those that are stored; it is said why.
    """
    method = format_of(config)
    if method is None:
        return None
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig

    if not any(name == method or name.startswith(f"{method}_") for name in AUTO_QUANTIZER_MAPPING):
        raise ModelError(
            f"{source.id!r} is quantised ({method}), which this transformers does not know.",
            detail="It would take the stored bytes for the weights.",
            hint="Open the unquantised checkpoint. A newer transformers may know it: pip install -U transformers",
        )
    if method not in FORMATS:
        return None
    check_dtype(source, config, dtype)
    found = _settings(config)
    if found.get("modules_to_convert"):
        raise ModelError(
            f"{source.id!r} keeps {', '.join(map(str, found['modules_to_convert']))} quantised in memory ({method}).",
            detail="transformers does not dequantise these parts while it loads.",
            hint="Open the unquantised checkpoint.",
        )
    return AutoQuantizationConfig.from_dict({**found, "dequantize": True})


def _settings(config: Any) -> dict[str, Any]:
    found = _stored(config)
    return dict(found if isinstance(found, dict) else found.to_dict())


def settings_of(config: Any, name: str) -> Any:
    """What the config says of packed weights, as their format takes it.

    Raises:
        ModelError: It says something that is not known.
    """
    return PACKED[format_of(config) or ""].settings(_settings(config), name)


def check_dtype(source: Source, config: Any, dtype: torch.dtype | str) -> None:
    """Refuse a dtype that weights cannot be dequantised to.

    Raises:
        ModelError: It is another than the config's, or neither is known.
    """
    method = str(format_of(config))
    any_dtype = method in PACKED or FORMATS[method].any_dtype
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    if own is None and dtype == "auto":
        raise ModelError(
            f"The config.json of {source.id!r} does not say which dtype its weights ({method}) had.",
            hint="Say it: --dtype bf16" if any_dtype else 'Add "dtype": "bfloat16" to config.json.',
        )
    if dtype not in ("auto", own) and not any_dtype:
        name = str(own).removeprefix("torch.")
        raise ModelError(
            f"{source.id!r} is stored as {method} and can be dequantised to {name} alone.",
            detail="transformers leaves weights that were not quantised as they are stored, and two dtypes do not mix.",
            hint="Leave --dtype out.",
        )


def packed_format(config: Any) -> str | None:
    """The format, if it is one that only streaming dequantises."""
    method = format_of(config)
    return method if method in PACKED else None


def lacking_library(config: Any) -> str | None:
    """What is not installed of the libraries that transformers needs in memory for a packed format, as pip calls it."""
    needed = LIBRARIES.get(packed_format(config) or "", "").split()
    return " ".join(name for name in needed if find_spec(name.replace("-", "_")) is None) or None


def refuse_ragged(name: str, shapes: Mapping[str, tuple[int, ...]], config: Any) -> None:
    """Refuse float8 weights whose last blocks are smaller: transformers reads block sizes off the grid of scales.

    Args:
        shapes: Of all stored tensors by name.

    Raises:
        ModelError: The first such weight is named.
    """
    said = _block_size(config) or (0, 0)
    for key, grid in shapes.items():
        of = f"{key.removesuffix(SCALES)}.weight"
        if not key.endswith(SCALES) or of not in shapes or len(grid) < 2:
            continue
        values, scales = shapes[of][-2:], grid[-2:]
        if any(map(_ragged, values, scales, said)):
            raise ModelError(
                f"{name!r} cannot be dequantised: the blocks of {of} are not all of one size.",
                detail=f"{list(values)} values have {list(scales)} scales; transformers divides the one by the other.",
                hint="Open a checkpoint of the model in bfloat16.",
            )


def _ragged(size: int, blocks: int, said: int) -> bool:
    """Whether a last block is smaller: values cannot be divided evenly, or can but not into blocks of the size said."""
    by_size = bool(said) and blocks == math.ceil(size / said) and blocks > 1
    return size % blocks != 0 or (by_size and size % said != 0)


def _block_size(config: Any) -> Sequence[int] | None:
    found = _stored(config)
    return found.get("weight_block_size") if isinstance(found, dict) else None


def planned_shapes(shell: nn.Module, config: Any, unpacks: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of float8 weights and their scales, as the config says that they are stored; nothing of other formats.

    Of experts only what they write with is told: gates and up projections are stored apart, and the model holds them
    side by side.

    Args:
        shell: The model without weights; its maps are replaced.
        unpacks: What `dequantising` gave.
    """
    if unpacks is None or format_of(config) != "fp8":
        return {}
    from transformers.quantizers.auto import get_hf_quantizer

    quantizer: Any = get_hf_quantizer(copy.deepcopy(config), copy.deepcopy(unpacks), None, True, {})[0]
    quantizer.quantization_config.dequantize = False  # the maps as they are stored
    quantizer.preprocess_model(shell, dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in shell.named_parameters()}
    return {name.replace(EXPERTS, f"{EXPERTS}.weight"): shape for name, shape in shapes.items()}


def scratch_bytes(config: Any, shapes: Iterable[tuple[int, ...]], itemsize: int) -> int:
    """Bytes beside the parameters of these shapes while the largest is dequantised; 0 if none is."""
    method = format_of(config) or ""
    if method in FORMATS:
        scratch = FORMATS[method].scratch
    elif method in PACKED:
        scratch = partial(_packed_scratch, PACKED[method].scratch)
    else:
        return 0
    return max((scratch(shape, itemsize) for shape in shapes if len(shape) > 1), default=0)
