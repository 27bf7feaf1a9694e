"""Write a LoRA adapter of ChatGLM2-6B under the module names of transformers' GlmForCausalLM.

The update of query_key_value is cut by rows: q, k and v share A and take their rows of B. Engines read one rank and
one alpha for all modules, so every scale is multiplied into B (alpha = rank), and lower ranks get rows of zeros.
Source: peft 0.21, the adapter format and lora/layer.py; vLLM 0.32, lora/peft_helper.py.
"""

from pathlib import Path

from safetensors.torch import save_file
from torch.nn.functional import pad
from transformers import PretrainedConfig

from glm_utils.lora import LoraPair
from glm_utils.native_glm import native_modules
from glm_utils.run_record import write_json


def write_native_adapter(pairs: dict[str, LoraPair], config: PretrainedConfig, directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Args:
        pairs: The updates by module path in ChatGLM2-6B.
        config: The configuration of ChatGLM2-6B.
        directory: Where; it exists.
    """
    native = {
        native_path: LoraPair(pair.a, pair.b[rows], pair.scale)
        for path, pair in pairs.items()
        for native_path, rows in native_modules(path, config).items()
    }
    rank = max(pair.a.shape[0] for pair in native.values())
    tensors = {}
    for path, pair in native.items():
        num_zeros = rank - pair.a.shape[0]
        tensors[f"base_model.model.{path}.lora_A.weight"] = pad(pair.a, (0, 0, 0, num_zeros)).clone()
        tensors[f"base_model.model.{path}.lora_B.weight"] = pad(pair.scale * pair.b, (0, num_zeros))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    write_json(directory / "adapter_config.json", native_adapter_config(list(native), rank, config.num_hidden_layers))


def native_adapter_config(paths: list[str], rank: int, num_layers: int) -> dict:
    """Return adapter_config.json; it names no base, because the original one has other module names.

    Args:
        paths: Adapted modules.
        rank: Rank of all of them.
        num_layers: Number of layers of the base.
    """
    names = sorted({path.rpartition(".")[2] for path in paths})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": names if len(paths) == num_layers * len(names) else sorted(paths),
        "inference_mode": True,
    }
