"""From findings and checks to one sentence. Every rule has an id, which the report shows on hover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sinklens.analyzers.base import Finding, Status, registry
from sinklens.analyzers.estimates import estimated
from sinklens.analyzers.evidence import span
from sinklens.core.counts import verb
from sinklens.tracers.selfcheck import Check

STRONG, MODERATE = 50.0, 25.0
"""Sink rate in percent from which a sink is called strong or moderate. Words only; the number stands beside them."""


@dataclass(frozen=True)
class Line:
    """A finding in a line of its own."""

    analyzer: str
    title: str
    text: str


State = Literal["sink", "no-sink", "untrusted", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """`status` is `sink`, `no-sink`, `untrusted` (a check failed) or `unknown` (primary sinks were not measured)."""

    status: State
    text: str
    rule: str
    lines: tuple[Line, ...] = ()
    """What the main sentence leaves out: one line for each other finding that applies, in the order of the chain,
    those that run only on request last."""

    def to_json(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "text": self.text,
            "rule": self.rule,
            "lines": [asdict(line) for line in self.lines],
        }


def judge(findings: Mapping[str, Finding], checks: Sequence[Check]) -> Verdict:
    """The verdict on a run."""
    failed = [check.name for check in checks if not check.passed]
    if failed:
        return Verdict(
            "untrusted", f"Not trustworthy: {_join(failed)} failed. No verdict is given.", "V0 failed check"
        )
    sinks = findings.get("primary-sinks")
    told = [name for name, finding in findings.items() if _is_link(finding)]
    chain = [findings[name].verdict for name in told if name != "primary-sinks"]
    lines = tuple(
        Line(name, findings[name].title, findings[name].verdict)
        for name in sorted(findings, key=_on_request)
        if findings[name].status is not Status.NOT_APPLICABLE and name not in (*told, "primary-sinks")
    )
    if sinks is None or sinks.status is Status.NOT_APPLICABLE:
        reason = sinks.reason if sinks else "primary-sinks was not asked for."
        text = ["Attention sinks were not measured:", str(reason), *chain]
        return Verdict("unknown", " ".join(text), "V1 not measured", lines)
    if sinks.status is Status.FOUND:
        return Verdict("sink", " ".join([_sink_sentence(sinks), *chain]), "V2 sink rule met", lines)
    learned = sinks.summary.get("learned_sink_mass")
    if learned is not None and learned >= 0.1:
        text = (
            f"No token is an attention sink; the learned sink logits take {100 * learned:.0f} % of the attention."
            f"{estimated(sinks.summary)}"
        )
        return Verdict("no-sink", " ".join([text, *chain]), "V3 learned sinks only", lines)
    return Verdict("no-sink", " ".join([sinks.verdict, *chain]), "V4 sink rule not met", lines)


def strength(rate: float) -> str:
    """A word for a sink rate in percent."""
    return "Strong" if rate >= STRONG else "Moderate" if rate >= MODERATE else "Weak"


def _sink_sentence(finding: Finding) -> str:
    top, summary = finding.rows[0], finding.summary
    where = span(top["first_layer"], top["last_layer"]) if top["n_heads"] else "no layer"
    return (
        f"{strength(top['rate'])} attention sink on position {top['position']} ({top['token']!r}): it receives "
        f"{100 * top['share']:.1f} % of all attention, {top['lift']:.1f} times the uniform share, and more than "
        f"{summary['epsilon']:g} in {top['rate']:.1f} % of (prompt, layer, head); {top['n_heads']} of "
        f"{summary['heads_in_all']} heads {verb(top['n_heads'], 'sinks', 'sink')} on it consistently ({where})."
        f"{estimated(summary)}"
    )


def _is_link(finding: Finding) -> bool:
    """Whether the main sentence tells it: a link of the chain that was found."""
    return finding.headline and finding.status is Status.FOUND


def _on_request(name: str) -> bool:
    """Whether an analyzer runs only when it is asked for; such findings come after the others."""
    known = dict(registry.items())
    return name in known and not known[name].default


def _join(names: list[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
