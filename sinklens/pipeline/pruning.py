"""What visual tokens a pruner takes away cost, beside as many random ones, and whether knowing the sinks helps it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from sinklens.analyzers.pictured import text_received, visual_positions
from sinklens.analyzers.visual import decided
from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.evaluation.answers import Answered, Answers, answer_positions, has_answer, sees_answer
from sinklens.evaluation.metrics import Metric
from sinklens.evaluation.paired import mean_interval
from sinklens.evaluation.pruners import USUAL, FastV, Pruner, Read
from sinklens.evaluation.statistics import Comparison, compare_paired, holm
from sinklens.evaluation.token_ranking import kept_count, padding_shares
from sinklens.inputs.cutting import cut_prompt
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.models.spec import OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.calibrate_dims import search_sink_dims
from sinklens.tracers.chosen import Chosen
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.sink_dims import SinkDims, SinkRule
from sinklens.tracers.states import input_tap
from sinklens.tracers.visual_interventions import VisualExit

KEEPS = (0.25, 0.5, 0.75)
DRAWS = 4
SEARCHED = 8
"""Prompts that sink dims are searched on."""
QUANTITIES = ("loss", "right", "kl")
RANDOM = "random tokens"
LOSS = Metric("loss", "loss of the answer", "nats per token", "loss", better=-1, role="primary")
READ = frozenset({pic.QUERIES_RECEIVED, pic.QUERIES_VISIBLE, sig.PHI, sig.INPUT_TYPICAL, sig.INPUT_LARGE})
Progress = Callable[[int, int], None]
Sinks = SinkRule | SinkDims | Collection[int] | None


def pruning_probe(
    opened: OpenedModel,
    prompts: PromptSet | Sequence[Prompt],
    pruners: Sequence[Pruner] = USUAL,
    *,
    keeps: Sequence[float] = KEEPS,
    calibration: Sequence[Prompt] | float = 0.4,
    sinks: Sinks | str = "search",
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer prompts with pictures after each pruner has taken its tokens away, and after as many random ones are gone.

    Pruners choose while the question is read and see nothing of the answer. Tokens that stay keep their positions.
    What is compared are the answers (`evaluation.answers`), within a prompt: with random tokens of the same number that
    leave at the same layer (averaged over `draws`), and, for a pruner that knows of sinks or corrects its ranking, with
    the same pruner with one correction less, and with none, as far as these are asked for too.

    Args:
        prompts: With pictures, a question behind them, and then the known answer; others are left out.
        keeps: Shares of the visual tokens that stay.
        calibration: Prompts that rankings are fitted on, or the share of `prompts` that is set aside for it.
        sinks: What makes a visual token a sink: `search` looks for sink dims on the calibration prompts; None leaves it
            unknown.
        draws: Random controls.

    Returns:
        Plain JSON: `verdict` (a sentence), `base` (loss and right of the unpruned model), `rows` (per pruner and share:
        `kept` tokens, changes of `loss`, `right` and `kl` with intervals, the same of random tokens, and `versus`, by
        what it is compared with, interval, p value and verdict on the loss), `fits` of corrected rankings, `sinks`,
        `skipped` pruners with their reasons, and the settings.

    Raises:
        DataError: Too few prompts have a picture, a question and an answer, or the two parts overlap.
        UsageError: A share that is none, the same pruner twice, or a layer that the model does not have.
        ModelError: The model sees the answer before it gives it.
    """
    simpler = {pruner.label: pruner.simpler for pruner in pruners}
    probe = _Probe(opened, {pruner.label: pruner for pruner in pruners}, tuple(keeps), draws, seed, simpler)
    probe.check(len(pruners))
    first, later = _parts(prompts, calibration, seed)
    if sees_answer(opened, later[0]):
        raise ModelError(
            f"{type(opened.module).__name__} reads its text both ways, so it sees the answer before it gives it.",
            detail="The loss of an answer that is a part of the prompt means nothing there.",
        )
    rule, why = _rule(opened, first, sinks)
    read = {prompt.index: one for prompt, one in zip(later, reads(opened, later, rule), strict=True)}
    probe.pruners, fits, skipped = _calibrated(pruners, reads(opened, first, rule), list(read.values()))
    for done, prompt in enumerate(later, 1):
        probe.ask(prompt, read[prompt.index])
        if progress:
            progress(done, len(later))
    rows = _rows(probe)
    return {
        "verdict": _sentence(rows),
        "base": {name: mean_interval(np.array(values)).to_json() for name, values in probe.base.items()},
        "rows": rows,
        "fits": fits,
        "skipped": skipped,
        "sinks": _described(rule, why, list(read.values())),
        "n_prompts": len(later),
        "n_calibration": len(first),
        "keeps": list(keeps),
        "draws": draws,
        "seed": seed,
        "statistics": "differences within a prompt; intervals and p as of evaluation.statistics, p after Holm over all "
        "verdicts of the probe",
    }


@dataclass
class _Cell:
    """What one pruner at one share did, an entry per prompt."""

    kept: list[int] = field(default_factory=list)
    mine: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    random: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    places: list[tuple[int, ...]] = field(default_factory=list)


@dataclass
class _Probe:
    opened: OpenedModel
    pruners: dict[str, Pruner]
    keeps: tuple[float, ...]
    draws: int
    seed: int
    simpler: dict[str, list[str]]
    base: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "right": []})
    cells: dict[tuple[str, float], _Cell] = field(default_factory=dict)

    def check(self, asked: int) -> None:
        layers = len(self.opened.anatomy.main.blocks)
        if not asked or asked > len(self.pruners):
            raise UsageError(
                "Name at least one pruner, and none of them twice.", detail=", ".join(self.pruners)
            )
        if self.draws < 1 or not self.keeps:
            raise UsageError("The probe needs at least one share to keep and one random control.")
        for share in self.keeps:
            kept_count(share, 1)
        deep = next((pruner for pruner in self.pruners.values() if pruner.leaves_at >= layers), None)
        if deep is not None:
            raise UsageError(
                f"{deep.label}: tokens cannot leave at layer {deep.leaves_at}; the model has layers 0 to {layers - 1}."
            )

    def ask(self, prompt: Prompt, read: Read) -> None:
        """All pruners and their controls on one prompt."""
        assert prompt.visual is not None
        answers = Answers(self.opened, prompt)
        usual = answers.under()
        self.base["loss"].append(usual.loss)
        self.base["right"].append(usual.right)
        positions = np.flatnonzero(prompt.visual.spans.visual)
        known: dict[tuple[int, tuple[int, ...]], dict[str, float]] = {}

        def change(layer: int, kept: Int[np.ndarray, " kept"]) -> dict[str, float]:
            key = layer, tuple(kept.tolist())
            if key not in known:
                gone = np.delete(positions, kept)
                exit_ = VisualExit(layer, Chosen.at({prompt.index: gone.tolist()}))
                known[key] = _changes(answers.under(exit_), usual)
            return known[key]

        for share in self.keeps:
            count = kept_count(share, len(positions))
            controls = [*_random(len(positions), count, self.draws, self.seed, prompt.index)]
            for label, pruner in self.pruners.items():
                cell = self.cells.setdefault((label, share), _Cell())
                kept = pruner.kept(read, count)
                if len(set(kept.tolist())) != count:
                    raise UsageError(f"{label} keeps {len(set(kept.tolist()))} tokens in place of {count}.")
                found = change(pruner.leaves_at, kept)
                drawn = [change(pruner.leaves_at, places) for places in controls]
                cell.kept.append(count)
                cell.places.append(tuple(kept.tolist()))
                for name in QUANTITIES:
                    cell.mine[name].append(found[name])
                    cell.random[name].append(float(np.mean([one[name] for one in drawn])))


def _changes(found: Answered, usual: Answered) -> dict[str, float]:
    return {"loss": found.loss - usual.loss, "right": found.right - usual.right, "kl": found.kl_from(usual)}


def _random(
    tokens: int, count: int, draws: int, seed: int, prompt: int
) -> Iterator[Int[np.ndarray, " kept"]]:
    """Places kept at random; equal for all pruners of the same share."""
    for draw in range(draws):
        rng = np.random.default_rng((seed, prompt, count, draw))
        yield np.sort(rng.choice(tokens, size=count, replace=False))


def _parts(
    prompts: PromptSet | Sequence[Prompt], calibration: Sequence[Prompt] | float, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Calibration and report prompts, none in both."""
    given = prompts.prompts if isinstance(prompts, PromptSet) else prompts
    usable = [prompt for prompt in given if _usable(prompt)]
    if not isinstance(calibration, float | int):
        first, later = [prompt for prompt in calibration if _usable(prompt)], usable
    else:
        if not 0.0 < calibration < 1.0:
            raise UsageError(
                f"calibration is a share of the prompts, above 0 and below 1; got {calibration}."
            )
        order = np.random.default_rng(seed).permutation(len(usable))
        cut = round(calibration * len(usable))
        first, later = ([usable[i] for i in sorted(part)] for part in (order[:cut], order[cut:]))
    if not first or len(later) < 2:
        raise DataError(
            "Too few prompts with a picture, a question and an answer: one to fit on and two to report on are needed.",
            detail=f"There are {len(first)} and {len(later)}.",
            hint="In a JSONL file: image, question, answer, and text with both of them.",
        )
    both = {_content(prompt) for prompt in first} & {_content(prompt) for prompt in later}
    if both:
        raise DataError(
            f"{len(both)} prompts are among those that rankings are fitted on and among those reported on.",
            hint="Give other calibration prompts, or a share of the prompts.",
        )
    return first, later


def _usable(prompt: Prompt) -> bool:
    """Whether a prompt has a picture, then a question, then the answer."""
    if prompt.visual is None or not prompt.visual.spans.visual.any() or not has_answer(prompt):
        return False
    return int(answer_positions(prompt)[0]) - 1 > int(np.flatnonzero(prompt.visual.spans.visual)[-1])


def _content(prompt: Prompt) -> tuple[Any, ...]:
    assert prompt.visual is not None
    return prompt.token_ids, tuple(picture.sha256 for picture in prompt.visual.spans.pictures)


def _rule(
    opened: OpenedModel, prompts: Sequence[Prompt], sinks: Sinks | str
) -> tuple[SinkRule | None, str | None]:
    """By what tokens are sinks, and why there is no such rule."""
    if isinstance(sinks, SinkRule):
        return sinks, None
    if sinks is None:
        return None, "sinks were not asked for."
    if isinstance(sinks, SinkDims):
        dims = sinks
    elif isinstance(sinks, str):
        if sinks != "search":
            raise UsageError(f"sinks are dims, a rule, None or 'search', got {sinks!r}.")
        dims = search_sink_dims(opened, list(prompts[:SEARCHED]))
    else:
        dims = SinkDims.given(tuple(sinks), opened.anatomy.main.hidden_size)
    return (SinkRule(dims), None) if dims else (None, dims.failed)


def reads(opened: OpenedModel, prompts: Sequence[Prompt], rule: SinkRule | None) -> list[Read]:
    """What pruners can know of prompts: they are read up to the token before the answer."""
    asked = [cut_prompt(prompt, int(answer_positions(prompt)[0])) for prompt in prompts]
    entered: list[np.ndarray] = []
    found: list[Read] = []
    for prompt in asked:
        assert prompt.visual is not None
        entered.clear()

        def keep(layer: int, state: Any) -> None:
            if layer == 0:
                entered.append(state[0].detach().float().cpu().numpy())

        with input_tap(opened.module, opened.anatomy.main, keep):
            (record,) = trace(opened, [prompt], TracePlan(signals=READ, sinks=rule)).records
        visual = visual_positions(record)
        found.append(
            Read(
                {name: text_received(record, at)[:, visual] for name, at in (("text", 0), ("last", 1))},
                entered[-1][visual],
                None if rule is None else decided(record, rule, rule).sink_somewhere()[visual],
                padding_shares(prompt.visual.spans),
            )
        )
    return found


def _calibrated(
    pruners: Sequence[Pruner], first: list[Read], later: list[Read]
) -> tuple[dict[str, Pruner], list[dict[str, Any]], list[dict[str, str]]]:
    """Pruners that apply, by label and with what they learn filled in; what was fitted; and those left out."""
    ready: dict[str, Pruner] = {}
    fits: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for pruner in pruners:
        why = pruner.why_not(later)
        if why is not None:
            skipped.append({"pruner": pruner.label, "why": f"Not applicable: {why}"})
            continue
        if isinstance(pruner, FastV) and pruner.recency and pruner.sigma is None:
            fits.append({"pruner": pruner.label, "layer": pruner.layer - 1, **pruner.fit(first)})
        ready[pruner.label] = pruner.calibrated(first)
    return ready, fits, skipped


def _described(rule: SinkRule | None, why: str | None, read: list[Read]) -> dict[str, Any]:
    counts = [0 if one.sinks is None else int(one.sinks.sum()) for one in read]
    return {
        "dims": [] if rule is None else list(rule.dims.indices),
        "tau": None if rule is None else rule.cut.tau,
        "why_none": why,
        "per_prompt": float(np.mean(counts)) if rule is not None else None,
    }


def _rows(probe: _Probe) -> list[dict[str, Any]]:
    """One row per pruner and share; p values are corrected over all comparisons of the probe."""
    rows = _compared(probe)
    pairs = [(other, found) for row in rows for other, found in row["versus"].items()]
    corrected = holm([found["p_value"] for _, found in pairs])
    for (other, found), p in zip(pairs, corrected, strict=True):
        found["p_holm"] = p
        found["verdict"] = _verdict(found, other)
    return rows


def _compared(probe: _Probe) -> list[dict[str, Any]]:
    pairs = [(label, share) for label in probe.pruners for share in probe.keeps]
    others = {label: [one for one in probe.simpler[label] if one in probe.pruners] for label in probe.pruners}
    verdicts = sum(1 + len(others[label]) for label, _ in pairs)
    rows = []
    for label, share in pairs:
        cell = probe.cells[label, share]
        row: dict[str, Any] = {"pruner": label, "keep": share, "kept": float(np.mean(cell.kept))}
        row["leaves_at"] = probe.pruners[label].leaves_at
        for name in QUANTITIES:
            row[name] = mean_interval(np.array(cell.mine[name])).to_json()
            row[f"random_{name}"] = mean_interval(np.array(cell.random[name])).to_json()
        row["versus"] = {RANDOM: _loss(cell.random, cell.mine, probe.seed, verdicts).to_json()}
        for other in others[label]:
            simpler = probe.cells[other, share]
            same = [len(set(a) & set(b)) / len(a) for a, b in zip(cell.places, simpler.places, strict=True)]
            found = _loss(simpler.mine, cell.mine, probe.seed, verdicts).to_json()
            row["versus"][other] = {**found, "same_tokens": float(np.mean(same))}
        rows.append(row)
    return rows


def _loss(
    before: Mapping[str, list[float]], after: Mapping[str, list[float]], seed: int, verdicts: int
) -> Comparison:
    columns = ({"loss": np.array(values["loss"])} for values in (before, after))
    return compare_paired(LOSS, *columns, seed=seed, verdicts=verdicts)


def _verdict(found: Mapping[str, Any], other: str) -> str:
    """One of `better than`, `worse than`, `the same as`, `no measurable difference to`, and the other."""
    if not found["changed"]:
        return f"the same as {other}"
    low, high = found["ci_low"], found["ci_high"]
    if found["p_holm"] < 0.05 and low is not None and high is not None and (low > 0 or high < 0):
        return f"{'worse' if low > 0 else 'better'} than {other}"
    return f"no measurable difference to {other}"


def _sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows come to."""

    def count(found: Sequence[str]) -> tuple[int, int]:
        better, worse = (sum(text.startswith(word) for text in found) for word in ("better", "worse"))
        return better, worse

    better, worse = count([row["versus"][RANDOM]["verdict"] for row in rows])
    said = (
        f"Of {len(rows)} prunings {better} cost less than random ones of the same size and {worse} cost more"
    )
    own = [found["verdict"] for row in rows for other, found in row["versus"].items() if other != RANDOM]
    if not own:
        return f"{said}."
    helped, harmed = count(own)
    return f"{said}; of {len(own)} corrections {helped} help and {harmed} harm, measurably."
