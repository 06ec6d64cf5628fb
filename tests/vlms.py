"""Tiny random vision-language models of every class whose tokens sinklens lays out, with their real processors.

The processors are transformers' own image processors and processor classes; only the tokenizer is made here. Sizes are
small and mostly odd on purpose: rows and columns differ, and no two numbers of a layout are equal by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sinklens.models.processors import without_videos
from tests.families import GQA, HEAD_DIM, WINDOW, redraw

SPECIALS = (
    "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|vision_start|>",
    "<|vision_end|>", "<img>", "</img>", "<boi>", "<eoi>",
)  # fmt: skip
ROLES = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["how many things are in the picture ? there are two red and three blue things, and a dog."] * 20


def tokenizer(*, bos: bool = True) -> Any:
    """Byte-level BPE with every special token that a processor may ask for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIALS.index("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIALS[3:]),
        extra_special_tokens=ROLES,
    )


TOKEN = {name: index for index, name in enumerate(SPECIALS)}


def _hf() -> Any:
    import transformers

    return transformers


def _pictures_only(name: str) -> Any:
    return without_videos(getattr(_hf(), name))


TEXT: dict[str, Any] = {
    **GQA,
    "pad_token_id": TOKEN["<pad>"],
    "bos_token_id": TOKEN["<bos>"],
    "eos_token_id": TOKEN["<eos>"],
    "max_position_embeddings": 4096,
}
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
IMAGE = {"image_token_index": TOKEN["<image>"]}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class Vlm:
    """A class of models.

    Attributes:
        make: Config and model, without weights worth having.
        process: The processor around a tokenizer.
        grey: Value in 0 to 1 that the image processor turns into about 0.
        mark: What stands for a picture in a text.
    """

    make: Callable[[], Any]
    process: Callable[[Any], Any]
    mark: str = "<image>"
    bos: bool = True
    note: str = ""
    features: dict[str, Any] = field(default_factory=dict)


def _clip(size: int, patch: int) -> dict[str, Any]:
    return {"model_type": "clip_vision_model", **VISION, "image_size": size, "patch_size": patch}


def _siglip(size: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        **VISION,
        "image_size": size,
        "patch_size": patch,
        "vision_use_head": False,
    }


def _llama() -> dict[str, Any]:
    return {"model_type": "llama", **TEXT}


def _llava(strategy: str = "default") -> Any:
    config = _hf().LlavaConfig(
        text_config=_llama(), vision_config=_clip(40, 8), **IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    return _hf().LlavaForConditionalGeneration(config)


def _padded_processor(tokens: Any) -> Any:
    """As LLaVA was trained: the picture in the middle of a square."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    size = {"height": 40, "width": 40}
    pictures = LlavaImageProcessorPil(do_pad=True, size=size, crop_size=size)
    return _hf().LlavaProcessor(
        pictures,
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _with_class_token(tokens: Any) -> Any:
    made = _llava_processor(tokens)
    made.vision_feature_select_strategy = "full"
    return made


def _llava_processor(tokens: Any) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    return _hf().LlavaProcessor(
        pictures,
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def _next() -> Any:
    config = _hf().LlavaNextConfig(
        text_config=_llama(), vision_config=_clip(32, 8), **IMAGE, image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return _hf().LlavaNextForConditionalGeneration(config)


def _next_processor(tokens: Any) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    return _hf().LlavaNextProcessor(
        pictures,
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


MANY = [[32 * i, 32 * j] for i in range(1, 5) for j in range(1, 5)]


def _onevision() -> Any:
    config = _hf().LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT}, vision_config=_siglip(32, 8), **IMAGE,
        video_token_index=TOKEN["<video>"], image_grid_pinpoints=MANY, vision_aspect_ratio="anyres_max_3",
    )  # fmt: skip
    return _hf().LlavaOnevisionForConditionalGeneration(config)


def _onevision_processor(tokens: Any) -> Any:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    pictures = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=MANY)
    return _pictures_only("LlavaOnevisionProcessor")(
        pictures, tokens, num_image_tokens=16, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
    )  # fmt: skip


QWEN_IDS = {
    "image_token_id": TOKEN["<image>"],
    "video_token_id": TOKEN["<video>"],
    "vision_start_token_id": TOKEN["<|vision_start|>"],
    "vision_end_token_id": TOKEN["<|vision_end|>"],
}
QWEN_VISION: dict[str, Any] = {"depth": 3, "num_heads": 3, "patch_size": 4, "spatial_merge_size": 2}


def _qwen(name: str, text: dict[str, Any] | None = None, **vision: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(_hf(), f"{name}Config")(
            text_config={**TEXT, "rope_parameters": MROPE, **(text or {})},
            vision_config={**QWEN_VISION, **vision},
            **QWEN_IDS,
        )
        return getattr(_hf(), f"{name}ForConditionalGeneration")(config)

    return make


def _qwen_processor(name: str) -> Callable[[Any], Any]:
    def make(tokens: Any) -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        pictures = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 60}
        )
        return _pictures_only(name)(pictures, tokens)

    return make


def _internvl() -> Any:
    config = _hf().InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [4, 4]},
        image_token_id=TOKEN["<image>"], image_seq_length=16, downsample_ratio=0.5,
    )  # fmt: skip
    return _hf().InternVLForConditionalGeneration(config)


def _internvl_processor(tokens: Any) -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    pictures = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6)
    return _pictures_only("InternVLProcessor")(pictures, tokens, image_seq_length=16)


def _gemma3() -> Any:
    text = {**TEXT, "head_dim": HEAD_DIM, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
    config = _hf().Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"] * 2},
        vision_config=_siglip(32, 4), mm_tokens_per_image=4, boi_token_index=TOKEN["<boi>"],
        eoi_token_index=TOKEN["<eoi>"], **IMAGE,
    )  # fmt: skip
    return _hf().Gemma3ForConditionalGeneration(config)


def _gemma3_processor(tokens: Any) -> Any:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return _hf().Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokens, image_seq_length=4
    )


def _paligemma() -> Any:
    config = _hf().PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "head_dim": HEAD_DIM},
        vision_config={**_siglip(40, 8), "projection_dim": TEXT["hidden_size"]}, **IMAGE,
        projection_dim=TEXT["hidden_size"],
    )  # fmt: skip
    return _hf().PaliGemmaForConditionalGeneration(config)


def _paligemma_processor(tokens: Any) -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pictures: Any = SiglipImageProcessorPil(size={"height": 40, "width": 40})
    pictures.image_seq_length = 25
    return _hf().PaliGemmaProcessor(pictures, tokens)


VLMS: dict[str, Vlm] = {
    "llava": Vlm(_llava, _llava_processor),
    "llava_next": Vlm(_next, _next_processor),
    "llava_onevision": Vlm(_onevision, _onevision_processor, bos=False),
    "qwen2_vl": Vlm(
        _qwen("Qwen2VL", embed_dim=48, hidden_size=64, mlp_ratio=2),
        _qwen_processor("Qwen2VLProcessor"),
        bos=False,
    ),
    "qwen2_5_vl": Vlm(
        _qwen(
            "Qwen2_5_VL",
            hidden_size=48,
            intermediate_size=80,
            out_hidden_size=64,
            window_size=24,
            fullatt_block_indexes=[1],
        ),
        _qwen_processor("Qwen2_5_VLProcessor"),
        bos=False,
    ),
    "qwen3_vl": Vlm(
        _qwen(
            "Qwen3VL",
            {"head_dim": HEAD_DIM},
            hidden_size=48,
            intermediate_size=80,
            out_hidden_size=64,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        _qwen_processor("Qwen3VLProcessor"),
        bos=False,
    ),
    "internvl": Vlm(_internvl, _internvl_processor, bos=False),
    "gemma3": Vlm(_gemma3, _gemma3_processor, mark="<boi>"),
    "paligemma": Vlm(_paligemma, _paligemma_processor),
}


VARIANTS: dict[str, Vlm] = {
    "padded to a square": Vlm(_llava, _padded_processor),
    "class token kept": Vlm(lambda: _llava("full"), _with_class_token),
}
"""Settings of the same classes that lay pictures out in another way."""
EVERY = {**VLMS, **VARIANTS}


def build(name: str, seed: int = 0) -> Any:
    """A tiny random model of a class in eval mode; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EVERY[name].make()
        redraw(model, torch.Generator().manual_seed(seed))
    return model.eval()


def processor(name: str) -> Any:
    """The processor of a class, with a chat template."""
    vlm = EVERY[name]
    made = vlm.process(tokenizer(bos=vlm.bos))
    made.chat_template = CHAT.replace("MARK", vlm.mark)
    return made
