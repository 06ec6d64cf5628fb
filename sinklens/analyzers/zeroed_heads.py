"""What zeroing the strongest sink heads did to the predictions, where a run tried it."""

from __future__ import annotations

from typing import Any

from sinklens.tracers.trace import Trace

from .expert_effects import stored_effects
from .heads import named


def zeroed_heads(trace: Trace) -> dict[str, Any] | None:
    """What zeroing the strongest sink heads did to the predictions, from the run's second look; None if not run.

    Returns:
        The heads, and the loss change in nats per token with its interval, of them and of other heads.
    """
    for experiment in stored_effects(trace).get("experiments", []):
        if experiment["kind"] != "heads" or "failed" in experiment:
            continue
        change = experiment["effect"]["loss_change"]
        if change["mean"] is None:
            continue
        controls = [control["effect"]["loss_change"]["mean"] for control in experiment["controls"]]
        return {
            "zeroed_heads": experiment["target"]["heads"],
            "zeroed_loss_change": change["mean"],
            "zeroed_loss_change_low": change["low"],
            "zeroed_loss_change_high": change["high"],
            "zeroed_loss_change_others": controls[0] if controls else None,
        }
    return None


def zeroed_note(zeroed: dict[str, Any] | None) -> list[str]:
    if zeroed is None:
        return []
    which = named([(layer, head) for layer, head in zeroed["zeroed_heads"]])
    low, high, others = (zeroed[f"zeroed_loss_change_{key}"] for key in ("low", "high", "others"))
    interval = "" if low is None or high is None else f" ({_signed(low)} to {_signed(high)})"
    beside = "" if others is None else f", zeroing as many other heads by {_signed(others)}"
    change = f"{_signed(zeroed['zeroed_loss_change'])} nats per token{interval}"
    return [f"Zeroing the strongest sink heads ({which}) changes the loss by {change}{beside}."]


def _signed(value: float) -> str:
    """Three digits with a sign, which nothing that rounds to 0 has."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text
