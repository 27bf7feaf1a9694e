"""Sharded checkpoints tensor by tensor: read from safetensors or .bin, written as safetensors, one held at a time.

Source: the safetensors format: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data.
"""

import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from glm_utils.checkpoint_files import LEGACY_PICKLE_MAGIC, weight_files
from glm_utils.cli import UserError

DTYPE_NAMES = {torch.float16: "F16", torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_SHARD_BYTES = 2_000_000_000
MAX_PENDING = 2  # tensors that wait to be written
WEIGHTS_NAME = "model.safetensors"


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


class ShardWriter:
    """Safetensors shards whose tensors are written one by one, in any order.

    Args:
        directory: Where the files go.
        specs: Every tensor that will be written; the order fills the shards.
        max_shard_bytes: Largest size of the data of a shard; a larger tensor gets a shard of its own.

    Attributes:
        num_bytes: Size of all tensors.
    """

    def __init__(self, directory: Path, specs: dict[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES):
        self.num_bytes = sum(spec.num_bytes for spec in specs.values())
        self._specs, self._directory = specs, directory
        self._places: dict[str, tuple[int, int]] = {}  # file descriptor, offset
        self._weight_map: dict[str, str] = {}
        self._files: list[int] = []
        shards = plan_shards(specs, max_shard_bytes)
        for number, names in enumerate(shards, start=1):
            file_name = WEIGHTS_NAME
            if len(shards) > 1:
                file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(file_name, names)
        self._missing = set(specs)
        self._pending: deque[Future] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1)

    def _begin(self, file_name: str, names: list[str]) -> None:
        """Write the header of a shard; wide dtypes come first, so that every tensor is aligned."""
        header, end = {"__metadata__": {"format": "pt"}}, 0
        ends = {}
        for name in sorted(names, key=lambda name: -self._specs[name].dtype.itemsize):
            spec = self._specs[name]
            start, end = end, end + spec.num_bytes
            header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
            ends[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = os.open(self._directory / file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._files.append(file)
        _write_all(file, len(text).to_bytes(8, "little") + text, 0)
        self._places.update({name: (file, 8 + len(text) + start) for name, start in ends.items()})
        self._weight_map.update(dict.fromkeys(names, file_name))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, which must have the shape and dtype that were announced, and must not change any more.

        A thread writes it while the next one is made; no more than MAX_PENDING wait.
        """
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if spec != self._specs[name]:
            raise RuntimeError(f"{name}: made {spec}, announced {self._specs[name]}")
        file, offset = self._places[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._pending.append(self._thread.submit(_write_all, file, memoryview(data), offset))
        while len(self._pending) > MAX_PENDING:
            self._pending.popleft().result()
        self._missing.discard(name)

    def close(self) -> None:
        """Close the files and, if there are several, write the index."""
        if self._missing:
            raise RuntimeError(f"never written: {sorted(self._missing)[:5]}")
        while self._pending:
            self._pending.popleft().result()
        self.abandon()
        if len(set(self._weight_map.values())) > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self._weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (self._directory / f"{WEIGHTS_NAME}.index.json").write_text(text, encoding="utf-8")

    def abandon(self) -> None:
        """Close the files as they are."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        while self._files:
            os.close(self._files.pop())


def plan_shards(specs: dict[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Fill shards with tensors in the order given."""
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, spec in specs.items():
        if shards[-1] and num_bytes + spec.num_bytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += spec.num_bytes
    return shards


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of data at offset.

    Raises:
        UserError: The disk is full.
    """
    data = memoryview(data)
    try:
        while data:
            written = os.pwrite(file, data[: 1 << 26], offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full ({error.strerror}). Free some space or give another place") from error
        raise
