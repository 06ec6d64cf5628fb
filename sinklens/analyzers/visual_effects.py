"""Visual effects: what happens to the answers when found visual tokens are taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sinklens.core.counts import counted, verb
from sinklens.core.figures import Estimate, Figure, Intervals, Tile
from sinklens.core.papers import VISUAL_SINKS
from sinklens.tracers.trace import Trace

from .base import Analyzer, Finding, Status, registry

HURTS, FREE, HELPS, OPEN = "needed", "free", "better without", "not told apart"
LESS = "needed less than others"


@registry.register("visual-effects")
@dataclass(frozen=True)
class VisualEffects(Analyzer):
    """What taking found visual tokens out does to the answers, beside as many random others of the same pictures.

    How it is computed: tokens that a finding names (visual sinks; sink and dead tokens; cells that show an object,
    where pictures have masks) are hidden from all other tokens in every layer, the others keep their positions. The
    same is done, four times with a seed, with as many visual tokens of the same picture that the finding does not
    name. On the tokens of the answer (without one, the text after the picture), given the true ones before them:
    change of the loss, change of the share of right tokens, KL from the unchanged prediction. Controls are averaged
    within a prompt; the difference is taken within a prompt and has a 95 % t interval over prompts. "free" are tokens
    without which the loss changes by less than `small` either way, "needed" ones raise it more than their controls, by
    `small` at least, "needed less than others" raise it, but less than the controls; the interval decides, not the
    mean.

    Compared with the paper: VAR cuts attention from the text to sinks and to as many random visual tokens and compares
    scores; EmbedLens takes tokens out of the prompt and scores benchmarks. Here they are taken out for all queries, and
    the loss is compared within a picture. VAR's published code has no such experiment, EmbedLens's draws its controls
    without a seed.

    When not to trust it: without answers in the prompts the text after the picture stands in for them, which most
    pictures say little about. Random tokens of a picture that is mostly background are mostly background: that tokens
    are no worse to lose than those does not make them special. Few prompts give wide intervals.

    Args:
        small: Change of the loss, in nats per token, that counts as none.
    """

    small: float = 0.01

    name = "visual-effects"
    title = "Visual tokens removed"
    place = 82
    of_pictures = True
    formula = (
        "<math "
        'display="block"><mi>Δ</mi><mo>=</mo><mo>(</mo><msub><mi>L</mi><mtext>without</mtext></msub><mo>-</mo><mi>L</mi><mo>)</mo>'
        "<mo>-</mo><mo>(</mo><msub><mi>L</mi><mtext>control</mtext></msub><mo>-</mo><mi>L</mi><mo>)</mo></math>"
    )
    needs = frozenset()
    summarises = ("base_loss", "base_right", "n_prompts", "draws", "seed", "sets")
    reference = VISUAL_SINKS.at("figure 3, sinks against random visual tokens; EmbedLens: arXiv 2603.00510")

    def analyze(self, trace: Trace) -> Finding:
        effects = (trace.manifest.get("experiments") or {}).get("visual_effects")
        if not effects:
            skipped = (trace.manifest.get("experiments_skipped") or {}).get("visual_effects")
            return self.not_applicable(skipped or "it was not run, add --verify.")
        rows = [self._row(item) for item in effects["sets"] if item["n_prompts"]]
        if not rows:
            return self.not_applicable("no picture has as many other visual tokens as were named.")
        whose = "answers" if effects.get("answered") else "texts after the pictures"
        order = {HURTS: 0, HELPS: 1, LESS: 2, OPEN: 3, FREE: 4}
        rows.sort(key=lambda row: order[row["verdict"]])
        told = [row for row in rows if row["verdict"] != OPEN]
        return self.finding(
            Status.FOUND if told else Status.NOT_FOUND,
            " ".join(_sentence(row, whose) for row in rows),
            rows=rows,
            summary={
                "base_loss": effects["base"]["loss"]["mean"],
                "base_right": effects["base"]["right"]["mean"],
                "n_prompts": effects["n_prompts"],
                "draws": effects["draws"],
                "seed": effects["seed"],
                "sets": len(rows),
            },
            units=UNITS,
            labels=LABELS,
            figures=[_figure(rows, effects, *text) for text in _DRAWN],
            tiles=[
                Tile(
                    "Removed",
                    f"{rows[0]['label']}: {rows[0]['verdict']}",
                    "against random others",
                    link=self.name,
                )
            ],
            notes=_notes(effects, rows),
        )

    def _row(self, item: dict[str, Any]) -> dict[str, Any]:
        difference, own = item["difference_loss"], item["loss"]
        return {
            "name": item["name"],
            "label": item["label"],
            "source": item["source"],
            "verdict": self._verdict(difference, own),
            "removed": item["removed"],
            "n_prompts": item["n_prompts"],
            **{f"loss_{key}": difference[key] for key in ("mean", "low", "high")},
            **{f"right_{key}": item["difference_right"][key] for key in ("mean", "low", "high")},
            **{f"kl_{key}": item["difference_kl"][key] for key in ("mean", "low", "high")},
            "own_loss": own["mean"],
            "own_loss_low": own["low"],
            "own_loss_high": own["high"],
            "control_loss": item["control_loss"]["mean"],
            "control_loss_low": item["control_loss"]["low"],
            "control_loss_high": item["control_loss"]["high"],
            "own_kl": item["kl"]["mean"],
            "control_kl": item["control_kl"]["mean"],
            "own_right": item["right"]["mean"],
            "control_right": item["control_right"]["mean"],
        }

    def _verdict(self, difference: dict[str, Any], own: dict[str, Any]) -> str:
        if own["low"] is None:
            return OPEN
        if own["high"] < -self.small and difference["high"] < 0:
            return HELPS
        if difference["low"] > self.small:
            return HURTS
        if -self.small <= own["low"] and own["high"] <= self.small:
            return FREE
        return LESS if difference["high"] < 0 else OPEN


UNITS = {
    "removed": "tokens per prompt",
    "loss_mean": "change of the loss beyond the controls', nats per token of the answer",
    "right_mean": "change of the share of right tokens beyond the controls'",
    "kl_mean": "KL from the unchanged prediction beyond the controls', nats per token",
    "own_loss": "change of the loss without them, nats per token",
    "control_loss": "change of the loss without random others, nats per token",
}
LABELS = {
    "label": "taken out",
    "source": "named by",
    "loss_mean": "loss beyond controls",
    "right_mean": "right beyond controls",
    "kl_mean": "KL beyond controls",
    "own_loss": "loss without them",
    "control_loss": "loss without others",
    "own_kl": "KL without them",
    "control_kl": "KL without others",
    "own_right": "right without them",
    "control_right": "right without others",
    "base_loss": "loss of the unchanged model",
    "base_right": "right tokens of the unchanged model",
}
_DRAWN = (
    (
        "own_loss",
        "control_loss",
        "loss",
        "Loss when visual tokens are taken out",
        "change of the loss (nats per token)",
    ),
    ("kl_mean", None, "kl", "Predictions beyond the controls", "KL beyond the controls' (nats per token)"),
)


def _interval(row: dict[str, Any], key: str) -> str:
    if row[f"{key}_low"] is None:
        return ""
    return f", 95 % interval {row[f'{key}_low']:+.3f} to {row[f'{key}_high']:+.3f}"


def _sentence(row: dict[str, Any], whose: str) -> str:
    many = f"{row['label']} ({row['removed']:.1f} per prompt)"
    against = f"{row['loss_mean']:+.3f} nats against as many random others{_interval(row, 'loss')}"
    if row["verdict"] == HURTS:
        return (
            f"The {whose} need the {many}: the loss rises by {row['own_loss']:.3f} without them, {against}."
        )
    if row["verdict"] == FREE:
        return f"The {many} can be taken out: the loss changes by {row['own_loss']:+.3f}, {against}."
    if row["verdict"] == LESS:
        return (
            f"The {whose} need the {many} less than random tokens: the loss changes by {row['own_loss']:+.3f} "
            "without them, "
            f"{against}."
        )
    if row["verdict"] == HELPS:
        return (
            f"The {whose} are better without the {many}: the loss falls by {-row['own_loss']:.3f}, {against}."
        )
    return f"Whether the {whose} need the {many} is open: {against}."


def _figure(
    rows: list[dict[str, Any]],
    effects: dict[str, Any],
    key: str,
    control: str | None,
    name: str,
    title: str,
    label: str,
) -> Figure:
    def number(row: dict[str, Any], field: str) -> float:
        value = row.get(field)
        return float("nan") if value is None else float(value)

    stem = key.removesuffix("_mean")
    estimates = tuple(
        Estimate(
            row["label"],
            number(row, key),
            number(row, f"{stem}_low"),
            number(row, f"{stem}_high"),
            *(
                (number(row, control), number(row, f"{control}_low"), number(row, f"{control}_high"))
                if control
                else ()
            ),
            note=row["verdict"] if control else "",
        )
        for row in rows
    )
    caption = (
        f"Mean over prompts with 95 % interval; hollow: as many random visual tokens of the same pictures, "
        f"{effects['draws']} draws."
    )
    return Intervals(name, title, caption, estimates, label)


def _notes(effects: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    few = [item for item in effects["sets"] if item["too_few"]]
    for item in few:
        notes.append(
            f"In {counted(item['too_few'], 'prompt')} there are fewer other visual tokens than {item['label']}, "
            "so they are "
            "left out."
        )
    if not effects.get("answered"):
        notes.append("No prompt has an answer: loss and KL are those of the text after the picture.")
    if effects["n_prompts"] < 5:
        notes.append(
            f"Only {counted(effects['n_prompts'], 'prompt')} {verb(effects['n_prompts'], 'was', 'were')} looked "
            "at; intervals are wide or missing."
        )
    if any(row["source"] == "masks" for row in rows):
        notes.append("Tokens that show an object are a check of the experiment: taking them out should hurt.")
    return notes
