"""Tokens taken out of prompts, against as many others of the same pictures: does the answer need them?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel
from sinklens.tracers.chosen import Chosen
from sinklens.tracers.interventions import Intervention
from sinklens.tracers.visual_interventions import TokensRemoved

from .answers import Answered, Answers, has_answer
from .paired import mean_interval, paired_difference

DRAWS = 4
QUANTITIES = ("loss", "right", "kl")
Positions = Mapping[int, Sequence[int]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenSet:
    """Visual tokens of each prompt that are taken out together.

    Attributes:
        positions: By `Prompt.index`.
        source: Which finding named them, or what they are.
        among: Tokens that controls are drawn from, by prompt; None for all other visual tokens.
    """

    name: str
    label: str
    positions: Positions
    source: str = ""
    among: Positions | None = None


@dataclass
class _Measured:
    """One entry per prompt that has tokens of the set and enough others."""

    prompts: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    mine: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    control: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    too_few: int = 0


def removal_effects(
    opened: OpenedModel,
    prompts: Sequence[Prompt],
    sets: Sequence[TokenSet],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Take each set out, then as many random visual tokens of the same pictures, `draws` times.

    Others keep their positions. What is compared are the answers (`evaluation.answers`): changes of the loss and of the
    share of right tokens, and KL from the unchanged model. Controls are averaged within a prompt, differences taken
    within a prompt, and intervals over prompts. They come from the pictures the tokens are from, in equal numbers.

    Returns:
        Plain JSON: `base` (loss and right of the unchanged model), `sets`, `draws`, `seed`, `n_prompts`, and
        `answered`, how many prompts have an answer.
    """
    measured = {item.name: _Measured() for item in sets}
    base: dict[str, list[float]] = {"loss": [], "right": []}
    for done, prompt in enumerate(prompts, 1):
        answers = Answers(opened, prompt)
        if answers:
            usual = answers.under()
            base["loss"].append(usual.loss)
            base["right"].append(usual.right)
            for item in sets:
                _measure(item, prompt, answers, usual, measured[item.name], draws, seed)
        if progress:
            progress(done, len(prompts))
    return {
        "base": {name: mean_interval(np.array(values)).to_json() for name, values in base.items()},
        "sets": [_json(item, measured[item.name]) for item in sets],
        "draws": draws,
        "seed": seed,
        "n_prompts": len(base["loss"]),
        "answered": sum(has_answer(prompt) for prompt in prompts),
        "interval": "95 % t interval over prompts, paired",
    }


def planned_passes(prompts: Sequence[Prompt], sets: Sequence[TokenSet], draws: int = DRAWS) -> int:
    """Forward passes that `removal_effects` makes."""
    return len(prompts) + sum(
        (1 + draws) * len(set(item.positions) & {p.index for p in prompts}) for item in sets
    )


def _measure(
    item: TokenSet, prompt: Prompt, answers: Answers, usual: Answered, into: _Measured, draws: int, seed: int
) -> None:
    mine = sorted({int(at) for at in item.positions.get(prompt.index, ())})
    if not mine:
        return
    drawn = list(random_others(prompt, mine, item.among, draws, seed))
    if not drawn:
        into.too_few += 1
        return
    into.prompts.append(prompt.index)
    into.removed.append(len(mine))
    for name, value in _changes(answers, usual, _without(prompt, mine)).items():
        into.mine[name].append(value)
    each = [_changes(answers, usual, _without(prompt, places)) for places in drawn]
    for name in QUANTITIES:
        into.control[name].append(float(np.mean([values[name] for values in each])))


def _without(prompt: Prompt, places: Iterable[int]) -> Intervention:
    return TokensRemoved(Chosen.at({prompt.index: places}))


def _changes(answers: Answers, usual: Answered, change: Intervention) -> dict[str, float]:
    found = answers.under(change)
    return {"loss": found.loss - usual.loss, "right": found.right - usual.right, "kl": found.kl_from(usual)}


def random_others(
    prompt: Prompt, mine: Sequence[int], among: Positions | None, draws: int, seed: int
) -> Iterator[Int[np.ndarray, " token"]]:
    """As many other visual tokens of each picture as `mine` has there; none where a picture has too few.

    The draws depend on the seed, the prompt and how many are drawn, so sets of equal size share their controls where
    they share their pool.
    """
    assert prompt.visual is not None
    spans = prompt.visual.spans
    pools: list[tuple[np.ndarray, int]] = []
    allowed = None if among is None else set(map(int, among.get(prompt.index, ())))
    placed = 0
    for picture in range(len(spans.pictures)):
        cells = {int(at) for grid in spans.of_picture(picture) for at in grid.positions.ravel() if at >= 0}
        here = len(cells & set(mine))
        pool = sorted(at for at in cells - set(mine) if allowed is None or at in allowed)
        if here > len(pool):
            return
        placed += here
        pools.append((np.array(pool), here))
    if placed < len(mine):
        return
    for draw in range(draws):
        rng = np.random.default_rng((seed, prompt.index, len(mine), draw))
        yield np.sort(np.concatenate([rng.choice(pool, size=n, replace=False) for pool, n in pools if n]))


def _json(item: TokenSet, found: _Measured) -> dict[str, Any]:
    out: dict[str, Any] = {
        "name": item.name,
        "label": item.label,
        "source": item.source,
        "n_prompts": len(found.prompts),
        "prompts": found.prompts,
        "removed": float(np.mean(found.removed)) if found.removed else 0.0,
        "too_few": found.too_few,
    }
    for name in QUANTITIES:
        mine, control = np.array(found.mine[name]), np.array(found.control[name])
        out[name] = mean_interval(mine).to_json()
        out[f"control_{name}"] = mean_interval(control).to_json()
        out[f"difference_{name}"] = paired_difference(mine, control).to_json()
    return out
