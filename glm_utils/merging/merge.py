"""Merge a LoRA adapter into a base model tensor by tensor, and quantize each merged weight.

W' = W + scale * B @ A in fp32, rounded once to fp16; then int8 or int4 with one scale per row
(remote_scripts/*/quantization.py). With merge_base "nf4", W is what QLoRA training saw: every Linear of a layer
quantized to NF4 (blocks of 64, double quantization) and dequantized. One tensor is in memory at a time.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from glm_utils.adapter import Adapter
from glm_utils.checkpoint import Checkpoint
from glm_utils.cli import UserError
from glm_utils.merging.arithmetic import add_update, nf4_round_trip, to_fp16
from glm_utils.merging.report import MergeReport
from glm_utils.merging.shards import CheckpointReader, TensorSpec
from glm_utils.remote_code import remote_code

SCALE_SUFFIX = "_scale"  # the state-dict key of a quantized weight's scales ends with it


@dataclass
class MergeJob:
    """A merge with resolved arguments.

    Attributes:
        base: The base model.
        adapter: The adapter.
        scripts_dir: Directory of the remote scripts that go with the model.
        bits: Bits of the merged layers' weights: 0 (fp16), 8 or 4.
        device: Device of the arithmetic.
        merge_base: "original" or "nf4".
        nf4_dtype: Dtype of the base weights when training quantized them.
        reader: The base model's tensors.
        report: Norms of updates and errors, filled while merging.
    """

    base: Checkpoint
    adapter: Adapter
    scripts_dir: Path
    bits: int
    device: torch.device
    merge_base: str
    nf4_dtype: torch.dtype
    reader: CheckpointReader
    report: MergeReport = field(default_factory=MergeReport)

    def __post_init__(self):
        self.quantize_rows = remote_code("quantization.quantize_rows", self.scripts_dir)
        self.dequantize_rows = remote_code("quantization.dequantize_rows", self.scripts_dir)
        check_fit(self)

    @property
    def weight_format(self) -> str:
        """Format of the merged layers' weights: fp16, int8 or int4."""
        return f"int{self.bits}" if self.bits else "fp16"

    def is_linear(self, name: str) -> bool:
        """Return whether a tensor is the weight of one of a layer's Linear modules."""
        path, _, kind = name.rpartition(".")
        return kind == "weight" and path.rpartition(".")[2] in self.base.family.linear_names

    def specs(self) -> dict[str, TensorSpec]:
        """Return the tensors that the merged model will hold, in the base's order."""
        specs = {}
        for name, spec in self.reader.specs.items():
            if self.bits and self.is_linear(name):
                rows, columns = spec.shape
                specs[name] = TensorSpec(torch.int8, (rows, columns // 2 if self.bits == 4 else columns))
                specs[f"{name}{SCALE_SUFFIX}"] = TensorSpec(torch.float16, (rows,))
            else:
                specs[name] = TensorSpec(torch.float16, spec.shape)
        return specs

    @torch.no_grad()
    def merge_tensor(self, name: str) -> dict[str, torch.Tensor]:
        """Merge one tensor of the base, and quantize it if it is a layer's weight and the merge has bits.

        Returns:
            The tensor in fp16, or the int8 or packed int4 weight and its scales under name and name + "_scale".

        Raises:
            UserError: A value is NaN, infinite or beyond the range of fp16.
        """
        tensor = self.reader.read(name)
        if not self.is_linear(name):
            return {name: to_fp16(tensor, name)}
        path = name.removesuffix(".weight")
        pair = self.adapter.pairs.get(path)
        # A weight that is only rounded is not worth the way to a GPU and back
        needs_device = pair or self.bits or self.merge_base == "nf4"
        weight = tensor.to(self.device) if needs_device else tensor
        if self.merge_base == "nf4":
            original, weight = weight, nf4_round_trip(weight.to(self.nf4_dtype))
            self.report.add_nf4_error(path, original, weight)
        if pair:
            merged = add_update(weight, pair, name)
            self.report.add_update(path, tensor, pair)
        else:
            merged = to_fp16(weight, name)
        return self.quantize(name, merged) if self.bits else {name: merged}

    def quantize(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize a merged fp16 weight; the report compares the searched scales with absmax scales."""
        stored, scale = self.quantize_rows(weight, self.bits)
        absmax = self.quantize_rows(weight, self.bits, "absmax")
        for method, quantized in (("search", (stored, scale)), ("absmax", absmax)):
            dequantized = self.dequantize_rows(*quantized, self.bits, torch.float16)
            self.report.add_quantization_error(name.removesuffix(".weight"), method, weight, dequantized)
        return {name: stored, f"{name}{SCALE_SUFFIX}": scale}


def check_fit(job: MergeJob) -> None:
    """Check that the base has a Linear of the same shape for every update, and that int4 can pack its weights.

    Raises:
        UserError: The adapter belongs to another model, or a row has an odd number of weights.
    """
    linears = {
        name.removesuffix(".weight"): spec.shape for name, spec in job.reader.specs.items() if job.is_linear(name)
    }
    job.adapter.check_fit(linears, f"{job.base.directory} ({job.base.family.title})")
    odd = [name for name, spec in job.reader.specs.items() if job.is_linear(name) and spec.shape[1] % 2]
    if job.bits == 4 and odd:
        raise UserError(
            f"{job.base.directory}: {odd[0]} has an odd number of columns, which int4 cannot pack. Use --qbits 8"
        )
