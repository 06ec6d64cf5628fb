"""`torchrun -m sinklens profile --stream on`: all processes go through the blocks in step, and find what one finds."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from sinklens.cli.main import main
from sinklens.inputs.spec import Prompt
from sinklens.pipeline import plan, streamed_blocks, together
from sinklens.pipeline.listener import Silent
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.plan import predict
from sinklens.pipeline.streamed_blocks import AT_A_TIME, Choice, choose
from sinklens.tracers.store import RunStore
from sinklens.tracers.streaming.steps import shared_out
from sinklens.tracers.team import Team
from tests.families import save_with_tokenizer

from .test_together import OPTIONS, same_arrays, told, torchrun

STREAMED = (*OPTIONS, "--stream", "on")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Path:
    """A streamed run by one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["profile", "-q", "--out", str(folder), *STREAMED]) == 0
    return folder


def test_two_processes_find_what_one_finds_bit_for_bit(alone: Path, tmp_path: Path) -> None:
    done = torchrun("-m", "sinklens", "profile", "--json", "--out", str(tmp_path / "run"), *STREAMED)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    expected = json.loads((alone / "summary.json").read_text(encoding="utf-8"))
    for part in ("model", "verdict", "checks", "findings"):
        assert document[part] == expected[part]
    assert same_arrays(tmp_path / "run", alone)
    manifest = document["manifest"]
    stream = manifest["stream"]
    assert stream["times_loaded"] == [1] * stream["blocks"]
    assert manifest["processes"]["bytes_read"] == [stream["bytes_stored"]] * 2
    assert {"shards", "streaming"}.isdisjoint(path.name for path in (tmp_path / "run").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_process_is_named_and_the_run_goes_on_at_its_block(
    victim: str, alone: Path, tmp_path: Path
) -> None:
    script, folder = str(Path(__file__).with_name("one_dies.py")), tmp_path / "run"
    done = torchrun(script, "kill", victim, "profile", "--out", str(folder), *STREAMED)
    assert done.returncode != 0
    assert told(done, "ended without a word") == [f"Process {victim} of 2 ended without a word."]
    (saved,) = told(done, "prompts saved")
    assert saved.endswith("0/7 prompts saved; the others have passed 2 blocks or more.")
    assert told(done, f"profile --resume {folder}")
    if victim == "0":
        assert main(["profile", "-q", "--resume", str(folder)]) == 0
    else:
        again = torchrun("-m", "sinklens", "profile", "-q", "--resume", str(folder), processes=3)
        assert again.returncode == 0, again.stderr
    assert same_arrays(folder, alone)
    loaded = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["stream"]["times_loaded"]
    assert loaded[:2] == [0, 0]
    assert set(loaded[2:]) == {1}


@pytest.mark.slow
def test_the_disk_is_read_once_by_all_processes_together(tmp_path: Path) -> None:
    """Although the page cache keeps no block that one of them is done with: the others are no block behind.

    One process has two batches, the other one: without steps between the blocks it would be far ahead, and what it was
    done with had to be fetched again.
    """
    folder = _large_blocks(tmp_path / "model")
    script, out = str(Path(__file__).with_name("forgetful.py")), tmp_path / "run"
    asked = ("--stream", "on", "-n", "6", "--seq-len", "200", "--batch-size", "2", "--no-verify")
    only = ("--analyzers", "primary-sinks", "-q", "--out", str(out))
    done = torchrun(script, "profile", "-m", str(folder), *asked, *only)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    stored, processes = manifest["stream"]["bytes_stored"], manifest["processes"]
    assert processes["bytes_read"] == [stored] * 2
    if None in processes["bytes_from_disk"] or not sum(processes["bytes_from_disk"]):
        pytest.skip("this system does not tell what it fetches from the disk")
    assert 0.98 < sum(processes["bytes_from_disk"]) / stored < 1.05


def _large_blocks(folder: Path) -> Path:
    """A random model of 24 MB, of which no process has read anything."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    save_with_tokenizer(LlamaForCausalLM(config), str(folder))
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return folder


def test_the_plan_counts_every_process_that_has_the_same_memory() -> None:
    options = ProfileOptions(n=4, seq_len=32, stream="on", stream_budget=1000, verify=False)
    one, three = (predict(None, options, count, count)[2] for count in (1, 3))
    assert one.stream is not None
    assert three.stream is not None
    each = one.stream.shell + AT_A_TIME * one.stream.block
    assert (one.weights, three.weights) == (each, 3 * each)
    assert (one.stream.held, three.stream.held) == (1000, 3000)
    assert one.stream.spilled - three.stream.spilled == 2000
    assert three.together == {"processes": 3, "one_memory": 3}
    whole = ProfileOptions(n=4, seq_len=32, stream="off", verify=False)
    (alone, spread) = (predict(None, whole, 3, count)[2] for count in (3, 1))
    assert alone.weights == 3 * spread.weights
    assert alone.working == 3 * spread.working


def test_auto_streams_what_does_not_fit_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ProfileOptions(n=4, seq_len=32, verify=False)
    whole = predict(None, options)[2]
    free = 2 * (whole.weights + whole.working)
    monkeypatch.setattr(plan, "available_memory", lambda _=None: free)
    monkeypatch.setattr(streamed_blocks, "MARGIN", 10**6)  # this one is too small to be predicted
    assert not choose(None, options, 2).on
    chosen = choose(None, options, 3)
    assert chosen.on
    assert "to hold all blocks in 3 processes" in chosen.why
    assert predict(None, options, 3, 3)[2].stream is not None
    assert predict(None, options, 3, 1)[2].stream is None


def test_all_stream_where_one_has_no_memory_for_all_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = {
        "cpu:0": Choice(False, "fits"),
        "cpu:1": Choice(True, "9 GB are needed"),
        "cpu:2": Choice(False, ""),
    }
    monkeypatch.setattr(together, "choose", lambda _, options, __: own[options.device])
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]

    def member(rank: int) -> Choice:
        with Team(store, rank, 3) as team:
            options = ProfileOptions(device=f"cpu:{rank}")
            task = together._Task("m", team, RunStore(tmp_path), options, Silent(), None, None)
            return task._choice(options, 3)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(member, range(3))) == [own["cpu:1"]] * 3


def test_batches_are_shared_out_evenly_and_each_once() -> None:
    lengths = (31, 30, 23, 17, 17, 5, 3)
    batches = [[Prompt(i, (0,) * n, ("x",) * n, "p", "d")] for i, n in enumerate(lengths)]
    shares = shared_out(batches, 3)
    assert sorted(batch[0].index for share in shares for batch in share) == list(range(7))
    sizes = [sum(len(batch[0]) for batch in share) for share in shares]
    assert sizes == [31 + 5 + 3, 30 + 17, 23 + 17]  # the longest first, each to whom has least
    assert [len(share) for share in shared_out(batches[:2], 3)] == [1, 1, 0]
