"""Names, dtypes and shapes of the tensors in a .safetensors or .bin file, which is refused if it is damaged.

Headers are checked here before safetensors or torch see the file, so that a lying one is refused in one line.
Source: the safetensors format: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data.
"""

import json
import math
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from glm_utils.cli import UserError
from glm_utils.files import JSON_ERRORS, download_again, json_fault

DTYPE_NAMES = {torch.float16: "F16", torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
LEGACY_PICKLE_MAGIC = b"\x80\x02"  # torch.save before the zip format (torch < 1.6)
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMENSIONS = 8


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor, known before it is read or computed."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def list_tensors(path: Path) -> dict[str, TensorSpec]:
    """Return the dtype and shape of each tensor of a file, without reading the data of a .safetensors or zipped .bin.

    Args:
        path: A .safetensors file, or a .bin file of torch.save.

    Raises:
        UserError: The file is damaged, or holds something other than tensors of the dtypes that are read here.
    """
    return read_header(path) if path.suffix == ".safetensors" else list_bin(path, load_bin(path))


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Read and check the header of a safetensors file.

    Raises:
        UserError: It is truncated or damaged, or holds tensors of a dtype that is not read here.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes < 8 or header_bytes > min(num_bytes - 8, MAX_HEADER_BYTES):
            raise _broken(path, f"its header claims {header_bytes} bytes")
        header = file.read(header_bytes)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except JSON_ERRORS as error:  # UnicodeDecodeError is a ValueError
        raise _broken(path, f"header: {json_fault(error)}") from None
    if not isinstance(entries, dict):
        raise _broken(path, f"its header is a {type(entries).__name__}, expected an object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "__metadata__ holds something other than texts")
    specs, ranges = {}, []
    for name, entry in entries.items():
        specs[name], offsets = _read_entry(path, name, entry)
        ranges.append((*offsets, name))
    end = 0
    for first, last, name in sorted(ranges):
        if first != end:
            raise _broken(path, f"{name!r} begins at byte {first} of the data, expected {end}")
        end = last
    if end != num_bytes - 8 - header_bytes:
        raise _broken(path, f"the header describes {end} bytes of data, {num_bytes - 8 - header_bytes} follow")
    _check_library_agrees(path)
    return specs


def _read_entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, tuple[int, int]]:
    """Check one entry of a header; return what it describes and its first and last byte in the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        found = dtype if isinstance(dtype, str) else type(dtype).__name__
        raise UserError(f"{path}: {name!r} is of type {found!r}, expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise _broken(path, f"shape and data_offsets of {name!r} are not lists of sizes")
    spec = TensorSpec(DTYPES[dtype], tuple(shape))
    if offsets[1] - offsets[0] != spec.num_bytes:
        raise _broken(path, f"{name!r} has {offsets[1] - offsets[0]} bytes, its shape and dtype make {spec.num_bytes}")
    return spec, (offsets[0], offsets[1])


def _are_sizes(value: object) -> bool:
    """Return whether a JSON value is a list of whole numbers that a 64-bit size can hold."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """Make an object of a header; of two entries of one name nobody knows which one counts."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _check_library_agrees(path: Path) -> None:
    """Open a file with safetensors itself, whose checks are the last word."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except Exception as error:  # SafetensorError, and what Python raises on the way
        raise _broken(path, str(error)) from None


def _broken(path: Path, fault: str) -> UserError:
    """Word the error of a safetensors file."""
    num_bytes, remedy = path.stat().st_size, download_again(path)
    return UserError(f"{path}: broken or truncated safetensors file of {num_bytes} bytes ({fault}). {remedy}")


def is_legacy_bin(path: Path) -> bool:
    """Return whether a .bin file has the format of torch before 1.6, which cannot be memory-mapped."""
    with path.open("rb") as file:
        return file.read(2) == LEGACY_PICKLE_MAGIC


def load_bin(path: Path) -> dict:
    """Load a .bin file, memory-mapped where its format allows it; never executes what it holds.

    Raises:
        UserError: It is damaged, or its pickle asks for code.
    """
    try:
        loaded = torch.load(path, map_location="cpu", mmap=not is_legacy_bin(path), weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        fault = _pickle_fault(error)
        if "GLOBAL" in fault:
            raise UserError(
                f"{path}: refused, because its pickle asks to run code, and only tensors are read ({fault}). Use the "
                "model's .safetensors files, or save its plain tensors with torch.save again"
            ) from None
        raise UserError(f"{path}: not a file of torch.save, or damaged ({fault}). {download_again(path)}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, expected tensors by name. {download_again(path)}")
    return loaded


def _pickle_fault(error: Exception) -> str:
    """Return the part of an error of torch.load that says what is wrong; advice on weights_only stands around it."""
    fault = str(error)
    if isinstance(error, pickle.UnpicklingError):
        fault = fault.partition("\n\nCheck the documentation")[0].rpartition("\n\n")[2]
        fault = fault.rpartition("WeightsUnpickler error: ")[2]
    return f"{type(error).__name__}: {' '.join(fault.split())[:120]}"


def list_bin(path: Path, loaded: dict) -> dict[str, TensorSpec]:
    """Return dtype and shape of each tensor of a loaded .bin file.

    Raises:
        UserError: An entry is not a plain tensor under a name.
    """
    specs = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {name!r:.60} is a {type(tensor).__name__}, expected a tensor under a name")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPE_NAMES:
            kind = f"{tensor.dtype}, {tensor.layout} on {tensor.device.type}"
            raise UserError(f"{path}: {name!r} is {kind}, expected a plain tensor of {', '.join(DTYPES)}")
        specs[name] = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if specs[name].num_bytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name!r} of shape {list(tensor.shape)} is larger than its data, not read")
    return specs
