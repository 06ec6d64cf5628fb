"""What `sinklens probe` reads in its options, and prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinklens.mitigations.quantise import FakeQuantisation
    from sinklens.pipeline.probe import Probe


def grid_of(text: str) -> FakeQuantisation:
    """`weights=4:activations=4` as a way to quantise."""
    from sinklens.core.errors import UsageError
    from sinklens.mitigations.asking import make_method
    from sinklens.mitigations.quantise import FakeQuantisation

    method = make_method(f"{FakeQuantisation.name}:{text.removeprefix(FakeQuantisation.name).lstrip(':')}")
    assert isinstance(method, FakeQuantisation)
    if method.protects or method.wants:
        raise UsageError(
            "--grid: what is kept is found by the probe, or named by --protect.",
            hint="Leave protect_... out of the grid.",
        )
    return method


def cache_of(text: str) -> tuple[int, int]:
    """`4+508` as first and recent tokens."""
    from sinklens.core.errors import UsageError

    start, plus, recent = text.partition("+")
    if not plus or not start.strip().isdigit() or not recent.strip().isdigit():
        raise UsageError(
            f"--cache takes the first and the recent tokens, got {text!r}.",
            hint="For instance: --cache 4+508",
        )
    return int(start), int(recent)


def shares_of(text: str) -> tuple[float, ...]:
    """`0.25,0.5` as shares.

    Raises:
        UsageError: Something else.
    """
    from sinklens.core.errors import UsageError

    try:
        shares = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < 1 for share in shares):
        raise UsageError(
            f"--keep takes shares above 0 and below 1, each the share of the visual tokens that stay; got {text!r}.",
            hint="For instance: --keep 0.25,0.5",
        )
    return shares


def print_quantisation(grid: str, found: Mapping[str, Any]) -> None:
    """The verdict on a grid, and a line per variant."""
    print(f"{grid}: {found['verdict']}")
    rows = [
        (name, _number(row["loss"]["mean"]), _interval(row["added"]))
        for name, row in found["variants"].items()
    ]
    _table([("", "loss", "added (95 %)"), *rows])


def print_streaming(found: Mapping[str, Any]) -> None:
    """The verdict on a cache, and a line per condition."""
    from sinklens.evaluation.streaming_cache import CONDITIONS

    print(f"{found['start']}+{found['recent']}: {found['verdict']}")
    rows = [
        (
            title,
            *(_number(found[name][key]) for key in ("perplexity", "after_full")),
            _interval(found[name]["added"]),
        )
        for name, title in CONDITIONS.items()
    ]
    _table([("", "perplexity", "once full", "loss added (95 %)"), *rows])


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
    _table(rows)


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = [f"{row[name]['mean']:+.3f}" for name in ("loss", "random_loss", "right", "random_right")]
    said = "; ".join(found["verdict"] for found in row["versus"].values())
    return row["pruner"], f"{row['kept']:g}", *numbers, said


def print_places(found: Probe, *more: str) -> None:
    """Where the results were saved."""
    from sinklens.pipeline.probe import FILE

    from .console import WIDTH

    for name in (FILE, *more):
        print(f"{'Saved':<{WIDTH}}{found.folder / name if found.folder else name}")


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "    " + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        )
    print()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(found: dict[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return "-"
    ends = "" if found["low"] is None else f" ({found['low']:+.3g} to {found['high']:+.3g})"
    return f"{found['mean']:+.3g}{ends}"
