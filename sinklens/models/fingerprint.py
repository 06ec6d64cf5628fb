"""Telling a model from another one: what was chosen for one must not be put on the next."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from .anatomy import find_anatomy
from .spec import OpenedModel
from .spread import whole

SAMPLE = 64
"""Entries looked at per weight."""


def fingerprint(model: nn.Module | OpenedModel) -> dict[str, Any]:
    """Shape of a model and a hash of a sample of its weights.

    The sample is read in bfloat16, so the same weights in another precision or on another device have the same hash;
    a model trained further has another one.

    Returns:
        `family, layers, heads, kv_heads, hidden_size, parameters, weights`.
    """
    module = model.module if isinstance(model, OpenedModel) else model
    anatomy = model.anatomy if isinstance(model, OpenedModel) else find_anatomy(module)
    tower = anatomy.main
    return {
        "family": anatomy.family,
        "layers": len(tower.blocks),
        "heads": tower.heads,
        "kv_heads": tower.kv_heads,
        "hidden_size": tower.hidden_size,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "weights": weights_hash(module),
    }


def weights_hash(module: nn.Module) -> str:
    """Hash of evenly spaced entries of every weight, names and shapes included; of a spread model by all processes."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = whole(parameter.detach()).reshape(-1)
        if flat.is_meta or not flat.numel():
            continue
        step = max(1, flat.numel() // SAMPLE)
        sample = flat[::step][:SAMPLE]
        kept = sample.to(torch.bfloat16).float() if sample.is_floating_point() else sample.double()
        digest.update(kept.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
