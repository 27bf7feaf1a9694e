"""Attention of both ChatGLM families: masks, the eager reference, and packed batches without padding.

(This file is byte-identical in both families' directories.)

Masks
    Inside the models a mask is a boolean tensor (B, 1, T, S) in which True means "may attend", or None where the plain
    rule holds (causal, or everything for a single new token). From outside both models take ``attention_mask`` as
    (B, S) with 1 = keep, or the published boolean (B, 1, T, S) with True = blocked.

Packed batches
    Sequences packed end to end without padding, each attending to itself only: one batch entry (1, T). Two keywords of
    transformers' FlashAttentionKwargs, ``cu_seq_lens_q`` and ``max_length_q``, give their boundaries (the same for
    queries and keys). All sequences run through torch's variable-length attention at once where it takes them, and
    one after the other elsewhere, which is the reference.

`choose_attention` returns the function that all layers of a forward pass attend with: one of transformers' attention
interface (sdpa by default), `eager_attention_forward`, or `packed_attention_forward`. All have one signature.

Shapes: B batch, T new tokens, S all tokens (cache included), H query heads, G key/value heads, D head_dim. In a packed
batch N sequences, T tokens of all sequences, P prefix tokens of all sequences.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels_chatglm import varlen_attn, varlen_takes


def blocked_to_keep(attention_mask: torch.Tensor) -> torch.Tensor:
    """Turn a published 4-D mask into a keep mask.

    Args:
        attention_mask: bool or 0/1 integer tensor (B, 1, T, S), True = blocked.

    Returns:
        bool tensor (B, 1, T, S), True = may attend.

    Raises:
        ValueError: The tensor is floating point: additive masks are not the published form.
    """
    if attention_mask.is_floating_point():
        raise ValueError(
            "a 4-D attention_mask must be boolean with True = blocked (the published form), found "
            f"{attention_mask.dtype}; pass a (batch, tokens) mask with 1 = keep instead."
        )
    return ~attention_mask.bool()


def build_keep_mask(
    attention_mask: torch.Tensor | None,
    num_new: int,
    num_past: int | torch.Tensor,
    num_keys: int,
    device: torch.device,
    context: torch.Tensor | None = None,
) -> torch.Tensor:
    """Build the boolean mask of a forward pass.

    A query sees every kept column up to its own, and every kept ``context`` column (ChatGLM-6B's bidirectional
    prefix). In the first pass padding queries see everything, so that no softmax is empty.

    Args:
        attention_mask: (B, S), 1 = keep, or None when nothing is padded. Columns beyond its width count as kept.
        num_new: T.
        num_past: Tokens already in the cache (a 0-d tensor for static caches).
        num_keys: S, the number of key columns, which exceeds past + new for static caches.
        device: Where the mask is built.
        context: bool (B, T), the columns that are visible to every query of their sequence. First pass only.

    Returns:
        bool tensor (B or 1, 1, T, S), True = may attend.
    """
    columns = torch.arange(num_keys, device=device)
    rows = torch.arange(num_new, device=device) + num_past
    keep = (columns <= rows[:, None])[None]  # (1, T, S)
    if context is not None:
        keep = keep | pad(context, (0, num_keys - num_new))[:, None, :]  # (B, T, S)
    if attention_mask is not None:
        column_keep = attention_mask.to(device=device, dtype=torch.bool)
        column_keep = pad(column_keep, (0, num_keys - column_keep.shape[1]), value=True)
        keep = keep & column_keep[:, None, :]
        if isinstance(num_past, int) and num_past == 0:
            keep = keep | ~column_keep[:, :num_new, None]
    return keep[:, None]


def padding_queries(attention_mask: torch.Tensor | None, keep: torch.Tensor, num_new: int) -> torch.Tensor:
    """Find the queries that stand for padding.

    Args:
        attention_mask: (B, S) with 1 = keep, or None when ``keep`` comes from a 4-D mask.
        keep: bool (B, 1, T, S).
        num_new: T.

    Returns:
        bool tensor (B, 1, T, 1), True for padding (no column may be attended).
    """
    if attention_mask is None:
        return ~keep.any(dim=-1, keepdim=True)
    return ~attention_mask[:, None, -num_new:, None].to(device=keep.device, dtype=torch.bool)


@dataclass(frozen=True)
class PackedSequences:
    """The boundaries of the sequences in a packed batch.

    Attributes:
        boundaries: int32 (N + 1,): 0, then the end of each sequence.
        longest: Tokens of the longest sequence.
        num_tokens: T.
        prefix: bool (T,), the tokens that see all of their sequence's prefix and nothing else; None: all is causal.
    """

    boundaries: torch.Tensor
    longest: int
    num_tokens: int
    prefix: torch.Tensor | None = None

    @classmethod
    def from_kwargs(cls, kwargs: dict, num_tokens: int, **excluded: object) -> "PackedSequences | None":
        """Take the sequences out of a model's keyword arguments; None for a batch that is not packed.

        Args:
            kwargs: Keyword arguments of a forward pass; those of packing are removed.
            num_tokens: T.
            **excluded: Arguments that a packed batch cannot have, by name.

        Raises:
            ValueError: One of those is given.
        """
        boundaries, longest = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("max_length_q", None)
        kwargs.pop("cu_seq_lens_k", None), kwargs.pop("max_length_k", None)
        if boundaries is None:
            return None
        for name, value in excluded.items():
            if value is not None:
                raise ValueError(f"a packed batch (cu_seq_lens_q) takes no {name}: its sequences are not padded")
        return cls(boundaries, int(boundaries.diff().max()) if longest is None else int(longest), num_tokens)

    @cached_property
    def sequence_of_token(self) -> torch.Tensor:
        """Index of each token's sequence, int64 (T,)."""
        tokens = torch.arange(self.num_tokens, device=self.boundaries.device)
        return torch.searchsorted(self.boundaries[1:], tokens, right=True)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Index of each token in its sequence, int64 (T,)."""
        return torch.arange(self.num_tokens, device=self.boundaries.device) - self.boundaries[self.sequence_of_token]

    @cached_property
    def prefix_tokens(self) -> torch.Tensor:
        """Indices of the prefix tokens, int64 (P,)."""
        return self.prefix.nonzero().flatten()

    @cached_property
    def prefix_boundaries(self) -> torch.Tensor:
        """As ``boundaries``, among the prefix tokens alone."""
        return pad(self.prefix.cumsum(0), (1, 0))[self.boundaries].to(torch.int32)

    def with_prefix(self, prefix: torch.Tensor) -> "PackedSequences":
        """Return the same sequences with a bidirectional prefix, bool (T,)."""
        return replace(self, prefix=prefix)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Turn (1, T) into a batch (N, longest), padded with 0 on the right."""
        batch = packed.new_zeros(len(self.boundaries) - 1, self.longest)
        batch[self.sequence_of_token, self.positions] = packed[0]
        return batch

    def pack(self, batch: torch.Tensor) -> torch.Tensor:
        """Turn a padded batch (N, ..., longest) into (1, ..., T)."""
        return batch.movedim(-1, 1)[self.sequence_of_token, self.positions].movedim(0, -1)[None]


def choose_attention(implementation: str, sequences: PackedSequences | None) -> Callable:
    """Return the function that every layer of a forward pass attends with.

    Args:
        implementation: A name of transformers' attention interface, or "eager"; of no effect on a packed batch.
        sequences: Those of a packed batch, else None.
    """
    if sequences is not None:
        return partial(packed_attention_forward, sequences=sequences)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


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
    heads_per_key = getattr(module, "num_key_value_groups", 1)
    key, value = key.repeat_interleave(heads_per_key, dim=1), value.repeat_interleave(heads_per_key, dim=1)
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


def packed_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, *, sequences: PackedSequences, **kwargs
):
    """Attend inside each sequence: causally, and in both directions among the tokens of a sequence's prefix.

    Args:
        module: The attention module.
        query: (1, H, T, D).
        key: (1, G, T, D).
        value: (1, G, T, D).
        attention_mask: None: a packed batch has no mask.
        scaling: Factor on the scores.
        dropout: Probability of dropping an attention weight.
        sequences: Their boundaries.
        **kwargs: Ignored.

    Returns:
        The context (1, T, H, D), and None for the probabilities.
    """
    # A copy, because a view of the fused projection would keep all of that for the backward pass.
    states = [part[0].transpose(0, 1) for part in (query, key, value.contiguous())]  # (T, H or G, D) each
    context = varlen_attention(*states, sequences.boundaries, sequences.longest, scaling, dropout, causal=True)
    if sequences.prefix is not None and len(sequences.prefix_tokens):  # the causal pass is right behind the prefix
        states = [part.index_select(0, sequences.prefix_tokens) for part in states]  # (P, H or G, D) each
        inside = varlen_attention(
            *states, sequences.prefix_boundaries, sequences.longest, scaling, dropout, causal=False
        )
        context = context.index_copy(0, sequences.prefix_tokens, inside)
    return context[None], None


def varlen_attention(query, key, value, boundaries, longest: int, scaling: float, dropout: float, causal: bool):
    """Attend inside each sequence, (T, H or G, D) -> (T, H, D): with torch's kernel, else one after the other."""
    if dropout == 0 and varlen_takes(query):
        return varlen_attn(
            query, key, value, boundaries, boundaries, longest, longest, scale=scaling, **varlen_options(causal)
        )
    limits = boundaries.tolist()
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))  # (1, H or G, T, D)
    outputs = [
        scaled_dot_product_attention(
            *(part[:, :, start:stop] for part in (query, key, value)),
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, stop in zip(limits, limits[1:], strict=False)
        if stop > start
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


@cache
def varlen_options(causal: bool) -> dict:
    """Return the causal rule and grouped keys in the words of this torch: they changed between 2.10 and 2.13."""
    known = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})
