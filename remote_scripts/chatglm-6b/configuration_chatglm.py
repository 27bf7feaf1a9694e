"""Configuration of ChatGLM-6B.

The field names are those of the published ``config.json``, so that published checkpoints load unchanged. Two
fields are ours and keep their default for every published checkpoint: ``rotary_angles_in_model_dtype`` and the
``attribute_map`` aliases under which transformers looks for common sizes.
"""

from transformers import PretrainedConfig


class ChatGLMConfig(PretrainedConfig):
    """Hold the hyper-parameters of a ChatGLM-6B model.

    The defaults describe the released 6B checkpoint with its vocabulary of 130,528.

    Args:
        vocab_size: Rows of the embedding and of the output layer. May exceed the tokenizer's size.
        hidden_size: Width of the residual stream, C.
        num_layers: Number of blocks (``num_hidden_layers`` is an alias).
        num_attention_heads: Query heads, H; each is ``hidden_size / num_attention_heads`` wide.
        inner_hidden_size: Width of the feed-forward layer, F.
        layernorm_epsilon: Epsilon of every LayerNorm.
        max_sequence_length: Longest trained sequence, in tokens.
        position_encoding_2d: Must be true; no released checkpoint has another value.
        bos_token_id: ``<sop>``, the first token of the causal part.
        eos_token_id: ``<eop>``, the end of an answer.
        pad_token_id: ``<pad>``.
        mask_token_id: ``[MASK]``.
        gmask_token_id: ``[gMASK]``.
        use_cache: Whether generation keeps keys and values.
        quantization_bit: 0 for floating-point weights, 8 or 4 for row-wise quantized linear layers.
        quantization_embeddings: Whether the embedding (shared with the output layer) is quantized too.
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
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    bos_token_id: int = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    use_cache: bool = True
    quantization_bit: int = 0
    quantization_embeddings: bool = False
    rotary_angles_in_model_dtype: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pre_seq_len: int | None = None
    prefix_projection: bool = False

    def __post_init__(self, **kwargs):
        """Refuse what this implementation does not compute."""
        super().__post_init__(**kwargs)
        if not self.position_encoding_2d:
            raise ValueError("position_encoding_2d=false is not supported: released checkpoints set it to true.")
        # region shared by both families: settings that are refused
        if self.pre_seq_len is not None:
            raise ValueError(
                f"pre_seq_len={self.pre_seq_len}: this is a P-tuning v2 checkpoint; prefix tuning is not supported. "
                "Load the base checkpoint without pre_seq_len and train a LoRA adapter instead."
            )
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(f"quantization_bit must be 0, 4 or 8, found {self.quantization_bit}.")
        # endregion
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 * num_attention_heads "
                f"({self.num_attention_heads}): the 2-D rotary embedding rotates quarters of a head."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads: one for each query head."""
        return self.num_attention_heads


__all__ = ["ChatGLMConfig"]
