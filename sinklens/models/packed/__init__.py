"""Formats of packed weights that streaming dequantises itself, while a block is read, without the format's library.

What is traced are the values that the stored weights stand for, computed in float32 and rounded once to the dtype of
the config (or the one asked for). Activations, keys and values are not quantised, whatever the config says of them.
"""

from . import awq, bitsandbytes, compressed_tensors, gptq
from .weights import Format as Format
from .weights import PackedWeight as PackedWeight

PACKED: dict[str, Format] = {
    module.METHOD: module.FORMAT for module in (bitsandbytes, gptq, awq, compressed_tensors)
}
"""By the config's `quant_method`."""
