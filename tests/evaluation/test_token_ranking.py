"""Rankings of token pruners against naive definitions, the corrections on made scores of known bias."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sinklens.analyzers.position_bias import recency_fit as fit_of_the_analyzer
from sinklens.core.errors import UsageError
from sinklens.core.recency import recency_fit, recency_weights
from sinklens.evaluation.pruners import USUAL, DivPrune, FastV, Read, registry
from sinklens.evaluation.token_ranking import (
    detrended,
    distances,
    kept_count,
    largest,
    most_different,
    padding_shares,
    without_padding,
)
from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture
from tests.vlms import build, processor

TOKENS, DIM = 23, 7


def test_the_worked_example_of_the_fit() -> None:
    """T = 8, y = .01 e^(1.5 i / 8): dividing by the fit leaves a constant."""
    y = 0.01 * np.exp(1.5 * np.arange(8) / 8)
    assert recency_fit is fit_of_the_analyzer
    mu, sigma, explained = recency_fit(y)
    assert (mu, sigma, explained) == pytest.approx((0.01, 1.5, 1.0))
    assert detrended(y, sigma) == pytest.approx(np.full(8, 0.01))


def test_weights_are_those_of_the_published_files() -> None:
    """exp(-k i) over 576 tokens, sigma = 576 k, 1 at the first token."""
    weights = recency_weights(576 * 0.002041, 576)
    assert weights == pytest.approx([np.exp(-0.002041 * i) for i in range(576)])
    assert weights[0] == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_largest_is_a_sorted_list(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, TOKENS) / 6  # many ties
    count = int(rng.integers(1, TOKENS + 1))
    first, never = np.split(rng.permutation(TOKENS)[:9], [int(rng.integers(0, 9))])

    def key(place: int) -> tuple[int, float, int]:
        return (0 if place in first else 2 if place in never else 1, -scores[place], place)

    expected = sorted(sorted(range(TOKENS), key=key)[:count])
    assert largest(scores, count, first=first, never=never).tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_most_different_is_the_greedy_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(TOKENS, DIM)).astype(np.float32)
    features[rng.permutation(TOKENS)[:6]] = features[0]  # copies
    count = int(rng.integers(1, TOKENS + 1))
    cut = rng.integers(0, 4, 2) if seed % 2 else (0, 0)
    order = rng.permutation(TOKENS)
    first, never = order[: cut[0]], order[cut[0] : cut[0] + cut[1]]

    def far(a: int, b: int) -> float:
        x, y = features[a].astype(float), features[b].astype(float)
        return round(1 - x @ y / np.sqrt((x @ x) * (y @ y)), 12)

    chosen = sorted(first)[:count]
    usual = [i for i in range(TOKENS) if i not in never]
    if not chosen:
        chosen.append(max(usual, key=lambda i: (min(far(i, j) for j in usual if j != i), -i)))
    while len(chosen) < count:
        left = [i for i in usual if i not in chosen] or [i for i in range(TOKENS) if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(far(i, j) for j in chosen), -i)))
    found = most_different(features, count, first=first, never=never)
    assert found.tolist() == sorted(chosen)
    assert len(set(found.tolist())) == count


def test_greedy_diversity_is_within_half_of_the_best() -> None:
    """The greedy solution is known to reach half of the largest smallest distance, in a metric: angles are one."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(9, 4))
    angle = np.arccos(np.clip(1 - distances(features), -1, 1))

    def least(places: tuple[int, ...]) -> float:
        return min(angle[a, b] for a, b in itertools.combinations(places, 2))

    best = max(least(places) for places in itertools.combinations(range(9), 4))
    assert least(tuple(most_different(features, 4).tolist())) >= best / 2


def test_padding_is_read_off_the_boxes() -> None:
    """A wide picture padded to a square of 3 x 3 cells: the middle row shows it, the rows above and below in part."""
    spans = ModalitySpans(
        np.array([Kind.SYSTEM, *[Kind.VISUAL] * 9, Kind.QUESTION]),
        (Picture("wide", 90, 54, ""),),
        (PatchGrid(0, "whole", np.arange(1, 10).reshape(3, 3), (0.0, -18.0, 90.0, 72.0)),),
    )
    shares = padding_shares(spans)
    assert shares == pytest.approx([0.6] * 3 + [0.0] * 3 + [0.6] * 3)
    scores = np.arange(1.0, 10.0)
    assert without_padding(scores, shares).tolist() == [0, 0, 0, 4, 5, 6, 0, 0, 0]
    assert without_padding(scores, shares, least=0.7).tolist() == scores.tolist()
    cropped = ModalitySpans(
        spans.kinds, spans.pictures, (PatchGrid(0, "whole", spans.grids[0].positions, (18, 0, 72, 54)),)
    )
    assert not padding_shares(cropped).any()


def read(rng: np.random.Generator, sigma: float, sink: int | None = None) -> tuple[Read, np.ndarray]:
    """Content times an exponential of the place, and the content."""
    content = rng.uniform(0.5, 1.5, TOKENS)
    share = 0.01 * content * np.exp(sigma * np.arange(TOKENS) / TOKENS)
    sinks = np.zeros(TOKENS, dtype=bool)
    if sink is not None:
        share[sink], sinks[sink] = 0.4, True
    attention = np.stack([np.full(TOKENS, 0.02), share])
    both = {"text": attention[::-1].copy(), "last": attention}
    return Read(both, rng.normal(size=(TOKENS, DIM)), sinks, np.zeros(TOKENS)), content


def test_the_correction_gives_back_the_ranking_by_content() -> None:
    """Fitted on other prompts, each with a sink at another place, which must not bend the fit."""
    rng = np.random.default_rng(0)
    calibration = [read(rng, 1.4, int(rng.integers(TOKENS)))[0] for _ in range(200)]
    corrected = FastV(recency=True)
    fit = corrected.fit(calibration)
    assert fit["sigma"] == pytest.approx(1.4, abs=0.1)
    assert fit["n"] == 200
    bent = recency_fit(np.mean([one.attention["last"][1] for one in calibration], axis=0))[1]
    assert abs(bent - 1.4) > abs(fit["sigma"] - 1.4)
    given, content = read(rng, 1.4)
    truth = largest(content, 8).tolist()
    exact = FastV(recency=True, sigma=1.4)
    assert exact.kept(given, 8).tolist() == truth
    assert FastV().kept(given, 8).tolist() != truth
    assert exact.calibrated(calibration) == exact
    found = corrected.calibrated(calibration).kept(given, 8)
    assert len(set(found.tolist()) & set(truth)) >= 7
    assert FastV(queries="text").kept(given, 3).tolist() == [0, 1, 2]  # all equal there: the earlier ones


def test_sinks_are_kept_or_dropped_and_the_number_stays() -> None:
    rng = np.random.default_rng(1)
    given, _ = read(rng, 0.0, sink=5)
    for kind in (FastV, DivPrune):
        kept = {how: kind(sinks=how).kept(given, 6).tolist() for how in ("kept", "dropped")}
        assert 5 in kept["kept"]
        assert 5 not in kept["dropped"]
        assert {len(places) for places in kept.values()} == {6}
        assert len(kind(sinks="dropped").kept(given, TOKENS)) == TOKENS


def test_what_has_no_meaning_says_so() -> None:
    rng = np.random.default_rng(2)
    plain, sinking = read(rng, 0.0)[0], read(rng, 0.0, sink=4)[0]
    unknown = Read(plain.attention, plain.features, None, plain.padding)
    dropped = FastV(sinks="dropped")
    assert "no visual token is a sink" in (dropped.why_not([plain]) or "")
    assert "no sink dims" in (DivPrune(sinks="kept").why_not([unknown]) or "")
    assert dropped.why_not([plain, sinking]) is None
    assert "does not pad" in (FastV(padding=True).why_not([plain]) or "")
    for wrong in ({"layer": 0}, {"queries": "first"}, {"sinks": "gone"}, {"sigma": float("nan")}):
        with pytest.raises(UsageError):
            FastV(**wrong)  # type: ignore[arg-type]
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(UsageError, match="share of the visual tokens"):
            kept_count(share, 10)
    assert [kept_count(share, 25) for share in (0.001, 0.5, 0.98)] == [1, 13, 25]


def test_labels_name_what_is_not_usual() -> None:
    assert [pruner.label for pruner in USUAL[:4]] == [
        "fastv",
        "fastv:recency=true",
        "fastv:padding=true",
        "fastv:sinks=kept",
    ]
    both = FastV(recency=True, sigma=1.25, sinks="kept")
    assert both.simpler == ["fastv:recency=true:sigma=1.25", "fastv:sinks=kept", "fastv"]
    assert FastV(recency=True).simpler == ["fastv"]
    assert DivPrune().simpler == []
    assert {cls.reference.arxiv for _, cls in registry.items()} == {"2403.06764", "2503.02175"}
    assert all("When not to trust it:" in (cls.__doc__ or "") for _, cls in registry.items())


@pytest.mark.parametrize("size", [(40, 72), (90, 30), (40, 40), (33, 50)])
def test_padding_is_where_the_processor_put_it(size: tuple[int, int]) -> None:
    """A white picture through a processor that pads: what is not white in a patch is padding."""
    from sinklens.inputs.vision import load_pictures

    name = "padded to a square"
    made, config = processor(name), build(name).config
    white = np.full((*size, 3), 255, dtype=np.uint8)
    (prompt,) = load_pictures([[white]], made, config, question="how many ?").prompts
    assert prompt.visual is not None
    pixels = prompt.visual.inputs["pixel_values"][0].double().numpy()
    full = pixels.max((1, 2), keepdims=True)
    shown = (pixels / full).mean(0).reshape(5, 8, 5, 8).mean((1, 3))
    assert padding_shares(prompt.visual.spans) == pytest.approx(1 - shown.ravel(), abs=0.05)
    assert padding_shares(prompt.visual.spans).any() == (size[0] != size[1])
