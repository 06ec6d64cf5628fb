"""The rule table of causal effects, and the finding made of stored results."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import CausalEffects, Status
from sinklens.analyzers.causal_rules import (
    CARRIES,
    CHANGE,
    CONSTANT,
    DID_NOT_ACT,
    DO_WITHOUT,
    ELSEWHERE,
    HOLDS_BACK,
    NEED,
    NO_EFFECT,
    NOTHING_TO_LOSE,
    PART,
    SAME,
    UNCLEAR,
    UNKNOWN,
    Evidence,
    judge_predictions,
    judge_sink,
    short,
)
from sinklens.core.figures import Intervals, Lines

from .made import record, trace

CLEAR, NOT_CLEAR, UNSURE = ((0.4, 0.3, 0.5),), ((0.4, -0.1, 0.9),), ((0.4, None, None),)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Evidence("massive", False, 0.9, CLEAR), DID_NOT_ACT),
        (Evidence("massive", True, None), NOTHING_TO_LOSE),
        (Evidence("massive", True, 0.9, CLEAR, left=0.0, cosine=0.1), CARRIES),
        (Evidence("massive", True, 0.5, CLEAR), CARRIES),
        (Evidence("massive", True, 0.49, CLEAR), PART),
        (Evidence("massive", True, 0.1, CLEAR), PART),
        (Evidence("massive", True, 0.2, CLEAR, left=0.87, cosine=0.88), "not removed: 87 % remains"),
        (Evidence("expert", True, 0.2, CLEAR, left=0.87, cosine=0.99), PART),
        (Evidence("massive", True, 0.9, CLEAR, left=0.87, cosine=0.99), CARRIES),
        (Evidence("massive", True, 0.9, NOT_CLEAR), SAME),
        (Evidence("massive", True, 0.9, (*CLEAR, *NOT_CLEAR)), SAME),
        (Evidence("massive", True, 0.9), CARRIES),
        (Evidence("massive", True, 0.9, UNSURE), CARRIES),
        (Evidence("massive", True, 0.9, ((0.05, None, None),)), SAME),
        (Evidence("massive", True, 0.0, left=0.01, cosine=0.2), NO_EFFECT),
        (Evidence("massive", True, 0.0, left=None), NO_EFFECT),
        (Evidence("massive", True, 0.0, left=0.8, cosine=0.2), "not removed: 80 % remains"),
        # The clamped write: little is left of the entry, but the state points where it did.
        (Evidence("write", True, -0.01, left=0.13, cosine=0.98), "not removed: 13 % remains"),
        (Evidence("write", True, -0.01, left=0.13, cosine=0.6), NO_EFFECT),
        (Evidence("expert", True, 0.0, left=1.0, cosine=1.0), ELSEWHERE),
        # A norm makes as much of what is left: the write is gone in its block and back in the next.
        (Evidence("write", True, 0.0, left=1.0, cosine=1.0, left_here=0.1), "not removed: 100 % remains"),
        (Evidence("massive", True, 0.0, left=1.0, cosine=1.0), "not removed: 100 % remains"),
        (Evidence("massive-mean", True, 0.02, left=1.0, cosine=1.0), CONSTANT),
        (Evidence("massive-mean", True, 0.6, CLEAR, left=1.0), CARRIES),
        (Evidence("expert", True, -0.3, ((-0.3, -0.4, -0.2),), left=1.0), HOLDS_BACK),
        (Evidence("expert", True, -0.3, ((-0.3, -0.8, 0.2),), left=1.0), SAME),
        # What differs between prompts so much that its own interval holds 0 is neither an effect nor none.
        (Evidence("expert", True, 0.12, CLEAR, left=1.0, lost_interval=(-0.15, 0.4)), UNCLEAR),
        (Evidence("massive", True, 0.9, CLEAR, left=0.0, lost_interval=(-0.1, 1.9)), UNCLEAR),
        (Evidence("expert", True, -0.59, CLEAR, lost_interval=(-1.2, 0.1)), UNCLEAR),
        (Evidence("expert", True, 0.12, CLEAR, left=1.0, lost_interval=(0.02, 0.22)), PART),
        (Evidence("expert", True, 0.05, CLEAR, left=1.0, lost_interval=(-0.1, 0.2)), ELSEWHERE),
        # The opposite of the entries is not the entries.
        (Evidence("massive", True, 0.0, left=-1.0, cosine=-0.9, left_here=0.0), NO_EFFECT),
    ],
)
def test_the_words_on_the_sink(found: Evidence, words: str) -> None:
    assert judge_sink(found) == words


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Evidence("key", False, None, kl=1.0, kl_beyond=CLEAR), DID_NOT_ACT),
        (Evidence("key", True, None, kl=None), UNKNOWN),
        (Evidence("key", True, None, kl=0.009, kl_beyond=CLEAR), DO_WITHOUT),
        (Evidence("key", True, None, kl=0.01, kl_beyond=CLEAR), NEED),
        (Evidence("key", True, None, kl=0.5, kl_beyond=NOT_CLEAR), SAME),
        (Evidence("key", True, None, kl=0.5, kl_beyond=UNSURE), NEED),
        (Evidence("key", True, None, kl=0.5), NEED),
        (Evidence("key", True, None, kl=0.5, kl_beyond=CLEAR, loss=(0.2, 0.1, 0.3)), NEED),
        (Evidence("key", True, None, kl=0.5, kl_beyond=CLEAR, loss=(0.2, None, None)), NEED),
        (Evidence("key", True, None, kl=0.5, kl_beyond=CLEAR, loss=(-0.01, -0.02, 0.0)), CHANGE),
        (Evidence("key", True, None, kl=0.5, kl_beyond=CLEAR, loss=(0.01, -0.02, 0.04)), CHANGE),
        (Evidence("key", True, None, kl=0.5, kl_beyond=CLEAR, loss=(-0.01, None, None)), CHANGE),
        (Evidence("key", True, None, kl=0.5, kl_beyond=NOT_CLEAR, loss=(-0.01, None, None)), SAME),
    ],
)
def test_the_words_on_the_predictions(found: Evidence, words: str) -> None:
    assert judge_predictions(found) == words


def interval(mean: float | None, half: float = 0.01) -> dict[str, Any]:
    known = mean is not None
    return {
        "mean": mean,
        "low": mean - half if known else None,
        "high": mean + half if known else None,
        "n": 8 if known else 0,
    }


def quantities(lost: float | None, kl: float | None, loss: float | None) -> dict[str, Any]:
    share = None if lost is None else 0.4 - 0.3 * lost
    return {
        "sink_share": interval(share),
        "sink_rate": interval(None if lost is None else 50 * (1 - lost)),
        "sink_lost": interval(lost),
        "d_sink": interval(lost),
        "d_sink_of_means": interval(lost),
        "kl": interval(kl),
        "loss_change": interval(loss),
    }


def experiment(
    name: str,
    kind: str,
    lost: float | None,
    *,
    kl: float | None = 0.3,
    loss: float | None = 0.2,
    left: float | None = 0.0,
    cosine: float = 0.1,
    edited: int = 8,
    control: bool = True,
    target: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One stored experiment whose controls do nothing."""
    beyond = {key: interval(value["mean"]) for key, value in quantities(lost, kl, loss).items()}
    none = quantities(
        None if lost is None else 0.0, None if kl is None else 0.0, None if loss is None else 0.0
    )
    stored_control = {"what": "another", "draws": 2, "edited": 8, "output_change": 0.1}
    stored_control = {"what": "another", "draws": 2, "edited": 8, "output_change": 0.1}
    return {
        "name": name,
        "kind": kind,
        "what": f"{name} taken away",
        "target": target or {},
        "acted": {"edited": edited, "largest_change": 1.0, "output_change": 0.5},
        "effect": quantities(lost, kl, loss),
        "change": {"sink_share": interval(None if lost is None else -0.3 * lost), "sink_rate": interval(lost)},
        "d_sink_by_layer": [None, lost, lost],
        "faint_heads": 2,
        "controls": [{**stored_control, "effect": none, "beyond": beyond}] if control else [],
        "remaining": None
        if left is None
        else {"behind_block": 1, "before": 9.0, "after": 9.0 * left, "ratio": left, "cosine": cosine},
    }  # fmt: skip


def effects(*experiments: dict[str, Any], loss: float | None = 2.0) -> dict[str, Any]:
    return {
        "position": 0,
        "base": {
            "sink_share": interval(0.4),
            "sink_rate": interval(50.0),
            "uniform": interval(0.1),
            "loss": interval(loss),
        },
        "experiments": list(experiments),
        "n_prompts": 8,
        "tokens": 64,
        "seed": 0,
        "calibration": {"prompts": 12, "held_out": True},
        "skipped": [],
    }


def found_in(stored: dict[str, Any] | None, **manifest: Any) -> Any:
    made = trace([record(None, np.ones((3, 5, 7)))])
    made.manifest = {**manifest, **({"experiments": {"effects": stored}} if stored is not None else {})}
    return CausalEffects().analyze(made)


def test_the_carrier_is_named_and_stands_beside_its_control() -> None:
    finding = found_in(
        effects(
            experiment("key-0", "key", 1.2, left=None),
            experiment("massive-zero", "massive", 0.7, kl=0.6, loss=0.5),
            experiment("expert-L2E3", "expert", 0.9, kl=0.2, loss=0.1),
            experiment("expert-L1E1", "expert", 0.0, kl=0.001, loss=0.0, left=1.0, cosine=1.0),
        )
    )
    assert finding.status is Status.FOUND
    assert finding.verdict.startswith(
        "What carries the sink: with expert-L2E3 taken away, 90 % of the sink is lost, 95 % interval 89 to 91 "
        "(control: 0 %); 1 other change did the like."
    )
    assert "KL 0.6 nats per token (control: 0), the loss by +0.50 (control: 0.00)" in finding.verdict
    verdicts = {row["name"]: (row["verdict"], row["predictions"]) for row in finding.rows}
    assert verdicts == {
        "massive-zero": (CARRIES, NEED),
        "expert-L2E3": (CARRIES, NEED),
        "expert-L1E1": (ELSEWHERE, DO_WITHOUT),
        "key-0": (NEED, NEED),
    }
    assert [row["kind"] for row in finding.rows] == ["massive", "expert", "expert", "key"]
    assert finding.summary["carriers"] == ["entries zeroed", "L2E3 pruned"]
    assert finding.tiles[0].value == "L2E3"
    sink, costs, layers = finding.figures
    assert isinstance(sink, Intervals)
    assert [row.value for row in sink.rows] == pytest.approx([70.0, 90.0, 0.0])
    assert [(row.control_low, row.control_high) for row in sink.rows] == [(-1.0, 1.0)] * 3
    assert isinstance(costs, Intervals)
    assert len(costs.rows) == 4
    assert isinstance(layers, Lines)
    assert layers.series[0].name == "L2E3 pruned"
    assert set(finding.units) <= set(finding.rows[0])
    json.dumps(finding.to_json(), allow_nan=False)


def test_one_expert_is_named_before_the_group_that_holds_it() -> None:
    group = experiment("super-experts", "expert", 0.9961, target={"experts": [[1, 3], [2, 5]]})
    one = experiment("expert-L1E3", "expert", 0.9955, target={"experts": [[1, 3]]})
    one["controls"][0]["effect"]["sink_lost"] = interval(-0.003)
    finding = found_in(effects(group, one))
    assert finding.verdict.startswith("What carries the sink: with expert-L1E3 taken away, 100 %")
    assert "(control: 0 %)" in finding.verdict
    assert finding.tiles[0].value == "L1E3"


def test_what_came_back_leaves_the_question_open() -> None:
    finding = found_in(
        effects(experiment("massive-zero", "massive", 0.02, left=0.9, cosine=1.0, kl=0.0, loss=0.0))
    )
    assert finding.status is Status.NOT_FOUND
    assert (
        "did not last (90 % came back in later blocks), so whether the sink needs it is open"
        in finding.verdict
    )
    assert "irrelevant" in finding.notes[0]


def test_entries_held_at_zero_settle_what_zeroing_them_once_leaves_open() -> None:
    once = experiment("massive-zero", "massive", 0.03, left=0.9, cosine=1.0, kl=0.0, loss=0.0)
    held = experiment("massive-held", "massive", 0.01, left=0.0, kl=0.0, loss=0.0)
    write = experiment("write-mlp-1", "write", 0.04, left=0.8, cosine=1.0, kl=0.0, loss=0.0)
    finding = found_in(effects(once, held, write))
    assert finding.rows[0]["verdict"] == "not removed: 90 % remains"
    assert finding.verdict.startswith(
        "Nothing that was taken away ended the sink: with massive-held taken away, 1 % of the sink is lost"
    )
    assert "open" not in finding.verdict
    idle = experiment("massive-held", "massive", 0.0, left=0.0, kl=0.0, loss=0.0, edited=0)
    assert "is open" in found_in(effects(once, idle)).verdict


def test_the_change_furthest_beyond_its_control_is_not_called_the_largest() -> None:
    """The sink heads change more, but so do other heads."""
    heads = experiment("heads", "heads", 0.0, kl=0.23, loss=0.19, left=None)
    heads["controls"][0]["effect"]["kl"] = interval(0.21)
    zeroed = experiment("massive-zero", "massive", 0.7, kl=0.097, loss=0.09)
    zeroed["controls"][0]["effect"]["loss_change"] = interval(-0.0001)
    finding = found_in(effects(heads, zeroed))
    assert finding.verdict.endswith(
        "Of the changes that exceed their controls, the predictions move furthest beyond them with massive-zero taken "
        "away: KL 0.097 nats per token (control: 0), the loss by +0.09 (control: 0.00)."
    )


def test_other_predictions_are_not_needed_ones() -> None:
    better = found_in(effects(experiment("key-0", "key", 1.2, left=None, loss=-0.03)))
    assert better.rows[0]["verdict"] == CHANGE
    assert better.status is Status.FOUND
    assert "the loss by -0.03" in better.verdict
    equal = found_in(effects(experiment("key-0", "key", 1.2, left=None, loss=-0.0004)))
    assert "-0.00" not in equal.verdict
    assert "the loss stays as it is to within 0.005 nats" in equal.verdict


def test_a_loss_beyond_even_attention_is_told_as_that() -> None:
    finding = found_in(effects(experiment("massive-zero", "massive", 1.43), experiment("key-0", "key", 1.97)))
    assert "143 % of the sink is lost" in finding.verdict
    assert "over 100 % is below even attention" in finding.verdict
    assert "all of it" in finding.tiles[0].note
    assert "1: down to even attention" in finding.units["sink_lost"]
    assert "above 1: below it" in finding.units["sink_lost"]
    plain = found_in(effects(experiment("massive-zero", "massive", 0.9)))
    assert "below even" not in plain.verdict


def test_means_of_the_tried_prompts_themselves_are_told() -> None:
    stored = effects(experiment("massive-mean", "massive-mean", 0.0))
    assert found_in(stored).notes == []
    stored["calibration"]["held_out"] = False
    assert any("no other prompts with these entries" in note for note in found_in(stored).notes)
    stored["experiments"][0]["acted"]["edited"] = 0
    (note,) = found_in(stored).notes
    assert "massive" not in note
    assert "changes nothing" in note


def test_nothing_that_matters_is_said_plainly() -> None:
    finding = found_in(effects(experiment("massive-zero", "massive", 0.02, kl=0.0, loss=0.0)))
    assert finding.status is Status.NOT_FOUND
    assert finding.verdict.startswith(
        "Nothing that was taken away ended the sink: with massive-zero taken away, 2 %"
    )
    assert finding.verdict.endswith("The predictions change no more than in the controls.")


def test_encoders_have_no_loss_and_models_without_a_head_no_predictions() -> None:
    masked = found_in(effects(experiment("massive-zero", "massive", 0.9, loss=None), loss=None))
    assert "0.3 nats per token" in masked.verdict
    assert any("does not predict the next token" in note for note in masked.notes)
    headless = found_in(effects(experiment("massive-zero", "massive", 0.9, kl=None, loss=None), loss=None))
    assert headless.rows[0]["predictions"] == UNKNOWN
    assert "no language head" in headless.verdict
    assert len(headless.figures) == 2


def test_a_model_without_a_sink_is_judged_by_its_predictions() -> None:
    finding = found_in(effects(experiment("massive-zero", "massive", None)))
    assert finding.rows[0]["verdict"] == NOTHING_TO_LOSE
    assert finding.rows[0]["predictions"] == NEED
    assert finding.verdict.startswith(
        "There is no sink to lose: no position is an attention sink here. The pred"
    )
    assert "beyond the controls only with massive-zero taken away" in finding.verdict
    assert finding.tiles == []
    weak = found_in({**effects(experiment("massive-zero", "massive", None)), "sink_found": True})
    assert weak.verdict.startswith("The sink is too weak to measure a loss")
    keys = found_in(effects(experiment("key-0", "key", None, left=None)))
    assert keys.verdict.startswith("The predictions change beyond the controls only with key-0")


def test_a_row_without_a_control_says_so() -> None:
    finding = found_in(effects(experiment("heads", "heads", 0.0, left=None, control=False)))
    assert finding.rows[0]["control"] == "none was possible"
    assert any("no control" in note for note in finding.notes)


@pytest.mark.parametrize(
    ("stored", "manifest", "reason"),
    [
        (None, {}, "not run, add --verify"),
        (None, {"experiments_skipped": {"effects": "It would take about 9 min; add --verify."}}, "about 9 min"),
        ({"experiments": [], "reason": "nothing was found that could be taken away"}, {}, "nothing was found"),
        (
            {**effects({"name": "key-0", "kind": "key", "what": "x", "target": {}, "failed": "no mask"}),
             "skipped": ["key-0: no mask"]}, {}, "no mask",
        ),
    ],
)  # fmt: skip
def test_not_applicable_says_why(stored: Any, manifest: Any, reason: str) -> None:
    finding = found_in(stored, **manifest)
    assert finding.status is Status.NOT_APPLICABLE
    assert reason in str(finding.reason)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("massive-held", "entries held at zero"),
        ("expert-L12E3", "L12E3 pruned"),
        ("key-17", "key of position 17 blocked"),
        ("write-mlp-4", "feed-forward of block 4"),
        ("write-attention-0", "attention of block 0"),
        ("shared-L8", "shared projection of block 8"),
        ("super-experts", "Super Experts pruned"),
        ("heads", "sink heads zeroed"),
    ],
)
def test_short_names(name: str, words: str) -> None:
    assert short(name) == words
