"""The embedding lens: vocabulary tokens by the visual tokens they are nearest to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sinklens.analyzers import EmbedLens, Status
from sinklens.tracers.trace import PromptRecord

from .made_visual import VISUAL, record, trace


def looked(index: int, *, layers: int = 4, every: int = 2) -> PromptRecord:
    """Token 7 is the nearest of five visual tokens of every picture, the others have one of their own."""
    ids = np.full((layers, VISUAL, 10), -1)
    cosine = np.full((layers, VISUAL, 10), np.nan)
    for layer in range(0, layers, every):
        ids[layer] = np.arange(10) + 1000 * (index + 1)
        ids[layer, :, 0] = 1000 * (index + 1) + 50 + np.arange(VISUAL)
        ids[layer, :5, 0] = 7
        cosine[layer] = 0.5 - 0.01 * np.arange(10)
    return record(index, lens_id=ids, lens_cosine=cosine, lens_excluded=np.array([1, 2, 3, 4]))


def test_tokens_common_to_pictures_are_told_from_their_own() -> None:
    finding = EmbedLens(every=2).analyze(trace([looked(i) for i in range(6)], words={"7": "▁cer"}))
    assert finding.status is Status.FOUND
    top = finding.rows[0]
    assert (top["token_id"], top["token"], top["n_visual"], top["n_pictures"], top["layer"]) == (
        7,
        "▁cer",
        30,
        6,
        0,
    )
    assert top["share"] == 0.25
    assert finding.rows[1]["n_pictures"] == 1
    assert finding.summary["layers"] == [0, 2]
    assert finding.summary["common_tokens"] == 1
    assert finding.summary["excluded_placeholder"] == 2
    assert finding.summary["excluded_beyond_the_tokenizer"] == 3
    assert finding.verdict.startswith("'▁cer' is the nearest")
    assert len(finding.figures) == 1


def test_pictures_of_their_own_words_are_not_found() -> None:
    records = [looked(i) for i in range(6)]
    for one in records:
        one.arrays["lens_id"][::2, :5, 0] = 20 + one.index
    finding = EmbedLens().analyze(trace(records))
    assert finding.status is Status.NOT_FOUND
    assert "in most pictures" in finding.verdict


def test_one_picture_says_nothing_of_others() -> None:
    finding = EmbedLens().analyze(trace([looked(0)]))
    assert finding.status is Status.NOT_FOUND
    assert finding.notes


def test_pictures_are_counted_and_not_prompts() -> None:
    """One prompt of two pictures: token 7 is near both, the tokens of the second row of cells near one."""
    one = looked(0)
    assert one.spans is not None
    (whole,) = one.spans.grids
    parts = [
        replace(whole, picture=i, positions=rows)
        for i, rows in enumerate((whole.positions[:2], whole.positions[2:]))
    ]
    picture = one.spans.pictures[0]
    one.spans = replace(
        one.spans, pictures=(picture, replace(picture, name="second.png")), grids=tuple(parts)
    )
    one.arrays["lens_id"][::2, whole.positions[2:].ravel()[:1] - 1, 0] = 7
    finding = EmbedLens(every=2).analyze(trace([one]))
    assert not finding.notes
    assert (finding.rows[0]["token_id"], finding.rows[0]["n_pictures"]) == (7, 2)
    assert finding.rows[0]["picture_share"] == 1.0
    assert finding.rows[1]["picture_share"] == 0.5


def test_reasons_for_not_applying() -> None:
    missing = EmbedLens().analyze(trace([record(0)]))
    assert missing.status is Status.NOT_APPLICABLE
    assert "profile again" in (missing.reason or "")
    empty = looked(0)
    empty.arrays["lens_id"][:] = -1
    assert EmbedLens().analyze(trace([empty])).status is Status.NOT_APPLICABLE
    assert EmbedLens(every=3).lens_every == 3
