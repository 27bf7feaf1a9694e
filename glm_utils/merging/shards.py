"""Read a checkpoint (safetensors or .bin) and write sharded safetensors, one tensor in memory at a time.

Source: the safetensors format: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data.
"""

import json
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

from glm_utils.model_files.checkpoint_files import weight_files
from glm_utils.model_files.tensor_files import DTYPE_NAMES, TensorSpec, is_legacy_bin, list_bin, list_tensors, load_bin

MAX_SHARD_BYTES = 2_000_000_000
MAX_PENDING = 2  # tensors that wait for the writing thread; each keeps its memory until then
WEIGHTS_NAME = "model.safetensors"


class CheckpointReader:
    """Reads the tensors of a checkpoint by name.

    Args:
        checkpoint_dir: A checked checkpoint directory with safetensors or .bin files.

    Attributes:
        specs: Dtype and shape by name.
        num_bytes: Size of all tensors.
    """

    def __init__(self, checkpoint_dir: Path):
        self.specs: dict[str, TensorSpec] = {}
        self._paths: dict[str, Path] = {}
        self._legacy: tuple[Path | None, dict] = (None, {})
        self._files = weight_files(checkpoint_dir)
        self._prefetched: set[Path] = set()
        for path in self._files:
            for name, spec in self._list(path).items():
                self.specs[name], self._paths[name] = spec, path
        self.num_bytes = sum(spec.num_bytes for spec in self.specs.values())

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, memory-mapped from its file.

        The file is opened for each tensor: as long as a mapping is open, every page that was read stays resident.
        """
        path = self._paths[name]
        self._prefetch(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        return self._load_bin(path)[name]

    def _prefetch(self, path: Path) -> None:
        """Ask the system to read this file and the next one ahead; a busy disk is slow page by page."""
        number = self._files.index(path)
        for ahead in self._files[number : number + 2]:
            if ahead not in self._prefetched and hasattr(os, "posix_fadvise"):
                self._prefetched.add(ahead)
                with ahead.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _list(self, path: Path) -> dict[str, TensorSpec]:
        """Return the spec of each tensor of a file by name."""
        return list_bin(path, self._load_bin(path)) if path.suffix == ".bin" else list_tensors(path)

    def _load_bin(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of a .bin file, memory-mapped.

        A file in the format of torch before 1.6 cannot be mapped: it is kept until another file is read.
        """
        if not is_legacy_bin(path):
            return load_bin(path)
        if self._legacy[0] != path:
            self._legacy = (path, load_bin(path))
        return self._legacy[1]


class ShardWriter:
    """Writes sharded safetensors files one tensor at a time, in any order.

    Args:
        directory: Directory of the files; it exists.
        specs: Every tensor that will be written; shards are filled in this order.
        max_shard_bytes: Largest size of a shard's data; a larger tensor gets a shard of its own.

    Attributes:
        num_bytes: Size of all tensors.
    """

    def __init__(self, directory: Path, specs: dict[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES):
        self.num_bytes = sum(spec.num_bytes for spec in specs.values())
        self._specs, self._directory = specs, directory
        self._places: dict[str, tuple[int, int]] = {}  # name -> file descriptor, offset in the file
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
        """Create a shard and write its header; all offsets are known, so the tensors can follow in any order."""
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        # Wide dtypes first, as safetensors itself writes them: then every tensor is aligned without padding
        for name in sorted(names, key=lambda name: -self._specs[name].dtype.itemsize):
            spec = self._specs[name]
            starts[name], end = end, end + spec.num_bytes
            offsets = [starts[name], end]
            header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so the data begin at a multiple of 8
        file = os.open(self._directory / file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._files.append(file)
        os.truncate(file, 8 + len(text) + end)  # a limit on the size of files shows before the first tensor is merged
        _write_all(file, len(text).to_bytes(8, "little") + text, 0)
        self._places.update({name: (file, 8 + len(text) + start) for name, start in starts.items()})
        self._weight_map.update(dict.fromkeys(names, file_name))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; it must not change until `close`.

        A thread writes it while the caller computes the next one. The caller waits when MAX_PENDING tensors are
        pending.

        Raises:
            RuntimeError: The tensor has another dtype or shape than announced.
        """
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if spec != self._specs[name]:
            raise RuntimeError(f"{name}: found {spec}, announced {self._specs[name]}")
        file, offset = self._places[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._pending.append(self._thread.submit(_write_all, file, data, offset))
        while len(self._pending) > MAX_PENDING:
            self._pending.popleft().result()
        self._missing.discard(name)

    def close(self) -> None:
        """Finish writing, close the files and, if there are several, write the index.

        Raises:
            RuntimeError: An announced tensor was never written.
        """
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
        """Close the files in whatever state they are."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        while self._files:
            os.close(self._files.pop())


def plan_shards(specs: dict[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Return the tensor names of each shard, filled in the given order."""
    # huggingface_hub's split_state_dict_into_shards_factory plans alike except for a tensor larger than a shard: its
    # shard comes before the one that is being filled, so the files of such a model would get other numbers
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
    """Write all of data at offset; one call of pwrite may write less."""
    data = memoryview(data)
    while data:
        written = os.pwrite(file, data[: 1 << 26], offset)
        data, offset = data[written:], offset + written
