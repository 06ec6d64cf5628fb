"""Causal verification: does the sink need what was found, and do the predictions need the sink?

A second look at a few prompts. Each intervention that matches a finding runs beside its controls, and everything is
compared within a prompt. The result is plain JSON for `trace.manifest["experiments"]["effects"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from sinklens.evaluation.paired import mean_interval
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
from .measured_effects import QUANTITIES, Measured, control_json, effect_json, left_json, mean_known

PROMPTS, TOKENS = 8, 256
BEHIND = 64
"""Queries looked at behind a sink that sits late in the prompt."""
LOGITS = 64_000_000
"""Logits of one batch that are kept for comparison."""
HEEDED = 1e-4
"""Attention that a blocked key may still get: masks are finite numbers in some families."""

Progress = Callable[[int, int], None]


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
        self.measured = {intervention: Measured() for intervention in self.interventions}
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

    def _decay(self, found: Measured, before: Seen, after: Seen) -> dict[str, float]:
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
        return {
            "d_sink": mean_known(lost.by_layer[layers]),
            "d_sink_of_means": mean_known(lost.of_means[layers]),
        }

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
                controls.append(control_json(control.what, found, draws))
        return {**head, **effect_json(found, self.base), "controls": controls, "remaining": left_json(found)}


def _touches(intervention: Intervention, prompt: int) -> bool:
    """Whether a prompt has what is changed: one without massive entries says nothing about their removal."""
    if isinstance(intervention, EntriesSet):
        return any(entry.prompt in (None, prompt) for entry in intervention.entries)
    if isinstance(intervention, MedianEntriesZeroed):
        return any(at == prompt for at, *_ in intervention.counts)
    return True


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
