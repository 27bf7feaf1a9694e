"""ChatGLM2-6B as transformers' own GlmForCausalLM: configuration, names of modules and tensors, LoRA adapters.

The two compute the same function: fp32 logits differ by summation order only. Source: transformers, models/glm.

The update of query_key_value is split by rows: q, k and v share A and take their rows of B. Engines read one rank and
one alpha for all modules, so every scale is multiplied into B (alpha = rank), and smaller ranks are padded with
zeros. Source: peft 0.21, the adapter format and lora/layer.py; vLLM 0.32, lora/peft_helper.py.
"""

import re
from pathlib import Path
from types import MappingProxyType

from safetensors.torch import save_file
from torch.nn.functional import pad
from transformers import PretrainedConfig

from glm_utils.adapter import LoraPair
from glm_utils.cli import UserError
from glm_utils.files import write_json
from glm_utils.merging.merge import MergeJob

TOP_MODULES = MappingProxyType(
    {
        "transformer.embedding.word_embeddings": "model.embed_tokens",
        "transformer.encoder.final_layernorm": "model.norm",
        "transformer.output_layer": "lm_head",
    }
)
LAYER_MODULES = MappingProxyType(
    {
        "input_layernorm": "input_layernorm",
        "self_attention.dense": "self_attn.o_proj",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
)
ADAPTER_TEXT_BYTES = 4096  # more than a module takes in the header and adapter_config.json, and than run_config.json
LAYER_PATH = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)")


def check_native(job: MergeJob) -> None:
    """Check that GlmForCausalLM can compute what the base computes.

    Raises:
        UserError: Another family, quantized weights, or biases that Glm does not have.
    """
    base, class_name = job.base, native_class(job)
    base.require_unquantized(f"{class_name} has no layout for them")
    if base.config.get("add_bias_linear"):
        raise UserError(
            f"{base.config_path}: add_bias_linear is true, and {class_name} has no such biases. Use --export_format "
            "chatglm"
        )


def native_class(job: MergeJob) -> str:
    """Return the name of the class of transformers that computes the base.

    Raises:
        UserError: There is none for the base's family.
    """
    base = job.base
    if base.family.native_class is None:
        raise UserError(
            f"{base.directory} is {base.family.title}: transformers has no class of its own that computes it (2-D "
            "rotary positions, a bidirectional prompt, residuals of normalized inputs). Use --export_format chatglm"
        )
    return base.family.native_class


def native_config(config: PretrainedConfig, class_name: str) -> dict:
    """Return config.json of fp16 weights for a class of transformers, from the configuration of ChatGLM2-6B."""
    return {
        "architectures": [class_name],
        "model_type": "glm",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.add_qkv_bias,
        "attention_dropout": config.attention_dropout,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": config.use_cache,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "dtype": "float16",
        "torch_dtype": "float16",
    }


def native_modules(path: str, config: PretrainedConfig) -> dict[str, slice]:
    """Return the Glm modules that hold the output rows of a ChatGLM2-6B module.

    Args:
        path: Module path in ChatGLM2-6B.
        config: Configuration of ChatGLM2-6B.

    Returns:
        Rows by module path in Glm; empty for rope frequencies, which Glm does not store.
    """
    if path in TOP_MODULES:
        return {TOP_MODULES[path]: slice(None)}
    match = LAYER_PATH.fullmatch(path)
    if match is None:
        return {}
    layer, name = f"model.layers.{match[1]}", match[2]
    if name in LAYER_MODULES:
        return {f"{layer}.{LAYER_MODULES[name]}": slice(None)}
    # What is left is query_key_value: the rows of all query heads, then of the key heads, then of the value heads
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        f"{layer}.self_attn.q_proj": slice(0, q_rows),
        f"{layer}.self_attn.k_proj": slice(q_rows, q_rows + kv_rows),
        f"{layer}.self_attn.v_proj": slice(q_rows + kv_rows, q_rows + 2 * kv_rows),
    }


def native_tensors(name: str, config: PretrainedConfig) -> dict[str, slice]:
    """Return the Glm tensors that hold the rows of a ChatGLM2-6B tensor; see `native_modules`."""
    path, _, kind = name.rpartition(".")
    return {f"{native_path}.{kind}": rows for native_path, rows in native_modules(path, config).items()}


def native_pairs(pairs: dict[str, LoraPair], config: PretrainedConfig) -> dict[str, LoraPair]:
    """Return the updates by module path in Glm.

    Args:
        pairs: The updates by module path in ChatGLM2-6B.
        config: Configuration of ChatGLM2-6B.
    """
    return {
        native_path: LoraPair(pair.a, pair.b[rows], pair.scale)
        for path, pair in pairs.items()
        for native_path, rows in native_modules(path, config).items()
    }


def native_adapter_bytes(native: dict[str, LoraPair]) -> int:
    """Return an upper bound of the size of what `write_native_adapter` writes.

    Args:
        native: The updates by module path in Glm.
    """
    rank = max(pair.a.shape[0] for pair in native.values())
    return sum(rank * sum(pair.shape) * 4 + ADAPTER_TEXT_BYTES for pair in native.values()) + ADAPTER_TEXT_BYTES


def write_native_adapter(native: dict[str, LoraPair], num_layers: int, directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json for GlmForCausalLM.

    Args:
        native: The updates by module path in Glm.
        num_layers: Number of layers of the base.
        directory: Directory of the files; it exists.
    """
    rank = max(pair.a.shape[0] for pair in native.values())
    tensors = {}
    for path, pair in native.items():
        num_zeros = rank - pair.a.shape[0]
        tensors[f"base_model.model.{path}.lora_A.weight"] = pad(pair.a, (0, 0, 0, num_zeros)).clone()
        tensors[f"base_model.model.{path}.lora_B.weight"] = pad(pair.scale * pair.b, (0, num_zeros))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    write_json(directory / "adapter_config.json", native_adapter_config(list(native), rank, num_layers))


def native_adapter_config(paths: list[str], rank: int, num_layers: int) -> dict:
    """Return adapter_config.json; it names no base, since the original one has other module names.

    Args:
        paths: Module paths in Glm.
        rank: Rank of every module.
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
