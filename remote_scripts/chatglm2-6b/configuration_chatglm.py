"""Configuration of ChatGLM2-6B.

The field names are those of the published ``config.json``, so that published checkpoints load unchanged. Two
fields are ours and keep their default for every published checkpoint: ``rotary_angles_in_model_dtype`` and the
``attribute_map`` aliases under which transformers looks for common sizes.
"""

from transformers import PretrainedConfig

# Published switches that are not computed with another value, which is refused, not ignored.
_FIXED_SWITCHES = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "rope_ratio": 1,
}


class ChatGLMConfig(PretrainedConfig):
    """Hold the hyper-parameters of a ChatGLM2-6B model.

    The defaults are the published class defaults, plus the token ids of the released checkpoint.

    Args:
        padded_vocab_size: Rows of the embedding and of the output layer (alias ``vocab_size``). Exceeds the
            tokenizer's size.
        hidden_size: Width of the residual stream, C.
        num_layers: Number of blocks (alias ``num_hidden_layers``).
        num_attention_heads: Query heads, H.
        ffn_hidden_size: Width of the gated feed-forward layer, F.
        kv_channels: Width of one head, D (alias ``head_dim``).
        multi_query_attention: Whether keys and values have fewer heads than queries.
        multi_query_group_num: Number of key/value heads, G, under multi-query attention.
        add_qkv_bias: Bias on the query/key/value projection.
        add_bias_linear: Bias on every other linear layer.
        layernorm_epsilon: Epsilon of every RMSNorm.
        attention_dropout: Dropout on attention probabilities during training.
        seq_length: Longest sequence, in tokens.
        rmsnorm: Must be true.
        post_layer_norm: Must be true: RMSNorm before the output layer.
        apply_residual_connection_post_layernorm: Must be false.
        fp32_residual_connection: Must be false.
        hidden_dropout: Must be 0.
        rope_ratio: Must be 1: checkpoints for longer texts scale the rotary angles by it.
        apply_query_key_layer_scaling: No effect: the factor cancels in the published code too.
        attention_softmax_in_fp32: No effect: the softmax always runs in fp32.
        bias_dropout_fusion: No effect.
        original_rope: No effect; kept because inference engines read it.
        eos_token_id: ``</s>``.
        pad_token_id: ``<unk>``.
        bos_token_id: Unset: prompts begin with ``[gMASK]`` and ``sop``.
        use_cache: Whether generation keeps keys and values.
        quantization_bit: 0 for floating-point weights, 8 or 4 for row-wise quantized linear layers.
        rotary_angles_in_model_dtype: Round rotary angles to the model's dtype as the published code did. Off by
            default: angles are computed in fp32, which is exact at every position.
        tie_word_embeddings: Whether the output layer shares the embedding's weight; false in the released files.
        initializer_range: Standard deviation of freshly initialized weights.
        pre_seq_len: Refused when set: prefix tuning (P-tuning v2) is not supported.
        prefix_projection: Part of prefix tuning; ignored.

    Raises:
        ValueError: For settings that no released checkpoint has and this implementation does not compute.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "vocab_size": "padded_vocab_size",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
    }

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    add_qkv_bias: bool = False
    add_bias_linear: bool = False
    layernorm_epsilon: float = 1e-5
    attention_dropout: float = 0.0
    seq_length: int = 2048
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    hidden_dropout: float = 0.0
    rope_ratio: float = 1
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    bias_dropout_fusion: bool = True
    original_rope: bool = True
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    use_cache: bool = True
    quantization_bit: int = 0
    rotary_angles_in_model_dtype: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pre_seq_len: int | None = None
    prefix_projection: bool = False

    def __post_init__(self, **kwargs):
        """Refuse what this implementation does not compute."""
        super().__post_init__(**kwargs)
        for name, supported in _FIXED_SWITCHES.items():
            if getattr(self, name) != supported:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not supported: released checkpoints set it to {supported}."
                )
        # region shared by both families: settings that are refused
        if self.pre_seq_len is not None:
            raise ValueError(
                f"pre_seq_len={self.pre_seq_len}: this is a P-tuning v2 checkpoint; prefix tuning is not supported. "
                "Load the base checkpoint without pre_seq_len and train a LoRA adapter instead."
            )
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(f"quantization_bit must be 0, 4 or 8, found {self.quantization_bit}.")
        # endregion
        if self.num_attention_heads % self.num_key_value_heads or self.kv_channels % 4:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of the {self.num_key_value_heads} "
                f"key/value heads, and kv_channels {self.kv_channels} of 4."
            )

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads, G."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads


__all__ = ["ChatGLMConfig"]
