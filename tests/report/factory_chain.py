"""The findings of the whole chain on the run that never happened: many verdicts, every kind of figure."""

from __future__ import annotations

from typing import Any

import numpy as np

from sinklens.core.figures import Estimate, Event, Figure, Intervals, Life, Lines, Series, Tile, Timeline

from . import factory


def make(layers: int = 6, heads: int = 4, experts: int = 7, **sizes: int) -> factory.Run:
    """`factory.make` with secondary sinks, writers, causal effects, sensitivity and more."""
    run = factory.make(layers=layers, heads=heads, experts=experts, **sizes)
    added = {
        "secondary-sinks": _secondary(layers),
        "writers": _writers(layers),
        "head-roles": _heads(layers, heads),
        "expert-cascade": _plain(
            "Expert cascade", "Expert 2 of layer 1 writes it, two amplify, expert 5 erases."
        ),
        "sink-geometry": _plain(
            "Geometry of the sink", "An angle effect: the key is short, the cosine is 0.71."
        ),
        "head-classes": _plain(
            "Head classes", "9 of 24 heads are sinks, 3 look back one token, 12 are mixed."
        ),
        "causal-effects": _effects(),
        "sensitivity": _sensitivity(),
    }
    for name, (finding, figures) in added.items():
        run.document["findings"][name] = finding
        run.figures[name] = figures
    run.document["verdict"]["lines"] = [
        {"analyzer": name, "title": finding["title"], "text": finding["verdict"]}
        for name, (finding, _) in added.items()
    ]
    run.document["references"] = _references()
    run.tiles.append(Tile("Sensitivity", "structural", "5 variants, 3 prompts", link="sensitivity"))
    return run


def _references() -> dict[str, Any]:
    row = {
        "model": "Synthetic-1B",
        "quantity": "sink_rate",
        "title": "Sink rate of the first token",
        "unit": "%",
        "published": 74.3,
        "here": 71.25,
        "remark": "base model",
        "status": "paper",
        "status_words": "read in the paper",
        "source": "An example paper",
        "url": "https://example.org/abs/0000.00000",
        "where": "table 1",
        "protocol": {"seq_len": 64},
        "differences": ["prompts of 64 tokens there, of up to 17 here"],
    }
    heard = {
        "published": [711, 1415],
        "here": None,
        "unit": "",
        "title": "Massive dims",
        "status": "third party",
    }
    return {
        "match": "this model",
        "rows": [row, row | heard | {"status_words": "third party", "differences": []}],
    }


def _plain(title: str, verdict: str, **rest: Any) -> tuple[dict[str, Any], list[Figure]]:
    blank: dict[str, Any] = {
        "parameters": {},
        "summary": {},
        "rows": [],
        "units": {},
        "notes": [],
        "labels": {},
    }
    return blank | {"title": title, "status": "found", "reason": None, "verdict": verdict} | rest, []


def _secondary(layers: int) -> tuple[dict[str, Any], list[Figure]]:
    rows = [
        {
            "position": 7,
            "token": ",",
            "creation_layer": 1,
            "lifetime": layers - 2,
            "cosine": 0.97,
            "share": 0.11,
        },
        {"position": 13, "token": ".", "creation_layer": 2, "lifetime": 1, "cosine": -0.93, "share": 0.02},
    ]
    finding, _ = _plain(
        "Secondary sinks",
        "2 secondary sinks per 1000 tokens, on punctuation; written by the MLP of layer 1 from unlike inputs.",
        rows=rows,
        summary={"per_thousand": 2.0, "norm_ratio": 31.5, "heads": [[1, 2, 0.4]], "agree": []},
        labels={"per_thousand": "secondary sinks per 1000 tokens", "agree": "found by both rules"},
    )
    lives = (
        Life(
            "position 7 ','",
            1,
            layers - 2,
            0.97,
            (Event(1, "written by the MLP", "rise"),),
            (2,),
            "punctuation",
        ),
        Life("position 13 '.'", 2, 2, 0.93, note="punctuation"),
    )
    return finding, [
        Timeline("lives", "Secondary sinks from creation to end", "All prompts.", lives, layers, "|cosine|")
    ]


def _writers(layers: int) -> tuple[dict[str, Any], list[Figure]]:
    finding, _ = _plain(
        "Who writes it",
        f"Dim 711 on position 0 is written by the MLP of layer 1 (neuron 17) and erased in layer {layers - 1}.",
    )
    events = (Event(1, "MLP neuron 17 adds 880", "rise"), Event(layers - 1, "MLP removes 840", "fall"))
    lives = (Life("position 0 'The', dim 711", 1, layers - 1, 1.0, events, note="97 % by one neuron"),)
    return finding, [Timeline("path", "From writer to eraser", "Largest entries.", lives, layers)]


def _heads(layers: int, heads: int) -> tuple[dict[str, Any], list[Figure]]:
    rng = np.random.default_rng(1)
    points = rng.random((2, 2, layers * heads // 2))
    figure = Lines(
        "roles",
        "Share on the sink against entropy",
        "One point per head, mean over prompts.",
        (Series("dormant", *points[0]), Series("active", *points[1])),
        "share on the sink",
        "nats",
        joined=False,
    )
    finding, _ = _plain(
        "Head roles", "3 of 24 heads are dormant on the sink in code, none in prose; 2 switch."
    )
    return finding, [figure]


def _effects() -> tuple[dict[str, Any], list[Figure]]:
    rows = (
        Estimate(
            "prune expert 2 of layer 1", -71.2, -75.0, -66.4, -0.4, -1.2, 0.3, "carries the sink", "Experts"
        ),
        Estimate("prune expert 5 of layer 3", -1.2, -3.0, 0.1, -0.1, -0.4, 0.3, "no effect", "Experts"),
        Estimate(
            "massive entries to zero", -2.0, -4.0, 1.0, note="not removed: 93 % remains", group="Writers"
        ),
        Estimate("did not act", float("nan"), group="Writers"),
    )
    finding, _ = _plain(
        "Causal effects",
        "Without expert 2 of layer 1 the sink rate falls from 71.2 % to 0 %; without another one it stays.",
        rows=[
            {"what": r.label, "delta": r.value, "delta_ci_low": r.low, "delta_ci_high": r.high}
            for r in rows[:3]
        ],
        units={"delta": "percentage points"},
        labels={"what": "intervention", "delta": "change of the sink rate"},
    )
    title, caption = "Change of the sink rate by intervention", "Mean over 3 prompts."
    return finding, [
        Intervals("effects", title, caption, rows, "change of the sink rate (percentage points)")
    ]


def _sensitivity() -> tuple[dict[str, Any], list[Figure]]:
    variants = ("as the run", "without BOS", "random tokens", "512 tokens", "float16")
    rows = tuple(Estimate(v, 50.0 - 4 * i, 44.0 - 4 * i, 56.0 - 4 * i) for i, v in enumerate(variants))
    finding, _ = _plain(
        "Sensitivity to the input", "The sink is structural: it stays on position 0 under 4 variants."
    )
    strip = Intervals(
        "strip", "Sink rate under other inputs", "Mean over prompts.", rows, "sink rate, %", reference=50.0
    )
    return finding, [strip]
