"""What streaming takes: a checkpoint of the layers of Qwen3-30B-A3B, with few of them, traced in three ways.

    python -m benchmarks.streaming --layers 8 --prompts 16 --length 512 --out benchmarks/results/streaming.json

The weights are random, in bfloat16, stored as on the hub (128 experts of a layer apart), one file per layer; only the
vocabulary is smaller. All signals are recorded; where offload is compared, only those that need no weights after a
block has run, because accelerate has taken them away by then. Every way runs in a process of its own, after the files
have been put out of the page cache:

- stream: blocks read one at a time (`--stream on`), once with all states in memory and once with none.
- normal: the model loaded as transformers does, then traced in memory.
- offload: accelerate's disk offload of all blocks; it writes the fused experts to disk again, so it has a layer less.

Memory is the largest anonymous memory of the process (weights and activations; not mapped files) above what it was
after the imports. Two blocks are in memory, so what a streamed run takes beyond shell, states and two blocks is set
beside what the same pass takes beyond the model in memory: activations of a batch and what oneDNN keeps. `read_s` is
reading all blocks without computing, `compute_s` tracing the loaded model; a streamed run should take little more time
than the larger of them. Each way runs `--rounds` times and its fastest run counts. Everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .profile import machine

if TYPE_CHECKING:
    from sinklens.inputs.spec import Prompt
    from sinklens.models.spec import OpenedModel
    from sinklens.tracers.trace import Trace

SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144, "decoder_sparse_step": 1,
    "norm_topk_prob": True, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "vocab_size": 8192,
}  # fmt: skip
TINY = {"hidden_size": 64, "moe_intermediate_size": 24, "num_experts": 8, "vocab_size": 8192, "head_dim": 16}
"""For trying the benchmark itself out (`--tiny`); its figures mean nothing."""
WAYS = ("stream", "stream, budget 0", "normal", "offload", "read")


def write_checkpoint(folder: Path, layers: int) -> None:
    """The checkpoint, one layer in memory at a time."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**SHAPE, num_hidden_layers=layers, dtype="bfloat16")
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {key: _random(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shapes, name))

    hidden, inner = SHAPE["hidden_size"], SHAPE["moe_intermediate_size"]
    vocabulary = (SHAPE["vocab_size"], hidden)
    shell = {
        "model.embed_tokens.weight": vocabulary,
        "lm_head.weight": vocabulary,
        "model.norm.weight": (hidden,),
    }
    save("model-shell.safetensors", shell)
    wide, narrow = (SHAPE[key] * SHAPE["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    for layer in range(layers):
        own = {
            "self_attn.q_proj.weight": (wide, hidden),
            "self_attn.k_proj.weight": (narrow, hidden),
            "self_attn.v_proj.weight": (narrow, hidden),
            "self_attn.o_proj.weight": (hidden, wide),
            "self_attn.q_norm.weight": (SHAPE["head_dim"],),
            "self_attn.k_norm.weight": (SHAPE["head_dim"],),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate.weight": (SHAPE["num_experts"], hidden),
        }
        for expert in range(SHAPE["num_experts"]):
            for part, shape in (
                ("gate", (inner, hidden)),
                ("up", (inner, hidden)),
                ("down", (hidden, inner)),
            ):
                own[f"mlp.experts.{expert}.{part}_proj.weight"] = shape
        shapes = {f"model.layers.{layer}.{key}": shape for key, shape in own.items()}
        save(f"model-{layer:05d}.safetensors", shapes)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)


def forget(folder: Path) -> None:
    """Put the files out of the page cache, so that the next process reads the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Peak(threading.Thread):
    """Watches the anonymous memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = anonymous()
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.005)

    @property
    def above(self) -> int:
        return self.peak - self.start_bytes


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def read_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


@contextmanager
def waits(blocks: Any) -> Iterator[list[float]]:
    """Seconds that the run waited for blocks."""
    found, load = [], blocks.load

    def timed(index: int) -> None:
        start = time.perf_counter()
        load(index)
        found.append(time.perf_counter() - start)

    blocks.load = timed
    yield found
    del blocks.load


def one_way(
    way: str, folder: Path, prompts: int, length: int, threads: int, scratch: Path, fewer_signals: bool
) -> dict[str, Any]:
    """What one way took, in this process."""
    import transformers

    from sinklens.models.opening import open_model
    from sinklens.tracers import signals as sig
    from sinklens.tracers.executor import TracePlan, trace
    from sinklens.tracers.record_births import BIRTH_SIGNALS
    from sinklens.tracers.record_experts import LATER
    from sinklens.tracers.record_writes import ENTRY_SIGNALS

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    few = random_prompts(prompts, length)
    tokenizer, peak, disk, start = object(), Peak(), read_from_disk(), time.perf_counter()
    found: dict[str, Any] = {"way": way}
    behind = {sig.HEAD_OUTPUT_NORM, sig.VALUE_OUT_NORM, sig.VALUE_OUT_NORM_MEAN}  # the output projection
    later = (LATER | ENTRY_SIGNALS | BIRTH_SIGNALS | behind) if fewer_signals else frozenset()
    plan = TracePlan(signals=frozenset(sig.ALL_SIGNALS) - later)
    if way == "read":
        return {**found, **only_read(open_model(str(folder), tokenizer=tokenizer, stream=True), disk)}
    if way == "offload":
        model = open_model(offloaded(folder, scratch), tokenizer=tokenizer)
    else:
        model = open_model(str(folder), tokenizer=tokenizer, stream=way.startswith("stream"))
    opened = time.perf_counter()
    if model.blocks is not None:
        model.blocks.budget = 0 if "budget 0" in way else model.blocks.budget
        found |= {"layer_bytes": model.blocks.sizes.block, "shell_bytes": model.blocks.sizes.shell}
        states = prompts * length * SHAPE["hidden_size"] * 2
        found["states_in_memory"] = 0 if "budget 0" in way else states
        with waits(model.blocks) as waited:
            result = trace(model, few, plan)
        found |= {"waited_s": sum(waited), "times_loaded": model.blocks.loads}
        found["bytes_read"] = model.blocks.recipes.stored.total_read
        found["bytes_stored"] = sum(header.nbytes for _, header in model.blocks.recipes.stored.where.values())
    else:
        result = trace(model, few, plan)
    found["trace_sha256"] = digest(result)
    end = time.perf_counter()
    return {
        **found,
        "open_s": opened - start,
        "trace_s": end - opened,
        "wall_s": end - start,
        "peak_bytes": peak.above,
        "disk_bytes": read_from_disk() - disk,
        "written_bytes": sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()),
    }


def random_prompts(count: int, length: int) -> list[Prompt]:
    from sinklens.inputs.spec import Prompt

    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randint(5, 8000, (length,), generator=generator).tolist() for _ in range(count))
    return [Prompt(i, tuple(ids), ("",) * length, "random") for i, ids in enumerate(drawn)]


def only_read(model: OpenedModel, disk: int) -> dict[str, Any]:
    """Every block made from its files once, and nothing run."""
    assert model.blocks is not None
    start = time.perf_counter()
    for index in range(len(model.blocks)):
        model.blocks.recipes.make(index)
    return {"wall_s": time.perf_counter() - start, "disk_bytes": read_from_disk() - disk}


def offloaded(folder: Path, scratch: Path) -> torch.nn.Module:
    """The model with its layers on accelerate's disk."""
    import transformers

    place = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"), "cpu")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    place |= {f"model.layers.{layer}": "disk" for layer in range(layers)}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map=place, offload_folder=scratch
    )


def digest(trace: Trace) -> str:
    """All arrays of all prompts in one hash."""
    found = hashlib.sha256()
    for record in trace.records:
        for name in sorted(record.arrays):
            found.update(name.encode() + record.arrays[name].tobytes())
    return found.hexdigest()


def without_last_layer(folder: Path, target: Path, layers: int) -> None:
    """The same checkpoint with a layer less, by links."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name == "config.json":
            config = json.loads(path.read_text())
            (target / path.name).write_text(json.dumps({**config, "num_hidden_layers": layers}))
        elif path.name != f"model-{layers:05d}.safetensors" and not path.name.endswith("index.json"):
            os.link(path, target / path.name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {key: file for key, file in index["weight_map"].items() if (target / file).exists()}
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": kept}))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All ways, each in a fresh process, and what follows from them."""
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        root = Path(temporary)
        folder, fewer = root / "model", root / "fewer"
        folder.mkdir()
        write_checkpoint(folder, options.layers)
        without_last_layer(folder, fewer, options.layers - 1)
        ways = [*((way, folder) for way in WAYS if way != "offload"), ("stream", fewer), ("offload", fewer)]
        ways = [(way, where) for way, where in ways if not options.only or way in options.only]
        tries: dict[tuple[str, Path], list[dict[str, Any]]] = {pair: [] for pair in ways}
        for _ in range(
            options.rounds
        ):  # in turn, so that a slow minute of the machine is not one way's alone
            for way, where in ways:
                tries[way, where].append(one_process(options, way, where, where == fewer, root))
                print(json.dumps(tries[way, where][-1]), file=sys.stderr, flush=True)
        for (_, where), found in tries.items():
            layers = options.layers if where == folder else options.layers - 1
            rows.append({"layers": layers, **min(found, key=lambda row: row["wall_s"])})
            rows[-1]["peak_bytes"] = max(row.get("peak_bytes", 0) for row in found)
    return {"rows": rows, "summary": summary(rows)}


def one_process(
    options: argparse.Namespace, way: str, folder: Path, fewer_signals: bool, root: Path
) -> dict[str, Any]:
    """A way in a fresh process, its files out of the page cache."""
    forget(folder)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        command = [sys.executable, "-m", "benchmarks.streaming", "--one", way, "--folder", str(folder)]
        command += ["--prompts", str(options.prompts), "--length", str(options.length)]
        command += ["--threads", str(options.threads), "--scratch", scratch]
        command += ["--tiny"] if options.tiny else []
        command += ["--fewer-signals"] if fewer_signals else []
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that have a target."""
    whole = {row["way"]: row for row in rows if row["layers"] == rows[0]["layers"]}
    fewer = {row["way"]: row for row in rows if row["layers"] < rows[0]["layers"]}
    stream, layer = whole["stream"], whole["stream"]["layer_bytes"]
    found: dict[str, Any] = {
        "layer_bytes": layer,
        "peak_in_layers_beyond_shell_and_states": {
            way: (row["peak_bytes"] - row["shell_bytes"] - row["states_in_memory"]) / layer
            for way, row in whole.items()
            if "shell_bytes" in row
        },
        "every_byte_read_once": stream["bytes_read"] == stream["bytes_stored"],
    }
    if "normal" in whole:
        normal = whole["normal"]
        if "read" in whole:
            read, compute = whole["read"]["wall_s"], normal["trace_s"]
            found |= {
                "read_s": read,
                "compute_s": compute,
                "trace_over_larger_of_both": stream["trace_s"] / max(read, compute),
            }
        model = normal["layers"] * layer + stream["shell_bytes"]
        found |= {
            "normal_beyond_model_in_layers": (normal["peak_bytes"] - model) / layer,
            "equal_to_normal": stream["trace_sha256"] == normal["trace_sha256"],
            "normal_peak_in_layers": normal["peak_bytes"] / layer,
            "wall_over_normal": stream["wall_s"] / normal["wall_s"],
        }
    if "offload" in fewer:
        short, offload = fewer["stream"], fewer["offload"]
        found |= {
            "equal_to_offload": short["trace_sha256"] == offload["trace_sha256"],
            "offload_peak_in_layers": offload["peak_bytes"] / layer,
            "offload_wall_over_stream": offload["wall_s"] / short["wall_s"],
            "offload_written_bytes": offload["written_bytes"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=WAYS)
    parser.add_argument(
        "--scratch", type=Path, help="Where the checkpoint is written. [default: the system's]"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fewer-signals", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        SHAPE.update(TINY)
    if options.one:
        row = one_way(
            options.one,
            options.folder,
            options.prompts,
            options.length,
            options.threads,
            options.scratch,
            options.fewer_signals,
        )
        print(json.dumps(row))
        return
    result = {
        "machine": machine(options.threads, "bfloat16"),
        "prompts": options.prompts,
        "length": options.length,
        **run(options),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
