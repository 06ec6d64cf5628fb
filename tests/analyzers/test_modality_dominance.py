"""MDI and AEI: the worked example, BOS in and out, and what cannot be said."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import ModalityDominance, Status
from sinklens.analyzers.modality_dominance import dominance
from sinklens.core.errors import UsageError

from .made_visual import LENGTH, TEXT, VISUAL, received, record, trace


def test_the_worked_example() -> None:
    """A_T = .7 over 50 tokens of text, A_O = .3 over 576 visual ones."""
    mdi, text, visual = dominance(0.7, 0.3, 50, 576)
    assert mdi == pytest.approx(26.88)
    assert text == pytest.approx(8.764, abs=5e-4)
    assert visual == pytest.approx(0.326042, abs=5e-7)
    assert text / visual == pytest.approx(mdi)
    assert np.isnan(dominance(0.7, 0.0, 50, 576)).all()
    assert np.isnan(dominance(0.7, 0.3, 50, 0)).all()


def made(bos: float = 0.5, layers: int = 6) -> np.ndarray:
    share = np.full((layers, LENGTH), 0.01)
    share[:, 0] = bos
    return share


def test_bos_is_a_sink_of_the_text() -> None:
    """With BOS: (.5 + 3 x .01) / 4 tokens over .01; without: even."""
    records = [record(i, **received(made())) for i in range(2)]
    finding = ModalityDominance().analyze(trace(records, 6))
    assert finding.status is Status.FOUND
    wanted = (0.5 + TEXT * 0.01) / (1 + TEXT) / 0.01
    assert [row["mdi"] for row in finding.rows] == pytest.approx([wanted] * 6, rel=1e-5)
    assert finding.summary["mdi_other_late"] == pytest.approx(1.0, rel=1e-5)
    assert finding.rows[0]["aei_text"] / finding.rows[0]["aei_visual"] == pytest.approx(wanted, rel=1e-5)
    without = ModalityDominance(bos=False).analyze(trace(records, 6))
    assert without.status is Status.NOT_FOUND
    assert without.summary["mdi_other_late"] == pytest.approx(wanted, rel=1e-5)
    question = ModalityDominance(system=False).analyze(trace(records, 6))
    assert question.summary["mdi_late"] == pytest.approx(1.0, rel=1e-5)


def test_pictures_can_dominate() -> None:
    share = made(bos=0.01)
    share[-2:, 1 : 1 + VISUAL] = 0.04
    finding = ModalityDominance().analyze(trace([record(0, **received(share))], 6))
    assert finding.status is Status.FOUND
    assert finding.verdict.startswith("A visual token gets 4.0 times")


def test_reasons() -> None:
    one = trace([record(0, **received(made()))], 6)
    generated = ModalityDominance(queries="generated").analyze(one)
    assert generated.status is Status.NOT_APPLICABLE
    assert "generated" in (generated.reason or "")
    assert ModalityDominance(queries="last").analyze(one).status is Status.FOUND
    assert ModalityDominance().analyze(trace([record(0)])).status is Status.NOT_APPLICABLE
    with pytest.raises(UsageError, match="queries"):
        ModalityDominance(queries="all")
