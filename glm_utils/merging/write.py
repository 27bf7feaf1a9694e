"""Check a base, then merge and write all its weights while the merged model answers a probe, weight by weight.

What every export format with safetensors weights shares.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from glm_utils.checkpoint import MODEL_CLASS
from glm_utils.load_model import check_weights
from glm_utils.merging.layer_streaming import empty_model, streamed_logits
from glm_utils.merging.merge import MergeJob
from glm_utils.merging.shards import ShardWriter, TensorSpec

PROBE_TEXT = "你好"

Parts = dict[str, slice]  # name in the written file -> rows of the tensor


class Reference(NamedTuple):
    """What the merged model computed in memory.

    Attributes:
        input_ids: Token ids of PROBE_TEXT as a prompt, length T.
        logits: fp32 [T, V].
    """

    input_ids: list[int]
    logits: torch.Tensor


def check_base(job: MergeJob) -> None:
    """Check that the base holds exactly the weights of its configuration, before any work.

    Args:
        job: The merge.

    Raises:
        UserError: Weights that are missing, left over or of another shape.
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
    """Write a tensor whole, under its own name."""
    return {name: slice(None)}


def write_weights(
    job: MergeJob,
    directory: Path,
    parts_of: Callable[[str], Parts] = same_name,
    dtype: torch.dtype = torch.float16,
) -> Reference:
    """Merge, quantise and write all weights; the model runs on the probe as its modules are made.

    Args:
        job: The merge.
        directory: Where the shards go.
        parts_of: Says how a tensor is named and cut in the files.
        dtype: What the model computes in.
    """
    input_ids = job.base.tokenizer.encode_prompt(PROBE_TEXT)
    specs = in_model_order(job)
    writer = ShardWriter(directory, part_specs(specs, parts_of))
    made: dict[str, torch.Tensor] = {}
    left = list(specs)
    with tqdm(total=writer.num_bytes, unit="B", unit_scale=True, desc="merge", mininterval=0.5) as bar:

        def make(key: str) -> torch.Tensor:
            if key not in made:
                for name, tensor in job.make(key.removesuffix("_scale")).items():
                    for part_name, rows in parts_of(name).items():
                        writer.write(part_name, tensor[rows])
                    left.remove(name)
                    bar.update(specs[name].num_bytes)
                    made[name] = tensor
            return made.pop(key)

        try:
            logits = streamed_logits(empty_merged(job, job.bits, dtype), input_ids, make, specs, job.device)
            for name in list(left):  # what no module uses: stored rope frequencies
                if name in left:
                    make(name)
            writer.close()
        finally:
            writer.abandon()
    return Reference(input_ids, logits)


def in_model_order(job: MergeJob) -> dict[str, TensorSpec]:
    """Return the merged tensors in the order in which the model holds them."""
    specs = job.specs()
    order = [name for name in empty_merged(job, job.bits).state_dict() if name in specs]
    return {name: specs[name] for name in [*order, *(name for name in specs if name not in set(order))]}


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
        dtype: Dtype of its floating weights.
    """
    model_class = get_class_from_dynamic_module(MODEL_CLASS, str(job.scripts_dir))
    config = model_class.config_class.from_dict(merged_config(job, bits))
    return empty_model(lambda: model_class(config), dtype)


def merged_config(job: MergeJob, bits: int) -> dict:
    """Return the base's config.json with the merged model's quantisation.

    Args:
        job: The merge.
        bits: 0, 4 or 8.
    """
    dropped = ("_name_or_path", "quantization_bit", "quantization_embeddings")
    config = {key: value for key, value in job.base.config.items() if key not in dropped}
    return {**config, "quantization_bit": bits} if bits else config
