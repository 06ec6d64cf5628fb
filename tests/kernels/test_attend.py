"""The compiled attention in tiles: output and statistics equal the definition, and it is used where it serves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinklens.kernels import native, rowpass
from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.rowpass import attend_serves
from sinklens.kernels.spec import AttentionCall, BlockPlan, Stat, Want

from .calls import ALL, Case, assert_close, build, cases, expected, near_ties, output_error

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)
pytestmark = needs_compiler

# These read the weights of a block, which the tiles do not keep.
SERVED = ALL - {Stat.RECEIVED_SQUARED, Stat.RECEIVED_MAX, Stat.GROUP_OUTPUT}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[AttentionCall]:
    """The calls that reach the compiled attention."""
    seen: list[AttentionCall] = []
    real = rowpass.attend

    def spy(call: AttentionCall, *rest: object) -> rowpass.RowResults:
        seen.append(call)
        return real(call, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(rowpass, "attend", spy)
    return seen


def narrow(case: Case) -> tuple[AttentionCall, Want, BlockPlan]:
    """A case with key groups of few keys, by head in every other one; wide ones need the weights too."""
    call, want, plan = build(case)
    groups = torch.zeros(3, case.batch, case.heads if case.seed % 2 else 1, case.keys, dtype=torch.bool)
    groups.scatter_(-1, torch.randint(0, case.keys, (*groups.shape[:3], 4)), True)
    groups[1, ..., 1:] = False
    return call, replace(want, stats=SERVED, groups=groups if case.seed % 2 else groups[:, :, 0]), plan


def compare(case: Case, *, output_bound: float = 2e-6) -> None:
    call, want, plan = narrow(case)
    true_output, truth = expected(call, want)
    output, fused = attention_fused(call, want, plan)
    assert output.dtype == case.dtype
    assert output_error(output, true_output, call) <= output_bound
    assert_close(fused, truth, ties=near_ties(call))
    assert_close(attention_sweep(call, want, None, plan), truth, ties=near_ties(call))


BOOLEAN = ("random", "by head", "left padding", "right padding", "window")
masks = st.sampled_from(["causal", "bidirectional", *BOOLEAN])


@settings(max_examples=100)
@given(cases(softcap=None, groups="empty"), masks, st.sampled_from([2, 37, 70, 131]))
def test_attention_in_tiles_equals_the_definition(case: Case, mask: str, keys: int) -> None:
    compare(replace(case, mask=mask, keys=keys))


@pytest.mark.parametrize("tiles_of_bfloat16", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_models_are_computed_in_float32(
    dtype: torch.dtype,
    bound: float,
    tiles_of_bfloat16: bool,
    used: list[AttentionCall],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of bfloat16, torch makes the products where the processor has instructions for whole tiles of it."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles_of_bfloat16)
    for seed, mask in enumerate(("causal", "window", "left padding", "by head")):
        case = Case(2, 2, 3, 61, 61, 24, 21, mask, None, True, True, True, "empty", 9_000, seed, dtype)
        compare(case, output_bound=bound)
    assert len(used) == (0 if tiles_of_bfloat16 and dtype == torch.bfloat16 else 8)


@pytest.mark.parametrize("value_dim", [3, 16, 33, 64, 90, 128])
@pytest.mark.parametrize("group", [1, 7, 13, 29])
def test_every_width_of_values_and_of_head_groups(
    value_dim: int, group: int, used: list[AttentionCall]
) -> None:
    case = Case(1, 2, group, 53, 61, 24, value_dim, "causal", None, True, True, True, "empty", 9_000, group)
    compare(case)
    assert len(used) == 2


@pytest.mark.parametrize("keys", [2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 161, 331])
def test_every_row_end(keys: int, used: list[AttentionCall]) -> None:
    compare(Case(1, 2, 3, keys, keys, 8, 5, "causal", None, True, False, False, "empty", 90_000, keys))
    compare(Case(1, 2, 3, keys, keys, 8, 5, "bidirectional", None, True, True, True, "empty", 90_000, keys))
    assert len(used) == 4


@pytest.mark.parametrize("kind", BOOLEAN)
def test_masks(kind: str, used: list[AttentionCall]) -> None:
    """Rows of several tiles and panels; some see nothing, some not their own key."""
    for keys, queries, seed in ((331, 331, 1), (161, 67, 2), (70, 131, 3)):
        compare(Case(2, 2, 3, queries, keys, 8, 5, kind, None, True, True, False, "empty", 90_000, seed))
    assert len(used) == 6


def test_a_window_far_from_the_first_key(used: list[AttentionCall]) -> None:
    """Tiles then begin in the middle of the keys, and everything counted by key begins with them."""
    torch.manual_seed(1)
    length, window = 401, 37
    query, key, value = (
        torch.randn(1, 6, length, 8),
        torch.randn(1, 2, length, 8),
        torch.randn(1, 2, length, 5),
    )
    mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    groups = torch.zeros(2, 1, length, dtype=torch.bool)
    groups[0, 0, 300], groups[1, 0, [0, 130]] = True, True
    call = AttentionCall(query, key, value, 0.4, mask=mask[None, None])
    want = Want(SERVED, groups=groups, probes=torch.rand(1, length) > 0.7, band=(3, 30))
    output, found = attention_fused(call, want)
    assert used
    true_output, truth = expected(call, want)
    torch.testing.assert_close(output.double(), true_output, atol=2e-6, rtol=0)
    assert_close(found, truth, ties=near_ties(call))


def test_rows_before_the_first_key_are_zero(used: list[AttentionCall]) -> None:
    """More queries than keys: the first rows see nothing."""
    torch.manual_seed(3)
    query, key, value = torch.randn(2, 6, 71, 8), torch.randn(2, 2, 29, 8), torch.randn(2, 2, 29, 20)
    call = AttentionCall(query, key, value, 0.4, learned_sinks=torch.randn(6))
    groups, probes = torch.rand(2, 2, 29) > 0.8, torch.rand(2, 71) > 0.5
    want = Want(SERVED, groups=groups, probes=probes, band=(1, 9))
    output, found = attention_fused(call, want)
    assert used
    assert not output[:, : 71 - 29].any()
    true_output, truth = expected(call, want)
    torch.testing.assert_close(output.double(), true_output, atol=2e-6, rtol=0)
    assert_close(found, truth, ties=near_ties(call))


def test_threads_change_nothing(used: list[AttentionCall]) -> None:
    call, want, plan = narrow(
        Case(2, 1, 5, 101, 101, 8, 5, "causal", None, True, True, True, "empty", 50_000, 4)
    )
    output, one = attention_fused(call, want, plan)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # more than there are key heads, so heads of one are shared out
        shared, three = attention_fused(call, want, plan)
    finally:
        torch.set_num_threads(before)
    assert len(used) == 2
    torch.testing.assert_close(shared, output, atol=1e-6, rtol=1e-6)
    for stat in SERVED:
        torch.testing.assert_close(three[stat], one[stat], atol=1e-6, rtol=1e-6)


def test_what_hidden_keys_hold_does_not_matter() -> None:
    """Infinite keys, NaN values: under a causal mask no earlier row may notice."""
    query, key, value = torch.randn(1, 4, 45, 8), torch.randn(1, 2, 45, 8), torch.randn(1, 2, 45, 5)
    want = Want(frozenset({Stat.ENTROPY, Stat.ROW_MAX}))
    clean, truth = attention_fused(AttentionCall(query, key, value, 0.4), want)
    key[:, :, 40:], value[:, :, 40:] = 1e30, 7e30
    output, found = attention_fused(AttentionCall(query, key, value, 0.4), want)
    assert torch.equal(output[:, :40], clean[:, :40])
    for stat in want.stats:
        assert torch.equal(found[stat][..., :40], truth[stat][..., :40])


@pytest.fixture
def _without_avx512(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-mno-avx512f", "-Wno-psabi"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("_without_avx512")
@pytest.mark.skipif("x86" not in native._processor(), reason="a flag of x86 compilers")
def test_processors_with_narrower_vectors(used: list[AttentionCall]) -> None:
    assert native.available()
    for seed, keys in enumerate((2, 17, 64, 131)):
        compare(Case(2, 2, 3, keys, keys, 8, 21, "causal", None, True, True, True, "empty", 90_000, seed))
    assert len(used) == 8


def test_where_it_does_not_serve(used: list[AttentionCall]) -> None:
    case = Case(1, 2, 3, 37, 37, 8, 5, "causal", None, False, False, False, "empty", 5_000, 1)
    call, want, plan = build(case)
    assert attend_serves(call, plan)
    mask = torch.ones(1, 1, 37, 37)
    assert attend_serves(replace(call, mask=mask > 0), plan)
    assert not attend_serves(replace(call, mask=mask), plan)
    assert not attend_serves(replace(call, mask=mask.mT[..., :1] > 0), plan)
    assert not attend_serves(replace(call, softcap=3.0), plan)
    assert not attend_serves(replace(call, query=call.query[:, :, -1:]), plan)
    assert not attend_serves(replace(call, value=call.value.double()), plan)
    assert not attend_serves(call, BlockPlan(score_dtype=torch.bfloat16))
    attention_fused(call, want, plan)  # asks for what needs the weights
    attention_fused(call, replace(want, stats=SERVED), replace(plan, native=False))
    assert not used
