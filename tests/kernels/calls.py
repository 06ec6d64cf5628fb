"""Random attention calls of every kind the kernels must handle, and how closely two results must agree."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from sinklens.kernels.reference import attention_reference, dense_logits, dense_visibility
from sinklens.kernels.shapes import sizes_of
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, BlockPlan, Stat, Want

ALL = frozenset(Stat)
MASKS = (
    "causal",
    "bidirectional",
    "random",
    "by head",
    "left padding",
    "right padding",
    "window",
    "bias",
    "hidden bias",
)


@dataclass(frozen=True)
class Case:
    """A drawn call: everything that shapes it."""

    batch: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    mask: str
    softcap: float | None
    sinks: bool
    counted: bool
    strided: bool
    groups: str
    scores: int
    seed: int
    dtype: torch.dtype = torch.float32

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    """Cases of small co-prime sizes; `fixed` sets fields."""
    keys = draw(st.sampled_from([1, 2, 5, 17, 37]))
    drawn = {
        "batch": draw(st.integers(1, 3)),
        "kv_heads": draw(st.sampled_from([1, 2, 3])),
        "group": draw(st.sampled_from([1, 2, 5])),
        "queries": draw(st.sampled_from([keys, keys, 1, 7, 41])),
        "keys": keys,
        "dim": draw(st.sampled_from([4, 7, 16])),
        "value_dim": draw(st.sampled_from([3, 5, 16])),
        "mask": draw(st.sampled_from(MASKS)),
        "softcap": draw(st.sampled_from([None, None, 1.5])),
        "sinks": draw(st.booleans()),
        "counted": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "groups": draw(st.sampled_from(["one key", "few", "many", "by head", "empty"])),
        "scores": draw(st.sampled_from([1, 300, 5000, 1_600_000])),
        "seed": draw(st.integers(0, 2**31)),
    }
    return Case(**{**drawn, **fixed})  # pyright: ignore[reportArgumentType]


def build(case: Case) -> tuple[AttentionCall, Want, BlockPlan]:
    """The tensors of a case."""
    torch.manual_seed(case.seed)
    shapes = (
        (case.batch, case.heads, case.queries, case.dim),
        (case.batch, case.kv_heads, case.keys, case.dim),
        (case.batch, case.kv_heads, case.keys, case.value_dim),
    )
    query, key, value = (_tensor(shape, case) for shape in shapes)
    call = AttentionCall(
        query,
        key,
        value,
        scale=1.3 * case.dim**-0.5,
        causal=case.mask == "causal",
        mask=_mask(case),
        softcap=case.softcap,
        learned_sinks=torch.randn(case.heads) if case.sinks else None,
        counted=torch.rand(case.batch, case.queries) > 0.3 if case.counted else None,
    )
    probes = torch.rand(case.batch, case.queries) > 0.8
    band = (case.seed % 3, case.seed % 3 + case.seed % 7)
    want = Want(ALL, groups=_groups(case), tail=3, window=4, probes=probes, band=band)
    return call, want, BlockPlan(scores=case.scores)


def _tensor(shape: tuple[int, int, int, int], case: Case) -> Tensor:
    if not case.strided:
        return torch.randn(shape).to(case.dtype)
    batch, heads, length, dim = shape  # as a projection's output arrives: heads inside of positions
    return torch.randn(batch, length, heads, dim).to(case.dtype).transpose(1, 2)


def _mask(case: Case) -> Tensor | None:
    if case.mask in ("causal", "bidirectional"):
        return None
    batch, queries, keys = case.batch, case.queries, case.keys
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    triangle = (key <= place).expand(batch, 1, queries, keys)
    padding = torch.randint(0, keys, (batch, 1, 1, 1))
    match case.mask:
        case "random":
            return torch.rand(batch, 1, queries, keys) > 0.6
        case "by head":
            return torch.rand(1, case.heads, queries, keys) > 0.7
        case "left padding":
            return triangle & (key >= padding)
        case "right padding":
            return triangle & (key < keys - padding)
        case "window":
            return triangle & (key > place - 3)
        case "bias":
            return torch.randn(1, case.heads, queries, keys).masked_fill(
                ~triangle, torch.finfo(torch.float32).min
            )
        case _:
            return torch.zeros(batch, 1, queries, keys).masked_fill(~triangle, float("-inf")).to(case.dtype)


def _groups(case: Case) -> Tensor:
    batch, keys = case.batch, case.keys
    match case.groups:
        case "one key":
            return (torch.arange(keys) == torch.randint(0, keys, (batch, 1)))[None]
        case "few":
            return torch.rand(3, batch, keys) > 0.9
        case "many":
            return torch.rand(5, batch, keys) > 0.3
        case "by head":
            return torch.rand(2, batch, case.heads, keys) > 0.5
        case _:
            return torch.zeros(2, batch, keys, dtype=torch.bool)


def expected(call: AttentionCall, want: Want) -> tuple[Tensor, AttentionStatistics]:
    """The definition, kept in float64."""
    return attention_reference(call, want, dtype=torch.float64)


def true_lse(call: AttentionCall) -> Tensor:
    """Log-sum-exp of every row, counted or not."""
    return expected(replace(call, counted=None), Want(frozenset({Stat.LSE})))[1][Stat.LSE].float()


def near_ties(call: AttentionCall) -> int:
    """Rows whose two largest weights differ by less than rounding can decide, over all heads and batch rows."""
    if call.key.shape[2] < 2:
        return 0
    sizes = sizes_of(call, Want(frozenset()))
    top = dense_logits(call, sizes, dense_visibility(call, sizes)).topk(2, dim=-1).values
    return int((top[..., 0] - top[..., 1] < 1e-5).sum())


def output_error(output: Tensor, truth: Tensor, call: AttentionCall) -> float:
    """Largest difference, relative to the largest value (at least 1): outputs are means of values."""
    return float((output.double() - truth).abs().max() / call.value.abs().max().clamp_min(1.0))


def assert_close(
    found: AttentionStatistics, truth: AttentionStatistics, *, ties: int = 0, bound: float = 1e-6
) -> None:
    """All statistics agree to `bound`, relative to the largest value of each, at least 1.

    Distances are differences of positions, so there it is relative to the largest of those.
    """
    assert found.values.keys() == truth.values.keys()
    assert found.rows is not None
    assert truth.rows is not None
    assert torch.equal(found.rows, truth.rows)
    assert found.visible is not None
    assert truth.visible is not None
    assert torch.equal(found.visible, truth.visible)
    for stat, true in truth.values.items():
        value = found[stat]
        assert value.dtype == torch.float32
        assert value.shape == true.shape, stat
        if stat is Stat.TOP1:
            assert float((value - true).abs().sum()) <= 2 * ties, stat
            continue
        error = float((value.double() - true).abs().max())
        positions = truth.visible.shape[-1] + truth.rows.shape[-1]
        largest = positions if stat.startswith("distance") else float(true.abs().max())
        limit = bound * max(1.0, largest)
        if stat in (Stat.ENTROPY, Stat.ENTROPY_NORMALISED, Stat.RECEIVED_LOG):
            limit *= 2  # a difference of two sums of logits, each rounded
        if stat is Stat.RECEIVED_BAND_REST:
            limit *= 3  # a sum of quotients, both sides of each rounded
        assert error <= limit, f"{stat}: {error:.2e} > {limit:.2e}"
