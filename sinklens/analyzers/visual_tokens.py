"""Visual tokens by what they carry: sink, dead, alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Tile
from sinklens.core.papers import EMBED_LENS
from sinklens.tracers import signals as sig
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .pictured import cells_of, distinct_pictures, why_none, with_pictures, word
from .recurring import POOL, nearest_direction, recurring_directions
from .visual_classes import (
    ALIVE,
    CLASSES,
    DEAD,
    SINK,
    Named,
    class_values,
    name_cluster,
    rows_by_ids,
    summary_of,
    typical_alive,
)
from .visual_tokens_words import LABELS, UNITS, figures, notes, verdict

NEEDS = frozenset(
    {
        pic.VISUAL_UNIT,
        pic.VISUAL_DRIFT,
        pic.VISUAL_FIRST_COSINE,
        pic.QUERIES_RECEIVED,
        pic.QUERIES_VISIBLE,
        pic.LENS_ID,
        sig.EMBEDDED_NORM,
    }
)


@registry.register("visual-tokens")
@dataclass(frozen=True)
class VisualTokens(Analyzer):
    """Which visual tokens are sinks, which are dead, and which are alive.

    How it is computed: recipe="paper" has two stages, and its thresholds are ours. First, over all pictures, directions
    in which visual tokens enter the first block are clustered around leaders (cosine of at least `join`); a cluster is
    recurring if at least `recurring` of the pictures have a member and the members' mean cosine is at least `tight`.
    A recurring cluster is a sink if its tokens come within `first_cosine` (median over members) of the first token
    that is no picture's, where one of the blocks 3 to 6 begins, or if the vision tower's last states of its patches
    exceed `vit_norm` times the median (then it is a sink of the vision tower). It is dead if its tokens stay nearer to
    their first state than the median token and get less attention from the text than the median token that is in no
    recurring cluster. Then every token belongs to the nearest named cluster, if its cosine with the centroid is at
    least `near`, and is alive otherwise. recipe="code" takes ids of the vocabulary: a token is of a class if its id is
    among the three nearest vocabulary tokens.

    Compared with the paper: it clusters tokens of many images and names clusters by their nearest vocabulary token,
    without giving the parameters. The published code has no clustering; its rule is recipe="code", with the ids 1141
    (sink of the vision tower), 26673 (sink of the language model) and 30296 (dead) for LLaVA-1.5-7B and no others.
    There its classes may overlap; here a token counts for the first of the three, and overlaps are counted. The code
    excludes no rows of the vocabulary; the lens here leaves out rows that were never trained. Shares are published for
    LLaVA-1.5-7B only (about 10 % sink, 30 % dead, 60 % alive).

    When not to trust it: with few or alike pictures everything recurs; `min_pictures` different ones are the least, and
    the paper uses many. A border that all pictures share is a recurring direction like any other. A cluster that fits
    no rule is left among the alive tokens and counted. Models of few layers have no blocks 3 to 6; the later ones
    there are stand in.

    Args:
        recipe: `paper` or `code`.
        join, recurring, tight, near: See above.
        first_cosine: Cosine with the first token from which a cluster is a sink.
        vit_norm: Multiple of the median norm in the vision tower; the rule of outliers, since norms differ by tower.
        vit_sink, llm_sink, dead: Vocabulary ids of recipe="code"; -1 for none.
        min_pictures: Different pictures below which nothing is said to recur.
        pictures: Prompts whose tokens are listed in the table and drawn.
    """

    recipe: str = "paper"
    join: float = 0.95
    recurring: float = 0.8
    tight: float = 0.9
    near: float = 0.9
    first_cosine: float = 0.9
    vit_norm: float = 3.0
    vit_sink: int = -1
    llm_sink: int = -1
    dead: int = -1
    min_pictures: int = 8
    pictures: int = 16

    name = "visual-tokens"
    title = "Visual tokens"
    place = 72
    of_pictures = True
    formula = (
        '<math display="block"><mi>t</mi><mo>∈</mo><mtext>class</mtext><mo>(</mo><mi>c</mi><mo>)</mo><mo>⇔</mo>'
        "<mi>cos</mi><mo>(</mo><msub><mi>u</mi><mi>t</mi></msub><mo>,</mo><msub><mi>μ</mi><mi>c</mi></msub><mo>)</mo><mo>≥</mo>"
        "<mn>0.9</mn></math>"
    )
    needs = NEEDS | frozenset({sig.VISION_NORM})
    summarises = (
        "n_prompts", "n_visual", "text_norm", "overlaps", "recurring_clusters", "unnamed_clusters",
        "vit_sink_share", "llm_sink_share", "share_sink", "attention_sink", "norm_sink", "share_dead",
        "attention_dead", "norm_dead", "share_alive", "attention_alive", "norm_alive",
    )  # fmt: skip
    reference = EMBED_LENS.at("sink, dead and alive tokens; llava_llama_token_pruning.py, lines 310-339")

    def __post_init__(self) -> None:
        if self.recipe not in ("paper", "code"):
            raise UsageError(f"visual-tokens: recipe must be paper or code, got {self.recipe!r}.")

    def analyze(self, trace: Trace) -> Finding:
        reason = why_none(trace, *NEEDS)
        if reason:
            return self.not_applicable(reason)
        records = with_pictures(trace, *NEEDS)
        if self.recipe == "code":
            ids = (self.vit_sink, self.llm_sink, self.dead)
            if max(ids) < 0:
                return self.not_applicable(
                    "recipe=code needs the vocabulary ids of the classes, and none are published for other models than "
                    "LLaVA-1.5-7B: give vit_sink, llm_sink and dead."
                )
            return self._found(trace, records, [rows_by_ids(record, ids) for record in records], ())
        distinct = distinct_pictures(records)
        if len(distinct) < self.min_pictures:
            return self.not_applicable(
                f"{counted(len(distinct), 'different picture')} cannot show what recurs; it needs "
                f"{self.min_pictures}, better 100."
            )
        return self._calibrated(trace, records, distinct)

    def _calibrated(self, trace: Trace, records: list[PromptRecord], distinct: list[Any]) -> Finding:
        units, left = [], POOL
        used = []
        for record, _, places in distinct:
            if left < len(places):
                break
            units.append(record[pic.VISUAL_UNIT][places])
            used.append((record, places))
            left -= len(places)
        clusters = recurring_directions(units, join=self.join, frequency=self.recurring, tightness=self.tight)
        alive = typical_alive(used, clusters)
        named = [
            name_cluster(cluster, used, alive, first_cosine=self.first_cosine, vit_norm=self.vit_norm)
            for cluster in clusters
        ]
        kept = [item for item in named if item.cls != ALIVE]
        centroids = np.array([item.centroid for item in kept])
        found = []
        for record in records:
            index, _ = nearest_direction(record[pic.VISUAL_UNIT], centroids, self.near)
            cls = np.array([ALIVE if i < 0 else kept[i].cls for i in index])
            kind = ["" if i < 0 else kept[i].kind for i in index]
            found.append(Named(cls, kind))
        return self._found(trace, records, found, tuple(named))

    def _found(
        self, trace: Trace, records: list[PromptRecord], found: list[Named], clusters: tuple[Any, ...]
    ) -> Finding:
        values = [class_values(record, named) for record, named in zip(records, found, strict=True)]
        summary = summary_of(records, found, values, clusters)
        some = summary["share_sink"] > 0 or summary["share_dead"] > 0
        rows = [
            row
            for record, named in list(zip(records, found, strict=True))[: self.pictures]
            for row in self._rows(trace, record, named)
        ]
        shares = " / ".join(f"{100 * summary[f'share_{name}']:.0f}" for name in CLASSES) + " %"
        return self.finding(
            Status.FOUND if some else Status.NOT_FOUND,
            verdict(summary, self.recipe),
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=figures(records[: self.pictures], found, values),
            tiles=[Tile("Sink / dead / alive", shares, "of the visual tokens", link=self.name)],
            notes=notes(records, found, self.pictures, clusters, self.recipe),
        )

    def _rows(self, trace: Trace, record: PromptRecord, named: Named) -> list[dict[str, Any]]:
        norms, ids = record[sig.EMBEDDED_NORM], record[pic.LENS_ID][0, :, 0]
        received = class_values(record, named).received
        order = {SINK: 0, DEAD: 1, ALIVE: 2}
        rows = [
            {
                "prompt": record.index,
                "image": cell.image,
                "view": cell.view,
                "row": cell.row,
                "col": cell.col,
                "position": cell.position,
                "cls": CLASSES[int(named.cls[cell.place])],
                "kind": named.kind[cell.place] or None,
                "norm": float(norms[cell.position]),
                "share": float(received[cell.place]),
                "nearest": word(trace, int(ids[cell.place])),
            }
            for cell in cells_of(record)
        ]
        return sorted(rows, key=lambda row: (order[CLASSES.index(row["cls"])], row["position"]))
