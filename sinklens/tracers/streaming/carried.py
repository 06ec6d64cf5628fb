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


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; arrays and tensors go into `tensors`, under the names that the JSON gives.

    Raises:
        TypeError: Something that cannot be written.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return {"item": _named(torch.from_numpy(np.asarray(value)), tensors)}
    if isinstance(value, Tensor):
        return {"tensor": _named(value.detach().cpu(), tensors), "device": value.device.type}
    if isinstance(value, np.ndarray):
        return {"array": _named(torch.from_numpy(np.asarray(value, order="C")), tensors)}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
    if is_dataclass(value) and type(value).__name__ in _CLASSES:
        items = {field.name: pack(getattr(value, field.name), tensors) for field in fields(value)}
        return {"class": type(value).__name__, "fields": items}
    raise TypeError(f"{type(value).__name__} cannot be carried from one process to another")


def unpack(packed: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """The value again, equal to the last bit.

    Args:
        device: Where the model runs now: of several processes another one may go on with a batch.
    """
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return tensors[packed["tensor"]].to("cpu" if packed["device"] == "cpu" else device)
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
