"""Streaming, chat plumbing and eager attention (this file is byte-identical in both families' directories).

The published code hid NaN logits behind a fixed token, lost the last token of a stream, and could sample ids that
have no text. Here NaN logits are an error, every token is yielded, and ids without text cannot be sampled in chat.

Shapes: B batch, T new tokens, S all tokens, H query heads, G key/value heads, D head channels, V vocabulary rows.
"""

import copy

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicCache


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Compute attention step by step in fp32: the reference for the fused kernels.

    Args:
        module: The attention module, with ``num_key_value_groups``.
        query: (B, H, T, D).
        key: (B, G, S, D).
        value: (B, G, S, D).
        attention_mask: bool (B, 1, T, S), True = may attend; None means causal.
        scaling: Factor on the scores.
        dropout: Probability of dropping an attention weight.
        **kwargs: Ignored.

    Returns:
        The context (B, T, H, D) and the probabilities (B, H, T, S).
    """
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # fp32 scores: q k^T of ChatGLM-6B leaves fp16's range.
    scores = torch.matmul(query.float() * scaling, key.float().transpose(2, 3))  # (B, H, T, S)
    num_new, num_keys = scores.shape[-2:]
    if attention_mask is None and num_new > 1:
        attention_mask = torch.ones(num_new, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_new)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    probabilities = scores.softmax(dim=-1).to(query.dtype)
    dropped = torch.nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), probabilities


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Refuse NaN and infinite logits instead of hiding them."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) unchanged.

        Raises:
            FloatingPointError: When a score is NaN or infinite.
        """
        if not torch.isfinite(scores).all():
            raise FloatingPointError(
                f"the model returned NaN or infinite logits at token {input_ids.shape[1]} of the sequence. Usual "
                "causes: weights that were damaged or only partly loaded, or fp16 overflow; run in bf16 or fp32, "
                "and check the checkpoint."
            )
        return scores


class UnusedTokenLogitsProcessor(LogitsProcessor):
    """Keep vocabulary rows without a token from being sampled.

    Args:
        num_tokens: The tokenizer's size; rows from here on are padding of the weight matrix.
    """

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) with the padding rows at -inf."""
        if scores.shape[-1] <= self.num_tokens:
            return scores
        unused = torch.arange(scores.shape[-1], device=scores.device) >= self.num_tokens
        return scores.masked_fill(unused, float("-inf"))


class ChatGLMGenerationMixin:
    """Add streaming and the shared part of chat to a model with GenerationMixin."""

    def build_inputs(self, tokenizer, query: str, history: list[tuple[str, str]] | None = None) -> dict:
        """Encode a prompt, with control strings typed by the user kept as text.

        Returns:
            input_ids (1, T) and attention_mask (1, T) on the model's device.
        """
        input_ids = torch.tensor([tokenizer.encode_prompt(query, history)], device=self.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def _chat_processors(self, tokenizer, logits_processor) -> LogitsProcessorList:
        return LogitsProcessorList(
            [InvalidScoreLogitsProcessor(), UnusedTokenLogitsProcessor(len(tokenizer)), *(logits_processor or [])]
        )

    def _chat(self, tokenizer, query, history, logits_processor, settings):
        history = list(history or [])
        inputs = self.build_inputs(tokenizer, query, history)
        output = self.generate(
            **inputs, logits_processor=self._chat_processors(tokenizer, logits_processor), **settings
        )
        response = self.process_response(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :].tolist()))
        return response, [*history, (query, response)]

    def _stream_text(self, tokenizer, inputs, logits_processor, settings):
        """Yield (decoded answer so far, cache) after each token."""
        num_prompt = inputs["input_ids"].shape[1]
        processors = self._chat_processors(tokenizer, logits_processor)
        for ids, cache in self._stream_steps(**inputs, logits_processor=processors, **settings):
            yield tokenizer.decode(ids[0, num_prompt:].tolist()), cache

    def stream_generate(self, input_ids: torch.Tensor, **kwargs):
        """Generate token by token.

        Args:
            input_ids: (B, T).
            **kwargs: What ``generate`` takes, except beam search; ``max_length`` counts the prompt.

        Yields:
            All ids so far, (B, T + n), after each of the n new tokens, the last one included.
        """
        for ids, _ in self._stream_steps(input_ids=input_ids, **kwargs):
            yield ids

    @torch.no_grad()
    def _stream_steps(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        logits_processor=None,
        generation_config=None,
        **settings,
    ):
        """Yield (ids so far, cache) after each new token; see stream_generate."""
        config = copy.deepcopy(generation_config or self.generation_config)
        unknown = config.update(**settings)
        if unknown:
            raise ValueError(f"unknown generation settings {sorted(unknown)}: pass those of GenerationConfig")
        if (config.num_beams or 1) > 1:
            raise ValueError("beam search cannot be streamed: use chat or generate, or num_beams=1")
        cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        num_past, num_prompt = int(cache.get_seq_length()), input_ids.shape[1]
        num_new = config.max_new_tokens or (config.max_length or 0) - num_past - num_prompt
        if num_new <= 0:
            raise ValueError(
                f"the prompt has {num_past + num_prompt} tokens and max_length is {config.max_length}, which leaves "
                "nothing to generate: raise max_length or shorten the history"
            )
        processors = LogitsProcessorList([*(logits_processor or []), *_sampling_processors(config)])
        eos = torch.tensor(_as_list(config.eos_token_id), dtype=torch.long, device=input_ids.device)
        finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        attention_mask = self._token_mask(attention_mask)
        if position_ids is None:
            position_ids = self._prompt_positions(input_ids, attention_mask, num_past)
        ids, step_ids = input_ids, input_ids
        for _ in range(num_new):
            logits = self(
                input_ids=step_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            scores = processors(ids, logits.float())  # (B, V)
            token = torch.multinomial(scores.softmax(-1), 1) if config.do_sample else scores.argmax(-1, keepdim=True)
            token = token.masked_fill(finished[:, None], config.pad_token_id or 0)
            ids, step_ids = torch.cat((ids, token), dim=1), token
            finished = finished | torch.isin(token[:, 0], eos)
            yield ids, cache
            if finished.all():
                return
            position_ids = self._next_positions(position_ids)
            if attention_mask is not None:
                attention_mask = torch.cat((attention_mask, attention_mask.new_ones(ids.shape[0], 1)), dim=1)

    @staticmethod
    def _token_mask(attention_mask):
        """Reduce a published 4-D mask (True = blocked) to (B, S) with 1 = keep: its last row sees all but padding."""
        if attention_mask is None or attention_mask.dim() == 2:
            return attention_mask
        return (~attention_mask[:, 0, -1].bool()).long()


def _as_list(value) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _sampling_processors(config) -> list[LogitsProcessor]:
    """Build the processors in the published order: repetition penalty, temperature, top-k, top-p."""
    processors = []
    if config.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if not config.do_sample:
        return processors
    if config.temperature not in (None, 1.0):
        processors.append(TemperatureLogitsWarper(float(config.temperature)))
    top_k = 50 if config.top_k is None else config.top_k
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if config.top_p is not None and config.top_p < 1.0:
        processors.append(TopPLogitsWarper(float(config.top_p)))
    return processors
