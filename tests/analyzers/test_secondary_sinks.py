"""Golden cases of secondary sinks: creation layer, lifetime, labels, levels, gaps, signs and who wrote them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklens.analyzers import Finding, SecondarySinks, Status
from sinklens.analyzers.aligned_tokens import Aligned, active_range, sink_levels, token_class
from sinklens.core.errors import UsageError
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

from .made import causal_uniform, record, trace, with_sink
from .made_chain import Parts, chain_record

Recipe = Literal["relative", "paper"]
WIDTH, LENGTH, DEPTH = 11, 41, 40
START, END = 2, 39


def stream(
    *aligned: tuple[int, list[int]],
    layers: int = DEPTH,
    start: int = START,
    end: int = END,
    primary: int = 0,
    size: float = 60.0,
    sign: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Random states in which `primary` is large in dim 3 from `start` to `end - 1`, and others in given layers."""
    hidden = np.random.default_rng(seed).normal(size=(layers, LENGTH, WIDTH))
    hidden[start:end, primary, 3] += 500
    for position, at in aligned:
        hidden[at, position, 3] = sign * size
    return hidden


def kinds(finding: Finding) -> dict[int, tuple[str, int, float]]:
    """Position to type, creation layer and lifetime."""
    return {row["position"]: (row["type"], row["creation_layer"], row["lifetime"]) for row in finding.rows}


CASES = [
    (list(range(5, 15)), ("secondary", 5, 10)),
    (list(range(2, 39)), ("bos_sink", 2, 37)),
    ([5, 6, 9, 10, 11, 14, 15], ("secondary", 5, 7)),
]


@pytest.mark.parametrize("recipe", ["relative", "paper"])
@pytest.mark.parametrize(("layers", "expected"), CASES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_creation_layer_lifetime_and_label(
    layers: list[int], expected: tuple[str, int, float], sign: float, recipe: Recipe
) -> None:
    if recipe == "paper" and expected[0] == "bos_sink":
        layers, expected = (
            layers[:-1],
            ("bos_sink", 2, 36),
        )  # without erasing, its list of states ends one earlier
    made = trace([chain_record(stream((17, layers), sign=sign))])
    finding = SecondarySinks(recipe=recipe).analyze(made)
    assert kinds(finding) == {17: expected}
    assert np.sign(finding.rows[0]["cosine"]) == sign
    assert abs(finding.rows[0]["cosine"]) > 0.9
    assert (finding.status is Status.FOUND) == (expected[0] == "secondary")


@pytest.mark.parametrize("recipe", ["relative", "paper"])
def test_a_short_alignment_is_noise_and_no_row(recipe: Recipe) -> None:
    finding = SecondarySinks(recipe=recipe).analyze(trace([chain_record(stream((17, [5, 6, 7])))]))
    assert finding.rows == []
    assert finding.summary["n_noise"] == 1
    assert finding.status is Status.NOT_FOUND


def test_the_recipes_differ_where_they_should() -> None:
    # 26 of 40 layers: beyond the paper's 25, below three quarters of the primary's 37.
    made = trace([chain_record(stream((17, list(range(6, 32)))))])
    assert kinds(SecondarySinks().analyze(made)) == {17: ("secondary", 6, 26)}
    assert kinds(SecondarySinks(recipe="paper").analyze(made)) == {17: ("bos_sink", 6, 26)}
    # A token before the primary sink is none in the paper.
    early = trace([chain_record(stream((3, list(range(6, 20))), primary=9), references=at(9))])
    assert kinds(SecondarySinks().analyze(early)) == {3: ("secondary", 6, 14)}
    assert SecondarySinks(recipe="paper").analyze(early).rows == []


def at(*positions: int, layers: int = DEPTH) -> np.ndarray:
    """Reference positions: the first token, and the given one in every layer (or one per layer)."""
    second = positions * layers if len(positions) == 1 else positions
    return np.array([[0, position] for position in second])


@pytest.mark.parametrize("layers", [12, 20, 21, 40])
def test_the_papers_bounds_need_more_than_twenty_layers(layers: int) -> None:
    made = trace([chain_record(stream((17, [5, 6, 7, 8, 9]), layers=layers, end=layers))])
    finding = SecondarySinks(recipe="paper").analyze(made)
    assert (finding.status is Status.NOT_APPLICABLE) == (layers <= 20)
    if layers <= 20:
        assert f"model of {layers} layers" in (finding.reason or "")
    assert kinds(SecondarySinks().analyze(made))[17][:2] == ("secondary", 5)


def test_without_a_primary_sink_by_norm_there_is_nothing_to_compare_with() -> None:
    hidden = np.random.default_rng(1).normal(size=(8, LENGTH, WIDTH))
    hidden[3, 0, 3] = 500  # one layer is not enough
    finding = SecondarySinks().analyze(trace([chain_record(hidden)]))
    assert finding.status is Status.NOT_APPLICABLE
    assert "no primary sink by norm" in (finding.reason or "")
    without_attention = trace([chain_record(hidden)], attention=False)
    assert "no softmax attention" in (SecondarySinks().analyze(without_attention).reason or "")
    bare = trace([record(causal_uniform(8, 2, LENGTH), hidden)])
    assert "profile again" in (SecondarySinks().analyze(bare).reason or "")
    bare.records = []
    assert "no prompts" in (SecondarySinks().analyze(bare).reason or "")


def test_the_norm_gate_keeps_a_narrow_cone_from_counting() -> None:
    # Every token has the primary's direction in layers 20 to 29, but an ordinary norm.
    hidden = stream((17, list(range(8, 16))))
    hidden[20:30, 1:] *= 0.01
    hidden[20:30, 1:, 3] += 3
    made = trace([chain_record(hidden)])
    assert kinds(SecondarySinks().analyze(made)) == {17: ("secondary", 8, 8)}
    assert len(SecondarySinks(norm_gate=0.0).analyze(made).rows) == LENGTH - 1
    assert len(SecondarySinks(recipe="paper").analyze(made).rows) == LENGTH - 1


def test_a_primary_in_the_middle_is_used_where_the_trace_compared_with_it() -> None:
    references = at(*[9 if layer >= 10 else 4 for layer in range(DEPTH)])
    made = trace([chain_record(stream((17, list(range(6, 16))), primary=9), references=references)])
    finding = SecondarySinks().analyze(made)
    assert finding.summary["primary_position"] == 9
    assert finding.summary["layers_unknown"] == 10 - START
    assert kinds(finding) == {17: ("secondary", 10, 6)}
    assert any("other positions" in note for note in finding.notes)
    never = trace([chain_record(stream((17, list(range(6, 16))), primary=9), references=at(4))])
    finding = SecondarySinks().analyze(never)
    assert finding.status is Status.NOT_APPLICABLE
    assert "did not compare" in (finding.reason or "")


def test_share_is_the_attention_of_other_queries_in_the_aligned_layers() -> None:
    weights = causal_uniform(DEPTH, 3, LENGTH)
    alive = list(range(5, 15))
    for layer in alive:
        with_sink(weights, layer, 1, 17, 0.6)
    made = trace([chain_record(stream((17, alive)), weights=weights)])
    column = weights[alive, :, 18:, 17].mean()
    assert SecondarySinks().analyze(made).rows[0]["share"] == pytest.approx(column)


def test_a_primary_sink_that_weakens_where_secondary_sinks_live_is_seen() -> None:
    weights = causal_uniform(DEPTH, 2, LENGTH)
    alive = list(range(10, 20))
    for layer in range(DEPTH):
        with_sink(weights, layer, 0, 0, 0.2 if layer in alive else 0.8)
    made = trace([chain_record(stream((17, alive)), weights=weights)])
    finding = SecondarySinks().analyze(made)
    active = [layer for layer in range(START, END) if layer not in alive]
    visible = np.arange(LENGTH, 0, -1)
    column = weights[:, :, :, 0].sum(2).mean(1) / visible[0]
    assert finding.summary["primary_share_alone"] == pytest.approx(column[active].mean())
    assert finding.summary["primary_share_beside_secondary"] == pytest.approx(column[alive].mean())
    assert finding.summary["primary_share_beside_secondary"] < finding.summary["primary_share_alone"]


def test_the_first_token_is_compared_with_in_layers_without_attention_too() -> None:
    made = chain_record(stream((17, list(range(5, 15)))))
    made["reference_position"][7:9] = -1
    finding = SecondarySinks().analyze(trace([made]))
    assert kinds(finding) == {17: ("secondary", 5, 10)}
    assert finding.summary["layers_unknown"] == 0


def test_positions_that_were_not_kept_are_scored_with_themselves_and_that_is_said() -> None:
    one = chain_record(stream((17, list(range(5, 15)))))
    kept = np.array([0, 1, 2])
    one.arrays |= {
        "kept_positions": kept,
        **{
            name: one[name][:, :, kept] for name in ("attention_received", "attention_self", "attention_top1")
        },
    }
    finding = SecondarySinks().analyze(trace([one]))
    expected = one["attention_received_mean"][5:15, 17].mean()
    assert finding.rows[0]["share"] == pytest.approx(expected)
    assert any("themselves" in note for note in finding.notes)


def test_a_token_that_few_queries_see_has_no_share() -> None:
    for late in (LENGTH - 5, LENGTH - 1):
        finding = SecondarySinks().analyze(trace([chain_record(stream((late, list(range(5, 15)))))]))
        assert finding.rows[0]["share"] is None
        assert finding.rows[0]["lifetime"] == 10


def test_levels_are_cells_of_creation_and_lifetime_merged_within_one_layer() -> None:
    def token(creation: int, lifetime: int, gap: int = 1) -> Aligned:
        layers = tuple(creation + gap * i for i in range(lifetime))
        return Aligned(0, 5, 5, "x", "secondary", layers, 0.95, 0.1, False, 1.0, 1.0, (0.0,) * 6)

    tokens = [token(10, 8)] * 4 + [token(11, 9)] * 2 + [token(10, 20)] * 3 + [token(30, 5)] * 2
    assert [(level.creation, level.lifetime, level.tokens) for level in sink_levels(tokens, 3)] == [
        (10, 8, 6),
        (10, 20, 3),
    ]
    assert len(sink_levels(tokens, 2)) == 3


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=30), st.integers(1, 4))
def test_levels_hold_every_token_once_and_do_not_depend_on_order(
    cells: list[tuple[int, int]], at_least: int
) -> None:
    tokens = [
        Aligned(0, 5, 5, "x", "secondary", tuple(range(c, c + n)), 0.95, 0.1, False, 1.0, 1.0, (0.0,) * 6)
        for c, n in cells
    ]
    assert sum(level.tokens for level in sink_levels(tokens, 1)) == len(tokens)
    assert sink_levels(tokens, at_least) == sink_levels(tokens[::-1], at_least)
    assert all(level.tokens >= at_least for level in sink_levels(tokens, at_least))


def test_the_mlp_that_wrote_them_is_named_with_its_cosines() -> None:
    hidden = stream((17, list(range(8, 18))))
    generator = np.random.default_rng(3)
    shared = generator.normal(size=13)
    parts: Parts = {
        (8, position): {
            "input": np.eye(13)[position % 13],
            "product": shared + 0.01 * position,
            "down": shared,
        }
        for position in (0, 17)
    }
    finding = SecondarySinks().analyze(trace([chain_record(hidden, parts=parts)]))
    row = finding.rows[0]
    assert row["input_cosine"] == pytest.approx(0.0)
    assert row["down_cosine"] == pytest.approx(1.0)
    assert row["gate_cosine"] is None
    assert row["write_norm"] == pytest.approx(np.linalg.norm(hidden[8, 17] - hidden[7, 17]))
    assert row["written_by_mlp"] is True
    assert (
        "wrote 1 of 1; what it puts out is like the primary's (1.00), what it is given is not (0.00)"
        in finding.verdict
    )


def test_inputs_that_are_alike_already_are_said() -> None:
    shared = np.ones(13)
    parts: Parts = {(8, position): {"input": shared, "down": shared} for position in (0, 17)}
    finding = SecondarySinks().analyze(trace([chain_record(stream((17, list(range(8, 18)))), parts=parts)]))
    assert "what it is given is like the primary's (1.00) too" in finding.verdict


def test_what_attention_wrote_is_not_put_down_to_the_mlp() -> None:
    hidden = stream((17, list(range(8, 18))))
    attention = np.zeros_like(hidden)
    attention[8, 17] = hidden[8, 17] - hidden[7, 17]
    finding = SecondarySinks().analyze(trace([chain_record(hidden, attention=attention)]))
    assert finding.rows[0]["written_by_mlp"] is False
    assert "wrote 0 of 1" in finding.verdict


def test_the_norm_written_is_correlated_with_attention_and_lifetime() -> None:
    records = []
    for prompt in range(7):
        weights = causal_uniform(DEPTH, 2, LENGTH)
        alive = list(range(6, 12 + prompt))
        for layer in alive:
            with_sink(weights, layer, 0, 17, 0.1 * (prompt + 1))
        hidden = stream((17, alive), size=50.0 + 20 * prompt, seed=prompt)
        records.append(chain_record(hidden, weights=weights, index=prompt))
    summary = SecondarySinks().analyze(trace(records)).summary
    assert summary["norm_score_rho"] == pytest.approx(1.0)
    assert summary["norm_lifetime_rho"] == pytest.approx(1.0)
    assert summary["norm_score_n"] == summary["norm_lifetime_n"] == 7
    assert summary["per_1000_tokens"] == pytest.approx(1000 * 7 / (7 * LENGTH))
    assert summary["position_deciles"] == [0, 0, 0, 0, 7, 0, 0, 0, 0, 0]


def test_prompts_without_a_primary_sink_are_left_out_and_counted() -> None:
    ordinary = chain_record(np.random.default_rng(5).normal(size=(DEPTH, LENGTH, WIDTH)), index=1)
    finding = SecondarySinks().analyze(trace([chain_record(stream((17, list(range(8, 18))))), ordinary]))
    assert finding.summary["n_prompts"] == 1
    assert finding.summary["n_prompts_without_primary"] == 1
    assert finding.summary["n_tokens"] == LENGTH
    assert any("1 prompt has no primary" in note for note in finding.notes)


def test_the_same_token_in_several_prompts_is_one_row() -> None:
    records = [chain_record(stream((17, list(range(8, 18 + i))), seed=i), index=i) for i in range(3)]
    records.append(chain_record(stream((23, list(range(8, 18))), seed=9), index=3))
    finding = SecondarySinks().analyze(trace(records))
    assert [(row["position"], row["n_prompts"], row["lifetime"]) for row in finding.rows] == [
        (17, 3, 11.0),
        (23, 1, 10.0),
    ]


def test_delimiters_are_seen_to_be_likelier() -> None:
    pieces = [" word"] * LENGTH
    pieces[17], pieces[25] = ".", ","
    made = trace([chain_record(stream((17, list(range(8, 18)))), pieces=pieces)])
    summary = SecondarySinks().analyze(made).summary
    assert summary["punctuation_lift"] == pytest.approx(LENGTH / 2)
    assert summary["word_lift"] == 0
    assert summary["newline_lift"] is None


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        ("\n", "newline"),
        (" \n\n", "newline"),
        (".", "punctuation"),
        (" —", "punctuation"),
        ("+", "punctuation"),
        ("3", "digit"),
        (" 1.5", "digit"),
        ("٣", "digit"),
        (" fox", "word"),
        ("日", "word"),
        ("a1", "word"),
        ("<s>", "other"),
        (" ", "other"),
        ("\x00", "other"),
    ],
)
def test_token_classes(piece: str, kind: str) -> None:
    assert token_class(piece) == kind


def test_the_active_range_runs_from_the_largest_rise_to_the_largest_fall() -> None:
    norm = np.array([1.0, 1.2, 9.0, 50.0, 52.0, 51.0, 3.0, 4.0])
    assert active_range(norm, 1.0, paper=False) == (3, 6)
    assert active_range(norm, 1.0, paper=True) == (3, 6)
    kept = np.array([50.0, 52.0, 51.0, 48.0])
    assert active_range(kept, 1.0, paper=False) == (0, 4)
    assert active_range(kept, 1.0, paper=True) == (1, 3)
    assert active_range(np.array([5.0]), 1.0, paper=False) == (0, 1)
    assert active_range(np.array([5.0]), 1.0, paper=True) == (0, 1)


def test_random_states_have_no_secondary_sinks() -> None:
    for seed in range(5):
        hidden = stream(seed=seed)
        finding = SecondarySinks().analyze(trace([chain_record(hidden)]))
        assert finding.status is Status.NOT_FOUND
        assert finding.rows == []


def test_layers_without_attention_do_not_spoil_the_share() -> None:
    made = chain_record(stream((17, list(range(5, 15)))))
    for name in ("attention_received", "attention_self", "attention_received_mean"):
        made.arrays[name] = made[name].astype(float)
        made.arrays[name][6:9] = np.nan
    made.arrays["visible_queries"][6:9] = -1
    share = SecondarySinks().analyze(trace([made])).rows[0]["share"]
    whole = SecondarySinks().analyze(trace([chain_record(stream((17, list(range(5, 15)))))])).rows[0]["share"]
    assert share == pytest.approx(whole)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="relative, paper"):
        SecondarySinks(recipe="code")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="cosine"):
        SecondarySinks(cosine=1.2)


def test_every_signal_it_reads_is_one_it_needs() -> None:
    whole: PromptRecord = chain_record(stream((17, list(range(5, 15)))))
    named = {signal.name for signal in SecondarySinks.needs}
    slim = {name: array for name, array in whole.arrays.items() if name in named}
    assert sig.RESIDUAL_COSINE in SecondarySinks.needs
    rest = record(None, stream()).arrays.keys() - named
    made = PromptRecord(0, whole.token_ids, whole.pieces, "made", "", slim)
    reference = trace([whole])
    reference.records = [made]
    assert SecondarySinks().analyze(reference).rows
    assert rest  # the slim record really lacks something
