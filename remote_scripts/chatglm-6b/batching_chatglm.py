"""Continuous batching: B sequences advance together, and one that has ended makes room for the next prompt.

(This file is byte-identical in both families' directories.)

A new prompt goes through the model's forward (prefill), many prompts at once and all but their last tokens. Its keys
and values are then copied into the cache of the running batch, right before the slot that all sequences have reached,
and the next step feeds its last token. Steps are those of a DecodeGraph where it covers the model and the batch, else
of the model's forward. Only who reads the tokens waits for the device.

What is sampled depends on a sequence's key and the tokens' positions alone, not on who else is in the batch: the noise
is a hash of them, not a stream of random numbers.

Shapes: B batch, S cache slots, L layers, G key/value heads, D head_dim, N prompts, T prompt tokens, V vocabulary,
K top_k.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

from .decoding_chatglm import DecodeGraph, SequenceSlots, Unsupported, bucket, capture

logger = logging.getLogger(__name__)

NOT_FINITE = -1  # in place of a token whose logits were NaN or infinite
# Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64), as int64
GAMMA, MULTIPLIERS = 0x9E3779B97F4A7C15 - 2**64, (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27, 31)


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash int64 numbers to int64 numbers; products wrap around, on every device in the same way."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * multiplier  # the mask makes it a shift without the sign
    return x


def sequence_key(*numbers: int) -> int:
    """Return the key of a sequence: an int64 hash of a seed and of what tells the sequence from others."""
    key = torch.zeros((), dtype=torch.long)
    for number in numbers:
        key = mix((key + GAMMA) ^ (number + 2**63) % 2**64 - 2**63)
    return int(key)


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked.

    Attributes:
        temperature: Divides the logits; 0: always the most probable token.
        top_k: The most probable tokens that may be sampled; 0: all.
        top_p: Nucleus probability.
        num_tokens: The tokenizer's size: ids from here on have no text and are never picked.
    """

    temperature: float
    top_k: int
    top_p: float
    num_tokens: int


class BatchSampler:
    """Pick the next token of every sequence, on the device alone.

    Args:
        batch: B.
        sampling: How.
        device: Where the logits are.

    Attributes:
        keys: int64 (B,), of the sequences, see `sequence_key`.
        counts: int64 (B,), how many tokens of each were picked.
    """

    def __init__(self, batch: int, sampling: Sampling, device: torch.device):
        self.sampling = sampling
        self.keys, self.counts = torch.zeros(2, batch, dtype=torch.long, device=device)

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the next tokens, (B,), for logits (B, V)."""
        scores, sampling = logits[:, : self.sampling.num_tokens].float(), self.sampling
        if not sampling.temperature:
            return scores.argmax(-1)
        num_kept = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
        scores, ids = (scores / sampling.temperature).topk(num_kept)  # (B, K), the most probable first
        probabilities = scores.softmax(-1)
        above = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(above >= sampling.top_p, 0)
        # The token with the greatest p / e, for e exponentially distributed, is distributed as p.
        winner = (probabilities / self._exponential(ids)).argmax(-1, keepdim=True)
        self.counts += 1
        return ids.gather(-1, winner)[:, 0]

    def _exponential(self, ids: torch.Tensor) -> torch.Tensor:
        """Return exponentially distributed numbers, a function of keys, counts and ids (B, K)."""
        states = mix(self.keys + GAMMA * (self.counts + 1))[:, None]
        bits = mix(states + GAMMA * (ids + 1)) >> 11 & (1 << 53) - 1
        return -((bits.double() + 0.5) * 2.0**-53).log()


class CacheView:
    """What the model's forward sees of the slots: a transformers cache that is filled up to `length`."""

    def __init__(self, caches: list[tuple[torch.Tensor, torch.Tensor]], length: int):
        self.caches, self.length = caches, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the filled slots."""
        return self.length

    def get_mask_sizes(self, num_new: int, layer_idx: int) -> tuple[int, int]:
        """Return the keys that the new tokens attend to, and the first of them."""
        return self.length + num_new, 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args) -> tuple[torch.Tensor, ...]:
        """Store new keys and values (B, G, 1, D); return all."""
        stop = self.length + keys.shape[2]
        for cache, new in zip(self.caches[layer_idx], (keys, values), strict=True):
            cache[:, :, self.length : stop] = new
        return tuple(cache[:, :, :stop] for cache in self.caches[layer_idx])


class ForwardSteps(SequenceSlots):
    """What a DecodeGraph does, through the model's forward: any model, device and batch.

    Args:
        model: A ChatGLM model.
        batch: B.
        slots: S.
        position: The positions of one token, which tell their shape.

    Attributes:
        logits: (B, V), of the newest token.
    """

    def __init__(self, model: nn.Module, batch: int, slots: int, position: torch.Tensor):
        config, device = model.config, model.device
        self.model, self.batch, self.slots, self.length = model, batch, slots, 0
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        self.caches = [
            tuple(torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = position.new_zeros(batch, *position.shape)
        self.starts = torch.zeros(batch, dtype=torch.long, device=device)
        self.logits = None

    def step(self) -> None:
        """Feed `token`: `logits` are then those of the next one."""
        columns = torch.arange(self.length + 1, device=self.starts.device)
        self.logits = self.model(
            input_ids=self.token,
            attention_mask=(columns >= self.starts[:, None]).long(),
            position_ids=self.positions,
            past_key_values=CacheView(self.caches, self.length),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.positions = self.model._next_positions(self.positions)
        self.length += 1

    def grown(self) -> "ForwardSteps":
        """Give these sequences twice the slots."""
        self.caches = [tuple(pad(cache, (0, 0, 0, self.slots)) for cache in pair) for pair in self.caches]
        self.slots *= 2
        return self


@dataclass(frozen=True)
class Prefill:
    """Prompts that have gone through the model, but for their last tokens.

    Attributes:
        cache: A transformers cache, (N, G, T - 1, D), padded on the left.
        prompts: Their ids.
        positions: (N, ...), of their last tokens.
    """

    cache: DynamicCache
    prompts: list[list[int]]
    positions: torch.Tensor


class ContinuousBatch:
    """B places for sequences that begin and end independently of each other.

    Args:
        model: A ChatGLM model in evaluation mode.
        batch: B.
        num_slots: Tokens of a sequence that there must be room for at first; it grows.
        sampling: How tokens are picked.
        use_cuda_graph: Whether a DecodeGraph may be used.

    Attributes:
        num_ahead: Steps that are best launched before the tokens of the first are read.
        is_fast: Whether steps are those of a DecodeGraph.
    """

    def __init__(self, model: nn.Module, batch: int, num_slots: int, sampling: Sampling, use_cuda_graph: bool = True):
        self.model, self.batch, self.num_slots = model, batch, bucket(num_slots)
        self.num_ahead = int(model.device.type == "cuda")
        self.sampler = BatchSampler(batch, sampling, model.device)
        self.status = torch.zeros(batch, dtype=torch.long, device=model.device)
        self.num_cached: list[int | None] = [None] * batch  # tokens of the sequence in each place; None: it is free
        self.steps, self.replay_pick = self._take_graph() if use_cuda_graph else None, None
        self.is_fast = self.steps is not None

    def _take_graph(self) -> DecodeGraph | None:
        try:
            graph = DecodeGraph.take(self.model, self.batch, self.num_slots)
        except Unsupported as reason:
            logger.info("generating through the model's forward: %s", reason)
            return None
        graph.end_at(0)  # an idle graph holds another stream's sequences
        return graph

    def close(self) -> None:
        """Leave the graph to the model's next stream."""
        if self.is_fast:
            self.steps.give_back(self.model)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[list[int]]) -> Prefill:
        """Run prompts through the model.

        Args:
            prompts: Their ids, special tokens included.

        Raises:
            ValueError: A prompt of fewer than two tokens.
        """
        if min(map(len, prompts)) < 2:
            raise ValueError("a prompt has fewer than two tokens: build prompts with the tokenizer's encode_prompt")
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        num_pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(width, device=device) >= num_pads[:, None]).long()
        positions, cache = self.model._prompt_positions(ids, mask, 0), DynamicCache(config=self.model.config)
        self.model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[..., :-1],
            past_key_values=cache,
            use_cache=True,
        )
        return Prefill(cache, list(prompts), positions[..., -1:])

    @torch.no_grad()
    def place(self, index: int, prefill: Prefill, row: int, key: Sequence[int]) -> None:
        """Begin a sequence in a free place.

        Args:
            index: The place.
            prefill: The prompts of `prefill`.
            row: Which of them.
            key: Numbers that tell the sequence from others, the seed among them: its noise depends on nothing else.
        """
        prompt, position = prefill.prompts[row], prefill.positions[row]
        if self.steps is None:
            self.steps = ForwardSteps(self.model, self.batch, self.num_slots, position)
        self._make_room(len(prompt) - 1)
        self.steps.place(index, prefill.cache, row, len(prompt) - 1, prompt[-1], position)
        self.sampler.keys[index], self.sampler.counts[index] = sequence_key(*key), 0
        self.num_cached[index] = len(prompt) - 1

    def free(self, index: int) -> None:
        """Say that the sequence in a place has ended: whatever it goes on with is not looked at."""
        self.num_cached[index] = None

    @torch.no_grad()
    def step(self) -> Callable[[], list[int]]:
        """Launch a step.

        Returns:
            What waits for the step and returns the token that it picked in each place, or NOT_FINITE.
        """
        self._make_room()
        self.steps.step()
        self.num_cached = [None if count is None else count + 1 for count in self.num_cached]
        if self.replay_pick:
            self.replay_pick()
        else:
            self._pick()  # for real: it is this step's token, and the run that a capture must have seen before
            self.replay_pick = capture(self._pick, self.model.device) if self.is_fast else None
        return self._send()

    def _make_room(self, num_cached: int = 0) -> None:
        """See to it that there is a free slot behind the sequences, and room for a prompt before it.

        Sequences end at a slot that only grows, and those that began early have gone: moved to the first slots, the
        others have room again.

        Args:
            num_cached: Tokens of the prompt.
        """
        longest = max([num_cached, *(count for count in self.num_cached if count is not None)])
        while longest >= self.steps.slots:
            self.steps, self.replay_pick = self.steps.grown(), None
        if longest > self.steps.length or self.steps.length == self.steps.slots:
            self.steps.end_at(longest)
            for index, count in enumerate(self.num_cached):
                if count is None:
                    self.steps.clear(index)

    def _pick(self) -> None:
        """Pick tokens on the device alone, into buffers that stay where they are: this is what a graph replays."""
        logits = self.steps.logits
        token = self.sampler.pick(logits)
        self.steps.token.copy_(token[:, None])
        self.status.copy_(token.masked_fill(~(logits.float().sum(-1) < float("inf")), NOT_FINITE))

    def _send(self) -> Callable[[], list[int]]:
        """Start copying the picked tokens to the host; return what waits for them."""
        if not self.status.is_cuda:
            return self.status.clone().tolist
        status = torch.empty(self.status.shape, dtype=torch.long, pin_memory=True)
        status.copy_(self.status, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.status.device))

        def wait() -> list[int]:
            arrived.synchronize()
            return status.tolist()

        return wait
