"""What a recorder knows between two blocks, as numbers and JSON, so that a run can go on in another process.

A class names the attributes that it carries from block to block (`carried`); everything else it works out anew.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..record_births import Birth

_CLASSES = {cls.__name__: cls for cls in (Birth,)}


def pack(value: Any, tensors: dict[str, Tensor], home: torch.device | None = None) -> Any:
    """`value` as JSON; arrays and tensors go into `tensors`, under the names that the JSON gives.

    Args:
        home: The device of the model: tensors that are there will be where the model is when they are unpacked.

    Raises:
        TypeError: Something that cannot be written.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return {"item": _named(torch.from_numpy(np.asarray(value)), tensors)}
    if isinstance(value, Tensor):
        return _packed(value.detach(), tensors, home)
    if isinstance(value, np.ndarray):
        return {"array": _named(torch.from_numpy(np.asarray(value, order="C")), tensors)}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack(item, tensors, home) for item in value]}
    if isinstance(value, dict):
        pairs = [[pack(key, tensors, home), pack(item, tensors, home)] for key, item in value.items()]
        return {"dict": pairs}
    if is_dataclass(value) and type(value).__name__ in _CLASSES:
        items = {field.name: pack(getattr(value, field.name), tensors, home) for field in fields(value)}
        return {"class": type(value).__name__, "fields": items}
    raise TypeError(f"{type(value).__name__} cannot be carried from one process to another")


def unpack(packed: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """The value again, equal to the last bit, its tensors laid out in memory as they were.

    Args:
        device: Where the model runs now: of several processes another one may go on with a batch.
    """
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return _unpacked(packed, tensors[packed["tensor"]], device)
    if "array" in packed:
        return tensors[packed["array"]].numpy()
    if "item" in packed:
        return tensors[packed["item"]].numpy()[()]
    if "class" in packed:
        items = {name: unpack(item, tensors, device) for name, item in packed["fields"].items()}
        return _CLASSES[packed["class"]](**items)
    if "dict" in packed:
        return {unpack(key, tensors, device): unpack(item, tensors, device) for key, item in packed["dict"]}
    (kind, items), *_ = packed.items()
    values = (unpack(item, tensors, device) for item in items)
    return tuple(values) if kind == "tuple" else list(values)


def _packed(value: Tensor, tensors: dict[str, Tensor], home: torch.device | None) -> dict[str, Any]:
    # Sums over the same numbers in another layout may round otherwise. What is expanded is written once.
    once = value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
    once = once.contiguous() if _overlaps(once) else once
    device = "home" if value.device == home else value.device.type
    layout = {"shape": list(value.shape), "strides": list(once.stride())}
    return {"tensor": _named(once.cpu(), tensors), "device": device, **layout}


def _overlaps(tensor: Tensor) -> bool:
    """Whether places of a tensor may share memory."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False


def _unpacked(packed: dict[str, Any], stored: Tensor, device: torch.device) -> Tensor:
    place = "cpu" if packed["device"] == "cpu" else device
    made = torch.empty_strided(stored.shape, packed["strides"], dtype=stored.dtype, device=place)
    return made.copy_(stored).expand(packed["shape"])


def _named(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name = f"carried-{len(tensors)}"
    tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # no two may share memory
    return name


def parts_of(recorder: Any) -> dict[str, Any]:
    """The parts of a recorder that carry something, by name."""
    return {
        "ledger": recorder.ledger,
        "leaders": recorder.attention.leaders,
        "inputs": recorder.inputs,
        "pictures": recorder.pictures,
        "births": recorder.states.births,
        "experts": recorder.experts,
    }


def carried_by(recorder: Any) -> dict[str, dict[str, Any]]:
    """What all parts of a recorder carry."""
    return {
        name: {attribute: getattr(part, attribute) for attribute in part.carried}
        for name, part in parts_of(recorder).items()
    }


def give_back(recorder: Any, values: dict[str, dict[str, Any]]) -> None:
    """Put into a new recorder what an earlier one carried."""
    for name, part in parts_of(recorder).items():
        for attribute in part.carried:
            setattr(part, attribute, values[name][attribute])
