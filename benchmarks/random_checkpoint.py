"""Make a base checkpoint of 6B size with random fp16 weights, in the published layout, and a LoRA adapter for it.

    python benchmarks/random_checkpoint.py --output_path /data/random-6b --family chatglm2-6b

Shapes and config come from tests/fixtures/<family>/state_dict_6b.json, those of other sizes from the model class; the
tokenizer is the small one of the tests.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from glm_utils.checkpoint import load_classes
from glm_utils.cli import UserError, nearest, run_cli
from glm_utils.family import FAMILIES, LINEAR_NAMES, PROJECT_DIR, Family
from glm_utils.shards import CheckpointReader

SHARD_BYTES = 1_900_000_000
NOISE_ELEMENTS = 1 << 24
FIXTURES_DIR = PROJECT_DIR / "tests" / "fixtures"


def find_family(name: str) -> Family:
    """Return a family by its name."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UserError(f"--family {name}: expected one of {', '.join(family.name for family in FAMILIES)}")


def published_model(family: str) -> dict:
    """Return the config, and the shape of every tensor, of a family's 6B checkpoint."""
    return json.loads((FIXTURES_DIR / family / "state_dict_6b.json").read_text())


def resized_model(family: str, config_overrides: dict) -> dict:
    """Return what `published_model` does, for a model of another size.

    Args:
        family: Its name.
        config_overrides: Values by configuration key, in place of the 6B checkpoint's.

    Raises:
        UserError: A key that the 6B checkpoint's configuration does not have.
    """
    config = published_model(family)["config"]
    for key in config_overrides:
        if key not in config:
            raise UserError(f"--config_overrides: {key} is no key of {family}. {nearest(key, config, 'keys')}")
    config |= config_overrides
    classes = load_classes(find_family(family))
    with torch.device("meta"):
        model = classes.model(classes.config.from_dict(config))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {"config": config, "n_params": sum(map(torch.Tensor.numel, model.parameters())), "shapes": shapes}


def small_ids(family: str) -> dict:
    """Return the special ids of the tests' small tokenizer, by configuration key."""
    small = json.loads((FIXTURES_DIR / family / "model" / "config.json").read_text())
    return {key: value for key, value in small.items() if key.endswith("token_id")}


def layer_shapes(family: str) -> list[tuple[int, int]]:
    """Return (out, in) of the four Linear modules of a 6B checkpoint's layer, in the order of LINEAR_NAMES."""
    shapes = {
        name.split(".")[-2]: tuple(shape)
        for name, shape in published_model(family)["shapes"].items()
        if ".layers.0." in name and name.endswith(".weight")
    }
    return [shapes[name] for name in LINEAR_NAMES]


def random_weight(shape: list[int], noise: torch.Tensor, name: str) -> torch.Tensor:
    """Return an fp16 weight: ones for norms, else cut from one block of noise (quick, and distinct by name)."""
    if "layernorm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    num_elements = torch.Size(shape).numel()
    start = sum(map(ord, name)) * 9973 % (NOISE_ELEMENTS // 2)
    repeats = (start + num_elements) // NOISE_ELEMENTS + 1
    return noise.repeat(repeats)[start : start + num_elements].reshape(shape)


def random_checkpoint(
    *, output_path: str, family: str = "chatglm2-6b", bin_files: bool = True, config_overrides: str = "{}"
) -> None:
    """Write the checkpoint, in shards.

    Args:
        output_path: Directory to make.
        family: chatglm-6b or chatglm2-6b.
        bin_files: pytorch_model-*.bin as published, else safetensors.
        config_overrides: JSON object of configuration values for another size, e.g. {"num_layers": 2}.
    """
    record, output_dir = find_family(family), Path(output_path)
    output_dir.mkdir(parents=True)
    overrides = json.loads(config_overrides)
    published = resized_model(family, overrides) if overrides else published_model(family)
    noise = (0.02 * torch.randn(NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0))).half()
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, shape in published["shapes"].items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and num_bytes + size > SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += size
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
    for file_name in ("tokenizer_config.json", record.tokenizer_file):
        shutil.copyfile(FIXTURES_DIR / family / "model" / file_name, output_dir / file_name)


def random_adapter(base_dir: Path, adapter_dir: Path, targets: list[str], rank: int = 8) -> None:
    """Write a random LoRA adapter, in peft's format.

    Args:
        base_dir: Directory of the base, named in the adapter.
        adapter_dir: Directory to make.
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


if __name__ == "__main__":
    run_cli(random_checkpoint)
