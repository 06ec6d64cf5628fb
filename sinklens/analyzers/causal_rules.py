"""The rule table of causal effects: from numbers to words, and from stored experiments to rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST, SOME, NEEDED = 0.5, 0.1, 0.01
"""Lost share of the sink from which a cause carries it, or carries part of it; nats per token that matter."""
STAYS, LEFT, SAME_DIRECTION, UNTOUCHED = 0.5, 0.1, 0.9, 0.95

CARRIES, PART, HOLDS_BACK = "carries the sink", "one of several", "holds the sink back"
UNCLEAR = "not clear: it differs between prompts"
SAME, NO_EFFECT, DID_NOT_ACT = "same as its control", "no effect, although removed", "did not act"
CONSTANT, ELSEWHERE, NOTHING_TO_LOSE = (
    "a constant does as well",
    "no effect: the strong entries come from elsewhere",
    "no sink to lose",
)
CHANGE = "predictions change, not clearly for the worse"
NEED, DO_WITHOUT, UNKNOWN = "predictions need it", "predictions do without it", "no predictions to compare"
ON_PREDICTIONS = frozenset({"key", "heads"})
"""Interventions on what the sink does rather than on what makes it: they are judged by the predictions."""


@dataclass(frozen=True)
class Evidence:
    """What the rules read of one experiment; None is "not known".

    Attributes:
        kind: `massive`, `massive-mean`, `expert`, `write`, `key` or `heads`.
        acted: Whether anything was changed and the output moved.
        lost: Drop of the sink's share over what it has beyond even attention; 1 is down to even attention.
        beyond: `(mean, low, high)` of what is lost beyond each control, within prompts.
        kl, kl_beyond: The same for the predictions, in nats per token.
        left: What later blocks have along the targeted entries, as a ratio to their former size.
        left_here: The same right after the block in which the change was made.
        cosine: Of the sink token's state with its former self, one block later.
        lost_interval: 95 % interval of `lost` over prompts.
        loss: `(mean, low, high)` of the change of the loss, in nats per token.
    """

    kind: str
    acted: bool
    lost: float | None
    beyond: tuple[tuple[float | None, float | None, float | None], ...] = ()
    kl: float | None = None
    kl_beyond: tuple[tuple[float | None, float | None, float | None], ...] = ()
    left: float | None = None
    cosine: float | None = None
    left_here: float | None = None
    lost_interval: tuple[float | None, float | None] = (None, None)
    loss: tuple[float | None, float | None, float | None] = (None, None, None)


def judge_sink(found: Evidence) -> str:
    """What an intervention says about the sink; the first rule that holds.

    An effect counts if its own interval over the prompts lies beyond 0 and it exceeds every control within the
    prompts: the interval of the difference lies beyond 0 (for one prompt, which has no interval, the difference is at
    least a tenth of the sink).
    """
    if not found.acted:
        return DID_NOT_ACT
    if found.lost is None:
        return NOTHING_TO_LOSE
    low, high = found.lost_interval
    if abs(found.lost) >= SOME and low is not None and high is not None and low <= 0 <= high:
        return UNCLEAR
    if found.lost >= SOME:
        if not _beyond(found.beyond, SOME):
            return SAME
        if found.lost >= MOST:
            return CARRIES
        # Entries that came back did some of their work again: what they lost meanwhile is no measure of their part.
        if found.kind == "massive" and found.left is not None and _stays(found):
            return _not_removed(found.left)
        return PART
    if found.lost <= -SOME:
        return HOLDS_BACK if _beyond(tuple(map(_negated, found.beyond)), SOME) else SAME
    if found.kind == "massive-mean":
        return CONSTANT
    return _without_effect(found)


def _without_effect(found: Evidence) -> str:
    """A change that leaves the sink may have left its cause: that must not read as "irrelevant"."""
    left = found.left
    if left is None:
        return NO_EFFECT
    here = left if found.left_here is None else found.left_here
    if found.kind in ("expert", "write") and min(left, here) >= UNTOUCHED:
        return ELSEWHERE
    return _not_removed(left) if _stays(found) else NO_EFFECT


def _not_removed(left: float) -> str:
    return f"not removed: {100 * left:.0f} % remains"


def _stays(found: Evidence) -> bool:
    """Whether the entries are still there behind the change, or enough of them that the state points where it did."""
    if found.left is None:
        return False
    turned = found.cosine is not None and found.cosine < SAME_DIRECTION
    return found.left >= STAYS or (found.left >= LEFT and not turned)


def judge_predictions(found: Evidence) -> str:
    """What an intervention says about the next-token predictions; the first rule that holds."""
    if not found.acted:
        return DID_NOT_ACT
    if found.kl is None:
        return UNKNOWN
    if found.kl < NEEDED:
        return DO_WITHOUT
    if not _beyond(found.kl_beyond, NEEDED):
        return SAME
    mean, low, _ = found.loss
    # Predictions that change without a rise of the loss are others, not worse; without a loss there is only KL.
    return CHANGE if mean is not None and (mean if low is None else low) <= 0 else NEED


def _beyond(differences: Sequence[tuple[float | None, float | None, float | None]], least: float) -> bool:
    """Whether the effect exceeds every control; without a control there is nothing to exceed."""
    return all(
        (low > 0) if low is not None else (mean is not None and mean >= least) for mean, low, _ in differences
    )


def _negated(
    difference: tuple[float | None, float | None, float | None],
) -> tuple[float | None, float | None, float | None]:
    mean, low, high = (None if value is None else -value for value in difference)
    return mean, high, low


def read_evidence(experiment: dict[str, Any]) -> Evidence:
    """The part of a stored experiment that the rules read."""
    effect, controls = experiment["effect"], experiment["controls"]
    acted, left = experiment["acted"], experiment["remaining"] or {}
    return Evidence(
        experiment["kind"],
        acted["edited"] > 0 and acted["output_change"] > 0,
        effect["sink_lost"]["mean"],
        tuple(_interval(control["beyond"]["sink_lost"]) for control in controls),
        effect["kl"]["mean"],
        tuple(_interval(control["beyond"]["kl"]) for control in controls),
        left.get("ratio"),
        left.get("cosine"),
        left.get("ratio_here"),
        (effect["sink_lost"]["low"], effect["sink_lost"]["high"]),
        _interval(effect["loss_change"]),
    )


def _interval(stored: dict[str, Any]) -> tuple[float | None, float | None, float | None]:
    return stored["mean"], stored["low"], stored["high"]


def effect_rows(effects: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per experiment that could be run: effect, interval, strongest control, what remains, verdict."""
    return [_row(effects, experiment) for experiment in effects["experiments"] if "failed" not in experiment]


def _row(effects: dict[str, Any], experiment: dict[str, Any]) -> dict[str, Any]:
    found, effect = read_evidence(experiment), experiment["effect"]
    left = experiment["remaining"] or {}
    on_sink, on_predictions = judge_sink(found), judge_predictions(found)
    speaks = experiment["kind"] in ON_PREDICTIONS
    return {
        "intervention": experiment["what"],
        "verdict": on_predictions if speaks else on_sink,
        "predictions": on_predictions,
        "sink_lost": effect["sink_lost"]["mean"],
        "sink_lost_low": effect["sink_lost"]["low"],
        "sink_lost_high": effect["sink_lost"]["high"],
        "control_sink_lost": _strongest(experiment, "sink_lost"),
        "sink_share_before": effects["base"]["sink_share"]["mean"],
        "sink_share_after": effect["sink_share"]["mean"],
        "sink_rate_before": effects["base"]["sink_rate"]["mean"],
        "sink_rate_after": effect["sink_rate"]["mean"],
        "d_sink": effect["d_sink"]["mean"],
        "d_sink_of_means": effect["d_sink_of_means"]["mean"],
        "kl": effect["kl"]["mean"],
        "kl_low": effect["kl"]["low"],
        "kl_high": effect["kl"]["high"],
        "control_kl": _strongest(experiment, "kl"),
        "loss_change": effect["loss_change"]["mean"],
        "loss_change_low": effect["loss_change"]["low"],
        "loss_change_high": effect["loss_change"]["high"],
        "control_loss_change": _strongest(experiment, "loss_change"),
        "remains": left.get("ratio"),
        "direction_kept": left.get("cosine"),
        "edited": experiment["acted"]["edited"],
        "output_change": experiment["acted"]["output_change"],
        "control": "; ".join(control["what"] for control in experiment["controls"]) or "none was possible",
        "short": short(experiment["name"]),
        "kind": experiment["kind"],
        "name": experiment["name"],
        "n_prompts": max(effect["sink_share"]["n"], effect["kl"]["n"]),
    }


_SHORT = {
    "massive-zero": "entries zeroed",
    "massive-held": "entries held at zero",
    "massive-mean": "entries at their mean",
    "super-experts": "Super Experts pruned",
    "heads": "sink heads zeroed",
}


def short(name: str) -> str:
    """An experiment's name in a few words: `expert-L2E3` is `L2E3 pruned`."""
    if name in _SHORT:
        return _SHORT[name]
    what, *rest = name.split("-")
    where = rest[-1] if rest else ""
    if what == "expert":
        return f"{where} pruned"
    if what == "key":
        return f"key of position {where} blocked"
    if what == "write":
        return f"{'feed-forward' if rest[0] == 'mlp' else 'attention'} of block {where}"
    return f"{what} projection of block {where.removeprefix('L')}"


def strongest_control(experiment: dict[str, Any], quantity: str) -> dict[str, Any] | None:
    """The stored interval of the control with the largest effect, the one that is hardest to exceed."""
    found = [control["effect"][quantity] for control in experiment["controls"]]
    known = [interval for interval in found if interval["mean"] is not None]
    return max(known, key=lambda interval: interval["mean"], default=None)


def _strongest(experiment: dict[str, Any], quantity: str) -> float | None:
    found = strongest_control(experiment, quantity)
    return None if found is None else found["mean"]
