"""Token transitions: how much sublayers change visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure, Lines, Series
from sinklens.core.reference import Reference
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .evidence import span
from .pictured import cells_of, visual_positions, why_none, with_pictures

BAND = (7, 12)
OF_LAYERS = 32


@registry.register("token-transitions")
@dataclass(frozen=True)
class TokenTransitions(Analyzer):
    """How much attention and feed-forward parts change each visual token (TTV): a ranking that needs no attention.

    How it is computed: for each sublayer with normalised input x and output F(x), m is the ratio of their norms and d
    their cosine; TTV is the softmax over tokens of 1 - |d|, times m. Values of both sublayers are added, and summed
    over layers 7 to 12 of 32, or the same part of other depths. recipe="paper" takes the softmax over the visual
    tokens. Found means that the tokens differ: the top tenth has at least `spread` times its even share of the sum.

    Compared with the paper: recipe="code" follows the published program, which uses 1 - d without the absolute value
    and a softmax over the whole sequence, text included. x there is the input after the norm, as here. The full method
    adds instruction-guided attention and prunes; that is not done here.

    When not to trust it: norm ratios of sink tokens are those of massive activations; the table says what a token's
    ratio is, and a few tokens with extreme ones decide the sum. The softmax over few tokens is steeper than over many.

    Args:
        recipe: `paper` or `code`.
        spread: See above.
        most_rows: Tokens in the table.
    """

    recipe: str = "paper"
    spread: float = 1.5
    most_rows: int = 64

    name = "token-transitions"
    title = "Token transitions"
    place = 77
    default = False
    of_pictures = True
    formula = (
        '<math display="block"><mi>TTV</mi><mo>=</mo><mi>softmax</mi><mo>(</mo><mn>1</mn><mo>-</mo><mo>|</mo><mi>d</mi>'
        "<mo>|</mo><mo>)</mo><mo>·</mo><mi>m</mi></math>"
    )
    needs = pic.OF_TRANSITIONS
    summarises = ("n_prompts", "first_layer", "last_layer", "top_tenth", "even")
    reference = Reference(
        key="li2025transprune",
        title="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
        authors="Ao Li and others",
        year=2025,
        arxiv="2507.20630",
        section="token transition variation; modeling_llama_transprune.py, lines 871-930",
        code="https://github.com/liaolea/TransPrune",
    )

    def __post_init__(self) -> None:
        if self.recipe not in ("paper", "code"):
            raise UsageError(f"token-transitions: recipe must be paper or code, got {self.recipe!r}.")

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *self.needs)
        if reason:
            return self.not_applicable(reason)
        records = with_pictures(trace, *self.needs)
        layers = band(len(trace.layers))
        scores = [self._scores(record, layers) for record in records]
        if any(np.isnan(score).any() for score in scores):
            return self.not_applicable(
                "some of these layers have no attention or feed-forward part that can be read."
            )
        tops = [top_share(score) for score in scores]
        top = float(np.mean(tops))
        rows = [
            row
            for record, score in zip(records, scores, strict=True)
            for row in self._rows(record, score, layers)
        ]
        rows.sort(key=lambda row: -row["ttv"])
        summary = {
            "n_prompts": len(records),
            "first_layer": int(layers[0]),
            "last_layer": int(layers[-1]),
            "top_tenth": top,
            "even": float(np.mean([top_count(len(score)) / len(score) for score in scores])),
        }
        found = top >= self.spread * summary["even"]
        return self.finding(
            Status.FOUND if found else Status.NOT_FOUND,
            f"The tenth of the visual tokens that changes most has {100 * top:.1f} % of all change in "
            f"{span(layers[0], layers[-1])} (even: {100 * summary['even']:.1f} %).",
            rows=rows[: self.most_rows],
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=_figures(records),
        )

    def _scores(self, record: PromptRecord, layers: np.ndarray) -> Float[np.ndarray, " visual"]:
        ratio, cosine = (
            record[signal][layers].astype(np.float64)
            for signal in (pic.TRANSITION_RATIO, pic.TRANSITION_COSINE)
        )
        visual = visual_positions(record)
        if self.recipe == "paper":
            return transition_variation(ratio[..., visual], cosine[..., visual]).sum((0, 1))
        return transition_variation(ratio, cosine, absolute=False).sum((0, 1))[visual]

    def _rows(self, record: PromptRecord, score: np.ndarray, layers: np.ndarray) -> list[dict[str, Any]]:
        ratio = record[pic.TRANSITION_RATIO][layers].astype(np.float64).mean(0)
        cells = sorted(cells_of(record), key=lambda cell: -score[cell.place])
        return [
            {
                "prompt": record.index,
                "image": cell.image,
                "row": cell.row,
                "col": cell.col,
                "position": cell.position,
                "ttv": float(score[cell.place]),
                "attention_ratio": float(ratio[0, cell.position]),
                "mlp_ratio": float(ratio[1, cell.position]),
            }
            for cell in cells[: self.most_rows]
        ]


def band(layers: int) -> np.ndarray:
    """Layers 7 to 12 of 32, or the same part of another depth; at least one."""
    first = min(layers - 1, round(BAND[0] * layers / OF_LAYERS))
    return np.arange(first, max(first + 1, round((BAND[1] + 1) * layers / OF_LAYERS)))


def transition_variation(
    ratio: Float[np.ndarray, "*any token"], cosine: Float[np.ndarray, "*any token"], *, absolute: bool = True
) -> Float[np.ndarray, "*any token"]:
    """softmax over tokens of 1 - |d|, times m; the published program leaves the absolute value out."""
    turn = 1 - (np.abs(cosine) if absolute else cosine)
    weight = np.exp(turn - turn.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) * ratio


def top_count(tokens: int) -> int:
    return max(1, round(tokens / 10))


def top_share(score: Float[np.ndarray, " token"]) -> float:
    """Part of the sum that the largest tenth has."""
    return float(np.sort(score)[-top_count(len(score)) :].sum() / score.sum())


UNITS = {
    "ttv": "sum over both sublayers and the layers",
    "attention_ratio": "norm of the attention's output over its input's, mean over the layers",
    "mlp_ratio": "the same of the feed-forward part",
}
LABELS = {"ttv": "TTV", "image": "picture", "top_tenth": "share of the top tenth", "even": "even share"}


def _figures(records: list[PromptRecord]) -> list[Figure]:
    ratio = np.mean([r[pic.TRANSITION_RATIO][..., visual_positions(r)].mean(-1) for r in records], axis=0)
    x = np.arange(len(ratio))
    return [
        Lines(
            "ratio",
            "How much sublayers write on visual tokens",
            "Norm of a sublayer's output over that of its normalised input, mean over visual tokens and "
            f"{counted(len(records), 'prompt')}.",
            tuple(Series(name, x, ratio[:, i]) for i, name in enumerate(("attention", "feed-forward"))),
            "layer",
            "ratio",
        )
    ]
