"""Trains a recipe on one CPU thread, the same weights every time, and saves it for transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from .recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHUNK = 2048
"""Sequences drawn at a time; part of what makes a run reproducible."""


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer of the task's vocabulary; see `word_tokenizer`."""
    return word_tokenizer(recipe.task.vocabulary)


def word_tokenizer(
    words: Sequence[str], *, eos_token: str | None = None, extra: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts `<s>` first by itself.

    Args:
        words: Every token, at the place that is its id; `<s>`, `<unk>` and `<pad>` are among them.
        extra: Further special tokens by attribute, such as `image_token`; they need no spaces around them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    options: dict[str, Any] = {} if eos_token is None else {"eos_token": eos_token}
    if extra:
        options["extra_special_tokens"] = extra
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        **options,
    )


def build_model(recipe: Recipe, seed: int | None = None) -> PreTrainedModel:
    """The untrained model of a recipe; the caller's random state is left as it was."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed if seed is None else seed)
        model = AutoModelForCausalLM.from_config(recipe.config(), dtype=torch.float32)
    if recipe.architecture == "qwen3_moe":
        model.set_experts_implementation("grouped_mm")
    return model


def batches_of(recipe: Recipe, seed: int) -> Iterator[torch.Tensor]:
    """Token ids of the training sequences, `[batch, length]`, without end."""
    rng = np.random.default_rng(seed + 1)
    while True:
        chunk = torch.from_numpy(recipe.task.sample(CHUNK, recipe.length, rng))
        for start in range(0, CHUNK - recipe.batch + 1, recipe.batch):
            yield chunk[start : start + recipe.batch]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are reproducible, and small matrices fastest, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Schedule(Protocol):
    """What optimising needs of a recipe."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def warmup(self) -> int: ...
    @property
    def cooldown(self) -> int: ...
    @property
    def clip(self) -> float: ...


def fit(
    model: PreTrainedModel,
    recipe: Schedule,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    at: Collection[int] = (),
    on_checkpoint: Callable[[int, PreTrainedModel], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> PreTrainedModel:
    """Trains `model` in place on one thread and returns it in eval mode.

    Args:
        batches: Arguments of the model's forward, labels included; at least as many as the recipe has steps.
        at, on_checkpoint, on_step: As in `train`.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )

    def rate(done: int) -> float:
        rising = min(1.0, (done + 1) / recipe.warmup)
        return rising * min(1.0, (recipe.steps - done) / recipe.cooldown) if recipe.cooldown else rising

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def checkpoint(step: int) -> None:
        if on_checkpoint is not None and step in at:
            model.eval()
            on_checkpoint(step, model)
            model.train()

    with _one_thread():
        checkpoint(0)
        model.train()
        for step, batch in zip(range(1, recipe.steps + 1), batches, strict=False):
            loss = model(**batch, use_cache=False).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step, float(loss.detach()))
            checkpoint(step)
    return model.eval()


def train(
    recipe: Recipe,
    *,
    seed: int | None = None,
    at: Collection[int] = (),
    on_checkpoint: Callable[[int, PreTrainedModel], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> PreTrainedModel:
    """Trains from scratch and returns the model in eval mode.

    Args:
        seed: Of the initialisation and the data order; the recipe's own if None.
        at: Steps after which `on_checkpoint(step, model)` is called; 0 is the untrained model.
        on_step: Called with the step (1-based) and its training loss in nats.
    """
    seed = recipe.seed if seed is None else seed
    batches = ({"input_ids": ids, "labels": ids} for ids in batches_of(recipe, seed))
    model = build_model(recipe, seed)
    return fit(model, recipe, batches, at=at, on_checkpoint=on_checkpoint, on_step=on_step)


def held_out(recipe: Recipe, count: int, length: int | None = None) -> torch.Tensor:
    """`count` sequences of the same language that training never drew: token ids `[count, length]`."""
    rng = np.random.default_rng(recipe.evaluation_seed)
    return torch.from_numpy(recipe.task.sample(count, length or recipe.length, rng))


def save_checkpoint(
    model: PreTrainedModel,
    recipe: Recipe,
    folder: Path,
    *,
    card: str | None = None,
    prompts: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes config, safetensors, tokenizer, held-out prompts and the card; the model itself stays as it is.

    The prompts' `text` has no `<s>`: the tokenizer adds it, as users' own text would get it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = copy.deepcopy(model)
    torch.nn.Module.to(stored, dtype)
    stored.config.architectures = [type(model).__name__]
    stored.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes them for the owner only
    build_tokenizer(recipe).save_pretrained(folder)
    vocabulary = recipe.task.vocabulary
    with (folder / "sinklens_prompts.jsonl").open("w", encoding="utf-8") as out:
        for row in held_out(recipe, prompts)[:, 1:].tolist():
            out.write(json.dumps({"text": " ".join(vocabulary[token] for token in row)}) + "\n")
    if card is not None:
        (folder / "card.md").write_text(card, encoding="utf-8")
    return folder
