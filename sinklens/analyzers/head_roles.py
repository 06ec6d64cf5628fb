"""Active and dormant heads: who rests on the sink, on which inputs, and on which queries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sinklens.core.counts import verb
from sinklens.core.errors import UsageError
from sinklens.core.figures import Tile
from sinklens.core.papers import ACTIVE_DORMANT
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord, Trace

from .base import Analyzer, Finding, Status, registry
from .head_figures import figures
from .heads import Histogram, PerHead, bimodality, find_sinks, groups, mass_after, mean, named, number, spread
from .primary_sinks import PrimarySinks
from .zeroed_heads import zeroed_heads, zeroed_note

CLASSES = ("dormant", "by domain", "switching", "partial", "active")


@dataclass(frozen=True)
class Roles:
    """What the heads do at one position.

    Attributes:
        mass: Mean attention on the position per prompt, over the later queries that see it.
        domain: Domain of each prompt.
        spread: Histogram of that mass over the queries, all prompts together; NaN where not recorded.
        prompts_switching: Share of the prompts in which the head is a sink on many queries and active on many others.
    """

    position: int
    token: str
    mass: Float[np.ndarray, "prompt layer head"]
    domain: tuple[str, ...]
    spread: Histogram
    prompts_switching: PerHead

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.domain)))

    @property
    def by_domain(self) -> Float[np.ndarray, "domain layer head"]:
        names = np.array(self.domain)
        return np.stack([self.mass[np.flatnonzero(names == name)].mean(0) for name in self.domains])


@registry.register("head-roles")
@dataclass(frozen=True)
class HeadRoles(Analyzer):
    """Heads that rest on the sink: always, only in some kinds of text, or only on some queries.

    How it is computed: the dormancy of a head is the mean attention that the queries after the sink, and that see
    it, put on it (on the first token where no position is a sink). It is averaged over the prompts of each domain.
    A head is dormant in a domain if that exceeds `dormant`. Heads get the first class that fits: dormant (in every
    domain), by domain (dormant in one, at most `active` in another), switching (at least `share` of the queries put
    more than 0.9 on the sink and at least `share` put less than 0.1), partial (above `active` on average), active.
    The contrast between domains is the largest minus the smallest dormancy; its p is the share of `shuffles` random
    assignments of the prompts to the domains with a contrast at least as large.

    Compared with the paper: Guo et al. call a head dormant if nearly all queries attend to the sink and show heads
    that are active on code only, without a threshold; 0.9 and the classes are ours. They zero a head to see what it
    is for; `--verify` does that for the strongest sink heads, and its result is repeated here. Bimodality is
    Sarle's coefficient of the histogram over queries: above 0.556, that of a uniform distribution, it suggests two
    groups of queries.

    When not to trust it: a head that splits its attention over several sinks is dormant without passing 0.9 on any
    one of them. Heads that rest on a learned sink logit, which is no token, are counted apart. Queries right after
    the sink see few other keys, so short prompts make heads look dormant. The largest contrast among many heads is
    large by chance when a domain has few prompts: read its p. Only two positions per layer have a histogram over
    queries; a sink that is neither has dormancy alone.

    Args:
        dormant: Dormancy above which a head is called dormant.
        active: Dormancy up to which it is called active in a domain.
        share: Smallest share of the queries in each of the two groups of a switching head.
    """

    dormant: float = 0.9
    active: float = 0.5
    share: float = 0.2
    shuffles: int = 499
    seed: int = 0

    name = "head-roles"
    title = "Active and dormant heads"
    place = 45
    formula = (
        '<math display="block"><msub><mi>D</mi><mrow><mi>l</mi><mo>,</mo><mi>h</mi></mrow></msub><mo>=</mo><munder>'
        "<mi>mean</mi><mrow><mi>q</mi><mo>&gt;</mo><mi>s</mi></mrow></munder><mspace width='0.2em'/><msubsup><mi>A</mi>"
        "<mrow><mi>q</mi><mo>,</mo><mi>s</mi></mrow><mrow><mi>l</mi><mo>,</mo><mi>h</mi></mrow></msubsup>"
        "<mo>&gt;</mo><mn>0.9</mn></math>"
    )
    optional = PrimarySinks.optional
    needs = PrimarySinks.needs | {sig.REFERENCE_POSITION, sig.REFERENCE_MASS}
    summarises = (
        "position", "token", "n_heads", "n_prompts", "domains", "dormant_by_domain", "n_dormant",
        "n_by_domain", "n_switching", "n_partial", "n_active", "dormant", "by_domain", "switching",
        "mean_dormancy", "largest_contrast", "on_learned_sink", "zeroed_heads", "zeroed_loss_change",
        "zeroed_loss_change_low", "zeroed_loss_change_high", "zeroed_loss_change_others",
    )  # fmt: skip
    reference = ACTIVE_DORMANT.at("active-dormant mechanism in pretrained language models")

    def __post_init__(self) -> None:
        if not 0 <= self.active < self.dormant < 1:
            raise UsageError(
                "head-roles needs 0 <= active < dormant < 1, got "
                f"active = {self.active} and dormant = {self.dormant}."
            )
        if not 0 < self.share <= 0.5:
            raise UsageError(f"share of head-roles must lie above 0 and be at most 0.5, got {self.share}.")

    def analyze(self, trace: Trace) -> Finding:
        sinks, reason = find_sinks(trace)
        if reason is not None:
            return self.not_applicable(reason)
        rule = PrimarySinks()
        if sinks:
            position, token, records = sinks[0].position, sinks[0].token, list(sinks[0].records)
        else:
            records = [record for record in trace if len(record) >= rule.min_tokens]
            position, token = 0, records[0].pieces[0]
        roles = self._roles(records, position, token)
        classes = self.classify(roles)
        rows = self._rows(roles, classes)
        zeroed = zeroed_heads(trace)
        learned = self._on_learned_sink(records)
        summary = {**self._summary(roles, classes), "on_learned_sink": learned, **(zeroed or {})}
        verdict = self._verdict(summary, found_sink=bool(sinks))
        return self.finding(
            Status.FOUND if any(row["role"] != "partial" for row in rows) else Status.NOT_FOUND,
            verdict,
            rows=rows,
            summary=summary,
            units=UNITS,
            labels=LABELS,
            figures=figures(roles, classes, dormant=self.dormant, active=self.active),
            tiles=_tiles(summary),
            notes=_notes(roles, n_sinks=len(sinks)) + zeroed_note(zeroed),
        )

    def _roles(self, records: list[PromptRecord], position: int, token: str) -> Roles:
        spreads = [spread(record, position) for record in records]
        switching = np.stack([_both_groups(s, self.share) for s in spreads])
        known = ~np.isnan(np.stack(spreads)).any(-1)
        pooled = np.where(np.expand_dims(known.any(0), -1), np.nansum(np.stack(spreads), axis=0), np.nan)
        n = known.sum(0)
        return Roles(
            position,
            token,
            np.stack([_dormancy(record, position) for record in records]),
            _domains(records),
            pooled,
            np.where(n > 0, switching.sum(0) / np.maximum(n, 1), np.nan),
        )

    def classify(self, roles: Roles) -> np.ndarray:
        """Role of each head, `[layer, head]` of words; "" in layers without attention."""
        by_domain = roles.by_domain
        high, low = groups(roles.spread)
        rest = (by_domain > self.dormant).any(0) & (by_domain <= self.active).any(0)
        tests = [
            (by_domain > self.dormant).all(0),
            rest,
            (high >= self.share) & (low >= self.share),
            roles.mass.mean(0) > self.active,
        ]
        words = np.select(tests, CLASSES[:-1], default=CLASSES[-1])
        return np.where(np.isnan(roles.mass.mean(0)), "", words)

    def _rows(self, roles: Roles, classes: np.ndarray) -> list[dict[str, Any]]:
        """One row per head that is not simply active."""
        by_domain = roles.by_domain
        high, low = groups(roles.spread)
        two = bimodality(roles.spread)
        p = self._chance(roles)
        rows = []
        for layer, head in np.argwhere((classes != "") & (classes != "active")).tolist():
            values = by_domain[:, layer, head]
            row: dict[str, Any] = {
                "layer": layer,
                "head": head,
                "role": str(classes[layer, head]),
                "dormancy": float(roles.mass[:, layer, head].mean()),
                "queries_above": number(high[layer, head]),
                "queries_below": number(low[layer, head]),
                "bimodality": number(two[layer, head]),
                "prompts_switching": number(roles.prompts_switching[layer, head]),
            }
            if p is not None:
                row |= {
                    "contrast": float(values.max() - values.min()),
                    "contrast_p": float(p[layer, head]),
                    "most_dormant_in": roles.domains[int(values.argmax())],
                    "least_dormant_in": roles.domains[int(values.argmin())],
                }
            rows.append(row)
        rows.sort(key=lambda row: (CLASSES.index(row["role"]), -row["dormancy"], row["layer"], row["head"]))
        return rows

    def _chance(self, roles: Roles) -> PerHead | None:
        """How often shuffled domains give a contrast as large; None for one domain."""
        if len(roles.domains) < 2:
            return None
        member = np.array(
            [[name == domain for name in roles.domain] for domain in roles.domains], dtype=float
        )
        weights = member / member.sum(1, keepdims=True)
        flat = np.nan_to_num(roles.mass.reshape(len(roles.mass), -1))  # layers without attention get no row
        observed = np.ptp(weights @ flat, axis=0)
        rng = np.random.default_rng(self.seed)
        as_large = np.ones_like(observed)
        for _ in range(self.shuffles):
            as_large += np.ptp(weights[:, rng.permutation(len(flat))] @ flat, axis=0) >= observed - 1e-12
        return (as_large / (self.shuffles + 1)).reshape(roles.mass.shape[1:])

    def _summary(self, roles: Roles, classes: np.ndarray) -> dict[str, Any]:
        by_domain = roles.by_domain
        counts = Counter(classes.ravel().tolist())
        contrast = np.ptp(by_domain, axis=0) if len(roles.domains) > 1 else None
        return {
            "position": roles.position,
            "token": roles.token,
            "n_heads": int((classes != "").sum()),
            "n_prompts": len(roles.mass),
            "domains": {name: roles.domain.count(name) for name in roles.domains},
            "dormant_by_domain": {
                name: int((by_domain[i] > self.dormant).sum()) for i, name in enumerate(roles.domains)
            },
            **{f"n_{word.replace(' ', '_')}": counts.get(word, 0) for word in CLASSES},
            "dormant": _places(classes, "dormant"),
            "by_domain": _places(classes, "by domain"),
            "switching": _places(classes, "switching"),
            "mean_dormancy": number(np.nanmean(roles.mass)),
            "largest_contrast": None if contrast is None else number(np.nanmax(contrast)),
        }

    def _on_learned_sink(self, records: list[PromptRecord]) -> list[list[int]]:
        """Heads that rest on their learned sink logit, which is no token, instead of on a token."""
        known = [r[sig.LEARNED_SINK_MASS] for r in records if sig.LEARNED_SINK_MASS.name in r.arrays]
        return np.argwhere(mean(known) > self.dormant).tolist() if known else []

    def _verdict(self, s: dict[str, Any], *, found_sink: bool) -> str:
        where = f"position {s['position']} ({s['token']!r})"
        if not found_sink and not any(
            s[key] for key in ("dormant", "by_domain", "switching", "on_learned_sink")
        ):
            return f"No head rests on a sink: none of {s['n_heads']} is dormant on {where}."
        counts = s["dormant_by_domain"]
        if len(set(counts.values())) == 1:
            n = next(iter(counts.values()))
            everywhere = " in every domain" if len(counts) > 1 and n else ""
            text = f"{n} of {s['n_heads']} heads {verb(n, 'is', 'are')} dormant on {where}{everywhere}"
        else:
            most, *others = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            rest = ", ".join(f"{n} in {name}" for name, n in others)
            are = verb(most[1], "is", "are")
            text = f"{most[1]} of {s['n_heads']} heads {are} dormant on {where} in {most[0]}, {rest}"
        if s["by_domain"]:
            n = len(s["by_domain"])
            which = named([(a, b) for a, b in s["by_domain"]], 2)
            text += f"; {n} {'depends' if n == 1 else 'depend'} on the domain ({which})"
        if s["switching"]:
            n = len(s["switching"])
            rests, looks = ("rests", "looks") if n == 1 else ("rest", "look")
            text += f"; {n} {rests} on it for some queries and {looks} elsewhere for others"
        if s["on_learned_sink"]:
            n = len(s["on_learned_sink"])
            text += f"; {n} {'rests on its' if n == 1 else 'rest on their'} learned sink logit"
        return f"{text}."


UNITS = {
    "dormancy": "share of attention on the sink, mean over queries and prompts",
    "queries_above": "share of queries with more than 0.9 of their attention on it",
    "queries_below": "share of queries with less than 0.1 of their attention on it",
    "bimodality": "Sarle's coefficient; above 0.556 suggests two groups of queries",
    "prompts_switching": "share of prompts in which both groups are large",
    "contrast": "largest minus smallest dormancy of a domain",
    "contrast_p": "share of shuffled domains with a contrast as large",
    "zeroed_loss_change": "nats per token",
    "zeroed_loss_change_others": "nats per token",
}
LABELS = {
    "queries_above": "queries resting on it",
    "queries_below": "queries looking elsewhere",
    "bimodality": "two groups of queries",
    "prompts_switching": "prompts in which it does both",
    "contrast": "difference between domains",
    "contrast_p": "p of that difference",
    "dormant_by_domain": "dormant heads per domain",
    "n_dormant": "dormant in every domain",
    "n_by_domain": "dormant in some domains only",
    "n_switching": "dormant on some queries only",
    "n_partial": "mostly on the sink",
    "n_active": "active",
    "dormant": "dormant",
    "by_domain": "dormant in some domains only",
    "switching": "dormant on some queries only",
    "on_learned_sink": "rest on a learned sink logit",
    "largest_contrast": "largest difference between domains",
    "zeroed_heads": "heads that were zeroed",
    "zeroed_loss_change": "change of the loss by that",
    "zeroed_loss_change_low": "lower end of its interval",
    "zeroed_loss_change_high": "upper end of its interval",
    "zeroed_loss_change_others": "change by zeroing as many other heads",
    "share": "least share of the queries in each group",
    "shuffles": "shuffles of the domains",
}


def _domains(records: list[PromptRecord]) -> tuple[str, ...]:
    """Domain of each prompt, in words."""
    unnamed = "other prompts" if any(record.domain for record in records) else "all prompts"
    return tuple(record.domain or unnamed for record in records)


def _dormancy(record: PromptRecord, position: int) -> PerHead:
    """Mean mass of the later queries; 0 where the prompt did not keep the position, because no head cared for it."""
    mass = mass_after(record, position)
    if mass is not None:
        return mass
    return np.where(np.isnan(record[sig.ATTENTION_RECEIVED][:, :, 0]), np.nan, 0.0)


def _both_groups(spread: Histogram, share: float) -> np.ndarray:
    high, low = groups(spread)
    return (high >= share) & (low >= share)


def _places(classes: np.ndarray, word: str) -> list[list[int]]:
    return np.argwhere(classes == word).tolist()


def _tiles(s: dict[str, Any]) -> list[Tile]:
    counts = s["dormant_by_domain"]
    most = max(counts.values())
    each = ", ".join(f"{name} {n}" for name, n in counts.items())
    note = each if len(counts) > 1 else f"on position {s['position']}"
    if s["switching"]:
        note += f"; {len(s['switching'])} on some queries only"
    return [Tile("Dormant heads", f"{most} of {s['n_heads']}", note, link="head-roles")]


def _notes(roles: Roles, *, n_sinks: int) -> list[str]:
    notes = []
    if len(roles.domains) < 2:
        notes.append("All prompts are of one domain, so there is no contrast between domains.")
    elif min(roles.domain.count(name) for name in roles.domains) < 3:
        notes.append(
            "Some domains have fewer than 3 prompts: contrasts between domains are weakly supported."
        )
    if np.isnan(roles.spread).all():
        notes.append("No distribution over queries: the position was not among those looked at closely.")
    if n_sinks > 1:
        notes.append(
            f"There are {n_sinks} sinks; heads that rest on another one do not count as dormant here."
        )
    return notes
