"""Rows laid end to end without padding, each attending to itself only (byte-identical in both families' directories).

A packed batch is one sequence (1, T). Where its rows lie is said by two keywords of transformers'
FlashAttentionKwargs, ``cu_seq_lens_q`` and ``max_length_q`` (queries and keys have the same). On CUDA all rows run
through torch's variable-length attention at once; elsewhere one after the other, which is the reference.

Shapes: B rows, T tokens of all rows, P prefix tokens of all rows, H query heads, G key/value heads, D head channels.
"""

import inspect
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of a packed batch lie.

    Attributes:
        boundaries: int32 (B + 1,): 0, then the end of each row.
        longest: Tokens of the longest row.
        num_tokens: T.
        prefix: bool (T,), the tokens that see all of their row's prefix and nothing else; None: all is causal.
    """

    boundaries: torch.Tensor
    longest: int
    num_tokens: int
    prefix: torch.Tensor | None = None

    @classmethod
    def from_kwargs(cls, kwargs: dict, num_tokens: int, **excluded: object) -> "PackedRows | None":
        """Take the rows out of a model's keyword arguments; None for a batch that is not packed.

        Args:
            kwargs: Keyword arguments of a forward pass; those of packing are removed.
            num_tokens: T.
            **excluded: Arguments that a packed batch cannot have, by name.

        Raises:
            ValueError: When one of those is given.
        """
        boundaries, longest = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("max_length_q", None)
        kwargs.pop("cu_seq_lens_k", None), kwargs.pop("max_length_k", None)
        if boundaries is None:
            return None
        for name, value in excluded.items():
            if value is not None:
                raise ValueError(f"a packed batch (cu_seq_lens_q) takes no {name}: rows are whole and not padded")
        return cls(boundaries, int(boundaries.diff().max()) if longest is None else int(longest), num_tokens)

    @cached_property
    def row_of_token(self) -> torch.Tensor:
        """Row of each token, int64 (T,)."""
        tokens = torch.arange(self.num_tokens, device=self.boundaries.device)
        return torch.searchsorted(self.boundaries[1:], tokens, right=True)

    @cached_property
    def columns(self) -> torch.Tensor:
        """Place of each token in its row, int64 (T,)."""
        return torch.arange(self.num_tokens, device=self.boundaries.device) - self.boundaries[self.row_of_token]

    @cached_property
    def prefix_tokens(self) -> torch.Tensor:
        """Indices of the prefix tokens, int64 (P,)."""
        return self.prefix.nonzero().flatten()

    @cached_property
    def prefix_boundaries(self) -> torch.Tensor:
        """As ``boundaries``, among the prefix tokens alone."""
        return pad(self.prefix.cumsum(0), (1, 0))[self.boundaries].to(torch.int32)

    def with_prefix(self, prefix: torch.Tensor) -> "PackedRows":
        """Return the same rows with a bidirectional prefix, bool (T,)."""
        return replace(self, prefix=prefix)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Turn (1, T) into rows (B, longest), padded with 0 on the right."""
        rows = packed.new_zeros(len(self.boundaries) - 1, self.longest)
        rows[self.row_of_token, self.columns] = packed[0]
        return rows

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn rows (B, ..., longest) into (1, ..., T)."""
        return rows.movedim(-1, 1)[self.row_of_token, self.columns].movedim(0, -1)[None]


def packed_attention_forward(module, query, key, value, rows, scaling, dropout=0.0, **kwargs):
    """Attend inside each row: causally, and in both directions among the tokens of a row's prefix.

    Args:
        module: The attention module.
        query: (1, H, T, D).
        key: (1, G, T, D).
        value: (1, G, T, D).
        rows: The PackedRows.
        scaling: Factor on the scores.
        dropout: Probability of dropping an attention weight.
        **kwargs: Ignored.

    Returns:
        The context (1, T, H, D), and None for the probabilities.
    """
    # a copy, because a view of the fused projection would keep all of that for the backward pass
    states = [part[0].transpose(0, 1) for part in (query, key, value.contiguous())]  # (T, H or G, D) each
    context = attend(*states, rows.boundaries, rows.longest, scaling, dropout, causal=True)
    if rows.prefix is not None and len(rows.prefix_tokens):  # the causal pass is right behind the prefix
        states = [part.index_select(0, rows.prefix_tokens) for part in states]  # (P, H or G, D) each
        inside = attend(*states, rows.prefix_boundaries, rows.longest, scaling, dropout, causal=False)
        context = context.index_copy(0, rows.prefix_tokens, inside)
    return context[None], None


def attend(query, key, value, boundaries, longest: int, scaling: float, dropout: float, causal: bool):
    """Attend inside each row, (T, H or G, D) -> (T, H, D); variable-length attention where it runs."""
    if dropout == 0 and has_varlen(query):
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


def has_varlen(query: torch.Tensor) -> bool:
    """Return whether variable-length attention takes these states: half precision on an Ampere GPU or later."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@cache
def varlen_options(causal: bool) -> dict:
    """Return the causal rule and grouped keys in the words of this torch: they changed between 2.10 and 2.13."""
    known = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})
