"""Write base checkpoints and LoRA adapters with random weights, in the formats that are published.

The tokenizer is the small one of the tests.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.harness.published import FIXTURES_DIR, find_family, published_model, resized_model, small_ids
from glm_utils.merging.shards import CheckpointReader, TensorSpec, plan_shards

LORA_TARGETS = ["query_key_value"]  # what an adapter updates unless a benchmark says otherwise
SHARD_BYTES = 1_900_000_000
NOISE_ELEMENTS = 1 << 24


def write_random_checkpoint(
    output_dir: Path, family: str, bin_files: bool = True, config_overrides: dict | None = None
) -> None:
    """Write a base checkpoint of random fp16 weights in shards.

    Args:
        output_dir: Directory to create.
        family: The family's name.
        bin_files: pytorch_model-*.bin as published, else safetensors.
        config_overrides: Configuration values for another size than 6B, e.g. {"num_layers": 2}.
    """
    tokenizer_file = find_family(family).tokenizer_file
    published = resized_model(family, config_overrides) if config_overrides else published_model(family)
    output_dir.mkdir(parents=True)
    noise = (0.02 * torch.randn(NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0))).half()
    specs = {name: TensorSpec(torch.float16, tuple(shape)) for name, shape in published["shapes"].items()}
    shards = plan_shards(specs, SHARD_BYTES)
    stem, suffix = ("pytorch_model", "bin") if bin_files else ("model", "safetensors")
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        part = {name: random_weight(published["shapes"][name], noise, name).half().clone() for name in names}
        if bin_files:
            torch.save(part, output_dir / file_name)
        else:
            save_file(part, output_dir / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": 2 * published["n_params"]}, "weight_map": weight_map}
    (output_dir / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (output_dir / "config.json").write_text(json.dumps(published["config"] | small_ids(family), indent=2))
    for file_name in ("tokenizer_config.json", tokenizer_file):
        shutil.copyfile(FIXTURES_DIR / family / "model" / file_name, output_dir / file_name)


def random_weight(shape: list[int], noise: torch.Tensor, name: str) -> torch.Tensor:
    """Return a weight: ones for a norm, zeros for its bias, else a slice of the noise.

    Slices of one block are made much faster than fresh noise; the start of a slice depends on the name, so that
    weights differ.

    Args:
        shape: Of the weight.
        noise: fp16 [NOISE_ELEMENTS], repeated for a larger weight.
        name: State-dict key.
    """
    if "layernorm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    num_elements = torch.Size(shape).numel()
    start = sum(map(ord, name)) * 9973 % (NOISE_ELEMENTS // 2)
    repeats = (start + num_elements) // NOISE_ELEMENTS + 1
    return noise.repeat(repeats)[start : start + num_elements].reshape(shape)


def write_random_adapter(base_dir: Path, adapter_dir: Path, targets: list[str], rank: int = 8) -> None:
    """Write a random LoRA adapter in peft's format.

    Args:
        base_dir: Directory of the base, which the adapter's configuration names.
        adapter_dir: Directory to create.
        targets: Names of the adapted Linear modules.
        rank: Rank of the matrices.
    """
    adapter_dir.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for name, spec in CheckpointReader(base_dir).specs.items():
        path = name.removesuffix(".weight")
        if path != name and path.rpartition(".")[2] in targets:
            num_out, num_in = spec.shape
            pairs[f"base_model.model.{path}.lora_A.weight"] = 0.01 * torch.randn(rank, num_in, generator=generator)
            pairs[f"base_model.model.{path}.lora_B.weight"] = 0.01 * torch.randn(num_out, rank, generator=generator)
    save_file(pairs, adapter_dir / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32, "bias": "none"}
    config |= {"target_modules": targets, "base_model_name_or_path": str(base_dir)}
    (adapter_dir / "adapter_config.json").write_text(json.dumps(config))
