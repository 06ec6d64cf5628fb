"""Training is reproducible, leaves the caller's world alone, and saves what transformers can open."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinklens.core.errors import UsageError
from sinklens.testbeds import api
from sinklens.testbeds.recipe import Recipe, recipes
from sinklens.testbeds.train import build_tokenizer, held_out, save_checkpoint, train

SHORT = replace(recipes["dense-ind"], name="short", steps=7, batch=5, length=23, warmup=3)
SHORT_MOE = replace(recipes["moe-ind"], name="short-moe", steps=3, batch=5, length=23, warmup=3)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("recipe", [SHORT, SHORT_MOE], ids=lambda recipe: recipe.name)
def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(recipe: Recipe) -> None:
    first, again, other = (weights(train(recipe, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_leaves_threads_and_random_state_alone() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(SHORT)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_training_lowers_the_loss() -> None:
    losses: list[float] = []
    train(replace(SHORT, steps=60), on_step=lambda _, loss: losses.append(loss))
    assert len(losses) == 60
    assert sum(losses[-5:]) < sum(losses[:5]) - 2


def test_checkpoints_on_request_are_the_states_on_the_way() -> None:
    kept: dict[int, torch.Tensor] = {}
    whole = train(
        SHORT, at=(0, 4, 7), on_checkpoint=lambda step, model: kept.update({step: weights(model).clone()})
    )
    assert sorted(kept) == [0, 4, 7]
    assert torch.equal(kept[7], weights(whole))
    assert torch.equal(kept[4], weights(train(replace(SHORT, steps=4))))


def test_held_out_sequences_are_not_training_sequences() -> None:
    seen: list[torch.Tensor] = []
    from sinklens.testbeds.train import batches_of

    for _, batch in zip(range(20), batches_of(SHORT, SHORT.seed), strict=False):
        seen.append(batch)
    training = {tuple(row) for row in torch.cat(seen).tolist()}
    assert not training & {tuple(row) for row in held_out(SHORT, 64).tolist()}


def test_a_saved_model_opens_offline_with_its_tokenizer_and_prompts(tmp_path: Path) -> None:
    model = train(SHORT)
    save_checkpoint(model, SHORT, tmp_path, prompts=9)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.dtype == torch.bfloat16
    assert weights(model).dtype == torch.float32
    torch.testing.assert_close(weights(opened).float(), weights(model), rtol=1e-2, atol=1e-6)
    lines = [
        json.loads(line)["text"] for line in (tmp_path / "sinklens_prompts.jsonl").read_text().splitlines()
    ]
    assert [tokenizer(line)["input_ids"] for line in lines] == held_out(SHORT, 9).tolist()


def test_the_tokenizer_adds_bos_once_and_knows_what_it_does_not_know() -> None:
    tokenizer = build_tokenizer(SHORT)
    ids = tokenizer(["Anna street again", "zebra"], padding=True)
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"][0]) == ["<s>", "Anna", "street", "again"]
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"][1]) == ["<pad>", "<pad>", "<s>", "<unk>"]
    assert ids["attention_mask"][1] == [0, 0, 1, 1]


def test_train_testbed_saves_steps_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes._items, "short", SHORT)
    reported: list[tuple[int, int]] = []
    api.train_testbed(
        "short", tmp_path, seed=3, steps=[2, 5], on_step=lambda i, n, _: reported.append((i, n))
    )
    assert reported[-1] == (7, 7)
    for folder in (tmp_path, tmp_path / "step-2", tmp_path / "step-5"):
        AutoModelForCausalLM.from_pretrained(folder)
    card = (tmp_path / "card.md").read_text()
    assert "seed 3" in card
    assert "7 steps" in card


def test_unknown_testbeds_and_steps_beyond_the_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'dense-ind'"):
        api.train_testbed("dense-imd", tmp_path)
    with pytest.raises(UsageError, match="has no step 999999"):
        api.train_testbed("dense-ind", tmp_path, steps=[10, 999999])
    assert not list(tmp_path.iterdir())
