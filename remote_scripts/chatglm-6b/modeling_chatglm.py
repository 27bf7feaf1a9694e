"""ChatGLM-6B for transformers 5: a prefix language model with 2-D rotary angles and normalized residuals.

Written from the published formulas; state-dict keys and config fields are the checkpoint's. Attention runs through
transformers' attention interface (sdpa by default, eager available).

Shapes: B batch, T new tokens, S all tokens, H heads, D head_dim, C hidden, F ffn, V vocab.
"""

import re

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention_chatglm import PackedSequences, blocked_to_keep, build_keep_mask, choose_attention, padding_queries
from .batching_chatglm import ContinuousBatch  # noqa: F401 - transformers copies only the siblings that this names
from .configuration_chatglm import ChatGLMConfig
from .cuda_kernels import FORMATS  # noqa: F401
from .cuda_source import SOURCE  # noqa: F401
from .decoding_chatglm import Block, DecodeGraph, DecodeParts
from .fused_chatglm import linear_cross_entropy, rotate_pairs
from .generation_chatglm import ChatGLMGenerationMixin
from .kernels_chatglm import KERNELS  # noqa: F401
from .quantization import QuantizedEmbedding, insert_quantized_linears, output_layer_of, quantize

# sqrt(2 * 28): the published block never learns the layer count, so this holds for any number of layers.
RESIDUAL_SCALE = 56**0.5


class RotaryEmbedding(nn.Module):
    """Compute the angles of the 2-D rotary embedding: one position for each half of a head.

    The frequencies are rounded to fp16 because the model was trained with them so. The ``inv_freq`` buffer exists
    for the checkpoint format; the formula is used instead, because ``model.to(bfloat16)`` would round the buffer.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.rotary_dim = config.head_dim // 2
        self.in_model_dtype = config.rotary_angles_in_model_dtype
        self.register_buffer("inv_freq", self.frequencies())

    def frequencies(self, device: torch.device | None = None) -> torch.Tensor:
        """Return 10000^(-2j/r) rounded to fp16, as fp32 (r/2,)."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device) / self.rotary_dim
        return (1.0 / 10000**exponents).half().float()

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each (B, 1, T, 2, r/2) in ``dtype``, for position_ids (B, 2, T)."""
        angle_dtype = dtype if self.in_model_dtype else torch.float32
        frequencies = self.frequencies(position_ids.device).to(angle_dtype)
        angles = position_ids.transpose(1, 2)[:, None, :, :, None].to(angle_dtype) * frequencies
        return angles.float().cos().to(dtype), angles.float().sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each half of a head by its own position; within a half, the first quarter pairs with the second.

    Args:
        x: (B, H, T, D).
        cos: (B, 1, T, 2, D/4).
        sin: (B, 1, T, 2, D/4).

    Returns:
        (B, H, T, D).
    """
    return rotate_pairs(x, cos, sin, interleaved=False)


class SelfAttention(nn.Module):
    """Attend with H heads; the fused projection holds query, key and value head by head."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.rotary_emb = RotaryEmbedding(config)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, rotary, attention_mask, attend, padding=None, past_key_values=None, **kwargs):
        """Return the attention output (B, T, C) and, for eager attention, the probabilities (B, H, T, S).

        ``attend`` is that of `choose_attention`. Queries of padding, where ``padding`` (B, 1, T, 1) is true, are
        zeroed: equal scores, a uniform average, as published.
        """
        batch, num_new, hidden_size = hidden_states.shape
        mixed = self.query_key_value(hidden_states).view(batch, num_new, -1, 3 * self.head_dim)
        query, key, value = mixed.transpose(1, 2).chunk(3, dim=-1)  # (B, H, T, D) each
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if padding is not None:
            query = query.masked_fill(padding, 0)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, D)
        context, probabilities = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs
        )  # (B, T, H, D)
        return self.dense(context.reshape(batch, num_new, hidden_size)), probabilities


class GLU(nn.Module):
    """Apply the feed-forward layer with tanh GELU; despite the published name there is no gate."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return (B, T, C) for (B, T, C)."""
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class GLMBlock(GradientCheckpointingLayer):
    """Run one block whose residual is the normalized input: y = a LN(x) + Attn(LN(x)); x' = a LN(y) + MLP(LN(y))."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = GLU(config)

    def forward(self, hidden_states, rotary, attention_mask, attend, padding=None, past_key_values=None, **kwargs):
        """Return the new states (B, T, C) and the attention probabilities or None."""
        normed = self.input_layernorm(hidden_states)
        attention, probabilities = self.attention(
            normed, rotary, attention_mask, attend, padding=padding, past_key_values=past_key_values, **kwargs
        )
        normed = self.post_attention_layernorm(RESIDUAL_SCALE * normed + attention)
        return RESIDUAL_SCALE * normed + self.mlp(normed), probabilities


def first_index(condition: torch.Tensor) -> torch.Tensor:
    """Return the index of the first true token of each sequence, (B, T) -> (B,); T where there is none."""
    return torch.where(condition.any(-1), condition.int().argmax(-1), condition.shape[-1])


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
    """Run the blocks and the final norm."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        if config.quantization_bit and config.quantization_embeddings:
            self.word_embeddings = QuantizedEmbedding(config.vocab_size, config.hidden_size, config.quantization_bit)
        else:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if config.quantization_bit:
            insert_quantized_linears(self.layers, config.quantization_bit)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.word_embeddings = value

    def get_position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute both positions of every token of complete sequences.

        The first counts up to bos and then stays at the position of the first gMASK (of the first MASK in a sequence
        without gMASK); the second is 0 before bos and counts from 1 at bos. Left padding shifts nothing: positions
        count from the first kept token.

        Args:
            input_ids: (B, T), sequences from their first token on.
            attention_mask: (B, T) with 1 = keep, or None.

        Returns:
            int64 tensor (B, 2, T).

        Raises:
            ValueError: A sequence has no bos, or neither gMASK nor MASK.
        """
        config, columns = self.config, torch.arange(input_ids.shape[1], device=input_ids.device)
        is_gmask, is_mask = input_ids == config.gmask_token_id, input_ids == config.mask_token_id
        bos = first_index(input_ids == config.bos_token_id)  # (B,)
        mask = torch.where(is_gmask.any(-1), first_index(is_gmask), first_index(is_mask))
        missing = torch.nonzero(torch.maximum(bos, mask) == input_ids.shape[1]).flatten().tolist()
        if missing:
            raise ValueError(
                f"sequence {missing[0]} of input_ids has no bos ({config.bos_token_id}) or neither gMASK "
                f"({config.gmask_token_id}) nor MASK ({config.mask_token_id}); ChatGLM-6B needs both. Build prompts "
                "with the tokenizer, or pass position_ids for a continuation of cached tokens."
            )
        pad = torch.zeros_like(bos) if attention_mask is None else first_index(attention_mask.bool())
        bos, mask, pad = bos[:, None], mask[:, None], pad[:, None]
        first = torch.where(columns < bos, columns, mask) - pad
        second = (columns - bos + 1).clamp(min=0)
        return torch.stack((first.clamp(min=0), second), dim=1)

    def _keep_mask(self, attention_mask, position_ids, num_new: int, past_key_values):
        """Return the mask, bool (B, 1, T, S) with True = may attend, and the padding queries, (B, 1, T, 1) or None."""
        device = position_ids.device
        if attention_mask is not None and attention_mask.dim() == 4:
            keep = blocked_to_keep(attention_mask).to(device)
            padding = padding_queries(None, keep, num_new)
            return keep | padding, padding
        num_past, num_keys = 0, num_new
        if past_key_values is not None:
            num_past, num_keys = past_key_values.get_seq_length(), past_key_values.get_mask_sizes(num_new, 0)[0]
        if num_new == 1 and attention_mask is None and isinstance(num_past, int) and num_keys == num_past + 1:
            return None, None
        if num_new > 1:
            num_past = int(num_past)
        context = position_ids[:, 1] == 0 if num_new > 1 and num_past == 0 else None  # (B, T)
        keep = build_keep_mask(attention_mask, num_new, num_past, num_keys, device, context)
        padded = attention_mask is not None and num_new > 1 and num_past == 0
        return keep, padding_queries(attention_mask, keep, num_new) if padded else None

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
            position_ids: (B, 2, T); computed from input_ids, which must be complete, when absent. Tokens of the first
                pass whose second position is 0 are the bidirectional prefix.
            past_key_values: A transformers cache; created when ``use_cache`` and absent.
            inputs_embeds: (B, T, C), instead of input_ids; needs position_ids.
            use_cache: Whether to keep keys and values; the config's value when absent.
            output_hidden_states: Also return L+1 states (B, T, C): the inputs of the blocks, then the output of the
                final norm.
            output_attentions: Also return the probabilities (eager attention only).
            **kwargs: cu_seq_lens_q, int32 (N + 1,), and max_length_q: the batch is packed, N sequences end to end that
                do not see each other. All others are passed on to the attention function.

        Raises:
            ValueError: Not exactly one of input_ids and inputs_embeds is given, or positions are needed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        num_new = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        sequences = PackedSequences.from_kwargs(
            kwargs, num_new, attention_mask=attention_mask, past_key_values=past_key_values
        )
        if position_ids is None:
            if input_ids is None:
                raise ValueError("inputs_embeds needs position_ids (B, 2, T): bos and gMASK are not visible in it")
            token_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            if sequences is None:
                position_ids = self.get_position_ids(input_ids, token_mask)
            else:
                position_ids = sequences.pack(self.get_position_ids(sequences.unpack(input_ids)))
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if sequences is not None or (self.gradient_checkpointing and self.training):
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = padding = None
        if sequences is None:
            mask, padding = self._keep_mask(attention_mask, position_ids, num_new, past_key_values)
        else:
            sequences = sequences.with_prefix(position_ids[0, 1] == 0)
        attend = choose_attention(self.config._attn_implementation, sequences)
        rotary = self.layers[0].attention.rotary_emb(position_ids, hidden_states.dtype)

        all_states, all_probabilities = [], []
        for layer in self.layers:
            if output_hidden_states:
                all_states.append(hidden_states)
            hidden_states, probabilities = layer(
                hidden_states, rotary, mask, attend, padding=padding, past_key_values=past_key_values, **kwargs
            )
            if output_attentions:
                all_probabilities.append(probabilities)
        hidden_states = self.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_probabilities) if output_attentions else None,
        )


class ChatGLMForConditionalGeneration(ChatGLMGenerationMixin, ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its output layer: training, generation and chat."""

    chat_max_length = 2048
    chat_top_p = 0.7
    chat_temperature = 0.95
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        if config.quantization_bit and config.quantization_embeddings:
            self.lm_head = output_layer_of(self.transformer.word_embeddings)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.lm_head = value

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
        embed, dtype, device = self.transformer.layers[0].attention.rotary_emb, self.dtype, self.device

        def rotary(num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:  # must not hold the model
            positions = torch.arange(num_positions, device=device).expand(1, 2, -1)
            return tuple(table[0, 0, :, 0] for table in embed(positions, dtype))

        return DecodeParts(
            embedding=self.get_input_embeddings(),
            blocks=[
                Block(
                    layer.input_layernorm,
                    layer.attention.query_key_value,
                    layer.attention.dense,
                    layer.post_attention_layernorm,
                    layer.mlp.dense_h_to_4h,
                    layer.mlp.dense_4h_to_h,
                )
                for layer in self.transformer.layers
            ],
            final_norm=self.transformer.final_layernorm,
            lm_head=self.get_output_embeddings(),
            rotary=rotary,
            num_heads=self.config.num_attention_heads,
            num_kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            activation="gelu",
            residual_scale=RESIDUAL_SCALE,
            two_d=True,
        )

    def _prompt_positions(self, input_ids, attention_mask, num_past: int) -> torch.Tensor:
        return self.transformer.get_position_ids(input_ids, attention_mask)

    @staticmethod
    def _next_positions(position_ids: torch.Tensor) -> torch.Tensor:
        """Return (B, 2, 1): the first stays at the mask's position, the second counts on."""
        return position_ids[..., -1:] + position_ids.new_tensor([[0], [1]])

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """Generate as GenerationMixin does, and also take the tokenizer's published 4-D mask and 2-D positions."""
        kwargs["attention_mask"] = self._token_mask(kwargs.get("attention_mask"))
        if kwargs.get("position_ids") is not None:
            kwargs["prompt_position_ids"] = kwargs.pop("position_ids")
        if kwargs["attention_mask"] is None:
            del kwargs["attention_mask"]
        return super().generate(inputs, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Keep transformers' single positions away: prepare_inputs_for_generation computes both."""
        return

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, prompt_position_ids=None, use_cuda_graph=None, **kwargs
    ):
        """Add the position ids (B, 2, T) of the tokens that this pass computes."""
        if prompt_position_ids is None:
            positions = self.transformer.get_position_ids(input_ids, attention_mask)
        else:
            num_new = input_ids.shape[1] - prompt_position_ids.shape[-1]
            steps = torch.arange(1, num_new + 1, device=input_ids.device)
            added = prompt_position_ids[..., -1:] + torch.stack((torch.zeros_like(steps), steps))
            positions = torch.cat((prompt_position_ids, added), dim=-1)
        kwargs.pop("position_ids", None)
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, position_ids=positions, **kwargs
        )

    def process_response(self, response: str) -> str:
        """Tidy a decoded answer: punctuation that touches a Chinese character becomes full-width."""
        response = super().process_response(response)
        for mark, wide in zip(",!:;?", "，！：；？", strict=True):
            response = re.sub(rf"([\u4e00-\u9fff]){re.escape(mark)}", rf"\1{wide}", response)
            response = re.sub(rf"{re.escape(mark)}([\u4e00-\u9fff])", rf"{wide}\1", response)
        return response


__all__ = ["ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMPreTrainedModel"]
