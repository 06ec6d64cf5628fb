"""What GPTQ and AWQ have in common: codes in a `qweight` of int32 words, and tools that write both formats."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .weights import Stored, refuse_content, refuse_setting, whole

CODES = "qweight"
UNTOUCHED = (
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment",
    "damp_percent", "dataset", "desc_act", "exllama_config", "lm_head", "max_input_length", "meta", "method",
    "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "pad_token_id", "sym",
    "tokenizer", "true_sequential",
)  # fmt: skip
"""Settings of how the weights were found and of kernels, and those that the stored tensors say themselves."""


def group_size(name: str, method: str, settings: Mapping[str, Any], key: str = "group_size") -> int:
    """Inputs that have one scale; -1 for all.

    Raises:
        ModelError: It is no size, or words are of another type than those that are read here.
    """
    group = whole(name, method, settings, key)
    if group < 1 and group != -1:
        raise refuse_setting(name, method, "group_size", group, "a size, or -1 for one group")
    if settings.get("pack_dtype") not in (None, "int32"):
        raise refuse_setting(name, method, "pack_dtype", settings["pack_dtype"], "int32")
    return group


def refuse_without_codes(stored: Stored, parts: Collection[str]) -> None:
    """Refuse parts of a packed weight that have no codes beside them.

    Raises:
        ModelError: The first one is named.
    """
    for key in stored.where:
        module, _, part = key.rpartition(".")
        if part in parts and f"{module}.{CODES}" not in stored.where:
            raise refuse_content(
                stored, key, f"has no {CODES} beside it", "The weight that it belongs to is missing."
            )
