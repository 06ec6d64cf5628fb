"""The run folder: shards while running, one array file when done.

    manifest.json       what is needed to repeat and to resume the run; `status` is running, complete or partial
    prompts.jsonl       one line per prompt: tokens, source, domain
    shards/*.safetensors  finished batches of a run that is not complete
    streaming/          what has passed some blocks of a streamed model, while it runs
    arrays.safetensors  all arrays of a complete run, keyed `prompt/signal`
    tables/*.parquet    one tidy table per analyzer
    summary.json        the JSON document
    report.html

A shard is written to a temporary name and renamed, so a crash leaves either a whole shard or none. No pickle.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sinklens.core.errors import DataError, ResourceError, UsageError
from sinklens.inputs.spans import ModalitySpans
from sinklens.models.spec import ModelInfo

from .trace import LayerInfo, PromptRecord, Trace, as_plain

SCHEMA = "sinklens/run/1"
LOCK = ".lock"
STREAMING = "streaming"


class RunStore:
    """A run folder on disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    # writing ---------------------------------------------------------------------------------------------------

    def create(self, *, force: bool = False) -> None:
        """Make the folder, or take an empty one.

        Raises:
            UsageError: It holds a run already, or cannot be written.
        """
        if self.manifest_path.exists() and not force:
            raise UsageError(
                f"The folder {self.folder} already holds a run.",
                hint=f"Continue it with --resume {self.folder}, replace it with --force, or choose another --out.",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in (*self._shards(), self.folder / "arrays.safetensors"):
                stale.unlink(missing_ok=True)
            shutil.rmtree(self.folder / STREAMING, ignore_errors=True)
            (self.folder / "shards").mkdir(exist_ok=True)
            probe = self.folder / ".write-test"
            probe.write_bytes(b"sinklens")
            probe.unlink()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise self._disk_full() from error
            raise UsageError(
                f"The output folder {self.folder} cannot be written: {error.strerror or error}.",
                hint="Choose another folder with --out.",
            ) from error

    @contextmanager
    def created(self, *, force: bool = False, unless: Collection[str] = ()) -> Iterator[None]:
        """`create`, undone if nothing but the files `unless` was written into a folder that was made for the run."""
        made, nothing = not self.folder.exists(), {LOCK, *unless}
        self.create(force=force)
        try:
            yield
        finally:
            if made and not any(
                path.is_file() for path in self.folder.rglob("*") if path.name not in nothing
            ):
                shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; the system lets go of the lock when this one ends.

        Raises:
            UsageError: Another run is writing here.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            yield
            return
        path = self.folder / LOCK
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(
                    f"Another run is writing to {self.folder} now.",
                    hint="Wait for it, or choose another --out.",
                ) from error
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the run, whole or not at all."""
        with self._guard():
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
        return target

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        self.write_text("manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")

    def append(self, records: list[PromptRecord]) -> None:
        """Keep a finished batch as one shard."""
        self._write_arrays(self.folder / "shards" / f"{records[0].index:06d}.safetensors", records)

    def finish(self, trace: Trace) -> None:
        """Turn the shards into the arrays of a complete run."""
        lines = (json.dumps(record.describe(), ensure_ascii=False) for record in trace.records)
        self.write_text("prompts.jsonl", "".join(line + "\n" for line in lines))
        self._write_arrays(self.folder / "arrays.safetensors", trace.records)
        for shard in self._shards():
            shard.unlink()
        shards = self.folder / "shards"
        if shards.is_dir() and not any(shards.iterdir()):
            shards.rmdir()

    def _write_arrays(self, path: Path, records: list[PromptRecord]) -> None:
        self.write_bytes(path, packed(records))

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Write a file below the folder, whole or not at all."""
        with self._guard():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            try:
                with open(partial, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except OSError:
                partial.unlink(missing_ok=True)  # half a file would only keep a full disk full
                raise

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Full disks and lost permissions, said in words."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full() from error
            raise ResourceError(
                f"Writing to {self.folder} failed: {error.strerror or error}.",
                detail="The prompts finished before are saved.",
                hint=f"Make the folder writable again, then: sinklens profile --resume {self.folder}",
            ) from error

    def _disk_full(self) -> ResourceError:
        shards = len(self._shards())
        return ResourceError(
            f"The disk that holds {self.folder} is full.",
            detail=f"{shards} finished batches are saved." if shards else "No batch was finished.",
            hint=f"Free some space, then: sinklens profile --resume {self.folder}",
        )

    def passed_blocks(self) -> int | None:
        """Blocks of a streamed model that every unfinished prompt has passed; None if none is on its way."""
        # The probe goes first: all the others have passed the block before.
        passed = [
            int(path.stem.rpartition("-")[2]) - 1
            for path in self.folder.glob(f"{STREAMING}/probe-*.safetensors")
        ]
        return max(passed, default=None)

    # reading ---------------------------------------------------------------------------------------------------

    def read_manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            DataError: The folder is not a run, or its manifest is damaged or of a newer schema.
        """
        if not self.manifest_path.is_file():
            raise DataError(
                f"{self.folder} is not a run folder: it has no manifest.json.",
                hint="Run folders are what `sinklens profile --out FOLDER` writes.",
            )
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{self.manifest_path} is damaged: {error}.") from error
        if not isinstance(manifest, dict):
            raise DataError(f"{self.manifest_path} is damaged: it holds no JSON object.")
        schema = manifest.get("schema")
        if schema != SCHEMA:
            raise DataError(
                f"{self.folder} has schema {schema!r}; this version reads {SCHEMA!r}.",
                hint=_version_for(manifest),
            )
        return manifest

    def load_records(self) -> list[PromptRecord]:
        """All records on disk: of the complete run, or of its shards."""
        arrays = self.folder / "arrays.safetensors"
        paths = [arrays] if arrays.is_file() else self._shards()
        return sorted((r for path in paths for r in _read_arrays(path)), key=lambda r: r.index)

    def load(self) -> Trace:
        """The trace of a run, complete or not."""
        manifest = self.read_manifest()
        if manifest.get("status") == "complete" and not (self.folder / "arrays.safetensors").is_file():
            raise DataError(
                f"{self.folder} is a complete run, but its arrays.safetensors is missing.",
                hint="Copy the whole folder, or run the profile again with --force.",
            )
        try:
            model = manifest["model"]
            info = ModelInfo(**{k: v for k, v in model.items() if k in ModelInfo.__dataclass_fields__})
            layers = tuple(LayerInfo(**layer) for layer in manifest["layers"])
            tracing = manifest["tracing"]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.manifest_path} is damaged: its part on the model or the tracing is missing or not "
                f"readable ({error}).",
                hint="Copy the whole folder again, or run the profile again with --force.",
            ) from error
        return Trace(info, layers, self.load_records(), tracing, manifest)

    def _shards(self) -> list[Path]:
        return sorted((self.folder / "shards").glob("*.safetensors"))


def _version_for(manifest: dict[str, Any]) -> str:
    """What to install to read a run of another schema, as far as its manifest says."""
    writer = manifest.get("sinklens")
    version = writer.get("version") if isinstance(writer, dict) else None
    if not version:
        return "Read it with the version of sinklens that wrote it; the manifest does not say which."
    return f"It was written by sinklens {version}; read it with that version or a newer one that knows the schema."


def describe_trace(trace: Trace) -> dict[str, Any]:
    """The sections of a manifest that a trace needs to be read again."""
    return {"model": asdict(trace.info), "layers": as_plain(trace.layers), "tracing": trace.tracing}


def packed(records: Iterable[PromptRecord]) -> bytes:
    """Records as the bytes of a safetensors file, whose header tells everything but the arrays."""
    from safetensors.numpy import save

    records = list(records)
    tensors = {f"{r.index}/{name}": np.ascontiguousarray(a) for r in records for name, a in r.arrays.items()}
    header = {"prompts": json.dumps([record.describe() for record in records], ensure_ascii=False)}
    return save(tensors, metadata=header)


def unpacked(data: bytes) -> list[PromptRecord]:
    """The records of `packed`."""
    from safetensors.numpy import load

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return _records(json.loads(header["__metadata__"]["prompts"]), load(data).items())


def _read_arrays(path: Path) -> list[PromptRecord]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            described = json.loads((file.metadata() or {})["prompts"])
            # A safetensors handle is no mapping.
            return _records(described, ((key, file.get_tensor(key)) for key in file.keys()))  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(
            f"{path} is damaged: {error}.", hint="Delete this file and resume the run to make it again."
        ) from error


def _records(
    described: Iterable[dict[str, Any]], tensors: Iterable[tuple[str, np.ndarray]]
) -> list[PromptRecord]:
    arrays: dict[int, dict[str, np.ndarray]] = {}
    for key, tensor in tensors:
        index, name = key.split("/", 1)
        arrays.setdefault(int(index), {})[name] = tensor
    return [
        PromptRecord(
            entry["index"],
            np.asarray(entry["token_ids"], dtype=np.int64),
            tuple(entry["pieces"]),
            entry["source"],
            entry["domain"],
            arrays.get(entry["index"], {}),
            ModalitySpans.from_json(entry["spans"]) if "spans" in entry else None,
        )
        for entry in described
    ]
