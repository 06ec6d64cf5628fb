"""Each way a model can be unusable has its own message, hint and exit code, and at most four lines."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from sinklens.core.errors import ModelError, ResourceError, SinklensError
from sinklens.models.catalog import Source
from sinklens.models.failures import explain
from sinklens.models.opening import describe_model, open_model
from tests.families import FAMILIES, build, save_with_tokenizer, tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_with_tokenizer(build("llama"), str(folder))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refusal(spec: Any, **options: Any) -> SinklensError:
    with pytest.raises(SinklensError) as caught:
        open_model(spec, device="cpu", **options)
    message = str(caught.value)
    assert len(message.splitlines()) <= 4
    assert "Traceback" not in message
    return caught.value


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in {**config, **changes}.items() if value is not None})
    )


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(folder: Path, size: int) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:size] if size >= 0 else raw + b"\0" * -size)


def corrupt_header(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[8:40] = b"x" * 32
    (folder / WEIGHTS).write_bytes(raw)


def lose_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    build("llama").save_pretrained(folder, max_shard_size="200KB")
    next(folder.glob("model-00002*")).unlink()


def damage_index(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def put(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value

    return lambda folder: edit_weights(folder, change)


def wrong_shape(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))


CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        ["has no config.json", "found: ", "save_pretrained"],
    ),
    "adapter": (adapter, ["an adapter (LoRA), not a model", "merge_and_unload"]),
    "config not json": (lambda f: (f / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "config not an object": (lambda f: (f / "config.json").write_text("[]"), ["not a JSON object"]),
    "no model type": (lambda f: edit_config(f, model_type=None), ["has no model_type"]),
    "unknown family": (
        lambda f: edit_config(f, model_type="llamma"),
        ["'llamma'", "does not know", "'llama'"],
    ),
    "remote code": (
        lambda f: edit_config(f, model_type="own", auto_map={"AutoConfig": "own.Config"}),
        ["needs its own Python code", "--trust-remote-code"],
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ["no weights", WEIGHTS, "git lfs"]),
    "missing shard": (lose_shard, ["1 of ", "missing", "model-00002-of-"]),
    "damaged index": (damage_index, ["model.safetensors.index.json", "damaged"]),
    "truncated data": (lambda f: truncate(f, 300_000), [WEIGHTS, "truncated", "the file has 300,000"]),
    "truncated header": (lambda f: truncate(f, 900), [WEIGHTS, "truncated", "900 bytes"]),
    "truncated to five bytes": (lambda f: truncate(f, 5), [WEIGHTS, "truncated", "5 bytes"]),
    "empty file": (lambda f: truncate(f, 0), [WEIGHTS, "truncated", "0 bytes"]),
    "too long": (lambda f: truncate(f, -17), [WEIGHTS, "too long"]),
    "corrupt header": (corrupt_header, [WEIGHTS, "corrupt", "header"]),
    "lfs pointer": (
        lambda f: (f / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        [WEIGHTS, "Git LFS pointer", "git lfs pull"],
    ),
    "no tokenizer": (no_tokenizer, ["has no tokenizer", "tokenizer.json"]),
    "NaN": (put(float("nan")), ["NaN or infinity", "1 tensors", "model.layers.2.mlp.up_proj.weight"]),
    "infinity": (put(float("-inf")), ["NaN or infinity", "model.layers.2.mlp.up_proj.weight"]),
    "more layers than weights": (
        lambda f: edit_config(f, num_hidden_layers=5),
        ["9 parameters are missing", "model.layers.4.", "belong together"],
    ),
    "wrong shape": (wrong_shape, ["The weights of", "cannot be used"]),
    "contradiction": (lambda f: edit_config(f, num_attention_heads=7), ["The config of", "not a multiple"]),
    "unbuildable": (lambda f: edit_config(f, hidden_act="nope"), ["The config of", "cannot be used", "nope"]),
    "encoder-decoder": (
        lambda f: edit_config(f, model_type="t5", architectures=None),
        ["t5", "encoder-decoder"],
    ),
    "no attention": (
        lambda f: edit_config(f, model_type="mamba", architectures=None),
        ["mamba", "no softmax attention", "MambaMixer"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_folder(case: str, folder: Path) -> None:
    damage, words = CASES[case]
    damage(folder)
    error = refusal(folder)
    assert isinstance(error, ModelError)
    assert error.exit_code == 3
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    "case", ["no config", "unknown family", "no weights", "truncated data", "no attention"]
)
def test_description_refuses_the_same(case: str, folder: Path) -> None:
    damage, words = CASES[case]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        describe_model(folder)
    assert all(word in str(caught.value) for word in words)


def test_the_messages_differ() -> None:
    assert len({tuple(words) for _, words in CASES.values()}) == len(CASES)


def test_nan_in_memory_names_the_tensors() -> None:
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[7] = float("nan")
    error = refusal_in_memory(model)
    assert "4 tensors" in str(error)
    assert "model.layers.0.input_layernorm.weight" in str(error)
    assert "..." in str(error)


def refusal_in_memory(model: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        open_model(model, tokenizer=tokenizer())
    return caught.value


def test_the_cause_is_kept(folder: Path) -> None:
    wrong_shape(folder)
    assert refusal(folder).__cause__ is not None


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("how", ["asked for", "in the config"])
def test_quantised_without_its_library(how: str, folder: Path) -> None:
    options = {"quantization": "4bit"} if how == "asked for" else {}
    if not options:
        edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    error = refusal(folder, **options)
    assert error.exit_code == 3
    assert "library that is not installed" in str(error)
    assert "bitsandbytes" in str(error)


def test_a_random_thing_is_no_model() -> None:
    assert "cannot be opened from a dict" in str(refusal({"a": 1}))
    assert "Linear is not a transformers model" in str(refusal_in_memory(torch.nn.Linear(3, 5)))


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_if_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    (folder / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(folder, model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=classes)
    assert "--trust-remote-code" in str(refusal(folder))
    opened = open_model(folder, device="cpu", trust_remote_code=True)
    assert type(opened.module).__name__ == "OwnForCausalLM"
    assert opened.anatomy.main == open_model(build("llama")).anatomy.main


def response(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example/x"))


def answer(kind: str, status: int) -> OSError:
    """As transformers raises it: an OSError from the hub's own error."""
    error = OSError("something long\nin two lines")
    try:
        error.__cause__ = getattr(errors, kind)("no", response=response(status))
    except TypeError:
        error.__cause__ = getattr(errors, kind)("no")
    return error


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("GatedRepoError", 403, ["is gated", "hf auth login", "huggingface.co/org/name"]),
        ("RepositoryNotFoundError", 404, ["no model 'org/name' on the hub", "private", "HF_TOKEN"]),
        ("RevisionNotFoundError", 404, ["no revision 'v9'", "tree/main"]),
        ("LocalEntryNotFoundError", 404, ["not on this machine", "hf download org/name"]),
        ("OfflineModeIsEnabled", 0, ["HF_HUB_OFFLINE is set"]),
        ("RemoteEntryNotFoundError", 404, ["lacks the files of its weights"]),
    ],
)
def test_answers_of_the_hub(
    kind: str, status: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "OfflineModeIsEnabled":
        monkeypatch.setattr("sinklens.models.failures._is_offline", lambda: False)
    error = explain(answer(kind, status), Source("org/name", "org/name", "v9"), "weights")
    assert isinstance(error, ModelError)
    for word in words:
        assert word in str(error)


def test_offline_hub_model_that_is_not_cached() -> None:
    error = refusal("no-such-org/no-such-model")
    assert error.exit_code == 3
    assert "HF_HUB_OFFLINE is set" in str(error)
    assert "hf download no-such-org/no-such-model" in str(error)


def test_out_of_memory_has_its_own_exit_code() -> None:
    error = explain(MemoryError(), Source("org/name", "org/name"), "weights")
    assert isinstance(error, ResourceError)
    assert error.exit_code == 4
    assert "--dtype bf16" in str(error)


def test_families_are_refused_before_weights_are_read(folder: Path) -> None:
    """The weights are of no use to this config, and are not looked at: the family is what is said."""
    (folder / WEIGHTS).unlink()
    edit_config(folder, model_type="mamba", architectures=None)
    assert "no softmax attention" in str(refusal(folder))


def test_every_promised_family_has_a_class_that_opens() -> None:
    """No family of the table is refused from its config alone."""
    from sinklens.models.loading import without_weights

    for name in FAMILIES:
        model = FAMILIES[name].make()
        model.config.architectures = [type(model).__name__]
        assert type(without_weights(model.config)) is type(model)
