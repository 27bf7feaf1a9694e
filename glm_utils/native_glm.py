"""ChatGLM2-6B as transformers' own GlmForCausalLM: configuration and names of modules and tensors.

The two compute the same function: logits agree in fp32 to summation order. Source: transformers, models/glm.
"""

import re
from types import MappingProxyType

from transformers import PretrainedConfig

from glm_utils.cli import UserError
from glm_utils.merge import MergeJob

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
LAYER_PATH = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)")


def check_native(job: MergeJob) -> None:
    """Check that a base can be written for GlmForCausalLM.

    Args:
        job: The merge, or a job without updates.

    Raises:
        UserError: Another family, quantised weights, or biases that Glm has not.
    """
    if job.family.native_class is None:
        raise UserError(
            f"{job.base_dir} is {job.family.title}: transformers has no class of its own that computes it (2-D rotary "
            "positions, a bidirectional prompt, residuals of normalised inputs). Use --export_format chatglm"
        )
    if job.base_config.get("quantization_bit"):
        raise UserError(
            f"{job.base_dir}: quantised weights, and {job.family.native_class} has no layout for them. Give the fp16 "
            f"checkpoint, e.g. {job.family.hub_ids[0]}"
        )
    if job.base_config.get("add_bias_linear"):
        raise UserError(
            f"{job.base_dir / 'config.json'}: add_bias_linear is true, and {job.family.native_class} has no such "
            "biases. Use --export_format chatglm"
        )


def native_config(config: PretrainedConfig, native_class: str) -> dict:
    """Return config.json for GlmForCausalLM with fp16 weights.

    Args:
        config: The configuration of ChatGLM2-6B.
        native_class: Name of the class.
    """
    return {
        "architectures": [native_class],
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
    """Name the native modules that hold the rows of a module.

    Args:
        path: Module path in ChatGLM2-6B.
        config: Its configuration.

    Returns:
        Output rows by native module path; nothing for rope frequencies, which Glm does not store.
    """
    if path in TOP_MODULES:
        return {TOP_MODULES[path]: slice(None)}
    match = LAYER_PATH.fullmatch(path)
    if match is None:
        return {}
    layer, name = f"model.layers.{match[1]}", match[2]
    if name in LAYER_MODULES:
        return {f"{layer}.{LAYER_MODULES[name]}": slice(None)}
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        f"{layer}.self_attn.q_proj": slice(0, q_rows),
        f"{layer}.self_attn.k_proj": slice(q_rows, q_rows + kv_rows),
        f"{layer}.self_attn.v_proj": slice(q_rows + kv_rows, q_rows + 2 * kv_rows),
    }


def native_tensors(name: str, config: PretrainedConfig) -> dict[str, slice]:
    """Name the native tensors that hold the rows of a tensor; see `native_modules`."""
    path, _, kind = name.rpartition(".")
    return {f"{native_path}.{kind}": rows for native_path, rows in native_modules(path, config).items()}
