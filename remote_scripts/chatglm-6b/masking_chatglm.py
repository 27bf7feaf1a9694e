"""Attention masks of both ChatGLM families in today's form.

Inside the models a mask is a boolean tensor (B, 1, T, S) in which True means "may attend", or None where the plain
rule holds (causal, or everything for a single new token). From outside both models take ``attention_mask`` as
(B, S) with 1 = keep, or the published boolean (B, 1, T, S) with True = blocked.

Shapes: B batch, T new tokens, S all tokens (cache included).
"""

import torch


def blocked_to_keep(attention_mask: torch.Tensor) -> torch.Tensor:
    """Turn a published 4-D mask into a keep mask.

    Args:
        attention_mask: bool or 0/1 integer tensor (B, 1, T, S), True = blocked.

    Returns:
        bool tensor (B, 1, T, S), True = may attend.

    Raises:
        ValueError: When the tensor is floating point: additive masks are not the published form.
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
    prefix). In the first pass the rows of padding queries see everything, so that no softmax is empty.

    Args:
        attention_mask: (B, S), 1 = keep, or None when nothing is padded. Columns beyond its width count as kept.
        num_new: T.
        num_past: Tokens already in the cache (a 0-d tensor for static caches).
        num_keys: S, the number of key columns, which exceeds past + new for static caches.
        device: Where the mask is built.
        context: bool (B, T), the columns that are visible to every query of their row. First pass only.

    Returns:
        bool tensor (B or 1, 1, T, S), True = may attend.
    """
    columns = torch.arange(num_keys, device=device)
    rows = torch.arange(num_new, device=device) + num_past
    keep = (columns <= rows[:, None])[None]  # (1, T, S)
    if context is not None:
        keep = keep | torch.nn.functional.pad(context, (0, num_keys - num_new))[:, None, :]  # (B, T, S)
    if attention_mask is not None:
        column_keep = attention_mask.to(device=device, dtype=torch.bool)
        column_keep = torch.nn.functional.pad(column_keep, (0, num_keys - column_keep.shape[1]), value=True)
        keep = keep & column_keep[:, None, :]
        if isinstance(num_past, int) and num_past == 0:
            keep = keep | ~column_keep[:, :num_new, None]
    return keep[:, None]


def padding_queries(attention_mask: torch.Tensor | None, keep: torch.Tensor, num_new: int) -> torch.Tensor:
    """Find the query rows that stand for padding.

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
