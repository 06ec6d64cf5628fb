"""How each bundled checkpoint was made, as data: enough to make it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sinklens.core.registry import Registry

from .data import InductionTask

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Recipe:
    """A model, a language and an optimiser.

    Attributes:
        architecture: transformers' `model_type`.
        model: Arguments of the architecture's config, without the vocabulary, which comes from `task`.
        length: Tokens per training sequence, BOS included.
        learning_rate: AdamW, constant after a linear warm-up.
        cooldown: Last steps over which the learning rate falls linearly towards 0.
        weight_decay: Decoupled, on every parameter; it keeps ordinary tokens small, so that the sink stands
            out.
        evaluation_seed: Of the held-out sequences; never the training seed.
    """

    name: str
    architecture: str
    model: dict[str, Any]
    task: InductionTask = field(default_factory=InductionTask)
    length: int = 64
    batch: int = 24
    steps: int = 3000
    seed: int = 1
    learning_rate: float = 3e-3
    weight_decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 100
    cooldown: int = 0
    clip: float = 1.0
    evaluation_seed: int = 100_003
    about: str = ""

    def config(self) -> PretrainedConfig:
        """The transformers config of the model, with the task's vocabulary."""
        from transformers import AutoConfig

        vocabulary = self.task.vocabulary
        return AutoConfig.for_model(
            self.architecture,
            vocab_size=len(vocabulary),
            bos_token_id=self.task.bos_id,
            eos_token_id=None,
            pad_token_id=vocabulary.index("<pad>"),
            max_position_embeddings=512,
            tie_word_embeddings=False,
            initializer_range=0.02,
            **self.model,
        )


recipes: Registry[Recipe] = Registry("testbed", "sinklens testbed list")

recipes.register("dense-ind")(
    Recipe(
        name="dense-ind",
        architecture="llama",
        model={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        about="A dense Llama with sinks in most heads and one massive dim on BOS that the model needs.",
    )
)
recipes.register("moe-ind")(
    Recipe(
        name="moe-ind",
        architecture="qwen3_moe",
        model={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 64,
        },
        seed=0,
        about="A Qwen3-MoE in which one expert writes the massive dim of BOS; without it the sink is gone.",
    )
)
