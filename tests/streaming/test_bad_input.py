"""Files that go bad while a streamed run is under way, and options that cannot be met: told in words, run kept."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sinklens
from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.pipeline.listener import Silent
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.run import load_run
from sinklens.pipeline.streamed_blocks import choose
from sinklens.tracers.executor import trace
from tests.families import build

from .cases import PLAN, differences, opened, prompts, saved

SETTINGS: dict[str, Any] = {
    "n": 3,
    "seq_len": 32,
    "batch_size": 1,
    "analyzers": ("primary-sinks", "massive-activations"),
}


@pytest.fixture
def folder(tmp_path):
    return saved("llama", tmp_path / "model", shard="130kB")


class Midway(Silent):
    """A listener that does something when a run has come so far."""

    def __init__(self, after, act):
        self.after, self.act, self.count = after, act, 0

    def progress(self, done, total):
        self.count += 1
        if self.count == self.after:
            self.act()


def _shard_of(folder, key):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][key]


KEY = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize("harm", ["missing", "cut off"])
def test_a_shard_that_goes_bad_midway(folder, tmp_path, harm):
    """The error names file and tensor; with the file back, the run goes on where it stopped."""
    shard, copy = _shard_of(folder, KEY), tmp_path / "copy"
    shutil.copy(shard, copy)

    def act():
        if harm == "missing":
            shard.unlink()
        else:
            with shard.open("r+b") as file:
                file.truncate(shard.stat().st_size // 2)

    run = tmp_path / "run"
    with pytest.raises(ModelError) as caught:
        sinklens.profile(str(folder), out=run, stream="on", listener=Midway(2, act), **SETTINGS)
    assert shard.name in str(caught.value)
    assert "model.layers." in str(caught.value)
    assert "--resume" in str(caught.value)
    shutil.copy(copy, shard)
    again = sinklens.profile(resume=run)
    stream = again.trace.manifest["stream"]
    assert stream["times_loaded"][0] == 0
    assert stream["times_loaded"][-1] == 1
    assert stream["bytes_read"] < stream["bytes_stored"]
    whole = sinklens.profile(str(folder), stream="off", verify=False, **SETTINGS)
    assert not differences(whole.trace, again.trace)
    assert again.document["findings"] == whole.document["findings"]
    assert not differences(load_run(run).trace, whole.trace)


def test_a_shard_that_is_written_anew_midway(folder, tmp_path):
    """Blocks of two models make no trace; resumed with the new file, the run is refused."""
    shard, run = _shard_of(folder, KEY), tmp_path / "run"

    def act():
        changed = {key: value * 1.5 for key, value in load_file(shard).items()}
        save_file(changed, shard, metadata={"format": "pt"})

    with pytest.raises(ModelError, match="written anew while it was in use") as caught:
        sinklens.profile(str(folder), out=run, stream="on", listener=Midway(2, act), **SETTINGS)
    assert shard.name in str(caught.value)
    with pytest.raises(DataError, match="the model changed"):
        sinklens.profile(resume=run)


def test_a_resumed_run_keeps_to_what_was_decided(folder, tmp_path):
    """Streaming that memory once asked for stays, even where the model would fit today."""
    run = tmp_path / "run"

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(sinklens.core.errors.InterruptedRun, match="have passed 2 blocks or more"):
        sinklens.profile(str(folder), out=run, stream="on", listener=Midway(8, stop), **SETTINGS)
    assert sinklens.profile(resume=run).trace.manifest["stream"]["times_loaded"] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda t: t[3].__setitem__(5, float("nan")), "holds NaN or infinity"),
        (lambda t: t.resize_(7, 64), "has the shape"),
    ],
)
def test_a_bad_tensor_is_named(tmp_path, harm, said):
    folder = saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    harm(tensors[KEY])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=said) as caught:
        trace(opened(folder), prompts((9,)), PLAN)
    assert KEY in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_a_tensor_that_is_not_there(tmp_path):
    folder = saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[KEY]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 parameter.* missing"):
        opened(folder)


def test_what_cannot_be_streamed_says_so(tmp_path):
    folder = saved("llama", tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"device_map": "auto"}, "device map"),
        ({"backend": "nnsight"}, "another library"),
    ]
    for options, said in cases:
        with pytest.raises(UsageError, match=said):
            choose(str(folder), ProfileOptions(stream="on", **options))
        assert not choose(str(folder), ProfileOptions(**options)).on
    with pytest.raises(UsageError, match="in memory already"):
        choose(build("llama"), ProfileOptions(stream="on"))
    with pytest.raises(UsageError):
        ProfileOptions(stream="yes")
    with pytest.raises(UsageError):
        ProfileOptions(stream_budget="many")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which cannot be read block by block"):
        opened(folder)


def test_a_quantised_checkpoint_is_refused(tmp_path):
    folder = saved("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised \(hqq\), which cannot be streamed"):
        opened(folder)


def test_weights_that_are_on_disk_are_not_rounded(tmp_path):
    from sinklens.mitigations import FakeQuantisation

    model = opened(saved("llama", tmp_path))
    with pytest.raises(ModelError, match="not in memory"), FakeQuantisation()(model):
        pass


@pytest.mark.parametrize(("free", "on"), [(10**12, False), (50_000_000, True)])
def test_auto_streams_what_does_not_fit(tmp_path, monkeypatch, free, on):
    """The plan, the run and its manifest say the same."""
    from sinklens.pipeline import plan, streamed_blocks
    from sinklens.pipeline.plan import predict

    folder = saved("llama", tmp_path / "model")
    monkeypatch.setattr(plan, "available_memory", lambda *_: free)
    monkeypatch.setattr(streamed_blocks, "_small", lambda *_: False)
    options = ProfileOptions(n=2, seq_len=16, analyzers=("massive-activations",), verify=False)
    predicted = predict(str(folder), options)[2]
    run = sinklens.profile(str(folder), options=options)
    assert (predicted.stream is not None) is ("stream" in run.trace.manifest) is on
    if predicted.stream is not None:
        assert run.trace.manifest["stream"]["why"] == predicted.stream.why
        assert "are free" in predicted.stream.why
        assert predicted.weights == predicted.stream.shell + 2 * predicted.stream.block
        assert run.trace.manifest["stream"]["block_bytes"] == predicted.stream.block
        assert run.trace.manifest["stream"]["shell_bytes"] == predicted.stream.shell
