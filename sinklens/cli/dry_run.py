"""`sinklens profile --dry-run` and `sinklens mitigate --dry-run`: the plan as text or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinklens.inputs.spec import PromptSet
    from sinklens.models.opening import ModelDescription
    from sinklens.pipeline.mitigate_options import MitigateOptions
    from sinklens.pipeline.options import ProfileOptions
    from sinklens.pipeline.plan import Prediction

EXPERIMENTS = {
    "effects": "Verify",
    "sensitivity": "Sensitivity",
    "visual_effects": "Removal",
    "visual_exit": "Exit",
    "visual_horizon": "Horizon",
}


def print_plan(
    model: str | None, options: ProfileOptions, *, as_json: bool, processes: int = 1, one_memory: int = 1
) -> None:
    """The plan of a profile.

    Args:
        processes: How many torchrun started.
        one_memory: How many of them have the same memory.
    """
    from sinklens.pipeline.cost import duration, size
    from sinklens.pipeline.picture_prompts import refuse_unread_dims
    from sinklens.pipeline.plan import plan_document, predict

    from .console import WIDTH, print_json

    described, prompts, predicted = predict(model, options, processes, one_memory)
    refuse_unread_dims(options.sink_dims, prompts)
    if as_json:
        print_json(plan_document(described, prompts, predicted))
        return
    time = (
        "not predicted for this device"
        if predicted.seconds is None
        else f"about {duration(predicted.seconds)}"
    )
    lines = {**_head(described, prompts, predicted), "Time": time}
    lines["Blocks"] = "{rows} query rows at a time at {at_tokens} tokens".format(**predicted.query_blocks)
    if predicted.sampling is not None:
        lines["Sampled"] = prompts.description["warnings"][-1]
    if (stream := predicted.stream) is not None:
        disk = f", {size(stream.spilled)} of both on disk" if stream.spilled else ""
        states = (
            f"{size(stream.states)} of states between blocks, {size(stream.shown)} of what blocks show{disk}"
        )
        parts = f"{size(stream.shell)} stay, 2 of {described.info.layers} blocks of {size(stream.block)} at a time"
        parts += f", {size(stream.scratch)} to dequantise" if stream.scratch else ""
        lines["Stream"] = f"on ({stream.why}): {parts}, {states}"
    if (together := predicted.together) is not None:
        lines["Together"] = (
            "{processes} processes share the batches; memory is that of {one_memory} of them".format(
                **together
            )
            + ("; all go through the blocks in step" if stream is not None else "")
        )
    if predicted.spread is not None:
        lines["Parallel"] = (
            "tensor parallel: {processes} processes hold about {each} of weights each, and every one runs all prompts "
            "on its share of the heads and neurons; no experiments"
        ).format(processes=predicted.spread["processes"], each=size(predicted.spread["weights_each"]))
    for name, cost in predicted.experiments.items():
        took = "" if cost["seconds"] is None else f", about {duration(cost['seconds'])}"
        when = "; only if that takes under a minute" if cost["if_short"] else ""
        lines[EXPERIMENTS[name]] = f"about {cost['passes']} passes, {cost['tokens']} tokens{took}{when}"
    for name, text in lines.items():
        print(f"{name:<{WIDTH}}{text}")


def print_mitigation_plan(model: str | None, options: MitigateOptions, *, as_json: bool) -> None:
    from sinklens.pipeline.cost import duration
    from sinklens.pipeline.mitigate_plan import Cost, plan_mitigation

    from .console import WIDTH, print_json

    plan = plan_mitigation(model, options)
    if as_json:
        print_json(plan.document())
        return

    def told(cost: Cost) -> str:
        seconds = plan.seconds(cost)
        took = "" if seconds is None else f", about {duration(seconds)}"
        return f"{cost.passes} passes, {cost.tokens} tokens{took}"

    lines = list(_head(plan.described, plan.prompts, plan.profile).items())
    for row in plan.tasks:
        lines.append(
            ("Task", f"{row['name']}: {row['items']} items to report, {row['tokens']} tokens a round")
        )
    if plan.calibration:
        row = plan.calibration
        lines.append(
            ("Calibrate", f"on {row['items']} other items of {row['task']}, {row['tokens']} tokens a pass")
        )
    lines.append(("Unchanged", told(plan.before)))
    for step in plan.steps:
        more = [f"{step.open} of the run"] * bool(step.open)
        more += [f"at most {step.calibration} calibration passes"] * bool(step.calibration)
        more += [f"{step.controls} control{'s' * (step.controls > 1)}"] * bool(step.controls)
        lines.append(("Mitigation", " · ".join([step.label, *more, told(step.cost)])))
    elsewhere = "; the time is not predicted for this device" if plan.token is None else ""
    lines.append(("Total", told(plan.total) + elsewhere))
    for name, text in lines:
        print(f"{name:<{WIDTH}}{text}")


def _head(described: ModelDescription, prompts: PromptSet, predicted: Prediction) -> dict[str, str]:
    """Model, inputs, memory and disk."""
    from sinklens.pipeline.cost import size

    info, said = described.info, prompts.description
    fits = {True: "fits", False: "does not fit", None: "free memory unknown"}[predicted.fits]
    free = f" of {size(predicted.available)} free: {fits}" if predicted.available is not None else f": {fits}"
    about = "about " if described.estimated else ""
    heads = f"{info.layers} layers x {info.heads} heads ({info.kv_heads} KV)"
    counts = f"{said['n_prompts']} prompts, {said['n_tokens']} tokens, {predicted.batches} batches"
    stored = f" (dequantised from {described.dequantised})" if described.dequantised else ""
    return {
        "Model": f"{info.id}  {info.family} · {heads} · {info.dtype}{stored}",
        "Inputs": f"{said['source']}: {counts}",
        "Signals": f"{len(predicted.signals)} (named by --json)",
        "Memory": f"weights {about}{size(predicted.weights)} + working about {size(predicted.working)}{free}",
        "Disk": f"about {size(predicted.disk)}",
    }
