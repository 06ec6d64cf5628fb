"""Writes the golden files anew, where a format's library is at hand; nothing else needs this.

pip install --no-deps --target libraries bitsandbytes==0.50.2 auto-gptq==0.7.1 compressed-tensors==0.20.1 loguru
pip install --no-deps --target older compressed-tensors==0.9.4
pip download --no-deps --no-binary :all: autoawq==0.2.9 && tar xzf autoawq-0.2.9.tar.gz
PYTHONPATH=libraries:autoawq-0.2.9:. python -m tests.packed.golden.make bitsandbytes (gptq, awq, compressed)
PYTHONPATH=older:. python -m tests.packed.golden.make compressed_order
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .compressed import COMPRESSED

Made = Iterator[tuple[str, dict[str, Tensor], Tensor]]


def bitsandbytes() -> Made:
    """bitsandbytes 0.50.2. Its operation in torch reads the weights: the kernel for processors of that version takes
    scales of other blocks where rows are no multiple of a block (values of a 3 x 96 weight in blocks of 64 were off by
    0.8 to 1.6 instead of 0.3 to 0.4)."""
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]
    from bitsandbytes.backends.default import ops  # pyright: ignore[reportMissingImports]

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for shape, size in (((7, 9), 64), ((12, 77), 64), ((4, 320), 128)):
                if nested and size == 128 and kind == "nf4":
                    shape, size = (260, 65), 64  # more blocks than one nested block holds
                codes, state = functional.quantize_4bit(
                    torch.randn(shape), blocksize=size, quant_type=kind, compress_statistics=nested
                )
                held = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
                absmax = state.absmax
                if nested:
                    absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
                weight = ops._dequantize_4bit_compute(
                    codes.reshape(-1), absmax, state.code, size, shape, torch.float32
                )
                name = f"{kind}{'-nested' if nested else ''}-{shape[0]}x{shape[1]}-{size}"
                yield name, {**held, "weight": codes}, weight
    codes, largest, _ = functional.int8_vectorwise_quant(torch.randn(13, 29).half())
    yield "int8", {"weight": codes, "SCB": largest}, functional.int8_vectorwise_dequant(codes, largest)


def _file(package: str, path: str) -> Any:
    """A file of a package as a module, without what the package itself imports."""
    folder = (found := importlib.util.find_spec(package)) and found.submodule_search_locations
    spec = importlib.util.spec_from_file_location("alone", Path((folder or [""])[0]) / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _scales(outputs: int, groups: int, bits: int, low: int) -> tuple[Tensor, Tensor]:
    """Scales, and zero points from `low` on, by output and group."""
    return 0.01 + torch.rand(outputs, groups), torch.randint(low, 2**bits, (outputs, groups))


def gptq() -> Made:
    """AutoGPTQ 0.7.1: `qlinear_cuda.QuantLinear` packs, and multiplies a unit matrix with what it packed."""
    cls = _file("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    for bits in (2, 3, 4, 8):
        for size, act in ((32, False), (32, True), (-1, False)):
            inputs, outputs = 64, 32
            groups = 1 if size == -1 else inputs // size
            scales, zeros = _scales(outputs, groups, bits, 1)
            group_of = torch.arange(inputs) // (inputs // groups)
            group_of = (group_of[torch.randperm(inputs)] if act else group_of).to(torch.int32)
            linear = torch.nn.Linear(inputs, outputs, bias=False).half()
            codes = torch.randint(0, 2**bits, (outputs, inputs))
            half = scales.half().float()
            linear.weight.data = ((codes - zeros[:, group_of.long()]) * half[:, group_of.long()]).half()
            layer = cls(bits, size, inputs, outputs, bias=False, weight_dtype=torch.float16)
            layer.pack(linear, half, zeros.float(), group_of)
            held = {key: value for key, value in layer.state_dict().items() if key != "bias"}
            name = f"{bits}-{size}{'-act' if act else ''}"
            yield name, held, layer(torch.eye(inputs, dtype=torch.float16)).T


def awq() -> Made:
    """AutoAWQ 0.2.9: `WQLinear_GEMM.from_linear` packs, `dequantize_gemm` reads."""
    folder = Path(
        (((spec := importlib.util.find_spec("awq")) and spec.submodule_search_locations) or [""])[0]
    )
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package  # without what they import
    gemm = importlib.import_module("awq.modules.linear.gemm")
    read = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    for inputs, outputs, size in ((48, 32, 16), (32, 64, 32)):
        scales, zeros = _scales(outputs, inputs // size, 4, 0)
        group_of, half = torch.arange(inputs) // size, scales.half().float()
        linear = torch.nn.Linear(inputs, outputs, bias=False).half()
        codes = torch.randint(0, 16, (outputs, inputs))
        linear.weight.data = ((codes - zeros[:, group_of]) * half[:, group_of]).half()
        given = half.T.contiguous(), zeros.float().T.contiguous()
        layer = gemm.WQLinear_GEMM.from_linear(linear, 4, size, scales=given[0].half(), zeros=given[1])
        held = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
        yield f"{inputs}x{outputs}-{size}", held, read(*held.values(), 4, size).T


def compressed() -> Made:
    """compressed-tensors 0.20.1: its compressors write and read."""
    from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]

    for name, (layout, args, rows, inputs) in COMPRESSED.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        size, block = args.get("group_size") or 0, args.get("block_structure") or (1, 1)
        extent = {
            "tensor": (1,), "channel": (rows, 1), "group": (rows, inputs // max(1, size)),
            "block": (-(-rows // block[0]), -(-inputs // block[1])),
        }[args["strategy"]]  # fmt: skip
        scale = (0.01 + 0.05 * torch.rand(extent)).bfloat16()
        given = {"weight": torch.randn(rows, inputs).bfloat16(), "weight_scale": scale}
        if not args["symmetric"]:
            given["weight_zero_point"] = torch.randint(-4, 4, extent).to(torch.int8)
        compressor = BaseCompressor.get_value_from_registry(layout)
        held = compressor.compress(given, scheme)
        yield name, held, compressor.decompress(held, scheme)["weight"]


def compressed_order() -> Made:
    """compressed-tensors 0.9.4, which still knew groups in the order of activations."""
    from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationArgs  # pyright: ignore[reportMissingImports]

    args = {**COMPRESSED["pack-4-group"][1], "actorder": "group"}
    group_of = (torch.arange(48) // 12)[torch.randperm(48)].to(torch.int32)
    held = BaseCompressor.load_from_registry("pack-quantized").compress_weight(
        weight=torch.randn(7, 48).bfloat16(), scale=(scale := (0.05 + torch.rand(7, 4)).bfloat16()), zero_point=None,
        g_idx=group_of, quantization_args=QuantizationArgs(**args),
    )  # fmt: skip
    held |= {"weight_scale": scale, "weight_g_idx": group_of}
    reader = BaseCompressor.load_from_registry("pack-quantized")
    yield "pack-4-group-order", held, reader.decompress_weight(held, QuantizationArgs(**args))


MAKERS: dict[str, Callable[[], Made]] = {
    made.__name__: made for made in (bitsandbytes, gptq, awq, compressed, compressed_order)
}


def main(name: str) -> None:
    torch.manual_seed(11)
    held: dict[str, Any] = {}
    for case, stored, weight in MAKERS[name]():
        held |= {f"{case}/in/{key}": value.clone().contiguous() for key, value in stored.items()}
        held[f"{case}/out"] = weight.clone().contiguous()
    path = Path(__file__).with_name(f"{name}.safetensors")
    save_file(held, path)
    print(f"{path.name}: {len(held)} tensors, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
