"""VisualSinks on traces made by hand, and on what the whole path makes of a random model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sinklens.analyzers import Status, VisualSinks
from sinklens.core.errors import UsageError
from sinklens.core.figures import Lines, PictureMap
from sinklens.tracers.sink_dims import SinkDim, SinkDims
from sinklens.tracers.trace import Trace

from .made_pictures import COLS, FOUND, HEADS, LAYERS, LENGTH, ROWS, SIZE, made, phi_record


def trace() -> Trace:
    """BOS is a text sink; in the first picture position 4 in layers 1 to 3 and position 8 in layer 3 are."""
    bos = {(layer, 0): 60.0 for layer in range(1, 5)}
    first = {**bos, (1, 4): 20.0, (2, 4): 25.0, (3, 4): 31.0, (3, 8): 22.0, (2, 8): 19.9}
    return made([phi_record(0, first), phi_record(1, bos)])


def test_sinks_are_found_with_their_cells() -> None:
    finding = VisualSinks().analyze(trace())
    assert finding.status is Status.FOUND
    strong, weak = finding.rows
    assert (strong["prompt"], strong["image"], strong["name"]) == (0, 0, "cat0.png")
    assert (strong["row"], strong["col"], strong["position"]) == (0, 3, 4)
    assert (strong["layer"], strong["phi"]) == (3, 31.0)
    assert (strong["first_layer"], strong["last_layer"], strong["n_layers"]) == (1, 3, 3)
    assert strong["share"] == pytest.approx(0.4)
    assert strong["lift"] == pytest.approx(0.4 / ((6 * 0.05 + 2 * 0.4) / 8))
    assert (weak["row"], weak["col"], weak["layer"]) == (1, 3, 3)
    summary = finding.summary
    assert (summary["n_pictures"], summary["n_visual"], summary["n_sinks"]) == (2, 16, 2)
    assert (summary["first_layer"], summary["last_layer"], summary["most_layer"]) == (1, 3, 3)
    assert summary["most_per_picture"] == 1.0
    assert summary["part_of_visual"] == 2 / 16
    assert summary["part_of_attention"] == pytest.approx((0.8 / 1.1 + 0) / 2)
    assert summary["text_sinks_per_prompt"] == 1.0
    assert "2 visual sinks in 2 pictures (layers 1 to 3)" in finding.verdict
    assert "dim 17, found on 2 text prompts" in finding.verdict
    assert not finding.notes


def test_paper_and_code_differ_at_the_threshold_and_in_the_first_layers() -> None:
    code = VisualSinks(recipe="code").analyze(trace())
    row = code.rows[0]
    assert (row["first_layer"], row["n_layers"]) == (2, 2), "layers 0 and 1 are left out"
    exactly = made([phi_record(0, {(3, 4): 20.0})])
    assert len(VisualSinks().analyze(exactly).rows) == 1, "at least tau"
    assert not VisualSinks(recipe="code").analyze(exactly).rows, "above tau"


def test_definitions_can_be_changed_on_a_saved_run() -> None:
    lower = VisualSinks(tau=19.5).analyze(trace())
    assert lower.rows[1]["n_layers"] == 2
    share = VisualSinks(tau_energy=25.0**2 / SIZE).analyze(trace())
    assert [row["n_layers"] for row in share.rows] == [2]
    same = VisualSinks(dims="17+99").analyze(trace())
    assert [row["phi"] for row in same.rows] == [31.0, 22.0], "from the list of large entries"
    other = VisualSinks(dims="99").analyze(trace())
    assert other.status is Status.NOT_FOUND
    assert "99, named by the user" in other.verdict
    with pytest.raises(UsageError, match="2 % on"):
        VisualSinks(dims="99", tau=5.0).analyze(trace())
    for wrong in ({"dims": "x"}, {"tau": -1.0}, {"tau_energy": 2.0}, {"recipe": "neither"}):
        with pytest.raises(UsageError):
            VisualSinks(**wrong)  # type: ignore[arg-type]


def test_no_sink_is_said_with_numbers() -> None:
    finding = VisualSinks().analyze(made([phi_record(0, {(2, 5): 12.5})]))
    assert finding.status is Status.NOT_FOUND
    assert "none of the 8 visual tokens of 1 picture reaches φ = 20" in finding.verdict
    assert "the largest is 12.5 (layer 2)" in finding.verdict


def test_a_model_without_sink_dims_has_no_visual_sink() -> None:
    none = SinkDims(
        (), 64, "discovered", "8 text prompts", "measured", "no dim stands out: 1.9 times.", False
    )
    finding = VisualSinks().analyze(made([phi_record(0, {})], none))
    assert finding.status is Status.NOT_FOUND
    assert "no sink dims that a token could be large in" in finding.verdict
    assert "no dim stands out: 1.9 times." in finding.verdict
    unclear = dataclasses.replace(none, standing_out=True, failed="no gap.")
    finding = VisualSinks().analyze(made([phi_record(0, {})], unclear))
    assert finding.status is Status.NOT_APPLICABLE
    assert finding.reason is not None
    assert "cannot be told apart: no gap." in finding.reason
    named = VisualSinks(dims="17").analyze(made([phi_record(0, {(3, 4): 7.0}, least=1.2)], none))
    assert named.rows[0]["phi"] == 7.0


def test_a_threshold_out_of_reach_is_replaced_and_chance_is_named() -> None:
    dims = SinkDims((SinkDim(17),), 64, "given", "named by the user", "given")
    finding = VisualSinks().analyze(made([phi_record(0, {(3, 4): 7.0, (2, 5): 2.6})], dims))
    assert finding.status is Status.FOUND
    assert finding.summary["tau"] == pytest.approx(2.5)
    assert any("cannot be reached with 64 dims" in note for note in finding.notes)
    assert any("normal random states reach this φ too" in note for note in finding.notes)
    assert finding.summary["by_chance_per_picture"] == pytest.approx(8 * 0.01242, rel=1e-3)
    assert finding.summary["largest_by_chance"] == pytest.approx(5 * 8 * 2.56e-12, rel=1e-2)
    many = {(layer, 1 + layer): 2.6 for layer in range(5)}
    noise = made([phi_record(0, many)] + [phi_record(i, {}) for i in range(1, 6)], dims)
    finding = VisualSinks().analyze(noise)
    assert finding.status is Status.NOT_FOUND
    assert "No visual sink beyond chance" in finding.verdict


def test_published_dims_stand_beside_those_found() -> None:
    found = dataclasses.replace(FOUND, dims=(SinkDim(2533), SinkDim(7)))
    finding = VisualSinks().analyze(made([phi_record(0, {})], found, "llava-hf/llava-1.5-7b-hf"))
    assert finding.notes == [
        "Published sink dims of LLaVA-1.5-7B: 1415, 2533 (paper: See What You Are Told: Visual Attention Sink in Large "
        "Multimodal Models, https://arxiv.org/abs/2503.03321); 1 of them are among those used here."
    ]


def test_what_is_drawn() -> None:
    pictures, counts, histogram = VisualSinks().analyze(trace()).figures
    assert isinstance(counts, Lines)
    assert counts.series[0].y.tolist() == [0, 0.5, 0.5, 1.0, 0]
    assert isinstance(histogram, Lines)
    assert histogram.marks == ((20.0, "τ = 20"),)
    assert np.nansum(histogram.series[0].y) == 2 * 5 * 8
    assert isinstance(pictures, PictureMap)
    assert [page.ref.name for page in pictures.pages] == ["cat0.png", "cat1.png"]
    first = pictures.pages[0].grids[0]
    assert first.classes is not None
    assert np.argwhere(first.classes == 0).tolist() == [[0, 3], [1, 3]]
    attention, without, phi = first.values
    shares = np.full((ROWS, COLS), 0.05)
    shares[:, 3] = 0.4
    assert attention == pytest.approx(shares / shares.sum())
    shares[:, 3] = np.nan
    assert without == pytest.approx(shares / np.nansum(shares), nan_ok=True)
    assert phi[:, 3].tolist() == [31.0, 22.0]
    assert pictures.pages[0].sentence == (
        "Attention sticks to 2 of 8 patches; they are visual sinks (φ ≥ 20). They hold 72.7 % of the attention on this "
        "picture and are 25.0 % of its patches."
    )
    assert pictures.pages[1].sentence == "No visual sink: none of the 8 patches has φ ≥ 20."
    assert pictures.pages[0].bars == (), "the masses by class were not recorded"


def test_parts_of_the_attention_are_shown_if_they_are_of_the_same_sinks() -> None:
    run = trace()
    for item in run.records:
        mass = np.tile(np.array([0.2, 0.3, 0.25, 0.05, 0.1], dtype=np.float32), (LAYERS, HEADS, 1))
        item.arrays["key_class_mass"] = mass
        item.arrays["key_class_count"] = np.tile(np.array([6, 2, 1, 1, 3]), (LAYERS, 1))
    first, second = [page.bars for page in _pictures(VisualSinks(), run).pages]
    assert [name for name, _ in first] == [
        "visual sinks", "other visual tokens", "sinks of the text", "delimiters", "other text",
        "no token (learned sink)",
    ]  # fmt: skip
    assert [value for _, value in first] == pytest.approx([0.3, 0.2, 0.25, 0.05, 0.1, 0.1])
    assert second == (), "the second picture has no sinks, the recorded count says two"
    assert _pictures(VisualSinks(tau=30.0), run).pages[0].bars == ()


def test_pictures_without_recorded_attention_show_phi_alone() -> None:
    run = trace()
    for item in run.records:
        item.arrays.pop("text_received")
    drawn = _pictures(VisualSinks(recipe="code"), run)
    assert [quantity.key for quantity in drawn.quantities] == ["phi"]
    assert drawn.pages[0].sentence == "2 of 8 patches are visual sinks (φ > 20)."


def _pictures(analyzer: VisualSinks, run: Trace) -> PictureMap:
    drawn = analyzer.analyze(run).figures[0]
    assert isinstance(drawn, PictureMap)
    return drawn


def test_it_says_why_it_does_not_apply() -> None:
    text = made([phi_record(0, {})])
    text.records[0].spans = None
    finding = VisualSinks().analyze(text)
    assert finding.status is Status.NOT_APPLICABLE
    assert finding.reason is not None
    assert "no prompt has pictures" in finding.reason
    assert "no sink dims were looked for" in (
        VisualSinks().analyze(made([phi_record(0, {})], None)).reason or ""
    )
    bare = made([phi_record(0, {})])
    bare.records[0].arrays.pop("input_large")
    assert "profile again" in (VisualSinks().analyze(bare).reason or "")
    assert LENGTH == 13
