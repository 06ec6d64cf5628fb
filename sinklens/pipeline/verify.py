"""Causal verification: does the sink need what was found, and do the predictions need the sink?

A second look at a few prompts. Each intervention that matches a finding runs beside its controls, and everything is
compared within a prompt. The result is plain JSON for `trace.manifest["experiments"]["effects"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sinklens.analyzers import PrimarySinks
from sinklens.analyzers.base import Finding
from sinklens.analyzers.evidence import uniform_received
from sinklens.core.errors import ModelError, ResourceError
from sinklens.evaluation.effects import (
    Look,
    Seen,
    decay,
    look,
    output_change,
    predictions_change,
    remains,
    share,
    share_of_later,
)
from sinklens.evaluation.paired import mean_interval, paired_difference
from sinklens.evaluation.predictions import next_token_loss
from sinklens.inputs.cutting import cut_prompt
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.models.spec import OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers.batch import collate
from sinklens.tracers.blocked_key import KeyBlocked
from sinklens.tracers.executor import TracePlan, partition
from sinklens.tracers.interventions import EntriesSet, Intervention, MedianEntriesZeroed
from sinklens.tracers.trace import Trace

from .matched import Experiment, Matched, match, sink_position

PROMPTS, TOKENS = 8, 256
BEHIND = 64
"""Queries looked at behind a sink that sits late in the prompt."""
LOGITS = 64_000_000
"""Logits of one batch that are kept for comparison."""
HEEDED = 1e-4
"""Attention that a blocked key may still get: masks are finite numbers in some families."""
QUANTITIES = ("sink_share", "sink_rate", "sink_lost", "d_sink", "d_sink_of_means", "kl", "loss_change")

Progress = Callable[[int, int], None]
Values = dict[str, np.ndarray]


def verify(
    opened: OpenedModel,
    prompts: PromptSet | Sequence[Prompt],
    plan: TracePlan,
    trace: Trace,
    findings: Mapping[str, Finding],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the interventions that match the findings, on a few prompts cut to 256 tokens.

    Args:
        plan: How the run traced; attention is measured the same way here.
        trace: The run's trace; it says which experts had tokens and what massive entries are worth on average.
        findings: By analyzer name.
        progress: Called with (passes done, passes in all).

    Returns:
        Plain JSON; see docs of `causal-effects` for what the quantities mean. `experiments` is empty, with a
        `reason`, where nothing was found that could be removed or no prompt is long enough.
    """
    position = sink_position(findings) if sig.ATTENTION_RECEIVED in trace.signals else None
    few = cut(prompts, position)
    if not few:
        return _nothing(f"no prompt is long enough to see position {position} from later queries")
    matched = match(opened, few, trace, findings, seed=seed)
    if not matched.experiments:
        return _nothing("nothing was found that could be taken away")
    runner = _Runner(opened, few, plan, matched, progress)
    runner.run()
    return {
        "position": matched.position,
        "token": _token(few, matched.position),
        "sink_found": matched.sink_found,
        "sink_layers": list(matched.sink_layers),
        "epsilon": PrimarySinks().epsilon,
        "prompts": [prompt.index for prompt in few],
        "n_prompts": len(few),
        "tokens": max(len(prompt) for prompt in few),
        "seed": seed,
        "interval": "95 % t interval over prompts, paired",
        "watched": None
        if matched.watched is None
        else {"position": matched.watched[0], "dims": list(matched.watched[1])},
        "calibration": matched.calibration,
        "base": runner.base_json(),
        "experiments": [runner.experiment_json(experiment) for experiment in matched.experiments],
        "skipped": [*matched.skipped, *runner.failed.values()],
    }


def planned_passes(
    opened: OpenedModel,
    prompts: PromptSet | Sequence[Prompt],
    trace: Trace,
    findings: Mapping[str, Finding],
    *,
    seed: int = 0,
) -> tuple[int, int]:
    """Forward passes that `verify` would make over all its prompts, and the tokens of one such pass."""
    few = cut(prompts, sink_position(findings))
    if not few:
        return 0, 0
    matched = match(opened, few, trace, findings, seed=seed)
    return len(_interventions(matched)) + bool(matched.experiments), sum(map(len, few))


def cut(prompts: PromptSet | Sequence[Prompt], position: int | None) -> list[Prompt]:
    """The first few prompts in which queries follow the sink, cut so that enough of them do."""
    everything = prompts.prompts if isinstance(prompts, PromptSet) else prompts
    needed = (position or 0) + 2
    length = max(TOKENS, (position or 0) + BEHIND)
    few = [prompt for prompt in everything if len(prompt) >= needed][:PROMPTS]
    return [cut_prompt(prompt, length) for prompt in few]


def _nothing(reason: str) -> dict[str, Any]:
    return {"experiments": [], "reason": reason}


def _interventions(matched: Matched) -> list[Intervention]:
    """Every intervention and control draw once: experiments share controls."""
    found: dict[Intervention, None] = {}
    for experiment in matched.experiments:
        found[experiment.intervention] = None
        for control in experiment.controls:
            found.update(dict.fromkeys(control.draws))
    return list(found)


@dataclass
class _Measured:
    """What one intervention did, one entry per prompt in every list; NaN for prompts that lack what is changed."""

    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    by_layer: list[np.ndarray] = field(default_factory=list)
    left: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    faint: int = 0
    edited: int = 0
    largest: float = 0.0
    output: float = 0.0

    def array(self, name: str) -> np.ndarray:
        return np.array(self.values[name], dtype=np.float64)


class _Runner:
    """Runs the passes batch by batch: the unchanged one first, then every intervention against it."""

    def __init__(
        self,
        opened: OpenedModel,
        prompts: Sequence[Prompt],
        plan: TracePlan,
        matched: Matched,
        progress: Progress | None,
    ) -> None:
        self.opened, self.prompts, self.matched, self.progress = opened, prompts, matched, progress
        watched = () if matched.watched is None else (matched.watched[0],)
        self.look = Look.at(matched.position, watched, plan)
        self.interventions = _interventions(matched)
        self.measured = {intervention: _Measured() for intervention in self.interventions}
        self.behind = {e.intervention: e.after_block for e in matched.experiments}
        self.failed: dict[Intervention, str] = {}
        self.base: dict[str, list[float]] = {
            name: [] for name in ("sink_share", "sink_rate", "uniform", "loss")
        }

    def run(self) -> None:
        batches = self._batches()
        done, total = 0, len(batches) * (len(self.interventions) + 1)
        for group in batches:
            try:
                for _ in self._batch(group):
                    done += 1
                    if self.progress:
                        self.progress(done, total)
            except (torch.OutOfMemoryError, MemoryError) as error:
                longest = max(len(prompt) for prompt in group)
                raise ResourceError(
                    f"Out of memory while causes were taken away, in a batch of {len(group)} x {longest} tokens.",
                    detail="The run itself was traced.",
                    hint="Leave this out with --no-verify, or cut the prompts with --seq-len.",
                ) from error

    def _batches(self) -> list[list[Prompt]]:
        module: Any = self.opened.module
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        vocabulary = int(head.weight.shape[0]) if head is not None and hasattr(head, "weight") else 1
        return partition(self.prompts, most=PROMPTS, tokens=max(1, min(4096, LOGITS // vocabulary)))

    def _batch(self, group: list[Prompt]) -> Any:
        device = next(self.opened.module.parameters()).device
        pad = getattr(self.opened.tokenizer, "pad_token_id", None) or 0
        batch = collate(group, pad_id=pad, device=device)
        base, _ = look(self.opened, batch, self.look)
        for seen in base:
            self._note_base(seen)
        yield
        for intervention in self.interventions:
            if intervention not in self.failed:
                try:
                    seen, acted = look(self.opened, batch, self.look, intervention)
                    self._check(intervention, base, seen)
                except ModelError as error:
                    self.failed[intervention] = f"{_said(self.matched, intervention)}: {error.what}"
                else:
                    self._note(intervention, base, seen, acted)
            yield

    def _check(self, intervention: Intervention, base: list[Seen], seen: list[Seen]) -> None:
        """A blocked key must get nothing from other queries; a family that does not heed the mask is found out."""
        at = self.matched.position
        if at is None or not isinstance(intervention, KeyBlocked) or intervention.position != at:
            return
        for before, after in zip(base, seen, strict=True):
            left = share_of_later(after, before, at)
            if left is not None and np.nanmax(left, initial=0.0) > HEEDED:
                raise ModelError("The model's attention does not heed a mask that hides this key.")

    def _note_base(self, seen: Seen) -> None:
        loss = float("nan")
        if seen.logits is not None and self.opened.anatomy.main.causal:
            loss = next_token_loss(seen.logits, seen.ids)
        self.base["loss"].append(loss)
        received, rate = self._strength(seen, seen)
        self.base["sink_share"].append(received)
        self.base["sink_rate"].append(rate)
        self.base["uniform"].append(self._uniform(seen))

    def _strength(self, seen: Seen, base: Seen) -> tuple[float, float]:
        """Share of the sink, and its sink rate in percent."""
        at = self.matched.position
        alpha = None if at is None else share(seen, base, at)
        if alpha is None or np.isnan(alpha).all():
            return float("nan"), float("nan")
        known = alpha[~np.isnan(alpha)]
        return float(known.mean()), float(100 * (known > PrimarySinks().epsilon).mean())

    def _uniform(self, seen: Seen) -> float:
        if seen.visible is None or self.matched.position is None:
            return float("nan")
        return float(uniform_received(seen.visible)[self.matched.position])

    def _note(self, intervention: Intervention, base: list[Seen], edited: list[Seen], acted: Any) -> None:
        found = self.measured[intervention]
        found.edited += acted.edited
        found.largest = max(found.largest, acted.largest)
        for before, after in zip(base, edited, strict=True):
            if not _touches(intervention, before.index):
                for name in QUANTITIES:
                    found.values[name].append(float("nan"))
                continue
            found.output = max(found.output, output_change(before, after))
            received, rate = self._strength(after, before)
            was = self._strength(before, before)[0]
            excess = was - self._uniform(before)
            row = {
                "sink_share": received,
                "sink_rate": rate,
                # Chance lifts some position a little above even attention; only a sink can be lost.
                "sink_lost": (was - received) / excess
                if self.matched.sink_found and excess > 0
                else float("nan"),
                **predictions_change(before, after, causal=self.opened.anatomy.main.causal),
                **self._decay(found, before, after),
            }
            for name in QUANTITIES:
                found.values[name].append(row[name])
            self._note_left(intervention, before, after)

    def _decay(self, found: _Measured, before: Seen, after: Seen) -> dict[str, float]:
        at = self.matched.position
        p = None if at is None or not self.matched.sink_found else share_of_later(before, before, at)
        if at is None or p is None:
            return {"d_sink": float("nan"), "d_sink_of_means": float("nan")}
        later = share_of_later(after, before, at)
        assert later is not None
        lost = decay(p, later)
        found.by_layer.append(lost.by_layer)
        found.faint += lost.faint
        layers = list(self.matched.sink_layers) or list(range(len(p)))
        return {"d_sink": _mean(lost.by_layer[layers]), "d_sink_of_means": _mean(lost.of_means[layers])}

    def _note_left(self, intervention: Intervention, before: Seen, after: Seen) -> None:
        layer = self.behind.get(intervention)
        if layer is None or self.matched.watched is None:
            return
        position, dims = self.matched.watched
        if position in before.states and position in after.states:
            left = remains(before.states[position], after.states[position], dims, layer)
            self.measured[intervention].left.setdefault(layer, []).append(left)

    def base_json(self) -> dict[str, Any]:
        return {name: mean_interval(np.array(values)).to_json() for name, values in self.base.items()}

    def experiment_json(self, experiment: Experiment) -> dict[str, Any]:
        """One experiment with its controls; an experiment the model has no place for says so."""
        head = {
            "name": experiment.name,
            "kind": experiment.kind,
            "what": experiment.what,
            "target": experiment.target,
        }
        if experiment.intervention in self.failed:
            return {**head, "failed": self.failed[experiment.intervention]}
        found = self.measured[experiment.intervention]
        controls = []
        for control in experiment.controls:
            draws = [self.measured[draw] for draw in control.draws if draw not in self.failed]
            if draws:
                controls.append(self._control_json(control.what, found, draws))
        return {**head, **self._effect_json(found), "controls": controls, "remaining": _left_json(found)}

    def _effect_json(self, found: _Measured) -> dict[str, Any]:
        by_layer = np.array(found.by_layer)
        return {
            "acted": {"edited": found.edited, "largest_change": found.largest, "output_change": found.output},
            "effect": {name: mean_interval(found.array(name)).to_json() for name in QUANTITIES},
            "change": {
                name: paired_difference(found.array(name), np.array(self.base[name])).to_json()
                for name in ("sink_share", "sink_rate")
            },
            "d_sink_by_layer": [_plain(_mean(column)) for column in by_layer.T] if by_layer.size else [],
            "faint_heads": found.faint,
        }

    def _control_json(self, what: str, found: _Measured, draws: list[_Measured]) -> dict[str, Any]:
        pooled: Values = {name: np.mean([draw.array(name) for draw in draws], axis=0) for name in QUANTITIES}
        return {
            "what": what,
            "draws": len(draws),
            "edited": sum(draw.edited for draw in draws),
            "output_change": max(draw.output for draw in draws),
            "effect": {name: mean_interval(pooled[name]).to_json() for name in QUANTITIES},
            # Within each prompt: what the intervention does beyond its control.
            "beyond": {
                name: paired_difference(found.array(name), pooled[name]).to_json() for name in QUANTITIES
            },
        }


def _touches(intervention: Intervention, prompt: int) -> bool:
    """Whether a prompt has what is changed: one without massive entries says nothing about their removal."""
    if isinstance(intervention, EntriesSet):
        return any(entry.prompt in (None, prompt) for entry in intervention.entries)
    if isinstance(intervention, MedianEntriesZeroed):
        return any(at == prompt for at, *_ in intervention.counts)
    return True


def _left_json(found: _Measured) -> dict[str, Any] | None:
    """What is left of the massive entries behind the change, mean over prompts."""
    if not found.left:
        return None
    (layer, rows), *_ = found.left.items()
    return {
        "behind_block": layer,
        **{name: _plain(_mean(np.array([row[name] for row in rows]))) for name in rows[0]},
    }


def _said(matched: Matched, intervention: Intervention) -> str:
    for experiment in matched.experiments:
        if experiment.intervention == intervention:
            return experiment.what
        for control in experiment.controls:
            if intervention in control.draws:
                return control.what
    return "an intervention"


def _token(prompts: Sequence[Prompt], position: int | None) -> str | None:
    return None if position is None else prompts[0].pieces[position]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value
