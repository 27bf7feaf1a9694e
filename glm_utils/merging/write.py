"""Check a base, then merge and write its weights while the merged model computes the logits of a probe.

Used by every export format with safetensors weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from glm_utils.checkpoint import MODEL_CLASS
from glm_utils.merging.layer_streaming import empty_model, streamed_logits
from glm_utils.merging.merge import SCALE_SUFFIX, MergeJob
from glm_utils.merging.shards import ShardWriter
from glm_utils.model_files.tensor_files import TensorSpec
from glm_utils.model_files.weight_checks import check_weights
from glm_utils.remote_code import remote_code

PROBE_TEXT = "你好"

Parts = dict[str, slice]  # name in the written files -> rows of the tensor


class Reference(NamedTuple):
    """What the merged model computed in memory.

    Attributes:
        input_ids: Token ids of PROBE_TEXT as a prompt, length T.
        logits: fp32 [T, V].
    """

    input_ids: list[int]
    logits: torch.Tensor


def check_base(job: MergeJob) -> None:
    """Check before any work that the base holds exactly the weights that its config.json implies.

    Raises:
        UserError: Weights are missing, unexpected or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in empty_merged(job, bits=0).state_dict().items()}
    found = {name: spec.shape for name, spec in job.reader.specs.items()}
    mismatched = [
        f"{name} is {list(found[name])}, its config.json implies {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    check_weights(job.base.directory, missing=missing, mismatched=mismatched, unexpected=unexpected)


def same_name(name: str) -> Parts:
    """Write all rows of a tensor under its own name."""
    return {name: slice(None)}


def write_weights(
    job: MergeJob,
    directory: Path,
    parts_of: Callable[[str], Parts] = same_name,
    dtype: torch.dtype = torch.float16,
) -> Reference:
    """Merge, quantize and write all weights in the pass in which the merged model computes the probe's logits.

    The logits come from the merged tensors in memory and never from the written files. Only so can the check in a
    fresh process find a tensor that was written to the wrong place.

    The plain alternative is a loop that merges and writes, then a second pass that merges again for the logits. It
    takes 1.5 times the CPU time in fp16 (11.5 s for 7.6 s) and 2.1 times in int4 (115 s for 56 s), where quantizing is
    most of the work: ChatGLM2 with 1.1 B weights, one thread of a 2-core CPU (benchmarks/notes_merge.md).

    Args:
        job: The merge.
        directory: Directory of the shards; it exists.
        parts_of: Maps the name of a tensor to its parts: their names in the files and their rows.
        dtype: What the model computes in.
    """
    input_ids = job.base.tokenizer.encode_prompt(PROBE_TEXT)
    specs = in_model_order(job)
    writer = ShardWriter(directory, part_specs(specs, parts_of))
    try:
        with tqdm(total=writer.num_bytes, unit="B", unit_scale=True, desc="merge", mininterval=0.5) as bar:
            weights = WeightStream(job, writer, parts_of, bar)
            model = empty_merged(job, job.bits, dtype)
            logits = streamed_logits(model, input_ids, weights.fetch, specs, job.device)
            weights.write_rest()
        writer.close()
    finally:
        writer.abandon()
    return Reference(input_ids, logits)


class WeightStream:
    """Merges and writes the tensors in the order in which a running model fetches them.

    Args:
        job: The merge.
        writer: Gets every merged tensor once.
        parts_of: As for `write_weights`.
        bar: Counts the merged bytes.
    """

    def __init__(self, job: MergeJob, writer: ShardWriter, parts_of: Callable[[str], Parts], bar: tqdm):
        self._job, self._writer, self._parts_of, self._bar = job, writer, parts_of, bar
        self._remaining = list(job.reader.specs)  # tensors of the base
        self._waiting: dict[str, torch.Tensor] = {}  # merged and written, not fetched yet

    def fetch(self, key: str) -> torch.Tensor:
        """Return a merged tensor, which is written first."""
        if key not in self._waiting:
            # A quantized weight and its scales come from one tensor of the base: the second one waits for its turn
            self._waiting |= self._merge(key.removesuffix(SCALE_SUFFIX))
        return self._waiting.pop(key)

    def write_rest(self) -> None:
        """Write the tensors that no module fetched: rope frequencies that the base stores."""
        while self._remaining:
            self._merge(self._remaining[0])

    def _merge(self, base_name: str) -> dict[str, torch.Tensor]:
        """Merge a tensor of the base and write what becomes of it; returns that by state-dict key."""
        self._remaining.remove(base_name)
        merged = self._job.merge_tensor(base_name)
        for name, tensor in merged.items():
            for part_name, rows in self._parts_of(name).items():
                self._writer.write(part_name, tensor[rows])
            self._bar.update(tensor.nbytes)
        return merged


def in_model_order(job: MergeJob) -> dict[str, TensorSpec]:
    """Return the merged tensors in the order of the model's state dict, then those that it lacks."""
    specs = job.specs()
    order = [name for name in empty_merged(job, job.bits).state_dict() if name in specs]
    return {name: specs[name] for name in dict.fromkeys([*order, *specs])}


def part_specs(specs: dict[str, TensorSpec], parts_of: Callable[[str], Parts]) -> dict[str, TensorSpec]:
    """Return the tensors as the files will hold them."""
    return {
        part_name: TensorSpec(spec.dtype, (len(range(*rows.indices(spec.shape[0]))), *spec.shape[1:]))
        for name, spec in specs.items()
        for part_name, rows in parts_of(name).items()
    }


def empty_merged(job: MergeJob, bits: int, dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    """Build the merged model without weights, from the remote scripts that go with it.

    Args:
        job: The merge.
        bits: 0, 4 or 8.
        dtype: Dtype of its floating-point weights.
    """
    model_class = remote_code(MODEL_CLASS, job.scripts_dir)
    config = model_class.config_class.from_dict(merged_config(job, bits))
    return empty_model(lambda: model_class(config), dtype)


def merged_config(job: MergeJob, bits: int) -> dict:
    """Return the base's config.json with the bits of the merged model: 0, 4 or 8."""
    dropped = ("_name_or_path", "quantization_bit", "quantization_embeddings")
    config = {key: value for key, value in job.base.config.items() if key not in dropped}
    return {**config, "quantization_bit": bits} if bits else config
