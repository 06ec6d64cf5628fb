"""Which kernels take the attention statistics on a device, in words, and why not the faster ones."""

from __future__ import annotations

import torch

from . import native, triton_pass


def statistics_kernel(device: torch.device) -> str:
    """For manifests and the doctor: the path that ordinary calls on `device` take.

    Single calls may take the torch path for reasons of their own: edited maps, float64, more key groups than the
    Triton kernels hold.
    """
    if device.type == "cuda":
        why = triton_pass.why_not()
        return "Triton kernels" if why is None else f"torch, without the Triton kernels: {why}"
    if device.type != "cpu":
        return f"torch, there are no other kernels for {device.type}"
    why = native.why_not()
    return "compiled row pass" if why is None else f"torch row pass, without the compiled one: {why}"
