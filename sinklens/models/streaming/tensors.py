"""Tensors of safetensors files, read by place when they are asked for.

Nothing is mapped into memory: what was read belongs to its tensor and goes with it, a file that is cut off while a
run is under way gives an error and no crash, and reading releases the interpreter for whoever computes meanwhile.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinklens.core.errors import ModelError

from ..checkpoint import TensorHeader, read_header
from ..streamable import refuse_pickle

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
EXPONENTS = {
    torch.float64: 0x7FF0_0000_0000_0000, torch.float32: 0x7F80_0000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80,
}  # fmt: skip
"""The bits of the exponent: all are set in infinity and NaN, and in nothing else."""
NUMBERS = tuple(EXPONENTS)
_LOOKED_AT = 2**17
"""Values whose bits are looked at together; they and a copy stay in a core's cache."""


class Spare:
    """Memory of tensors that were let go, for others of the same shape and type.

    To map a large block anew, page by page, takes longer than to copy it there. What anyone still looks at is not
    handed out. One thread puts and another takes.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = defaultdict(list)
        self._asked: set[tuple[tuple[int, ...], torch.dtype]] = set()

    def put(self, tensor: Tensor) -> None:
        # What was made in inference mode could not be written to by a thread that is in none.
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_inference():
            self._kept[tuple(tensor.shape), tensor.dtype].append(tensor.data)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU with any content."""
        self._asked.add((shape, dtype))
        kept = self._kept.get((shape, dtype), [])
        while kept:
            if _alone(tensor := kept.pop()):
                return tensor
        return torch.empty(shape, dtype=dtype)

    def settle(self) -> None:
        """Let go of what nobody has asked for since the last time: blocks may differ."""
        for kind in list(self._kept):  # a copy: the other thread may put
            if kind not in self._asked:
                del self._kept[kind]
        self._asked.clear()

    def clear(self) -> None:
        self._kept.clear()


def _alone(tensor: Tensor) -> bool:
    """Whether nothing else shares a tensor's memory; False where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = tensor.untyped_storage()  # counts as a user, beside the tensor
    return count is not None and count(storage._cdata) == 2


@dataclass
class StoredTensors:
    """The tensors of some safetensors files by name.

    Attributes:
        name: How the model is called in messages.
        where: File and header entry of each tensor.
        written: When each file was last written, as its headers were read (ns).
        bytes_read: Per tensor, all reads together.
    """

    name: str
    where: dict[str, tuple[Path, TensorHeader]]
    written: dict[Path, int]
    bytes_read: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Iterable[Path], name: str) -> StoredTensors:
        """Read the headers.

        Raises:
            ModelError: A file is no safetensors file, is cut off, or stores a type that torch has no name for.
        """
        where: dict[str, tuple[Path, TensorHeader]] = {}
        written: dict[Path, int] = {}
        for path in files:
            refuse_pickle(path, name)
            written[path] = path.stat().st_mtime_ns
            for key, header in read_header(path, name).items():
                if header.dtype not in DTYPES:
                    raise ModelError(
                        f"{path.name} of {name!r} stores {key} as {header.dtype}, which streaming does not read.",
                        hint="Use --stream off.",
                    )
                where[key] = (path, header)
        return cls(name, where, written)

    @property
    def total_read(self) -> int:
        return sum(self.bytes_read.values())

    def file_of(self, key: str) -> str:
        return self.where[key][0].name

    def dtype_of(self, key: str) -> torch.dtype:
        return DTYPES[self.where[key][1].dtype]

    def shape_of(self, key: str) -> tuple[int, ...]:
        return self.where[key][1].shape

    def read(self, key: str) -> Tensor:
        """A tensor as it is stored."""
        found = torch.empty(self.shape_of(key), dtype=self.dtype_of(key))
        self.read_into(key, found)
        return found

    def read_into(self, key: str, target: Tensor) -> None:
        """Read a tensor into one that is contiguous and on the CPU; of another dtype, it is converted.

        Raises:
            ModelError: The file is gone, cut off or written anew, another shape is stored, or an entry is NaN or
                infinite.
        """
        path, header = self.where[key]
        if tuple(target.shape) != header.shape:
            raise ModelError(
                f"{key} in {path.name} of {self.name!r} has the shape {list(header.shape)}.",
                detail=f"The model's config asks for {list(target.shape)}.",
                hint="Check that config.json and the weights belong together.",
            )
        if target.dtype != DTYPES[header.dtype]:
            target.copy_(self.read(key))
            return
        if header.nbytes:
            self._fill(path, header, key, target)
            self.check(key, target)

    def _fill(self, path: Path, header: TensorHeader, key: str, target: Tensor) -> None:
        data: Any = target.reshape(-1).view(torch.uint8).numpy()
        view = memoryview(data)
        done = 0
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(header.start)
                while done < header.nbytes and (count := file.readinto(view[done:])):
                    done += count
                written = os.fstat(file.fileno()).st_mtime_ns
        except OSError as error:
            raise ModelError(
                f"{path.name} of {self.name!r} cannot be read: {error.strerror or error}.",
                detail=f"The tensor {key} is stored there.",
                hint="Put the file back; a run with --out goes on with --resume.",
            ) from error
        if done < header.nbytes:
            raise ModelError(
                f"{path.name} of {self.name!r} was cut off while it was in use.",
                detail=f"The tensor {key} has {header.nbytes:,} bytes; {done:,} are left of it.",
                hint="Copy or download the file again; a run with --out goes on with --resume.",
            )
        if written != self.written[path]:
            raise ModelError(
                f"{path.name} of {self.name!r} was written anew while it was in use.",
                detail=f"The tensor {key} may not belong to those that were read before.",
                hint="With the file as it was, a run with --out goes on with --resume; else start the run again.",
            )
        self.bytes_read[key] = self.bytes_read.get(key, 0) + done

    def check(self, key: str, tensor: Tensor) -> None:
        """Refuse NaN and infinity: one would make every statistic NaN."""
        if tensor.dtype not in NUMBERS or only_finite(tensor):
            return
        if "mask" not in key.rpartition(".")[2] or bool(tensor.isnan().any()):
            raise ModelError(
                f"{key} in {self.file_of(key)} of {self.name!r} holds NaN or infinity.",
                detail="No statistic of such a model would be a number.",
                hint="Was it saved from a diverged training run, or in fp16 out of range? Open an earlier checkpoint.",
            )

    def lazily(self, key: str) -> Any:
        """What transformers' weight conversion takes for a tensor: it reads when it is indexed."""
        return _Slice(self, key)


def only_finite(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU has neither NaN nor infinity, told by one thread.

    torch would share this out between all cores, whose threads then wait awake for the next tensor, and so take the
    cores from whatever computes beside the reading.
    """
    bits = tensor.contiguous().view(-1).view(getattr(torch, f"int{8 * tensor.element_size()}")).numpy()
    exponent = bits.dtype.type(EXPONENTS[tensor.dtype])
    pieces = (bits[start : start + _LOOKED_AT] for start in range(0, bits.size, _LOOKED_AT))
    return all(int((piece & exponent).max()) != exponent for piece in pieces)


class _Slice:
    """A tensor that is read when it is indexed as a whole."""

    def __init__(self, stored: StoredTensors, key: str) -> None:
        self._stored, self._key = stored, key
        self.shape = stored.shape_of(key)
        self.dtype = stored.dtype_of(key)

    def __getitem__(self, item: Any) -> Tensor:
        return self._stored.read(self._key)[item]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self._stored.where[self._key][1].dtype
