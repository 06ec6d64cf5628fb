"""Fake quantisation as a context manager: what it rounds, what it leaves, and that everything comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError, UsageError
from sinklens.kernels.quantise import Scheme, fake_quantised
from sinklens.mitigations import FakeQuantisation, NothingEdited

from ..families import EXPERTS, FAMILIES, HIDDEN, build, inputs
from .test_with import logits, state

LANGUAGE = [name for name, family in FAMILIES.items() if family.kind in ("text", "vlm")]


def parameters(model: Any) -> dict[str, tuple[int, Tensor]]:
    return {name: (id(weight), weight.detach().clone()) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("family", LANGUAGE)
def test_weights_and_activations_of_every_family_are_rounded_and_come_back(family: str) -> None:
    model, given = build(family), inputs(family, padding="left" if FAMILIES[family].padding else None)
    plain, before, weights = logits(model, given), state(model), parameters(model)
    moe = FAMILIES[family].moe
    with FakeQuantisation(weights=8, experts=8 if moe else None, activations=8)(model) as effect:
        found = logits(model, given)
        changed = {
            name for name, weight in model.named_parameters() if not torch.equal(weight, weights[name][1])
        }
    assert state(model) == before
    for name, weight in model.named_parameters():
        assert id(weight) == weights[name][0]
        assert torch.equal(weight, weights[name][1])
    assert torch.equal(logits(model, given), plain)
    assert not torch.equal(found, plain)
    assert effect.acted
    assert not any(word in name for name in changed for word in ("embed", "lm_head", "norm", "router", "ln_"))
    layers = len(
        {
            name.split(".")[i + 1]
            for name in changed
            for i, part in enumerate(name.split("."))
            if part in ("layers", "h", "blocks")
        }
    )
    assert layers == 4
    assert len(effect.by_layer) == 4


def test_nothing_stays_after_an_error() -> None:
    model = build("qwen3_moe")
    before, weights = state(model), parameters(model)

    def fails() -> None:
        with FakeQuantisation(weights=4, experts=4, activations=4)(model):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert state(model) == before
    assert all(id(weight) == weights[name][0] for name, weight in model.named_parameters())


@pytest.mark.parametrize("by", ["channel", "tensor", "group"])
def test_weights_are_those_of_the_quantiser(by: Any) -> None:
    model = build("mixtral")
    layer = model.model.layers[1]
    dense, experts = (
        layer.self_attn.k_proj.weight.detach().clone(),
        layer.mlp.experts.down_proj.detach().clone(),
    )
    granularity = "row" if by == "channel" else by
    with FakeQuantisation(weights=4, experts=8, weights_by=by, group=24)(model):
        rounded = layer.self_attn.k_proj.weight
        expected = fake_quantised(dense[None], Scheme(4, granularity, group=24))[0]
        assert torch.equal(rounded, expected)
        expected = torch.stack(
            [fake_quantised(e[None], Scheme(8, granularity, group=24))[0] for e in experts]
        )
        assert torch.equal(layer.mlp.experts.down_proj, expected)


def test_transposed_matrices_have_their_scales_along_the_right_side() -> None:
    """GPT-2 and gpt-oss store `[in, out]`; an output channel is a column there."""
    gpt2 = build("gpt2")
    stored = gpt2.transformer.h[0].attn.c_attn.weight.detach().clone()
    with FakeQuantisation(weights=4)(gpt2):
        expected = fake_quantised(stored.T[None], Scheme(4))[0].T
        assert torch.equal(gpt2.transformer.h[0].attn.c_attn.weight, expected)
    oss = build("gpt_oss")
    stored = oss.model.layers[0].mlp.experts.down_proj.detach().clone()
    with FakeQuantisation(weights=None, experts=4)(oss):
        expected = fake_quantised(stored.transpose(1, 2), Scheme(4)).transpose(1, 2)
        assert torch.equal(oss.model.layers[0].mlp.experts.down_proj, expected)


def test_protected_dims_and_experts_stay_to_the_bit() -> None:
    model = build("qwen3_moe")
    dims, mlp, attention = (3, 17), model.model.layers[2].mlp, model.model.layers[2].self_attn
    own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    protected = FakeQuantisation(weights=4, experts=4, protect_dims=dims, protect_experts=[(2, 5)])
    prefix = "model.layers.2."
    with protected(model):
        reads, writes = attention.q_proj.weight, attention.o_proj.weight
        assert torch.equal(reads[:, dims], own[prefix + "self_attn.q_proj.weight"][:, dims])
        assert torch.equal(writes[dims, :], own[prefix + "self_attn.o_proj.weight"][dims, :])
        assert float((writes == own[prefix + "self_attn.o_proj.weight"]).float().mean()) < 0.2
        up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
        assert torch.equal(up[5], own[prefix + "mlp.experts.gate_up_proj"][5])
        assert torch.equal(down[5], own[prefix + "mlp.experts.down_proj"][5])
        assert torch.equal(up[4][:, dims], own[prefix + "mlp.experts.gate_up_proj"][4][:, dims])
        assert torch.equal(down[4][dims, :], own[prefix + "mlp.experts.down_proj"][4][dims, :])
        assert not torch.equal(down[4], own[prefix + "mlp.experts.down_proj"][4])
        assert not torch.equal(
            model.model.layers[1].mlp.experts.down_proj[5], own["model.layers.1.mlp.experts.down_proj"][5]
        )


def read_by(
    model: Any, module: nn.Module, given: dict[str, Tensor], method: FakeQuantisation
) -> tuple[Tensor, Tensor]:
    """What a module reads without and with the rounding of layer 0, which reads the same there."""
    kept: list[Tensor] = []
    logits_of = []
    handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    logits(model, given)
    handle.remove()
    with method(model):
        handle = module.register_forward_pre_hook(lambda _, args: logits_of.append(args[0].clone()))
        logits(model, given)
        handle.remove()
    return kept[0], logits_of[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("by", ["token", "tensor", "group"])
def test_activations_are_rounded_without_padding_and_protected_tokens(by: Any, side: str) -> None:
    model, given = build("llama"), inputs("llama", padding=side)
    real = given["attention_mask"] != 0
    method = FakeQuantisation(
        weights=None,
        activations=4,
        activations_by=by,
        group=24,
        layers=[0],
        protect_positions=[0, 2],
        protect_dims=[5],
    )
    before, after = read_by(model, model.model.layers[0].self_attn.q_proj, given, method)
    stays = ~real
    for row in range(2):
        places = real[row].nonzero().squeeze(-1)
        stays[row, places[[0, 2]]] = True
    kept = stays.reshape(1, -1, 1) | (torch.arange(HIDDEN) == 5)
    scheme = Scheme(4, "row" if by == "token" else by, symmetric=False, group=24)
    expected = fake_quantised(before.reshape(1, -1, HIDDEN), scheme, kept).view_as(before)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


def test_what_experts_read_is_rounded_too_and_padding_does_not_count() -> None:
    model = build("mixtral")
    method = FakeQuantisation(weights=None, activations=4, activations_by="tensor")
    given = inputs("mixtral", padding="left")
    real = given["attention_mask"] != 0
    with method(model):
        padded = logits(model, given)[1][real[1]]
        alone = logits(model, {"input_ids": given["input_ids"][1][real[1]][None]})[0]
        batch = logits(model, {"input_ids": given["input_ids"][:1]})[0]
    # One scale for all tokens of the batch: alone, a row has another. Per token there is no difference.
    assert not torch.allclose(padded, alone, atol=1e-3)
    assert batch.shape[0] == real.shape[1]
    with FakeQuantisation(weights=None, activations=4)(model) as effect:
        padded = logits(model, given)[1][real[1]]
        alone = logits(model, {"input_ids": given["input_ids"][1][real[1]][None]})[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-4)
    assert effect.acted


def test_generated_tokens_are_rounded_like_those_of_a_fresh_prompt() -> None:
    model, given = build("qwen3_moe"), inputs("qwen3_moe", batch=1)
    with torch.no_grad(), FakeQuantisation(weights=8, experts=4, activations=8, protect_positions=[0])(model):
        ids = given["input_ids"]
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        row = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(row, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"weights": None}, "nothing to edit"),
        ({"weights": 1}, "1 bits"),
        ({"weights": 8, "activations": 32}, "32 bits"),
        ({"weights_by": "row"}, "weights_by must be one of channel, tensor, group"),
        ({"activations_by": "channel"}, "activations_by must be one of"),
        ({"group": 0}, "group of 0"),
    ],
)
def test_bad_parameters_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        FakeQuantisation(**fields)


@pytest.mark.parametrize(
    ("family", "fields", "error", "told"),
    [
        ("llama", {"experts": 8}, ModelError, "no fused experts, so there is nothing to edit"),
        ("llama", {"layers": [7]}, UsageError, "no layer 7"),
        ("llama", {"protect_dims": [HIDDEN]}, UsageError, f"no dim {HIDDEN}"),
        ("llama", {"protect_positions": [-1]}, UsageError, "no position -1"),
        ("mixtral", {"protect_experts": [(1, EXPERTS)]}, UsageError, "no expert"),
    ],
)
def test_what_the_model_lacks_is_refused(
    family: str, fields: dict[str, Any], error: type[Exception], told: str
) -> None:
    model = build(family)
    with pytest.raises(error, match=told), FakeQuantisation(**fields)(model):
        pass


def test_weights_out_of_memory_or_quantised_already_are_refused() -> None:
    model = build("llama")
    weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    model.model.layers[1].self_attn.q_proj.weight = weight
    before = parameters(model)
    with pytest.raises(ModelError, match="quantised already"), FakeQuantisation()(model):
        pass
    assert all(id(weight) == before[name][0] for name, weight in model.named_parameters())
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(build("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="not in memory"), FakeQuantisation()(model):
        pass


def test_what_lies_on_its_grid_already_is_said() -> None:
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for part in layer.modules():
                if isinstance(part, nn.Linear):
                    part.weight.fill_(0.0)
    with pytest.warns(NothingEdited, match="on its grid already"), FakeQuantisation()(model):
        pass
