"""`sinklens profile --dry-run`: the plan as text or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinklens.pipeline.options import ProfileOptions


def print_plan(model: str | None, options: ProfileOptions, *, as_json: bool) -> None:
    from sinklens.pipeline.plan import plan_document, predict

    from .console import WIDTH, print_json

    described, prompts, predicted = predict(model, options)
    if as_json:
        print_json(plan_document(described, prompts, predicted))
        return
    info, said = described.info, prompts.description
    fits = {True: "fits", False: "does not fit", None: "free memory unknown"}[predicted.fits]
    free = f" of {size(predicted.available)} free: {fits}" if predicted.available is not None else f": {fits}"
    about = "about " if described.estimated else ""
    heads = f"{info.layers} layers x {info.heads} heads ({info.kv_heads} KV)"
    counts = f"{said['n_prompts']} prompts, {said['n_tokens']} tokens, {predicted.batches} batches"
    time = (
        "not predicted for this device"
        if predicted.seconds is None
        else f"about {duration(predicted.seconds)}"
    )
    lines = {
        "Model": f"{info.id}  {info.family} · {heads} · {info.dtype}",
        "Inputs": f"{said['source']}: {counts}",
        "Signals": ", ".join(predicted.signals),
        "Memory": f"weights {about}{size(predicted.weights)} + working about {size(predicted.working)}{free}",
        "Disk": f"about {size(predicted.disk)}",
        "Time": time,
    }
    for name, text in lines.items():
        print(f"{name:<{WIDTH}}{text}")


def size(count: int | None) -> str:
    """Bytes for people: 512 B, 3.1 MB, 61 GB."""
    value = float(count or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people, with the coarseness of an estimate."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
