"""Read single tensors of a sharded checkpoint, safetensors or .bin, without holding more than the one at hand."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from glm_utils.checkpoint_files import LEGACY_PICKLE_MAGIC, weight_files
from glm_utils.cli import UserError

DTYPE_NAMES = {torch.float16: "F16", torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor, known before it is read or made."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a checkpoint, by name.

    Args:
        checkpoint_dir: A checked checkpoint directory, in safetensors or .bin.

    Attributes:
        specs: Shape and dtype by name.
        num_bytes: Size of all tensors.
    """

    def __init__(self, checkpoint_dir: Path):
        self.specs: dict[str, TensorSpec] = {}
        self._paths: dict[str, Path] = {}
        self._legacy: tuple[Path | None, dict] = (None, {})
        self._files = weight_files(checkpoint_dir)
        self._prefetched: set[Path] = set()
        for path in self._files:
            for name, spec in self._list(path):
                self.specs[name], self._paths[name] = spec, path
        self.num_bytes = sum(spec.num_bytes for spec in self.specs.values())

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, mapped from its file.

        The file is opened anew each time: a mapping that stays open keeps every page that was read resident.
        """
        path = self._paths[name]
        self._prefetch(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        return self._load_bin(path)[name]

    def _prefetch(self, path: Path) -> None:
        """Ask the system to read a file and the next one ahead; page by page a busy disk answers slowly."""
        number = self._files.index(path)
        for ahead in self._files[number : number + 2]:
            if ahead not in self._prefetched and hasattr(os, "posix_fadvise"):
                self._prefetched.add(ahead)
                with ahead.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _list(self, path: Path) -> Iterable[tuple[str, TensorSpec]]:
        """Yield name and spec of each tensor of a file."""
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = file.get_slice(name)
                    yield name, TensorSpec(_known_dtype(part.get_dtype(), path), tuple(part.get_shape()))
        else:
            for name, tensor in self._load_bin(path).items():
                if not isinstance(tensor, torch.Tensor):
                    raise UserError(f"{path}: {name} is a {type(tensor).__name__}, expected a tensor")
                yield name, TensorSpec(tensor.dtype, tuple(tensor.shape))

    def _load_bin(self, path: Path) -> dict[str, torch.Tensor]:
        """Map a .bin file; one in torch's format before 1.6 cannot be mapped and is kept until the next file."""
        with path.open("rb") as file:
            is_legacy = file.read(2) == LEGACY_PICKLE_MAGIC
        if not is_legacy:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if self._legacy[0] != path:
            self._legacy = (path, torch.load(path, map_location="cpu", weights_only=True))
        return self._legacy[1]


def _known_dtype(name: str, path: Path) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name."""
    if name not in DTYPES:
        raise UserError(f"{path}: weights of type {name}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]
