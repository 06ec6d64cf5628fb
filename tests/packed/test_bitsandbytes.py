"""bitsandbytes: against what the library itself wrote and read, and against the format written out.

The golden file is of bitsandbytes 0.50.2 (`tests/packed/golden/make.py` says how it was made).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sinklens.cli.main import main
from sinklens.core.errors import ModelError
from tests.streaming.cases import opened

from .bitsandbytes_writer import eight_bit, four_bit
from .golden import golden
from .memory_store import weight_of
from .writers import CASES, packed, set_config, set_tensors

GOLDEN = golden("bitsandbytes")
STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("case", GOLDEN)
def test_as_the_library_does(case: str) -> None:
    parts, expected = GOLDEN[case]
    assert torch.equal(weight_of("bitsandbytes", parts, {}), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "size"), [((7, 9), 64), ((31, 77), 64), ((5, 96), 32)])
def test_as_the_format_is_written_out(
    kind: str, nested: bool, storage: torch.dtype, shape: tuple[int, ...], size: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    parts, meant = four_bit(shape, generator, kind, nested=nested, size=size, storage=storage)
    assert torch.equal(weight_of("bitsandbytes", parts, {}), meant)


def test_eight_bits_row_by_row() -> None:
    parts, meant = eight_bit((11, 17), torch.Generator().manual_seed(3))
    assert torch.equal(weight_of("bitsandbytes", parts, {}), meant)
    del parts["weight_format"]
    assert torch.equal(weight_of("bitsandbytes", parts, {}), meant)


LAYER = "model.layers.2.mlp.up_proj"
ABSMAX, CODES, SCB = f"{LAYER}.weight.absmax", f"{LAYER}.weight", f"{LAYER}.SCB"


def _state(**changed: Any) -> torch.Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 64], **changed}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


BAD = [
    ("bnb-nf4", {ABSMAX: None}, rf"{LAYER}.{STATE} in model.safetensors of .* has no weight.absmax beside it"),
    ("bnb-nf4", {CODES: None}, "has no weight beside it"),
    ("bnb-nf4", {f"{LAYER}.{STATE}": None}, "belongs to a weight that does not say how it was quantised"),
    ("bnb-nf4", {ABSMAX: torch.ones(95)}, rf"{ABSMAX} in .* has the shape \[95\]"),
    ("bnb-nf4", {ABSMAX: torch.ones(96).half()}, "is stored as float16"),
    ("bnb-nf4", {CODES: torch.zeros(3073, 1, dtype=torch.uint8)}, "has 3,073 bytes"),
    ("bnb-nf4", {f"{LAYER}.weight.quant_map": torch.linspace(-1, 1, 16)}, "is not the table of nf4"),
    ("bnb-nf4", {f"{LAYER}.{STATE}": _state(blocksize=0)}, "cannot be read"),
    ("bnb-nf4", {f"{LAYER}.{STATE}": _state(quant_type="fp4")}, "says 'fp4'"),
    ("bnb-nf4", {f"{LAYER}.{STATE}": _state(shape=[64, 96])}, rf"{CODES}, packed in .* has the shape \[64, 96\]"),
    ("bnb-nf4", {f"{LAYER}.{STATE}": torch.zeros(9, dtype=torch.uint8)}, "cannot be read"),
    ("bnb-nf4", {f"{LAYER}.weight.twist": torch.ones(3)}, "weight.twist in .* is not known in this format"),
    ("bnb-nf4", {ABSMAX: torch.full((96,), torch.inf)}, f"{CODES} in .* holds NaN or infinity"),
    ("bnb-int8", {SCB: None}, f"{LAYER}.weight in .* is stored as int8, and no scales belong to it"),
    ("bnb-int8", {SCB: torch.ones(95)}, rf"{SCB} in .* has the shape \[95\]"),
    ("bnb-int8", {f"{LAYER}.weight_format": torch.tensor(1, dtype=torch.uint8)}, "row by row"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "said"), BAD)
def test_bad_files_are_refused_by_tensor(name: str, changed: Any, said: str, tmp_path: Path) -> None:
    whole, _ = packed(name, "llama", tmp_path)
    set_tensors(whole, **changed)
    with pytest.raises(ModelError, match=said):
        opened(whole).blocks.recipes.make(2)


@pytest.mark.parametrize("said", ["twist = 3", f"{LAYER}.{STATE} in model.safetensors"])
def test_plan_and_run_refuse_in_the_same_words(said: str, tmp_path: Path, capsys: Any) -> None:
    whole, _ = packed("bnb-nf4", "llama", tmp_path)
    if "twist" in said:
        set_config(whole, quantization_config={**CASES["bnb-nf4"].config, "twist": 3})
    else:
        set_tensors(whole, **{ABSMAX: None})
    told = []
    capsys.readouterr()
    for more in (("--dry-run",), ("--out", str(tmp_path / "run"))):
        assert main(["profile", "-q", "-m", str(whole), "--stream", "on", "-n", "2", *more]) == 3
        told.append(capsys.readouterr().err)
    assert said in told[0]
    assert told[0] == told[1]


def test_weights_that_are_not_quantised_stay(tmp_path: Path) -> None:
    """And biases beside packed weights are read as they are."""
    whole, _ = packed("bnb-nf4", "gpt2", tmp_path)
    bias = {
        key: value for key, value in load_file(whole / "model.safetensors").items() if key.endswith("bias")
    }
    made = {
        key: value for index in range(3) for key, value in opened(whole).blocks.recipes.make(index).items()
    }
    assert len([key for key in made if key.endswith("bias")]) > 8
    assert all(torch.equal(value, bias[key]) for key, value in made.items() if key in bias)
