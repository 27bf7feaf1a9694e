"""Operations that keep less than autograd would (byte-identical in both families' directories).

Shapes: M rows (tokens), C hidden, F ffn, V vocabulary.
"""

import torch
from torch import nn

IGNORED_LABEL = -100
CHUNK_BYTES = 1 << 27  # fp32 logits of one chunk of the loss: 512 tokens of ChatGLM2-6B


class SwiGLU(torch.autograd.Function):
    """Compute silu(gate) * up and keep the input only: autograd would keep silu(gate) too, half as much again."""

    @staticmethod
    def forward(ctx, gate_up: torch.Tensor) -> torch.Tensor:
        """Return (M, F) for (M, 2F)."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the input, (M, 2F)."""
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_input = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_input.chunk(2, dim=-1)
        torch.mul(grad, nn.functional.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grad_input


class LinearCrossEntropy(torch.autograd.Function):
    """Compute the summed cross-entropy of a frozen linear layer's outputs without holding them.

    The logits of one chunk of rows exist at a time, and the gradient of the rows is computed along with the loss.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum over all rows, fp32, for states (M, C), weight (V, C) and targets int64 (M,)."""
        loss = torch.zeros((), device=states.device)
        grad = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        num_rows = max(1, CHUNK_BYTES // (4 * len(weight)))
        for start in range(0, len(states), num_rows):
            part = slice(start, start + num_rows)
            logits, columns = (states[part] @ weight.T).float(), targets[part, None]  # (m, V), (m, 1)
            total = logits.logsumexp(dim=-1, keepdim=True)
            loss += (total - logits.gather(-1, columns)).sum()
            if grad is not None:
                probabilities = logits.sub_(total).exp_()
                probabilities.scatter_add_(-1, columns, torch.full_like(total, -1))
                torch.mm(probabilities.to(weight.dtype), weight, out=grad[part])
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor) -> tuple:
        """Scale the rows' gradient, (M, C)."""
        return ctx.saved_tensors[0] * grad_loss, None, None


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(first half) * second half, (..., 2F) -> (..., F)."""
    if gate_up.requires_grad:
        return SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def linear_cross_entropy(
    states: torch.Tensor, linear: nn.Module, labels: torch.Tensor, num_items: torch.Tensor | int | None
) -> torch.Tensor:
    """Compute the causal language model's loss from the states before the output layer.

    Args:
        states: (B, T, C).
        linear: The output layer; one that is not a plain frozen Linear gives the logits of the counted tokens.
        labels: int64 (B, T), -100 where a token does not count; shifted here.
        num_items: Divisor of the sum; None: the number of counted tokens.
    """
    targets = labels[:, 1:].to(states.device)
    counted = targets != IGNORED_LABEL
    states, targets = states[:, :-1][counted], targets[counted]  # (M, C), (M,)
    if type(linear) is nn.Linear and linear.bias is None and not linear.weight.requires_grad:
        loss = LinearCrossEntropy.apply(states.to(linear.weight.dtype), linear.weight, targets)
    else:
        loss = nn.functional.cross_entropy(linear(states).float(), targets, reduction="sum")
    return loss / (len(targets) if num_items is None else num_items)
