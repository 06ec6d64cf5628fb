"""The planted picture task: tokens and attention are as the truth says, and only VAR frees the head far enough."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from sinklens.core.errors import UsageError
from sinklens.mitigations import ACT, VAR, KnockOut, Method, SinkGating, ZeroTuning
from sinklens.testbeds.planting.probe import eager
from sinklens.testbeds.planting.retrieve_visual import VisualRetrievalTruth, plant_visual_retrieval
from sinklens.testbeds.vision import COLOURS, SHAPES
from sinklens.testbeds.visual_retrieval import Asked, VisualRetrievalTask

TASK = VisualRetrievalTask()
WORDS = {word: place for place, word in enumerate(TASK.vocabulary)}
SEEDS = (0, 1, 2)
SPECK, EMPTY = 24, 25


@cache
def bed(seed: int, noise: float = 0.03) -> tuple[Any, VisualRetrievalTruth]:
    return plant_visual_retrieval(seed=seed, noise=noise)


def given(asked: Asked) -> dict[str, torch.Tensor]:
    names = tuple(COLOURS)
    words = [["<s>", *["<image>"] * 25, *TASK.question(names[colour]).split()] for colour in asked.colours]
    ids = torch.tensor([[WORDS[word] for word in row] for row in words])
    return {"input_ids": ids, "pixel_values": torch.from_numpy(asked.scenes.pixels).float() / 255}


def right(seed: int, method: Method | None = None, count: int = 48) -> tuple[np.ndarray, bool]:
    """Whether each question is answered rightly, and whether the method acted."""
    model, _ = bed(seed)
    asked = TASK.ask(count, np.random.default_rng(seed + 100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad(), nullcontext() if method is None else method(model) as effect:
            answers = model(**given(asked), use_cache=False).logits[:, -1].argmax(-1)
    expected = [WORDS[SHAPES[shape]] for shape in asked.shapes]
    return answers.numpy() == expected, effect is not None and effect.acted


@pytest.mark.parametrize("seed", SEEDS)
def test_var_wins_and_the_wrong_methods_do_not(seed: int) -> None:
    _, truth = bed(seed)
    plain, _ = right(seed)
    assert plain.mean() < 0.4
    dims = (truth.sink_dim or 0,)
    freed, acted = right(seed, VAR(dims=dims, **truth.remedy_parameters))
    assert acted
    assert freed.all()
    assert right(seed, VAR(dims=dims, rho=0.5, heads=[(truth.layer, truth.head)]))[0].all()
    others = [
        (block, head) for block in range(4) for head in range(4) if (block, head) != (truth.layer, truth.head)
    ]
    wrong = [
        VAR(dims=dims),  # the paper's 0.8 for general tasks: the head has less than that on non-sinks
        VAR(dims=dims, rho=0.5, heads=others),
        VAR(dims=dims, rho=0.5, sinks="visual"),
        VAR(dims=dims, rho=0.5, budget="text"),
        ZeroTuning(gamma=0.01),
        ZeroTuning(gamma=4.0),
        ACT(beta=0.0),
        KnockOut(positions=(0,)),
        SinkGating(dims=dims, sink=0.0),
    ]
    for method in wrong:
        tuned, acted = right(seed, method)
        assert acted, method
        assert (tuned == plain).all(), method


def test_every_cell_is_the_embedding_of_what_it_shows() -> None:
    """One embedding per kind of patch, wherever it stands and whatever stands beside it; a root mean square of 1."""
    model, truth = bed(1)
    asked = TASK.ask(40, np.random.default_rng(0))
    kinds = torch.from_numpy(TASK.kinds_of(asked))
    with torch.no_grad():
        states = model(**given(asked), output_hidden_states=True).hidden_states[0]
    cells = states[:, 1:26]
    torch.testing.assert_close(
        states.square().mean(-1).sqrt(), torch.ones(states.shape[:2]), atol=1e-4, rtol=0
    )
    for kind in range(26):
        same = cells[kinds == kind]
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=2e-4, rtol=0)
    large = cells[..., truth.sink_dim].abs() > 3.54
    assert bool((large == (kinds == SPECK)).all())
    assert float(states[0, 0, truth.sink_dim]) == pytest.approx(8.0)


def test_attention_is_as_the_truth_says() -> None:
    model, truth = bed(2, 0.0)
    asked = TASK.ask(32, np.random.default_rng(5))
    kinds = TASK.kinds_of(asked)
    with torch.no_grad(), eager(model):
        maps = model(**given(asked), output_attentions=True, use_cache=False).attentions
    row = maps[truth.layer][:, truth.head, -1].double().numpy()
    wanted = kinds == (asked.colours * 4 + asked.shapes)[:, None]
    assert (wanted.sum(1) == 1).all()
    found = {
        "asked": row[:, 1:26][wanted],
        "visual_sinks": (row[:, 1:26] * (kinds == SPECK)).sum(1),
        "visual_others": (row[:, 1:26] * ((kinds != SPECK) & ~wanted)).sum(1),
        "text_sink": row[:, 0],
        "text_others": row[:, 26:].sum(1),
    }
    masses = truth.masses()
    for name, value in found.items():
        np.testing.assert_allclose(value, masses[name], rtol=2e-3, err_msg=name)
    assert truth.share(TASK.patches - 5 + 8, sinks=4) == pytest.approx(masses["asked"])
    assert truth.masses(text=0.0)["asked"] < truth.threshold < truth.redistributed(0.6)
    assert 0.5 < truth.non_sink_ratio < 0.6
    looking = maps[1][:, truth.looker[1], -1, 1:26].double().numpy()
    objects = kinds < SPECK
    assert looking[objects].mean() > 2 * looking[kinds == EMPTY].mean()
    first, last = looking[:, :8][kinds[:, :8] == EMPTY], looking[:, -8:][kinds[:, -8:] == EMPTY]
    assert last.min() > 1.5 * first.max()


def test_pictures_hold_what_is_asked() -> None:
    asked = TASK.ask(400, np.random.default_rng(0))
    kinds = TASK.kinds_of(asked)
    assert np.bincount(asked.shapes).tolist() == [100] * 4
    assert ((kinds == SPECK).sum(1) == 4).all()
    assert ((kinds == EMPTY).sum(1) == 17).all()
    for row, colour, shape in zip(kinds, asked.colours, asked.shapes, strict=True):
        named = row[row < SPECK] // 4
        assert len(set(named)) == 4
        assert colour * 4 + shape in row
    assert (TASK.background(asked.scenes) == (kinds >= SPECK)).all()
    patches = (
        asked.scenes.pixels.reshape(400, 3, 5, 4, 5, 4).transpose(0, 2, 4, 1, 3, 5).reshape(400, 25, 3, 4, 4)
    )
    assert (patches == TASK.patch_kinds()[kinds]).all()


@pytest.mark.parametrize("fields", [{"noise": -1.0}, {"strength": 1.0}, {"strength": 3.5}, {"match": 1.0}])
def test_what_cannot_be_planted_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plant_visual_retrieval(**fields)
