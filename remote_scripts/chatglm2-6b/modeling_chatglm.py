"""ChatGLM2-6B for transformers 5: a decoder with grouped keys, partial interleaved rotary angles and SwiGLU.

Written from the published formulas; state-dict keys and config fields are the checkpoint's. Attention runs through
transformers' attention interface (sdpa by default, eager available).

Shapes: B batch, T new tokens, S all tokens, H query heads, G key/value heads, D head_dim, C hidden,
F ffn, V vocab.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention_chatglm import PackedSequences, blocked_to_keep, build_keep_mask, choose_attention
from .batching_chatglm import ContinuousBatch  # noqa: F401 - transformers copies only the siblings that this names
from .configuration_chatglm import ChatGLMConfig
from .cuda_kernels import FORMATS  # noqa: F401
from .cuda_source import SOURCE  # noqa: F401
from .decoding_chatglm import Block, DecodeGraph, DecodeParts
from .fused_chatglm import linear_cross_entropy, rotate_pairs, swiglu
from .generation_chatglm import ChatGLMGenerationMixin
from .kernels_chatglm import KERNELS  # noqa: F401
from .quantization import insert_quantized_linears, quantize


class RMSNorm(nn.Module):
    """Normalize by the root mean square; the weight is applied in fp32, before the cast back."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalized states, (..., C) -> (..., C)."""
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps).to(hidden_states.dtype)


class RotaryEmbedding(nn.Module):
    """Compute rotary angles for the first half of each head.

    The ``inv_freq`` buffer exists for the checkpoint format. Angles are computed from the formula instead, because
    ``model.half()`` would round the buffer.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.rotary_dim = config.kv_channels // 2
        self.in_model_dtype = config.rotary_angles_in_model_dtype
        self.register_buffer("inv_freq", self.frequencies())

    def frequencies(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> torch.Tensor:
        """Return 10000^(-2j/r), (r/2,), computed step by step in ``dtype``."""
        return 1.0 / (10000 ** (torch.arange(0, self.rotary_dim, 2, dtype=dtype, device=device) / self.rotary_dim))

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each (B, 1, T, r/2) in ``dtype``, for position_ids (B, T)."""
        angle_dtype = dtype if self.in_model_dtype else torch.float32
        angles = position_ids[..., None].to(angle_dtype) * self.frequencies(angle_dtype, position_ids.device)
        angles = angles.float()[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved pairs of the first half of each head.

    Args:
        x: (B, H or G, T, D).
        cos: (B, 1, T, D/4).
        sin: (B, 1, T, D/4).

    Returns:
        (B, H or G, T, D); the second half passes through.
    """
    return rotate_pairs(x, cos, sin, interleaved=True)


class SelfAttention(nn.Module):
    """Attend with H query heads over G key/value heads."""

    is_causal = True

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.query_size = config.num_attention_heads * self.head_dim
        self.kv_size = config.num_key_value_heads * self.head_dim
        self.query_key_value = nn.Linear(
            config.hidden_size, self.query_size + 2 * self.kv_size, bias=config.add_qkv_bias or config.add_bias_linear
        )
        self.dense = nn.Linear(self.query_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden_states, rotary, attention_mask, attend, past_key_values=None, **kwargs):
        """Return the attention output (B, T, C) and, for eager attention, the probabilities (B, H, T, S).

        ``attend`` is that of `choose_attention`.
        """
        batch, num_new, _ = hidden_states.shape
        mixed = self.query_key_value(hidden_states)
        query, key, value = (
            part.view(batch, num_new, -1, self.head_dim).transpose(1, 2)  # (B, H or G, T, D)
            for part in mixed.split([self.query_size, self.kv_size, self.kv_size], dim=-1)
        )
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, G, S, D)
        context, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )  # (B, T, H, D)
        return self.dense(context.reshape(batch, num_new, self.query_size)), probabilities


class MLP(nn.Module):
    """Apply SwiGLU: the first half of the widened states gates the second."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return (B, T, C) for (B, T, C)."""
        return self.dense_4h_to_h(swiglu(self.dense_h_to_4h(hidden_states)))


class GLMBlock(GradientCheckpointingLayer):
    """Run one pre-norm block: y = x + Attn(RMS(x)); x' = y + MLP(RMS(y))."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states, rotary, attention_mask, attend, past_key_values=None, **kwargs):
        """Return the new states (B, T, C) and the attention probabilities or None."""
        normed = self.input_layernorm(hidden_states)
        attention, probabilities = self.self_attention(
            normed, rotary, attention_mask, attend, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), probabilities


class Embedding(nn.Module):
    """Hold the word embeddings under the checkpoint's key."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """Hold the blocks and the final norm under the checkpoint's keys."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


# region shared by both families: how transformers loads and initializes a model
class ChatGLMPreTrainedModel(PreTrainedModel):
    """Tell transformers how these models are loaded, initialized and run."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_missing = [r"\.inv_freq$"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())


# endregion


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Run the blocks; the output layer lives here because its checkpoint key does."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.quantization_bit:
            insert_quantized_linears(self.encoder.layers, config.quantization_bit)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embedding.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.output_layer = value

    def _keep_mask(self, attention_mask, num_new: int, past_key_values, device) -> torch.Tensor | None:
        """Return the mask of this pass, bool (B, 1, T, S) with True = may attend, or None for the plain rule."""
        if attention_mask is not None and attention_mask.dim() == 4:
            return blocked_to_keep(attention_mask).to(device)
        num_past, num_keys = 0, num_new
        if past_key_values is not None:
            num_past, num_keys = past_key_values.get_seq_length(), past_key_values.get_mask_sizes(num_new, 0)[0]
        static = num_keys != num_new and not isinstance(num_past, int)
        if attention_mask is None and not static and (num_new == 1 or num_keys == num_new):
            return None
        if attention_mask is not None and attention_mask.shape[-1] < num_new:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[-1]} tokens but there are {num_new} new ones; it must "
                "cover past and new tokens."
            )
        return build_keep_mask(attention_mask, num_new, num_past, num_keys, device)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the blocks and the final norm.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S) with 1 = keep, or the published boolean (B, 1, T, S) with True = blocked.
            position_ids: (B, T); 0..T-1 behind the cache when absent.
            past_key_values: A transformers cache; created when ``use_cache`` and absent.
            inputs_embeds: (B, T, C), instead of input_ids.
            use_cache: Whether to keep keys and values; the config's value when absent.
            output_hidden_states: Also return L+1 states (B, T, C): the inputs of the blocks, then the last output
                before the final norm.
            output_attentions: Also return the probabilities (eager attention only).
            **kwargs: cu_seq_lens_q, int32 (N + 1,), and max_length_q: the batch is packed, N sequences end to end that
                do not see each other. All others are passed on to the attention function.

        Raises:
            ValueError: Not exactly one of input_ids and inputs_embeds is given, or the mask does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden_states = self.embedding.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        num_new, device = hidden_states.shape[1], hidden_states.device
        sequences = PackedSequences.from_kwargs(
            kwargs, num_new, attention_mask=attention_mask, past_key_values=past_key_values
        )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if sequences is not None or (self.gradient_checkpointing and self.training):
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None and sequences is None:
            num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(num_new, device=device) + num_past)[None]
        elif position_ids is None:
            position_ids = sequences.positions[None]
        mask = None if sequences is not None else self._keep_mask(attention_mask, num_new, past_key_values, device)
        attend = choose_attention(self.config._attn_implementation, sequences)
        rotary = self.rotary_pos_emb(position_ids, hidden_states.dtype)

        all_states, all_probabilities = [hidden_states], []
        for layer in self.encoder.layers:
            hidden_states, probabilities = layer(
                hidden_states, rotary, mask, attend, past_key_values=past_key_values, **kwargs
            )
            if output_hidden_states:
                all_states.append(hidden_states)
            if output_attentions:
                all_probabilities.append(probabilities)
        return BaseModelOutputWithPast(
            last_hidden_state=self.encoder.final_layernorm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_states) if output_hidden_states else None,
            attentions=tuple(all_probabilities) if output_attentions else None,
        )


class ChatGLMForConditionalGeneration(ChatGLMGenerationMixin, ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM2-6B with its output layer: training, generation and chat."""

    chat_max_length = 8192
    chat_top_p = 0.8
    chat_temperature = 0.8
    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.transformer.output_layer = value

    # region shared by both families: quantization, logits and loss
    def quantize(
        self,
        bits: int,
        *,
        quantize_embeddings: bool = False,
        use_quantization_cache: bool = False,
        empty_init: bool = False,
        device: str | None = None,
    ) -> "ChatGLMForConditionalGeneration":
        """Quantize the linear layers of every block in place and return the model.

        Args:
            bits: 4 or 8.
            quantize_embeddings: Also quantize the embedding, which then serves as output layer too (ChatGLM-6B only).
            use_quantization_cache: No effect: a published switch for a buffer that is not needed here.
            empty_init: No effect: a published switch; weights are replaced one at a time anyway.
            device: Where the scales are searched; by default the weight's own GPU, else the first GPU, else the CPU.

        Raises:
            ValueError: Embeddings of a family whose checkpoints have no form for it, or what ``quantize`` refuses.
        """
        if quantize_embeddings and not hasattr(self.config, "quantization_embeddings"):
            raise ValueError("quantize_embeddings: this family's checkpoints hold no quantized embedding")
        DecodeGraph.forget(self)
        return quantize(self, bits, device=device, quantize_embeddings=quantize_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        loss_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits and, with labels, the loss.

        Args:
            input_ids: See ChatGLMModel.forward, also for the arguments not described here.
            attention_mask: As there.
            position_ids: As there.
            past_key_values: A transformers cache.
            inputs_embeds: (B, T, C).
            labels: (B, T) token ids, -100 where a token does not count; shifted here.
            use_cache: Whether to keep keys and values.
            output_hidden_states: Whether to return the hidden states.
            output_attentions: Whether to return the attention probabilities.
            return_dict: False returns a tuple.
            logits_to_keep: Number of last positions to compute logits for (0 = all), or a tensor of positions.
            num_items_in_batch: Divisor of the summed loss; the number of counted tokens when absent.
            loss_positions: int64 (M,), indices into (B * T) of the tokens whose next token counts. With labels, the
                loss alone is then computed, from these tokens, and their logits are never held at once.
            **kwargs: Passed on to the transformer.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        output_layer, loss, logits = self.get_output_embeddings(), None, None
        if labels is not None and loss_positions is not None:
            loss = linear_cross_entropy(
                outputs.last_hidden_state, output_layer, labels, loss_positions, num_items_in_batch
            )
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = output_layer(outputs.last_hidden_state[:, kept])  # (B, T, V)
            if labels is not None:
                loss = self.loss_function(
                    logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
                )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result

    # endregion

    def decode_parts(self) -> DecodeParts:
        """Describe the model to decoding_chatglm.py."""
        embed, dtype, device = self.transformer.rotary_pos_emb, self.dtype, self.device

        def rotary(num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:  # must not hold the model
            positions = torch.arange(num_positions, device=device)[None]
            return tuple(table[0, 0] for table in embed(positions, dtype))

        return DecodeParts(
            embedding=self.get_input_embeddings(),
            blocks=[
                Block(
                    layer.input_layernorm,
                    layer.self_attention.query_key_value,
                    layer.self_attention.dense,
                    layer.post_attention_layernorm,
                    layer.mlp.dense_h_to_4h,
                    layer.mlp.dense_4h_to_h,
                )
                for layer in self.transformer.encoder.layers
            ],
            final_norm=self.transformer.encoder.final_layernorm,
            lm_head=self.get_output_embeddings(),
            rotary=rotary,
            num_heads=self.config.num_attention_heads,
            num_kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            activation="swiglu",
            residual_scale=None,
            two_d=False,
        )

    @staticmethod
    def _prompt_positions(input_ids, attention_mask, num_past: int) -> torch.Tensor:
        """Return (B, T): padding at 0, the first real token at 0; behind ``num_past`` cached tokens."""
        if attention_mask is None:
            return (torch.arange(input_ids.shape[1], device=input_ids.device) + num_past).expand_as(input_ids)
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]

    @staticmethod
    def _next_positions(position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids[:, -1:] + 1

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        past_key_values: Cache | None = None,
        max_length: int | None = None,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor=None,
        return_past_key_values: bool = False,
        **kwargs,
    ):
        """Answer a query piece by piece, on request behind the cache of the earlier turns.

        With ``past_key_values`` only the new turn is encoded behind the cached tokens; ask for the cache with
        ``return_past_key_values`` and pass it to the next call.

        Args:
            tokenizer: See `chat`, also for the arguments not described here.
            query: As there.
            history: As there.
            past_key_values: The cache of the earlier turns.
            max_length: As there.
            do_sample: As there.
            top_p: As there.
            temperature: As there.
            logits_processor: As there.
            return_past_key_values: Yield the cache too.
            **kwargs: Passed on to ``stream_generate``.

        Yields:
            The answer so far and the history with it (and the cache). Text that ends inside a character is held
            back until the character is complete.
        """
        history = list(history or [])
        settings = self._chat_settings(max_length, do_sample, top_p, temperature) | kwargs
        if past_key_values is None:
            inputs = self.build_inputs(tokenizer, query, history)
        else:
            inputs = self.build_stream_inputs(tokenizer, query, history, past_key_values)
            settings["past_key_values"] = past_key_values
        if return_past_key_values:
            settings["use_cuda_graph"] = False  # its cache stays behind in the graph's buffers
        for text, cache in self._stream_text(tokenizer, inputs, logits_processor, settings):
            if not text or text.endswith("\ufffd"):
                continue
            response = self.process_response(text)
            turn = (response, [*history, (query, response)])
            yield (*turn, cache) if return_past_key_values else turn

    def build_stream_inputs(self, tokenizer, query: str, history: list[tuple[str, str]], past_key_values: Cache):
        """Encode only the newest turn, placed behind the cached tokens.

        Args:
            tokenizer: The ChatGLMTokenizer of this checkpoint.
            query: The user's text.
            history: Earlier turns; empty means a first turn after all.
            past_key_values: The cache of the earlier turns.

        Returns:
            input_ids (1, T), position_ids (1, T) and attention_mask (1, past + T).
        """
        if not history:
            ids = tokenizer.encode_prompt(query)
        else:
            # Compared with the prompt of the turns before, and not searched for: a question may hold any text
            before = tokenizer.build_prompt("", [("", "")] * (len(history) - 1))
            turn = tokenizer.build_prompt(query, [("", "")] * len(history)).removeprefix(before)
            ids = tokenizer.encode_text(turn)[1:]
        num_past = int(past_key_values.get_seq_length())
        input_ids = torch.tensor([ids], device=self.device)
        return {
            "input_ids": input_ids,
            "position_ids": torch.arange(len(ids), device=self.device)[None] + num_past,
            "attention_mask": torch.ones(1, num_past + len(ids), dtype=torch.long, device=self.device),
        }


__all__ = ["ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMPreTrainedModel"]
