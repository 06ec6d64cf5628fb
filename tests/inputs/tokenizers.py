"""Tiny tokenizers built in memory, one per way of treating the first token."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["the quick brown fox jumps over the lazy dog", "attention sinks and massive activations"] * 20
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_level(*, adds_bos: bool = False, bos: bool = True, template: str | None = None) -> Any:
    """Byte-level BPE in the manner of Llama 3 (`adds_bos`), GPT-2, or Qwen (`bos=False`)."""
    special = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", *(["<bos>"] if bos else [])]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<bos> $A",
            pair="<bos> $A <bos> $B",
            special_tokens=[("<bos>", core.token_to_id("<bos>"))],
        )
    names = {"bos_token": "<bos>"} if bos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **names,
    )
    tokenizer.chat_template = template
    return tokenizer


def word_piece() -> Any:
    """BERT's manner: `[CLS] text [SEP]`, no BOS, no EOS."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "quick", "brown", "fox", "jump", "##s", "over"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


def sentence_piece() -> Any:
    """Llama 2's manner: `▁` for spaces and `<0xE2>` for bytes that are in no piece."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁fox", "▁"]
    core = Tokenizer(
        models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0, byte_fallback=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.ByteFallback(), decoders.Metaspace()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
