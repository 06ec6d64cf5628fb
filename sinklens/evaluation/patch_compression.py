"""Does one token carry what one patch shows? Objects that fill exactly one patch, with their token kept, alone, frozen
or removed (after the patch-compression benchmark of arXiv 2603.00510, whose data is not released)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel
from sinklens.tracers.chosen import Chosen
from sinklens.tracers.interventions import Intervention
from sinklens.tracers.visual_interventions import SublayersSkipped, TokensRemoved

from .answers import Answers, answer_positions
from .paired import mean_interval, paired_difference

CONDITIONS = ("kept", "alone", "frozen", "removed")
"""All tokens as they are; the object's token and no other of the picture; the object's token passing all sublayers
unchanged; everything but the object's token."""


@dataclass(frozen=True)
class PatchCase:
    """A prompt with its answer and a picture in which one token shows all there is.

    Attributes:
        position: Of that token.
        kinds: Positions of the answer's tokens by what they state (`colour`, `count`, ...).
    """

    prompt: Prompt
    position: int
    kinds: Mapping[str, Sequence[int]]


def patch_compression(opened: OpenedModel, cases: Sequence[PatchCase]) -> dict[str, Any]:
    """Probability of what the answer states, by kind and condition, each given the true words before it.

    Returns:
        Plain JSON: `n_cases`, and per kind and condition an interval over cases (`probability`) and the paired
        difference to `kept` (`difference`).
    """
    sublayers = tuple(layer / 2 for layer in range(2 * len(opened.anatomy.main.blocks)))
    found: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        assert case.prompt.visual is not None
        places = answer_positions(case.prompt).tolist()
        answers = Answers(opened, case.prompt)
        for condition in CONDITIONS:
            answered = answers.under(_change(case, condition, sublayers))
            rows = torch.softmax(answered.logits.double(), -1).gather(1, answered.wanted[:, None])[:, 0]
            for kind, stated in case.kinds.items():
                mine = [float(rows[places.index(at)]) for at in stated]
                found.setdefault(kind, {}).setdefault(condition, []).append(float(np.mean(mine)))
    return {
        "n_cases": len(cases),
        "kinds": {
            kind: {
                condition: {
                    "probability": mean_interval(np.array(values)).to_json(),
                    "difference": paired_difference(np.array(values), np.array(each["kept"])).to_json(),
                }
                for condition, values in each.items()
            }
            for kind, each in found.items()
        },
    }


def _change(case: PatchCase, condition: str, sublayers: tuple[float, ...]) -> Intervention | None:
    index = case.prompt.index
    if condition == "kept":
        return None
    if condition == "frozen":
        return SublayersSkipped(sublayers, Chosen.at({index: [case.position]}))
    assert case.prompt.visual is not None
    visual = case.prompt.visual.spans.visual.nonzero()[0].tolist()
    gone = [at for at in visual if (at == case.position) == (condition == "removed")]
    return TokensRemoved(Chosen.at({index: gone}))
