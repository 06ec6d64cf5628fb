"""`sinklens profile --dry-run`: the plan as text or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinklens.pipeline.options import ProfileOptions

EXPERIMENTS = {
    "effects": "Verify",
    "sensitivity": "Sensitivity",
    "visual_effects": "Removal",
    "visual_exit": "Exit",
    "visual_horizon": "Horizon",
}


def print_plan(model: str | None, options: ProfileOptions, *, as_json: bool) -> None:
    from sinklens.pipeline.cost import duration, size
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
        "Signals": f"{len(predicted.signals)} (named by --json)",
        "Memory": f"weights {about}{size(predicted.weights)} + working about {size(predicted.working)}{free}",
        "Disk": f"about {size(predicted.disk)}",
        "Time": time,
    }
    if (stream := predicted.stream) is not None:
        disk = f", {size(stream.spilled)} of them on disk" if stream.spilled else ""
        states = f"{size(stream.states)} of states between blocks{disk}"
        parts = f"{size(stream.shell)} stay, 2 of {info.layers} blocks of {size(stream.block)} at a time"
        lines["Stream"] = f"on ({stream.why}): {parts}, {states}"
    for name, cost in predicted.experiments.items():
        took = "" if cost["seconds"] is None else f", about {duration(cost['seconds'])}"
        when = "; only if that takes under a minute" if cost["if_short"] else ""
        lines[EXPERIMENTS[name]] = f"about {cost['passes']} passes, {cost['tokens']} tokens{took}{when}"
    for name, text in lines.items():
        print(f"{name:<{WIDTH}}{text}")
