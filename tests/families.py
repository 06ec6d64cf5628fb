"""Tiny random models of every family that sinklens promises to read, and batches to feed them.

Random means random: every parameter is redrawn with unit gain, biases, norms and learned sinks too, so that
attention is far from uniform and a forgotten bias or scale is seen. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, WINDOW = 320, 64, 4, 4, 2, 16, 8, 3, 8
PAD, BOS, EOS = 0, 1, 2
IMAGE, VISION_START, VISION_END, VIDEO = 310, 311, 312, 313
"""Ids above the tokenizer's 300 byte-level pieces, used by the vision-language families."""


@dataclass(frozen=True)
class Family:
    """What a tiny model of this family is, as an oracle for tests.

    Attributes:
        make: Builds the config and the model (without weights worth having; `build` draws them).
        kind: `text`, `encoder` (bidirectional text), `vision`, `clip` (text and vision), `vlm`.
        towers: Tower names, main tower first.
        layers: Blocks per tower, in the order of `towers`.
        heads, kv_heads: Of the main tower.
        window: Sliding window in tokens of at least one layer, or None.
        dense_layers: MoE only: the leading blocks without experts.
        padding: Whether batches may be padded (vision batches are not).
    """

    make: Callable[[], Any]
    kind: str = "text"
    towers: tuple[str, ...] = ("text",)
    layers: tuple[int, ...] = (LAYERS,)
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    causal: bool = True
    window: int | None = None
    moe: bool = False
    dense_layers: int = 0
    shared_experts: bool = False
    learned_sinks: bool = False
    softcap: float | None = None
    post_ln: bool = False
    routed: bool = True
    padding: bool = True


def _hf() -> Any:
    import transformers

    return transformers


TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
GQA: dict[str, Any] = {**TEXT, "num_key_value_heads": KV_HEADS}
MOE: dict[str, Any] = {**GQA, "num_experts_per_tok": TOP_K}
PIXELS: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}


def _lm(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A causal language model by the prefix of its classes."""
    return lambda: getattr(_hf(), f"{name}ForCausalLM")(getattr(_hf(), f"{name}Config")(**config))


def _model(name: str, config_name: str | None = None, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(_hf(), name)(
        getattr(_hf(), config_name or name.replace("Model", "Config"))(**config)
    )


def _deepseek(name: str, **extra: Any) -> Callable[[], nn.Module]:
    config = {**TEXT, "num_key_value_heads": HEADS, "moe_intermediate_size": 40, "n_routed_experts": EXPERTS}
    mla = {"kv_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    return _lm(name, **config, **mla, num_experts_per_tok=TOP_K, first_k_dense_replace=1, **extra)


def _gpt_oss() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return _hf().GptOssForCausalLM(
        _hf().GptOssConfig(
            **MOE, head_dim=HEAD_DIM, num_local_experts=EXPERTS, sliding_window=WINDOW, rope_parameters=rope
        )
    )


def _clip() -> nn.Module:
    text = {**TEXT, "num_hidden_layers": 2}
    return _hf().CLIPModel(_hf().CLIPConfig(text_config=text, vision_config=PIXELS, projection_dim=32))


def _siglip() -> nn.Module:
    text = {**TEXT, "num_hidden_layers": 2, "max_position_embeddings": 64, "projection_size": 48}
    return _hf().SiglipModel(_hf().SiglipConfig(text_config=text, vision_config=PIXELS))


def _llava() -> nn.Module:
    config = _hf().LlavaConfig(
        text_config={"model_type": "llama", **GQA},
        vision_config={"model_type": "clip_vision_model", **PIXELS},
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return _hf().LlavaForConditionalGeneration(config)


QWEN_VISION: dict[str, Any] = {"depth": 3, "num_heads": 3, "patch_size": 4, "spatial_merge_size": 2}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _qwen_vl(name: str, text: dict[str, Any] | None = None, **vision: Any) -> Callable[[], nn.Module]:
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

    def make() -> nn.Module:
        config = getattr(_hf(), f"{name}Config")(
            text_config={**GQA, "rope_parameters": mrope, **(text or {})},
            vision_config={**QWEN_VISION, **vision},
            **QWEN_IDS,
        )
        return getattr(_hf(), f"{name}ForConditionalGeneration")(config)

    return make


def _gemma3_vlm() -> nn.Module:
    text = {**GQA, "head_dim": HEAD_DIM, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
    config = _hf().Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"] * 2},
        vision_config={**PIXELS, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        image_token_index=IMAGE,
    )
    return _hf().Gemma3ForConditionalGeneration(config)


GEMMA: dict[str, Any] = {**GQA, "head_dim": HEAD_DIM, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
OPT: dict[str, Any] = {
    **{key: value for key, value in TEXT.items() if key != "intermediate_size"},
    "ffn_dim": 96,
}
GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 512,
}
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
BLOOM: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
NEO: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS}
SHARED: dict[str, Any] = {"moe": True, "dense_layers": 1, "shared_experts": True}
MHA: dict[str, Any] = {"kv_heads": HEADS}
BOTH: dict[str, Any] = {"kind": "vlm", "towers": ("text", "vision"), "layers": (LAYERS, 3)}
UNPADDED: dict[str, Any] = {"causal": False, "padding": False}
VISION: dict[str, Any] = {
    "kind": "vision",
    "towers": ("vision",),
    "layers": (3,),
    "heads": 3,
    "kv_heads": 3,
    **UNPADDED,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(_lm("Llama", **GQA)),
    "mistral": Family(_lm("Mistral", **GQA, sliding_window=WINDOW), window=WINDOW),
    "qwen2": Family(_lm("Qwen2", **GQA)),
    "qwen2_window": Family(
        _lm("Qwen2", **GQA, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
        window=WINDOW,
    ),
    "qwen3": Family(_lm("Qwen3", **GQA, head_dim=24)),
    "qwen2_moe": Family(
        _lm(
            "Qwen2Moe",
            **MOE,
            num_experts=EXPERTS,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=56,
            mlp_only_layers=[0],
        ),
        **SHARED,
    ),
    "qwen3_moe": Family(
        _lm("Qwen3Moe", **MOE, head_dim=24, num_experts=EXPERTS, moe_intermediate_size=40), moe=True
    ),
    "mixtral": Family(_lm("Mixtral", **MOE, num_local_experts=EXPERTS), moe=True),
    "olmoe": Family(_lm("Olmoe", **MOE, num_experts=EXPERTS), moe=True),
    "olmo2": Family(_lm("Olmo2", **GQA)),
    "phi3": Family(_lm("Phi3", **GQA)),
    "gemma2": Family(_lm("Gemma2", **GEMMA, attn_logit_softcapping=3.0), window=WINDOW, softcap=3.0),
    "gemma3_text": Family(
        _model(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **GEMMA,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
        ),
        window=WINDOW,
    ),
    "gpt_oss": Family(_gpt_oss, window=WINDOW, moe=True, learned_sinks=True),
    "gpt2": Family(_model("GPT2LMHeadModel", "GPT2Config", **GPT), **MHA),
    "gpt_neox": Family(_lm("GPTNeoX", **TEXT, rotary_pct=0.25), **MHA),
    "opt": Family(_lm("OPT", **OPT), **MHA),
    "opt_post_ln": Family(
        _lm("OPT", **OPT, do_layer_norm_before=False, word_embed_proj_dim=40), post_ln=True, **MHA
    ),
    "deepseek_v2": Family(_deepseek("DeepseekV2", q_lora_rank=None, n_shared_experts=1), **SHARED, **MHA),
    "deepseek_v3": Family(
        _deepseek("DeepseekV3", q_lora_rank=24, n_shared_experts=2, n_group=4, topk_group=2), **SHARED, **MHA
    ),
    "bloom": Family(_lm("Bloom", **BLOOM, pad_token_id=PAD), routed=False, **MHA),
    "falcon": Family(
        _lm("Falcon", **SMALL, num_kv_heads=KV_HEADS, new_decoder_architecture=True, pad_token_id=PAD),
        routed=False,
    ),
    "falcon_alibi": Family(
        _lm(
            "Falcon", **SMALL, multi_query=True, parallel_attn=False, bias=True, alibi=True, pad_token_id=PAD
        ),
        routed=False,
        kv_heads=1,
    ),
    "gptj": Family(_lm("GPTJ", **GPT, rotary_dim=8), routed=False, **MHA),
    "codegen": Family(_lm("CodeGen", **GPT, rotary_dim=8), routed=False, **MHA),
    "gpt_neo": Family(
        _lm(
            "GPTNeo",
            **NEO,
            window_size=WINDOW,
            attention_types=[[["global", "local"], 2]],
            max_position_embeddings=512,
        ),
        routed=False,
        window=WINDOW,
        **MHA,
    ),
    "mpt": Family(
        _lm("Mpt", vocab_size=VOCAB, d_model=HIDDEN, n_layers=LAYERS, n_heads=HEADS), routed=False, **MHA
    ),
    "bert": Family(_model("BertModel", **TEXT), kind="encoder", causal=False, post_ln=True, **MHA),
    "roberta": Family(_model("RobertaModel", **TEXT), kind="encoder", causal=False, post_ln=True, **MHA),
    "bert_mlm": Family(
        _model("BertForMaskedLM", "BertConfig", **TEXT), kind="encoder", causal=False, post_ln=True, **MHA
    ),
    "vit": Family(_model("ViTModel", **PIXELS), **VISION),
    "dinov2": Family(_model("Dinov2Model", **PIXELS), **VISION),
    "dinov2_registers": Family(_model("Dinov2WithRegistersModel", **PIXELS, num_register_tokens=3), **VISION),
    "dinov3": Family(_model("DINOv3ViTModel", **PIXELS, num_register_tokens=3), **VISION),
    "clip_vision": Family(_model("CLIPVisionModel", **PIXELS), **VISION),
    "siglip_vision": Family(_model("SiglipVisionModel", **PIXELS), **VISION),
    "clip": Family(_clip, kind="clip", towers=("text", "vision"), layers=(2, 3), **MHA),
    "siglip": Family(_siglip, kind="clip", towers=("text", "vision"), layers=(2, 3), **UNPADDED, **MHA),
    "llava": Family(_llava, **BOTH),
    "qwen2_vl": Family(_qwen_vl("Qwen2VL", embed_dim=48, hidden_size=HIDDEN, mlp_ratio=2), **BOTH),
    "qwen2_5_vl": Family(
        _qwen_vl(
            "Qwen2_5_VL",
            hidden_size=48,
            intermediate_size=80,
            out_hidden_size=HIDDEN,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        **BOTH,
    ),
    "qwen3_vl": Family(
        _qwen_vl(
            "Qwen3VL",
            {"head_dim": HEAD_DIM},
            hidden_size=48,
            intermediate_size=80,
            out_hidden_size=HIDDEN,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        **BOTH,
    ),
    "gemma3": Family(_gemma3_vlm, window=WINDOW, **BOTH),
}


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of `family` in eval mode; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family].make()
        redraw(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


@torch.no_grad()
def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Unit-gain matrices, lively embeddings; vectors (biases, norms, sinks) leave their trivial start."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_((0.5 if name.endswith("sinks") else 0.15) * noise)
        elif id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        else:
            fan_in = (
                parameter[0].numel() if parameter.ndim == 2 or parameter.ndim > 3 else parameter.shape[-1]
            )
            parameter.copy_(noise / fan_in**0.5)


def inputs(
    family: str, *, batch: int = 2, length: int = 13, padding: str | None = None, seed: int = 1
) -> dict[str, Tensor]:
    """Keyword arguments of one forward pass.

    Args:
        length: Tokens of the longest row; vision-language prompts have the image of each row on top.
        padding: `left`, `right`, or None for rows of equal length. With padding, row i is 3 i tokens shorter.
    """
    spec, generator = FAMILIES[family], torch.Generator().manual_seed(seed)
    if spec.kind == "vision":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    if spec.kind == "vlm":
        return _vlm_inputs(family, batch, length, padding, generator)
    batch_of = _tokens(batch, length, padding if spec.padding else None, generator)
    if spec.kind == "clip":
        batch_of["input_ids"][:, -1] = EOS if padding != "right" else batch_of["input_ids"][:, -1]
        batch_of["pixel_values"] = torch.randn(batch, 3, 32, 32, generator=generator)
    return batch_of


def _tokens(
    batch: int, length: int, padding: str | None, generator: torch.Generator, prefix: list[int] | None = None
) -> dict[str, Tensor]:
    """Random ids `[batch, length]` after BOS and `prefix`, and their attention mask."""
    ids = torch.full((batch, length), PAD)
    mask = torch.zeros(batch, length, dtype=torch.long)
    for row in range(batch):
        count = length - 3 * row if padding else length
        head = [BOS, *(prefix or [])]
        if count <= len(head):
            raise ValueError(f"length {length} leaves no text in row {row}")
        text = torch.randint(5, 300, (count - len(head),), generator=generator)
        start = length - count if padding == "left" else 0
        ids[row, start : start + count] = torch.cat([torch.tensor(head), text])
        mask[row, start : start + count] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _vlm_inputs(
    family: str, batch: int, length: int, padding: str | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """One image per row after BOS and a start marker, then text; `length` counts text beside the image."""
    grid = torch.tensor([[1, 8, 6]] * batch)
    if family.startswith("qwen"):
        patches = 8 * 6
        n_image = patches // 4
        pixels = torch.randn(batch * patches, 3 * 2 * 4 * 4, generator=generator)
    else:
        n_image = 4 if family == "gemma3" else 16
        pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    prefix = [VISION_START, *[IMAGE] * n_image, VISION_END]
    out = _tokens(batch, length + n_image, padding, generator, prefix)
    is_image = (out["input_ids"] == IMAGE).long()
    out["pixel_values"] = pixels
    if family.startswith("qwen"):
        out["image_grid_thw"] = grid
        out["mm_token_type_ids"] = is_image
    if family == "gemma3":
        out["token_type_ids"] = is_image
    return out


def save_with_tokenizer(model: nn.Module, path: str, *, bos: bool = True) -> None:
    """Saves `model` and a byte-level BPE tokenizer of 300 pieces (BOS first, if `bos`) to a folder."""
    cast(Any, model).save_pretrained(path)
    tokenizer(bos=bos).save_pretrained(path)


def tokenizer(*, bos: bool = True) -> Any:
    """A byte-level BPE tokenizer: any text, 300 ids, BOS by post-processor, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE(byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, and the dog sleeps on."] * 20, trainer
    )
    if bos:
        template = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
        )
        inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    fast = _hf().PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        additional_special_tokens=special[3:]
    )  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast
