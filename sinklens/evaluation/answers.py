"""How well a model says the answer of a prompt, with and without a change: one prompt at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.core.errors import ModelError
from sinklens.inputs.cutting import cut_prompt
from sinklens.inputs.spans import Kind
from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel
from sinklens.tracers.batch import Batch, collate, forward
from sinklens.tracers.interventions import Intervention

from .predictions import divergence


def answer_positions(prompt: Prompt) -> Int[np.ndarray, " answer"]:
    """Positions of the answer's tokens; without an answer, of all text after the first picture.

    The first token of a prompt is predicted by none and is never among them.
    """
    if prompt.visual is None:
        return np.arange(1, len(prompt))
    spans = prompt.visual.spans
    answer = spans.is_(Kind.GENERATED)
    if not answer.any():
        answer = spans.is_(Kind.QUESTION)
        answer[: int(spans.visual.argmax())] = False
    found = answer.nonzero()[0]
    return found[found > 0]


def has_answer(prompt: Prompt) -> bool:
    """Whether a prompt with pictures goes on to its answer."""
    return prompt.visual is not None and bool(prompt.visual.spans.is_(Kind.GENERATED).any())


def sees_answer(opened: OpenedModel, prompt: Prompt) -> bool:
    """Whether the prediction of an answer's first token depends on the answer itself: a text that is read both ways.

    So it is in models that read a whole prompt as a prefix (PaliGemma); a loss of such an answer says nothing.
    """
    before = int(answer_positions(prompt)[0])
    device = next(opened.module.parameters()).device
    rows = []
    for part in (prompt, cut_prompt(prompt, before)):
        logits = forward(opened.module, collate([part], device=device)).logits
        rows.append(logits[0, before - 1].float())
    return float((rows[0] - rows[1]).norm()) > 1e-2 * float(rows[1].norm())


@dataclass(frozen=True)
class Answered:
    """The predictions of an answer's tokens, each given the true ones before it.

    Attributes:
        logits: One row per token of the answer.
        wanted: The answer's ids.
    """

    logits: Float[Tensor, "answer vocab"]
    wanted: Int[Tensor, " answer"]

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return float(torch.nn.functional.cross_entropy(self.logits.double(), self.wanted))

    @property
    def right(self) -> float:
        """Share of the tokens that are the most likely ones."""
        return float((self.logits.argmax(-1) == self.wanted).double().mean())

    @property
    def probability(self) -> float:
        """Mean probability of the tokens."""
        rows = torch.softmax(self.logits.double(), -1)
        return float(rows.gather(1, self.wanted[:, None]).mean())

    def kl_from(self, base: Answered) -> float:
        """KL(base || this), mean over the tokens, in nats."""
        return divergence(base.logits, self.logits)

    def agrees_with(self, base: Answered) -> bool:
        """Whether every most likely token is the same."""
        return bool((self.logits.argmax(-1) == base.logits.argmax(-1)).all())


class Answers:
    """Runs one prompt again and again, changed and unchanged."""

    def __init__(self, opened: OpenedModel, prompt: Prompt) -> None:
        self.opened, self.prompt = opened, prompt
        device = next(opened.module.parameters()).device
        self.batch = collate([prompt], device=device)
        places = answer_positions(prompt)
        first = int(places[0]) - 1 if len(places) else 0
        keep = len(prompt) - first
        self._rows = torch.from_numpy(places - 1 - first)
        self._wanted = self.batch.inputs["input_ids"][0, torch.from_numpy(places)].cpu()
        if "logits_to_keep" in _accepted(opened):
            self.batch = Batch(
                {**self.batch.inputs, "logits_to_keep": keep}, self.batch.valid, self.batch.prompts
            )

    def __bool__(self) -> bool:
        return len(self._rows) > 0

    def under(self, change: Intervention | None = None) -> Answered:
        """One pass.

        Raises:
            ModelError: The model has no language head, or no place for the change.
        """
        if change is None:
            return self._pass()
        with change.applied(self.opened, self.batch):
            return self._pass()

    def _pass(self) -> Answered:
        logits = getattr(forward(self.opened.module, self.batch), "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ModelError("The model has no language head, so it gives no answers.")
        keep = self.batch.inputs.get("logits_to_keep", len(self.prompt))
        return Answered(logits[0, -keep:][self._rows.to(logits.device)].float().cpu(), self._wanted)


def _accepted(opened: OpenedModel) -> set[str]:
    import inspect

    return set(inspect.signature(opened.module.forward).parameters)
