"""Visual tokens that become like the first token of the text."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import BosMap, Status

from .made_visual import COLS, VISUAL, record, trace


def test_only_the_middle_layers_count() -> None:
    cosine = np.full((8, VISUAL), 0.2)
    cosine[3, 7], cosine[7, 9], cosine[0, 11], cosine[2, 4] = 0.97, 0.99, 0.99, 0.91
    finding = BosMap().analyze(trace([record(0, visual_first_cosine=cosine)]))
    assert finding.status is Status.FOUND
    assert [(row["position"], row["layer"]) for row in finding.rows] == [(8, 3), (5, 2)]
    assert (finding.rows[0]["row"], finding.rows[0]["col"]) == divmod(7, COLS)
    assert finding.summary["share"] == pytest.approx(2 / VISUAL)
    drawn = finding.figures[0].pages[0].grids[0]  # type: ignore[union-attr]
    assert drawn.classes is not None
    assert (drawn.classes == 0).sum() == 2
    assert drawn.values[0].ravel()[7] == pytest.approx(0.97)
    assert (
        BosMap(aligned=0.98).analyze(trace([record(0, visual_first_cosine=cosine)])).status
        is Status.NOT_FOUND
    )


def test_reasons() -> None:
    assert BosMap().analyze(trace([record(0)])).status is Status.NOT_APPLICABLE
