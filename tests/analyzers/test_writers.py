"""Golden cases of writers: sublayer, steps, erasing, neurons and experts, prompts that disagree, what is not known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklens.analyzers import Status, Writers
from sinklens.tracers.trace import PromptRecord

from .made import largest, record, trace
from .made_chain import chain_record

WIDTH, LENGTH, DEPTH = 13, 17, 9
Writes = dict[tuple[int, str], float]
"""(layer, sublayer) to what it adds to the entry."""


def written(
    writes: Writes,
    *,
    position: int = 0,
    dim: int = 5,
    seed: int = 0,
    scale: float = 0.02,
    depth: int = DEPTH,
    **options: Any,
) -> PromptRecord:
    """A small random stream in which given sublayers add given amounts to one entry, and nothing else does."""
    generator = np.random.default_rng(seed)
    start = generator.normal(size=(LENGTH, WIDTH)) * scale
    attention, mlp = generator.normal(size=(2, depth, LENGTH, WIDTH)) * scale
    start[position, dim] = 0
    attention[:, position, dim] = mlp[:, position, dim] = 0
    for (layer, part), value in writes.items():
        (attention if part == "attention" else mlp)[layer, position, dim] = value
    hidden = start + np.cumsum(attention + mlp, axis=0)
    return chain_record(hidden, attention=attention, start=start, **options)


def found(*records: PromptRecord, **settings: Any) -> list[tuple[str, int, str, Any]]:
    finding = Writers(**settings).analyze(trace(list(records)))
    return [(r["role"], r["layer"], r["sublayer"], pytest.approx(r["share"], abs=1e-6)) for r in finding.rows]


def test_the_writing_and_the_erasing_sublayer_are_named() -> None:
    one = written({(2, "mlp"): 500.0, (6, "mlp"): -499.0})
    assert found(one) == [("writes", 2, "mlp", 1.0), ("erases", 6, "mlp", -0.998)]
    finding = Writers().analyze(trace([one]))
    assert "written by the MLP of block 2, 100 %" in finding.verdict
    assert "erased by the MLP of block 6" in finding.verdict
    assert finding.summary["largest_residue"] < 1e-9
    assert finding.summary["erased_in_share_of_prompts"] == 1.0


def test_attention_can_be_the_writer_and_the_sign_is_kept() -> None:
    one = written({(1, "attention"): -800.0}, position=4)
    finding = Writers().analyze(trace([one]))
    assert found(one) == [("writes", 1, "attention", 1.0)]
    assert (finding.rows[0]["position"], finding.rows[0]["dim"]) == (4, 5)
    assert finding.rows[0]["value"] == pytest.approx(-800)
    assert finding.summary["peak"] == pytest.approx(-800)
    assert "never erased" in finding.verdict


def test_several_writers_are_reported_as_steps() -> None:
    one = written({(1, "mlp"): 240.0, (3, "attention"): 60.0, (4, "mlp"): 300.0, (8, "mlp"): -595.0})
    assert found(one) == [
        ("writes", 1, "mlp", 0.4),
        ("writes", 3, "attention", 0.1),
        ("writes", 4, "mlp", 0.5),
        ("erases", 8, "mlp", pytest.approx(-595 / 600)),
    ]
    finding = Writers().analyze(trace([one]))
    assert "in 3 steps" in finding.verdict
    assert finding.summary["share_written"] == pytest.approx(1.0)
    assert finding.summary["main_layer"] == 4
    assert finding.summary["first_layer"] == 1


def test_both_sublayers_of_one_block_count_for_what_they_add() -> None:
    one = written({(2, "attention"): -100.0, (2, "mlp"): 600.0})
    assert found(one) == [("writes", 2, "mlp", 1.2), ("erases", 2, "attention", -0.2)]


def test_a_value_that_only_shrinks_a_little_is_never_erased() -> None:
    one = written({(2, "mlp"): 500.0, (5, "mlp"): -100.0})
    assert found(one)[1] == ("erases", 5, "mlp", -0.2)
    assert "never erased" in Writers().analyze(trace([one])).verdict


def test_steady_growth_has_no_single_writer() -> None:
    one = written({(layer, "mlp"): 30.0 for layer in range(30)}, depth=30)
    finding = Writers().analyze(trace([one]))
    assert finding.status is Status.NOT_FOUND
    assert finding.rows == []
    assert "grows in small steps" in finding.verdict
    assert any("many small steps" in note for note in finding.notes)


def test_neuron_and_expert_are_named_with_their_part() -> None:
    one = written(
        {(2, "mlp"): 500.0, (6, "mlp"): -500.0},
        authors={(2, 0, 5): (3, 490.0), (6, 0, 5): (1, -500.0)},
        neurons={(2, 0, 5): (11, 980.0)},
    )
    one.arrays |= {
        name: np.full((DEPTH, 4), fill)
        for name, fill in (("expert_max", np.nan), ("expert_max_pos", -1), ("expert_max_dim", -1))
    }
    one["expert_max"][2, 3], one["expert_max_pos"][2, 3], one["expert_max_dim"][2, 3] = 1000.0, 0, 5
    writer, eraser = Writers().analyze(trace([one], experts=4)).rows
    assert (writer["expert"], writer["neuron"]) == (3, 11)
    assert writer["expert_share"] == pytest.approx(0.98)
    assert writer["neuron_share"] == pytest.approx(0.98)
    assert (eraser["expert"], eraser["neuron"], eraser["neuron_share"]) == (1, None, None)


def test_a_dense_neurons_share_is_of_the_down_projections_output() -> None:
    # A norm after the feed-forward part: the stream gets 500, the projection itself put out 40, the neuron 30 of it.
    one = written({(2, "mlp"): 500.0}, neurons={(2, 0, 5): (7, 30.0)})
    output = np.zeros((DEPTH, LENGTH, WIDTH))
    output[2, 0, 5] = 40.0
    one.arrays |= largest("down_proj_top", output, 4)
    row = Writers().analyze(trace([one])).rows[0]
    assert (row["neuron"], row["neuron_share"]) == (7, pytest.approx(0.75))


def test_prompts_that_disagree_are_counted() -> None:
    records = [written({(2, "mlp"): 500.0}, seed=i, index=i) for i in range(5)]
    records += [written({(3, "attention"): 400.0}, seed=7, index=5), written({}, seed=8, index=6)]
    finding = Writers().analyze(trace(records))
    steps = [(row["layer"], row["sublayer"], row["n_prompts"], row["agreement"]) for row in finding.rows]
    assert steps == [(2, "mlp", 5, pytest.approx(5 / 6)), (3, "attention", 1, pytest.approx(1 / 6))]
    assert finding.summary["n_prompts"] == 6
    assert finding.summary["written_by"] == ["the MLP of block 2"]


def crowded(value: float, index: int, *, others: float, n: int) -> PromptRecord:
    """An entry that the MLP of block 2 writes, beside `n` entries of size `others` that it writes as well."""
    generator = np.random.default_rng(index)
    hidden = np.zeros((DEPTH, LENGTH, WIDTH)) + generator.normal(size=(LENGTH, WIDTH)) * 0.02
    places = [(p, d) for p in range(1, LENGTH) for d in range(WIDTH)][:n]
    for p, d in places:
        hidden[2:, p, d] = others
    hidden[2:, 0, 5] = value
    return chain_record(hidden, start=hidden[0], index=index, ranks=64)


def test_a_prompt_whose_block_lists_stronger_entries_is_read_from_the_longer_list() -> None:
    """Without it the mean would be over the one prompt that lists the entry: 9000, not 4000."""
    prompts = [crowded(9000, 0, others=500, n=20), crowded(2000, 1, others=5000, n=20)]
    prompts.append(crowded(1000, 2, others=5000, n=20))
    finding = Writers(entries=200).analyze(trace(prompts))
    rows = [row for row in finding.rows if (row["position"], row["dim"]) == (0, 5)]
    assert [(r["sublayer"], r["n_prompts"], r["n_read"], r["agreement"]) for r in rows] == [
        ("block", 2, 2, 1.0),
        ("mlp", 1, 1, 1.0),
    ]
    assert all(row["peak"] == pytest.approx(4000, rel=1e-3) for row in rows)
    assert [row["value"] for row in rows] == pytest.approx([1500, 9000], rel=1e-3)
    assert {(row["n_followed"], row["n_unread"]) for row in rows} == {(3, 0)}
    assert any("the block is named as a whole" in note for note in finding.notes)
    assert not any("could not be verified" in note for note in finding.notes)


def test_prompts_that_cannot_be_read_are_counted_and_said() -> None:
    """One entry stands out in every prompt; in two of three, 70 others are larger than it."""
    prompts = [crowded(9000, 0, others=4, n=70)]
    prompts += [crowded(800, index, others=5000, n=70) for index in (1, 2)]
    finding = Writers().analyze(trace(prompts))
    row = next(row for row in finding.rows if (row["position"], row["dim"]) == (0, 5))
    assert (row["n_prompts"], row["n_read"], row["n_followed"], row["n_unread"]) == (1, 1, 1, 2)
    assert finding.summary["n_unread"] == 2
    assert "That is known of 1 of 3 prompts." in finding.verdict
    assert any(
        "could not be read in every prompt" in note and "not in 2 of 3" in note for note in finding.notes
    )


def test_a_small_entry_that_is_not_listed_is_no_prompt_that_could_not_be_read() -> None:
    small = written({}, seed=8, index=1)
    finding = Writers().analyze(trace([written({(2, "mlp"): 500.0}), small]))
    assert finding.rows[0]["n_unread"] == 0
    assert finding.rows[0]["n_followed"] == 1


def test_prompts_of_both_signs_are_not_averaged_away() -> None:
    values = (900.0, -600.0, 750.0)
    records = [written({(2, "mlp"): value}, seed=i, index=i) for i, value in enumerate(values)]
    finding = Writers().analyze(trace(records))
    row = finding.rows[0]
    assert row["value"] == pytest.approx(750)
    assert row["peak"] == pytest.approx(750)
    assert row["same_sign"] == pytest.approx(2 / 3)
    assert "peak ±750" in finding.verdict
    assert any(
        "sign of 1 of 1 entries differs between prompts (dim 5 on position 0)" in n for n in finding.notes
    )
    line = finding.figures[1].series[0].y  # type: ignore[union-attr]
    assert line[-1] == pytest.approx(750)
    same = Writers().analyze(trace(records[:1]))
    assert same.rows[0]["same_sign"] == 1
    assert not any("sign" in note for note in same.notes)


def test_below_the_published_rule_the_strongest_entry_is_followed() -> None:
    one = written({(2, "mlp"): 20.0}, scale=0.02)
    finding = Writers().analyze(trace([one]))
    assert finding.status is Status.FOUND
    assert any("No entry is massive" in note for note in finding.notes)
    flat = written({(2, "mlp"): 0.5}, scale=0.02)
    finding = Writers().analyze(trace([flat]))
    assert finding.status is Status.NOT_APPLICABLE
    assert "no massive activation" in (finding.reason or "")


def test_without_a_verified_sum_the_block_alone_is_named() -> None:
    one = written({(2, "mlp"): 500.0, (6, "mlp"): -500.0})
    one["attention_write"][:] = np.nan
    one["mlp_write"][:] = np.nan
    finding = Writers().analyze(trace([one]))
    assert [(row["layer"], row["sublayer"]) for row in finding.rows] == [(2, "block"), (6, "block")]
    assert finding.summary["largest_residue"] is None
    assert any("could not be verified" in note for note in finding.notes)


def test_a_sum_that_does_not_add_up_is_not_believed() -> None:
    one = written({(2, "mlp"): 500.0})
    one["mlp_write"][2] *= 0.9
    finding = Writers().analyze(trace([one]))
    assert [(row["layer"], row["sublayer"]) for row in finding.rows] == [(2, "block")]
    assert finding.summary["largest_residue"] >= 0.1
    assert Writers(tolerance=0.2).analyze(trace([one])).rows[0]["sublayer"] == "mlp"


def test_what_the_trace_does_not_have_is_not_applicable() -> None:
    hidden = np.full((3, LENGTH, WIDTH), 0.1)
    hidden[1:, 0, 3] = 500
    finding = Writers().analyze(trace([record(None, hidden)]))
    assert finding.status is Status.NOT_APPLICABLE
    assert "profile again" in (finding.reason or "")
    unlisted = chain_record(hidden)
    unlisted.arrays["residual_after"] = np.full_like(unlisted["residual_after"], np.nan)
    finding = Writers().analyze(trace([unlisted]))
    assert finding.status is Status.NOT_APPLICABLE
    assert "could not be followed" in (finding.reason or "")
    empty = trace([unlisted])
    empty.records = []
    assert Writers().analyze(empty).status is Status.NOT_APPLICABLE


def test_several_entries_are_followed_strongest_first_and_limited() -> None:
    one = written({(2, "mlp"): 500.0})
    hidden = np.full((DEPTH, LENGTH, WIDTH), 0.1)
    hidden[2:, 0, 5], hidden[3:, 0, 7], hidden[2:, 4, 5] = 500, -900, 300
    made = trace([one, chain_record(hidden, index=1)])
    finding = Writers().analyze(made)
    assert [(row["position"], row["dim"], row["layer"]) for row in finding.rows] == [
        (0, 7, 3),
        (0, 5, 2),
        (4, 5, 2),
    ]
    finding = Writers(entries=1).analyze(made)
    assert {row["dim"] for row in finding.rows} == {7}
    assert any("3 entries are massive; the 1 strongest" in note for note in finding.notes)


def test_random_streams_have_nothing_to_follow() -> None:
    for seed in range(5):
        assert Writers().analyze(trace([written({}, seed=seed)])).status is Status.NOT_APPLICABLE


@given(
    st.integers(0, DEPTH - 2),
    st.sampled_from(["attention", "mlp"]),
    st.floats(200, 5000),
    st.booleans(),
    st.integers(0, LENGTH - 1),
    st.integers(0, 99),
)
def test_any_single_writer_is_found_exactly(
    layer: int, part: str, size: float, negative: bool, position: int, seed: int
) -> None:
    value = -size if negative else size
    erased = written({(layer, part): value, (DEPTH - 1, "mlp"): -value}, position=position, seed=seed)
    assert found(erased) == [("writes", layer, part, 1.0), ("erases", DEPTH - 1, "mlp", -1.0)]
