"""Write safetensors shards tensor by tensor, in any order, while the next tensor is made.

Source: the safetensors format: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data.
"""

import errno
import json
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from glm_utils.cli import UserError
from glm_utils.shards import DTYPE_NAMES, TensorSpec

MAX_SHARD_BYTES = 2_000_000_000
MAX_PENDING = 2  # tensors that wait to be written
WEIGHTS_NAME = "model.safetensors"


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
