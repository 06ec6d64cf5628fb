"""`sinklens mitigate --dry-run`: what would be put on, asked and measured, and its cost. No weights are loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sinklens.evaluation.running import BATCH_ITEMS, BATCH_TOKENS
from sinklens.evaluation.splits import refuse_overlap
from sinklens.mitigations import ExpertPruning, FakeQuantisation, MassiveActivations
from sinklens.mitigations.visual import VisualSinkMethod
from sinklens.models.opening import open_shell

from .estimates import seconds_for
from .judging import NEW_TOKENS, PROBES, ROUNDS, Assignment
from .mitigate_options import MitigateOptions
from .mitigate_setup import Job, assigned, is_run_folder, jobs, of_run, search_of
from .mitigation_found import fits, with_finders
from .plan import Prediction, plan_document, predict

if TYPE_CHECKING:
    from sinklens.inputs.spec import PromptSet
    from sinklens.models.opening import ModelDescription
    from sinklens.models.spec import OpenedModel

CALLS, TRACED = 150, 15
"""A block's time in a pass beside its multiplications, in calls of a small layer, and how many times as long it takes
while it is traced: about, as found on the bundled models."""


@dataclass(frozen=True)
class Cost:
    """Passes and tokens, and the seconds they take; None where the time is not predicted for the device."""

    passes: int = 0
    tokens: int = 0
    traced: int = 0
    """Of the passes, those that are traced."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.passes + other.passes, self.tokens + other.tokens, self.traced + other.traced)

    def times(self, count: int) -> Cost:
        return Cost(self.passes * count, self.tokens * count, self.traced * count)


@dataclass(frozen=True)
class Step:
    """What one mitigation takes.

    Attributes:
        calibration: Passes over the calibration items at most; 0 if nothing is calibrated.
        controls: Draws that are judged beside it, at most.
        open: What the run has to find first.
    """

    label: str
    method: str
    calibration: int
    controls: int
    open: str
    cost: Cost


@dataclass(frozen=True)
class MitigationPlan:
    """A mitigate run before it is made.

    Attributes:
        profile: Prediction of the profile of the unchanged model, whose memory is that of the whole run but for what
            `working` and `weights` add: logits of the tasks, and a second copy of what is quantised.
        tasks: `name, kind, items` (reported), `tokens` (of one round).
        calibration: `task, items, tokens`; None if nothing is calibrated.
        before: The profile and the tasks of the unchanged model.
        token, call: Seconds of a token's multiplications and of a small call, measured here; None for other devices.
    """

    described: ModelDescription
    prompts: PromptSet
    profile: Prediction
    tasks: list[dict[str, Any]]
    calibration: dict[str, Any] | None
    before: Cost
    steps: list[Step]
    token: float | None
    call: float | None

    @property
    def total(self) -> Cost:
        return sum((step.cost for step in self.steps), self.before)

    def seconds(self, cost: Cost) -> float | None:
        """Roughly; None for a device that is not here."""
        if self.token is None or self.call is None:
            return None
        blocks = self.described.info.layers
        calls = (cost.passes + (TRACED - 1) * cost.traced) * blocks * CALLS
        return cost.tokens * self.token + calls * self.call

    def document(self) -> dict[str, Any]:
        """The plan as one JSON document; `prediction` is that of the whole run."""
        found = plan_document(self.described, self.prompts, self.profile)
        found["prediction"] |= {"seconds": self.seconds(self.total), **asdict(self.total)}
        found["tasks"], found["calibration"] = self.tasks, self.calibration
        found["unchanged"] = self._told(self.before)
        found["mitigations"] = [
            {key: value for key, value in asdict(step).items() if key != "cost"} | self._told(step.cost)
            for step in self.steps
        ]
        return found

    def _told(self, cost: Cost) -> dict[str, Any]:
        return {**asdict(cost), "seconds": self.seconds(cost)}


def plan_mitigation(model: str | None, options: MitigateOptions) -> MitigationPlan:
    """What a mitigate run of a model by name would do.

    Raises:
        SinklensError: What the run itself would refuse: unknown methods, tasks, heads, or splits that overlap.
    """
    if is_run_folder(model):
        model, options = of_run(model, options)
    options = with_finders(options, jobs(options))
    # Mitigations are judged on a model in memory, whatever a profile of it would do.
    profile, wanted = replace(options.profile, stream="off"), jobs(options)
    described, prompts, predicted = predict(model, profile)
    shell = open_shell(
        model, revision=profile.revision, dtype=profile.dtype, trust_remote_code=profile.trust_remote_code
    )
    for job in wanted:
        if isinstance(job.method, FakeQuantisation):  # its weights are not here to be rounded
            job.method.check(shell.anatomy.main)
        elif not wants_dims(job):
            fits(job.method, shell)
    task, given, chosen_on = assigned(shell, options, any(job.calibrate for job in wanted))
    for job in wanted:
        if job.recipe is not None:
            for one in given:
                refuse_overlap(job.recipe.calibration.get("items") or (), one.split)
    tasks = [_task(one, shell) for one in given]
    calibration = None
    if task is not None and chosen_on is not None:
        tokens = task.tokens(shell, chosen_on.items)
        calibration = {"task": task.name, "items": len(chosen_on), "tokens": tokens}
    once = _round(sum(row["items"] for row in tasks), sum(row["tokens"] for row in tasks))
    traced = Cost(predicted.batches, prompts.description["n_tokens"], predicted.batches)
    steps = [_step(job, options, shell, once, traced, _probing(given, shell), calibration) for job in wanted]
    predicted = replace(
        predicted,
        experiments={},
        weights=predicted.weights
        * (2 if any(isinstance(job.method, FakeQuantisation) for job in wanted) else 1),
        working=max(predicted.working, BATCH_TOKENS * described.info.vocab_size * 4 * 2),
        disk=predicted.disk * (1 + len(wanted)),
    )
    here = profile.device in (None, "cpu")
    token, call = (seconds_for(described, 10**6) / 10**6, call_seconds()) if here else (None, None)
    return MitigationPlan(
        described, prompts, predicted, tasks, calibration, once + traced, steps, token, call
    )


def wants_dims(job: Job) -> bool:
    """Whether the run has to look for sink dims first."""
    return isinstance(job.method, VisualSinkMethod) and job.method.dims is None


def _task(one: Assignment, shell: OpenedModel) -> dict[str, Any]:
    tokens = one.task.tokens(shell, one.split.items)
    return {"name": one.task.name, "kind": one.task.kind, "items": len(one.split), "tokens": tokens}


def _round(items: int, tokens: int) -> Cost:
    """One round of asking: batches are full by items or by tokens."""
    return Cost(max(math.ceil(items / BATCH_ITEMS), math.ceil(tokens / BATCH_TOKENS)), tokens)


def _probing(given: Iterable[Assignment], shell: OpenedModel) -> list[int]:
    """Lengths of the contexts on which predictions are compared."""
    questions = [q for one in given for q in one.task.probes(shell, one.split.items[:PROBES])]
    return [len(question.context) for question in questions[:PROBES]]


def _step(
    job: Job,
    options: MitigateOptions,
    shell: OpenedModel,
    once: Cost,
    traced: Cost,
    probes: list[int],
    calibration: dict[str, Any] | None,
) -> Step:
    cost = once + traced
    passes = 0
    if job.calibrate and calibration is not None:
        passes = search_of(job.method, options).passes(job.method, shell.anatomy.main)
        cost += _round(calibration["items"], calibration["tokens"]).times(passes)
    if isinstance(job.method, MassiveActivations) and not job.method.means:
        cost += Cost(traced.passes, traced.tokens)
    draws = _draws(job, options)
    cost += (once + traced).times(draws)
    cost += Cost(2 * len(probes), 2 * sum(probes))
    timed = 2 * (ROUNDS + 1)
    cost += Cost(timed * (1 + NEW_TOKENS), timed * (max(probes, default=0) + NEW_TOKENS))
    wants = "sink dims" if wants_dims(job) else job.method.wants
    return Step(job.label, job.method.name, passes, draws, wants, cost)


def _draws(job: Job, options: MitigateOptions) -> int:
    method = job.method
    if options.controls < 1:
        return 0
    if isinstance(method, ExpertPruning) and (method.pairs or method.wants):
        return 2 * options.controls
    if isinstance(method, FakeQuantisation) and (method.protects or method.wants):
        return options.controls
    return int(isinstance(method, MassiveActivations) and not method.control)


def call_seconds() -> float:
    """Time of one call of a small layer on this machine, the median of a few runs."""
    import torch

    layer, state, taken = torch.nn.Linear(8, 8), torch.randn(1, 8), []
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(200):
                layer(state)
            taken.append((time.perf_counter() - start) / 200)
    return sorted(taken)[2]
