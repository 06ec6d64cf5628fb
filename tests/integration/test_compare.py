"""`compare`: parameters and models in the differences, all numbers, and maps by relative depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sinklens
from sinklens.cli.main import main
from sinklens.core.figures import Heatmap
from sinklens.pipeline.compare import _difference, at_depth, compare
from sinklens.testbeds import random_control
from sinklens.tracers import signals as sig

NAMED = ("primary-sinks", "massive-activations")


@pytest.fixture(scope="module")
def runs() -> tuple[Any, Any]:
    """The same model and prompts under two definitions."""
    one = sinklens.profile(n=4, analyzers=NAMED, verify=False)
    return one, one.analyze("primary-sinks:epsilon=0.7")


def test_parameters_of_shared_analyzers_and_nothing_else_differ(runs: tuple[Any, Any]) -> None:
    (found,) = compare(*runs).differences.values()
    assert found == {
        "analyzers.primary-sinks.epsilon": (0.3, 0.7),
        "analyzers run": (["massive-activations", "primary-sinks"], ["primary-sinks"]),
    }


def test_models_differ_by_their_fields() -> None:
    dense = sinklens.profile(n=3, analyzers=NAMED, verify=False)
    moe = sinklens.profile("bundled:moe-ind", n=3, analyzers=NAMED, verify=False)
    found = compare(dense, moe)
    (differences,) = found.differences.values()
    assert differences["model.family"] == ("llama", "qwen3_moe")
    assert differences["model.experts"] == (0, 8)
    assert "model.layers" not in differences
    maps = {figure.key: figure for figure in found.maps}
    received = maps["primary-sinks-received-1"]
    drawn = [run.primary_sinks.figures[0] for run in (dense, moe)]
    mine, other = (figure.values for figure in drawn if isinstance(figure, Heatmap))
    np.testing.assert_allclose(received.values, other - mine)
    assert "minus" in received.title


def test_every_number_that_two_runs_have(runs: tuple[Any, Any]) -> None:
    rows = compare(*runs).summaries
    rate = next(row for row in rows if row["quantity"] == "sink_rate")
    assert list(rate["values"].values()) == [run.primary_sinks.summary["sink_rate"] for run in runs]
    assert rate["differs"]
    share = next(row for row in rows if row["quantity"] == "uniform_share")
    assert share["finding"] == "primary-sinks"
    assert not any(row["finding"] == "massive-activations" for row in rows)  # only the first run has it
    assert not any(isinstance(value, bool | list) for row in rows for value in row["values"].values())


def test_relative_depth() -> None:
    values = np.arange(5.0)[:, None] * np.array([1.0, 10.0])
    np.testing.assert_allclose(at_depth(values, 5), values)
    np.testing.assert_allclose(at_depth(values, 3), values[[0, 2, 4]])
    # Four places in five layers: 0, 4/3, 8/3 and 4.
    np.testing.assert_allclose(at_depth(values, 4)[:, 0], [0, 4 / 3, 8 / 3, 4])
    holed = values.copy()
    holed[4] = np.nan
    np.testing.assert_array_equal(np.isnan(at_depth(holed, 3))[:, 0], [False, False, True])
    for deep in range(3, 50):  # where layers coincide the value is that layer's alone, whatever is beside it
        alone = np.full((deep, 1), np.nan)
        alone[[0, -1]] = 3.0
        for depth in range(2, deep):
            assert (at_depth(alone, depth)[[0, -1]] == 3.0).all()
        if deep % 2:
            alone[::2] = np.arange(0.0, deep, 2)[:, None]
            np.testing.assert_array_equal(at_depth(alone, deep // 2 + 1), alone[::2])


@pytest.fixture(scope="module")
def depths() -> list[Any]:
    """Random models of 7 and 4 layers on the same prompts; a third with more heads."""
    from transformers import LlamaConfig

    rng = np.random.default_rng(5)
    prompts = [[1, *rng.integers(3, 97, length - 1).tolist()] for length in (37, 43, 41)]
    common: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_key_value_heads": 1,
    }
    made = []
    for layers, heads in ((7, 3), (4, 3), (4, 2)):
        config = LlamaConfig(**common, num_hidden_layers=layers, num_attention_heads=heads, head_dim=16)
        model = random_control(config, layers + heads)
        made.append(sinklens.profile(model, prompts=prompts, analyzers=("primary-sinks",), verify=False))
    return made


def received(run: Any, position: int) -> np.ndarray:
    """`[layer, head]` by hand: attention to a position over the queries that see it, mean over prompts."""
    found = []
    for record in run.trace:
        (at,) = np.flatnonzero(record[sig.KEPT_POSITIONS] == position)
        found.append(record[sig.ATTENTION_RECEIVED][:, :, at].astype(np.float64))
    return np.mean(found, 0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_runs_of_different_depth_cell_by_cell(depths: list[Any], order: tuple[int, int]) -> None:
    first, second = (depths[i] for i in order)
    maps = {figure.key: figure for figure in compare(first, second).maps}
    drawn = maps["primary-sinks-received-1"]
    at = np.linspace(0, 1, 4)
    read = []
    for run in (first, second):
        values = received(run, run.primary_sinks.summary["strongest_position"])
        places = np.linspace(0, 1, len(values))
        read.append(np.stack([np.interp(at, places, column) for column in values.T], 1))
    np.testing.assert_allclose(drawn.values, read[1] - read[0], rtol=1e-5, atol=1e-7)
    assert drawn.y_label == "layer by relative depth"
    assert f"{len(received(first, 0))} of " in drawn.caption
    same = first.primary_sinks.figures[0].title == second.primary_sinks.figures[0].title
    assert ("The caption is that of" in drawn.caption) != same


def test_maps_without_counterparts_are_named(depths: list[Any], tmp_path: Path) -> None:
    found = compare(depths[1], depths[2])
    assert "primary-sinks-received-1" not in {figure.key for figure in found.maps}
    assert any("along head one has 3 columns, the other 2" in why for why in found.unmapped)
    html = found.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "not drawn" in html
    assert "without counterparts" in html
    assert found.to_json()["unmapped"] == found.unmapped


def test_positions_of_one_run_alone_have_no_value() -> None:
    base = Heatmap("k", "Title", "Caption.", np.full((3, 5), 1.0), "share", x_label="position")
    other = Heatmap("k", "Other", "Caption.", np.full((3, 7), 4.0), "share", x_label="position")
    (drawn,) = _difference(base, other, "a", "b", "k-1")
    np.testing.assert_array_equal(drawn.values, [[3.0] * 5 + [np.nan] * 2] * 3)
    assert drawn.limits == (-3.0, 3.0)
    assert drawn.title == "Other (b) minus Title (a)"
    assert "The caption is that of b." in drawn.caption


@pytest.mark.parametrize(
    ("shape", "unit", "drawn"),
    [((7, 3), "share", True), ((5, 3), "share", True), ((7, 4), "share", False), ((7, 3), "ratio", False)],
)
def test_maps_are_drawn_where_they_mean_the_same(shape: tuple[int, int], unit: str, drawn: bool) -> None:
    base = Heatmap("k", "Title", "Caption.", np.ones((7, 3)), "share", marks=((0, 1),))
    other = Heatmap("k", "Title", "Mean. Rings: above 0.3 somewhere. Rest.", np.full(shape, 3.0), unit)
    found = _difference(base, other, "a", "b", "k-1")
    assert bool(found) == drawn
    if drawn:
        assert found[0].values.shape == (min(7, shape[0]), 3)
        assert (found[0].values == 2).all()
        assert found[0].caption.startswith("Mean. Rest.")
        assert ("relative depth" in found[0].y_label) == (shape[0] != 7)


def test_the_page_has_maps_numbers_and_no_tokens(tmp_path: Path, capsys: Any) -> None:
    for name, bos in (("on", "on"), ("off", "off")):
        named = ["--analyzers", "primary-sinks", "--no-verify"]
        assert main(["profile", "-q", "-n", "3", "--bos", bos, *named, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    out = tmp_path / "page.html"
    folders = [str(tmp_path / name) for name in ("on", "off")]
    assert main(["compare", *folders, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    first_tokens = [key for key in document["differences"]["off"] if key.startswith("inputs.first_tokens")]
    assert first_tokens
    html = out.read_text(encoding="utf-8")
    assert "All numbers" in html
    assert "Where they differ" in html
    assert "first tokens" in html
    assert main(["compare", *folders, "--out", str(out), "--json", "--no-text"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert not [key for key in document["differences"]["off"] if key.startswith("inputs.first_tokens")]
    assert "first tokens" not in out.read_text(encoding="utf-8")
