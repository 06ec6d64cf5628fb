"""A run that never happened, in the shape of a real one: `example/synthetic`, any size, fixed by seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sinklens.core.figures import Figure, Heatmap, Lines, Samples, Series, Tile

WORDS = (
    "The",
    " sink",
    " is",
    " where",
    " heads",
    " rest",
    ",",
    " and",
    " nothing",
    " else",
    ".",
    "\n",
    " 17",
    " λ",
)


@dataclass
class Run:
    """What `render_report` takes."""

    document: dict[str, Any]
    figures: dict[str, list[Figure]]
    tiles: list[Tile]
    prompts: list[dict[str, Any]]
    methods: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.document, self.figures, self.tiles, self.prompts, self.methods


def make(
    layers: int = 6, heads: int = 4, experts: int = 0, n_prompts: int = 3, seq_len: int = 17, seed: int = 0
) -> Run:
    """A trusted run with a sink at position 0; with experts it has Super Experts, without it is dense."""
    rng = np.random.default_rng(seed)
    shares = _shares(rng, n_prompts, layers, heads)
    norms = _norms(rng, layers)
    writers = _experts(rng, layers, experts) if experts else None
    rate = 100 * float(np.mean(shares > 0.3))
    figures: dict[str, list[Figure]] = {
        "primary-sinks": _sink_figures(shares),
        "massive-activations": _norm_figures(norms),
        "super-experts": [] if writers is None else _expert_figures(writers[0], writers[1]),
    }
    findings = {
        "primary-sinks": _primary(shares, rate, layers, seq_len),
        "massive-activations": _massive(rng, layers),
        "super-experts": _super(writers, experts, layers),
    }
    return Run(
        _document(findings, layers, heads, experts, n_prompts, seq_len, rate),
        figures,
        _tiles(shares, rate, writers, layers, experts),
        _prompts(rng, n_prompts, seq_len),
        _methods(),
    )


def _shares(rng: np.random.Generator, prompts: int, layers: int, heads: int) -> np.ndarray:
    depth = np.clip((np.arange(layers) - 1) / max(2, layers / 8), 0, 1) * np.where(
        np.arange(layers) == layers - 1, 0.6, 1
    )
    per_head = rng.beta(2.2, 1.1, (layers, heads)) * depth[:, None]
    noise = rng.normal(0, 0.06, (prompts, layers, heads))
    return np.clip(0.05 + 0.9 * per_head + noise, 0, 1)


def _norms(rng: np.random.Generator, layers: int) -> dict[str, np.ndarray]:
    depth = np.arange(layers)
    usual = 1.2 * 1.06**depth * rng.uniform(0.9, 1.1, layers)
    high = np.where((depth >= max(1, layers // 12)) & (depth < layers - 1), 900.0 + 4 * depth, 3 * usual)
    return {"strongest position": high, "largest other": 3.1 * usual, "median": usual}


def _experts(
    rng: np.random.Generator, layers: int, experts: int
) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    values = rng.lognormal(0.2, 0.7, (layers, experts))
    values[:, experts // 3] = np.where(rng.random(layers) < 0.1, np.nan, values[:, experts // 3])
    marks = tuple((min(layers - 1, 1 + i), int(rng.integers(experts))) for i in range(3))
    for i, (layer, expert) in enumerate(marks):
        values[layer, expert] = 480.0 / (i + 1)
    return values, marks


def _sink_figures(shares: np.ndarray) -> list[Figure]:
    seq = np.arange(16)
    profile = np.where(seq == 0, shares.mean(), 0.02 + 0.3 / (seq + 9.0))
    return [
        Heatmap(
            "share",
            "Attention received by position 0",
            "Mean over prompts and visible queries of the attention from each head to position 0.",
            shares.mean(axis=0),
            "share",
        ),
        Samples(
            "rate",
            "Sink rate by layer and head",
            "Percentage of prompts in which a head's mean attention to position 0 exceeds the threshold.",
            shares,
            0.3,
        ),
        Lines(
            "profile",
            "Attention by key position",
            "Mean over prompts, layers and heads of the attention received per visible query.",
            (Series("", seq, profile),),
            "position",
            "share",
            bars=True,
        ),
    ]


def _norm_figures(norms: dict[str, np.ndarray]) -> list[Figure]:
    layers = np.arange(len(next(iter(norms.values()))))
    series = tuple(Series(name, layers, y, emphasis=i == 0) for i, (name, y) in enumerate(norms.items()))
    rise = max(1, len(layers) // 12)
    marks = ((float(rise), "rises"), (float(len(layers) - 1), "erased"))
    return [
        Lines(
            "norms",
            "Hidden-state norm by layer",
            "L2 norm of each block's output, mean over prompts.",
            series,
            "layer",
            "L2 norm",
            log_y=True,
            marks=marks,
        )
    ]


def _expert_figures(values: np.ndarray, marks: tuple[tuple[int, int], ...]) -> list[Figure]:
    return [
        Heatmap(
            "raster",
            "Largest expert output",
            "Largest absolute value of each expert's down projection over prompts, positions and dimensions.",
            values,
            "abs-max",
            x_label="expert",
            marks=marks,
            log=True,
        )
    ]


def _primary(shares: np.ndarray, rate: float, layers: int, seq_len: int) -> dict[str, Any]:
    row = {"position": 0, "token": "The", "token_id": 464, "share": float(shares.mean()), "lift": 9.87654321}
    row |= {"rate": rate, "n_prompts": len(shares), "first_layer": 1, "last_layer": layers - 1}
    return {
        "status": "found",
        "reason": None,
        "verdict": f"One primary sink, at position 0, with a mean share of {shares.mean():.2f}.",
        "parameters": {"epsilon": 0.3, "min_queries": 16},
        "summary": {"sink_rate": rate, "epsilon": 0.3, "seq_len": seq_len},
        "rows": [row],
        "units": {"share": "share", "rate": "%", "sink_rate": "%", "lift": "× uniform"},
        "notes": ["The tokenizer adds no BOS, so the sink stands on a content token."],
    }


def _massive(rng: np.random.Generator, layers: int) -> dict[str, Any]:
    rows = [
        {
            "layer": int(layer),
            "position": 0,
            "token": "The",
            "dim": int(dim),
            "value": float(sign * (900 - 3 * layer)),
            "ratio_to_median": float(4000 - 11 * layer),
            "n_prompts": int(rng.integers(1, 4)),
        }
        for layer in range(1, layers - 1)
        for dim, sign in ((711, 1), (1415, -1))
    ]
    return {
        "status": "found",
        "reason": None,
        "verdict": "Two dimensions are massive at position 0, from layer 1 to the one before the last.",
        "parameters": {"absolute": 100.0, "ratio": 1000.0},
        "summary": {"dims": [711, 1415], "first_layer": 1, "last_layer": layers - 2},
        "rows": rows,
        "units": {"ratio_to_median": "ratio to median"},
        "notes": [],
    }


def _super(
    writers: tuple[np.ndarray, tuple[tuple[int, int], ...]] | None, experts: int, layers: int
) -> dict[str, Any]:
    base = {
        "parameters": {"percentile": 99.5, "fraction": 0.1},
        "units": {"share_of_sink_token": "share"},
        "notes": [],
    }
    if writers is None:
        reason = "the model is dense, it has no experts."
        blank = {"status": "not-applicable", "reason": reason, "verdict": f"Not applicable: {reason}"}
        return base | blank | {"summary": {}, "rows": []}
    values, marks = writers
    rows = [
        {
            "layer": layer,
            "expert": expert,
            "abs_max": float(values[layer, expert]),
            "dim": 711,
            "position": 0,
            "token": "The",
            "share_of_sink_token": 0.83,
            "rank": rank,
        }
        for rank, (layer, expert) in enumerate(marks, start=1)
    ]
    return base | {
        "status": "found",
        "reason": None,
        "verdict": f"{len(rows)} of {experts * layers} experts write the massive dimensions.",
        "summary": {
            "threshold_percentile": 8.2,
            "threshold_fraction": 48.0,
            "experts_seen": experts * layers,
        },
        "rows": rows,
    }


def _document(
    findings: dict[str, Any], layers: int, heads: int, experts: int, n_prompts: int, seq_len: int, rate: float
) -> dict[str, Any]:
    names = (
        "calls seen",
        "logits unchanged",
        "streamed equals dense",
        "row mass",
        "attention is causal for logits",
    )
    values = ((layers, layers), (0.0, 0.0), (3.1e-7, 1e-5), (2.2e-7, 1e-5), (0.84, 1e-3))
    return {
        "schema": "sinklens/run/1",
        "model": {
            "id": "example/synthetic",
            "revision": "0123456789abcdef0123456789abcdef01234567",
            "family": "synthetic",
            "layers": layers,
            "heads": heads,
            "kv_heads": max(1, heads // 2),
            "hidden_size": 2048,
            "experts": experts,
            "top_k": 8 if experts else 0,
            "dtype": "bfloat16",
        },
        "verdict": {
            "status": "sink",
            "text": f"Strong primary sink on position 0 ('The'): at ε = 0.3, {rate:.1f} % of heads rest "
            f"on it. It starts in layer 1 and lasts to layer {layers - 1}; two massive dimensions carry it.",
            "rule": "sink-strong",
        },
        "checks": [
            {"name": name, "passed": True, "value": value, "limit": limit, "detail": ""}
            for name, (value, limit) in zip(names, values, strict=True)
        ],
        "findings": findings,
        "manifest": {
            "command": ["sinklens", "profile", "-m", "example/synthetic", "--seq-len", str(seq_len)],
            "wall_seconds": 108.4,
            "peak_bytes": 3_221_225_472,
            "attention_path": "sdpa, statistics beside",
            "seed": 1234567,
            "versions": {"sinklens": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "inputs": {
                "source": "corpus:mixed",
                "n_prompts": n_prompts,
                "n_tokens": n_prompts * seq_len,
                "first_tokens": ["The"],
                "warnings": ["The tokenizer adds no BOS: position 0 holds the first word of each prompt."],
            },
        },
    }


def _tiles(shares: np.ndarray, rate: float, writers: Any, layers: int, experts: int) -> list[Tile]:
    found = Tile("Super Experts", "3", f"of {experts * layers}", link="super-experts")
    none = Tile("Super Experts", "", "the model is dense.", applicable=False, link="super-experts")
    return [
        Tile(
            "Sink rate", f"{rate:.1f} %", "ε = 0.3, mean over prompts, layers and heads", link="primary-sinks"
        ),
        Tile(
            "Attention to position 0",
            f"{shares.mean():.2f}",
            "mean share; uniform would give 0.07",
            link="#primary-sinks",
        ),
        Tile("First sink layer", "1", f"present to layer {layers - 1}", link="primary-sinks"),
        Tile("Massive dimensions", "2", "up to 897, 3989 × the median", link="massive-activations"),
        none if writers is None else found,
        Tile("Secondary sinks", "", "not asked for in this run.", applicable=False),
    ]


def _prompts(rng: np.random.Generator, n: int, length: int) -> list[dict[str, Any]]:
    prompts = []
    for index in range(n):
        ids = [0, *rng.integers(0, len(WORDS), length - 1).tolist()]
        pieces = [WORDS[i] for i in ids]
        digest = hashlib.sha256("".join(pieces).encode()).hexdigest()
        domain = ("prose", "code", "mathematics", "dialogue")[index % 4]
        prompts.append(
            {
                "index": index,
                "source": f"corpus:mixed#{index}",
                "domain": domain,
                "n_tokens": length,
                "sha256": digest,
                "pieces": pieces,
                "token_ids": [464 + i for i in ids],
            }
        )
    return prompts


_FORMULA = (
    '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"><msub><mi>Sink</mi><mi>ε</mi></msub>'
    "<mo>=</mo><mn>100</mn><mo>·</mo><munder><mi>mean</mi><mrow><mi>n</mi><mo>,</mo><mi>l</mi><mo>,</mo><mi>h</mi>"
    "</mrow></munder><mo>[</mo><mfrac><mn>1</mn><mrow><mi>T</mi><mo>−</mo><mi>k</mi></mrow></mfrac>"
    '<munder><mo largeop="true">∑</mo><mrow><mi>q</mi><mo>≥</mo><mi>k</mi></mrow></munder>'
    "<msub><mi>A</mi><mrow><mi>q</mi><mi>k</mi></mrow></msub><mo>&gt;</mo><mi>ε</mi><mo>]</mo></math>"
)


def _methods() -> list[dict[str, Any]]:
    def method(name: str, title: str, line: str, formula: str = "") -> dict[str, Any]:
        return {
            "name": name,
            "title": title,
            "first_line": line,
            "formula_mathml": formula,
            "how": "From the recorded reductions; no attention map is kept.",
            "compared": "As the paper defines it.",
            "not_trust": "When prompts are shorter than the sliding window.",
            "parameters": {"epsilon": 0.3},
            "reference": {
                "title": "An example paper",
                "authors": "A. Author and B. Author",
                "year": 2020,
                "url": "https://example.org/abs/0000.00000",
                "section": "section 3",
                "code": "example/example",
                "bibtex": "@article{author2020example,\n  title = {An example paper}\n}",
            },
            "source_file": f"sinklens/analyzers/{name.replace('-', '_')}.py",
        }

    listed = [
        method("primary-sinks", "Primary sinks", "Key positions that many heads attend to.", _FORMULA),
        method("massive-activations", "Massive activations", "Hidden-state entries far above the median."),
        method("super-experts", "Super Experts", "Experts whose output carries the massive activations."),
    ]
    listed[0]["methods_paragraph"] = "Attention sinks were measured with sinklens on a synthetic example."
    return listed
