"""States beyond the budget are on disk while a sweep lasts; an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sinklens.core.errors import ResourceError
from sinklens.tracers.executor import trace
from sinklens.tracers.store import STREAMING, RunStore

from .cases import PLAN, differences, opened, prompts, saved

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def expected(folder):
    return trace(opened(folder, stream=False), prompts(), PLAN)


@pytest.mark.parametrize(("budget", "states", "shown"), [(0, 3, 12), (20_000, 1, 12), (60_000, 0, 11)])
def test_what_is_beyond_the_budget_is_spilled(folder, expected, budget, states, shown, tmp_path, monkeypatch):
    """What blocks showed goes before states do: those are needed again after every block."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = opened(folder)
    model.blocks.budget = budget
    seen = []
    found = trace(model, prompts(), PLAN, progress=lambda *_: seen.append(_files(tmp_path)))
    assert not differences(expected, found)
    assert tuple(map(max, zip(*seen, strict=True))) == (states, shown)
    assert not list(tmp_path.iterdir())


def _files(folder: Path) -> tuple[int, int]:
    """Files of states, and of what a block showed of a batch."""
    names = [path.stem for path in folder.rglob("*.safetensors")]
    return sum("-" not in name for name in names), sum("-" in name for name in names)


def test_what_blocks_will_show_is_told_from_the_first(folder, tmp_path, monkeypatch):
    import shutil

    model = opened(folder)
    model.blocks.budget = 20_000
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(ResourceError, match="What the blocks show needs") as caught:
        trace(model, prompts(), PLAN)
    assert "--out" in str(caught.value.hint)
    assert max(model.blocks.loads) == 1
    assert sum(model.blocks.loads) == 1


def test_arrays_in_memory_of_their_own_are_the_same():
    import numpy as np

    from sinklens.tracers.own_memory import in_own_memory

    random = np.random.default_rng(0)
    arrays = {
        "a": random.standard_normal((3, 5, 7), dtype=np.float32),
        "turned": random.integers(0, 9, (11, 13)).T,
        "one": np.float16(2.5).reshape(()),
        "none": np.zeros((0, 4), dtype=np.int32),
        "last": random.standard_normal(17),
    }
    found = in_own_memory(arrays)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert not np.shares_memory(found[name], array)
    found["a"][...] = 0
    np.testing.assert_array_equal(found["last"], arrays["last"])
    assert in_own_memory({}) == {}


def test_within_the_budget_nothing_is_written(folder, expected, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: pytest.fail("nothing is to be written"))
    assert not differences(expected, trace(opened(folder), prompts(), PLAN))


@pytest.mark.parametrize("steps", [1, 4, 6, 8, 11])
def test_an_interrupted_sweep_goes_on(folder, expected, steps, tmp_path):
    """Stopped after every kind of place: in the first block, between two blocks, within one, in the last."""
    store = RunStore(tmp_path / "run")
    store.create()
    first, passed, calls = opened(folder), steps // 3, []

    def stop(done, total):
        calls.append((done, total))
        if len(calls) == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(first, prompts(), PLAN, store=store, progress=stop)
    assert (store.folder / STREAMING).is_dir()
    assert first.blocks._resident == []
    again = opened(folder)
    found = trace(again, prompts(), PLAN, store=store)
    assert not differences(expected, found)
    assert again.blocks.loads == [0] * passed + [1] * (4 - passed)
    assert not (store.folder / STREAMING).exists()
    assert not differences(expected, trace(again, prompts(), PLAN, store=store))


def test_a_killed_process_goes_on(folder, expected, tmp_path):
    """Killed without a chance to clean up, in the middle of the third block."""
    run = tmp_path / "run"
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from sinklens.tracers.executor import trace\n"
        "from sinklens.tracers.store import RunStore\n"
        "from tests.streaming.cases import PLAN, opened, prompts\n"
        "store = RunStore(sys.argv[2]); store.create(); count = 0\n"
        "def stop(done, total):\n"
        "    global count; count += 1\n"
        "    if count == 8: os.kill(os.getpid(), 9)\n"
        "trace(opened(Path(sys.argv[1])), prompts(), PLAN, store=store, progress=stop)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(run)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == -9, done.stderr
    model = opened(folder)
    assert not differences(expected, trace(model, prompts(), PLAN, store=RunStore(run)))
    assert model.blocks.loads == [0, 0, 1, 1]


def test_killed_while_the_probe_was_written(tmp_path):
    """Half a file has a name of its own, and is not taken for the probe."""
    store = RunStore(tmp_path)
    (tmp_path / STREAMING).mkdir()
    assert store.passed_blocks() is None
    for name in ("probe-0001.safetensors", "probe-0002.safetensors", "probe-0003.safetensors.partial"):
        (tmp_path / STREAMING / name).write_bytes(b"half")
    assert store.passed_blocks() == 1


def test_a_full_disk_is_told_before_anything_is_read(folder, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    store = RunStore(tmp_path / "run")
    store.create()
    model = opened(folder)
    with pytest.raises(ResourceError, match=r"need .* on disk") as caught:
        trace(model, prompts(), PLAN, store=store)
    assert caught.value.exit_code == 4
    assert model.blocks.loads == [0] * 4
