"""What `sinklens probe pruning` reads and prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shares_of(text: str) -> tuple[float, ...]:
    """`0.25,0.5` as shares.

    Raises:
        UsageError: Something else.
    """
    from sinklens.core.errors import UsageError

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"--keep takes shares separated by commas, as in 0.25,0.5; got {text!r}.") from None


def print_pruning(found: Mapping[str, Any]) -> None:
    """The verdict, what was fitted and left out, and a line per pruner and share."""
    print(found["verdict"])
    base, sinks = found["base"], found["sinks"]
    print(
        f"Unpruned: loss {base['loss']['mean']:.3f} nats per token, {base['right']['mean']:.1%} of the answers' tokens "
        f"right, {found['n_prompts']} prompts ({found['n_calibration']} others to fit on)."
    )
    known = ", ".join(map(str, sinks["dims"]))
    print(
        f"Visual sinks: dims {known}, {sinks['per_prompt']:.1f} per prompt."
        if sinks["dims"]
        else f"Visual sinks are not known: {sinks['why_none']}"
    )
    for fit in found["fits"]:
        print(
            f"{fit['pruner']}: sigma {fit['sigma']:+.2f} in layer {fit['layer']} (R² {fit['explained']:.2f}, "
            f"{fit['n']} prompts)."
        )
    for skipped in found["skipped"]:
        print(f"{skipped['pruner']}: {skipped['why']}")
    print()
    rows = [("pruner", "keep", "loss", "random", "right", "random", "verdict"), *map(_row, found["rows"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    print()


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = [f"{row[name]['mean']:+.3f}" for name in ("loss", "random_loss", "right", "random_right")]
    said = "; ".join(found["verdict"] for found in row["versus"].values())
    return row["pruner"], f"{row['kept']:g}", *numbers, said
