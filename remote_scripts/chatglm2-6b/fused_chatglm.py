"""Operations that keep less for the backward pass than autograd would, and take fewer kernels on a GPU.

Each is plain torch, the reference, and a Triton kernel where Triton and CUDA are there. Monkeypatching ``has_kernels``
forces the reference. (This file is byte-identical in both families' directories.)

Shapes: B batch, T tokens, H heads, D head channels, P rotated pairs of a head, M rows (tokens), C hidden, F ffn,
V vocabulary.
"""

import torch
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

CHUNK_LOGITS = 512 * 65024  # held at once by the loss: 512 tokens of ChatGLM2-6B


def has_kernels(x: torch.Tensor) -> bool:
    """Return whether a Triton kernel can take this tensor."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


if triton is not None:

    @triton.jit
    def _swiglu_kernel(gate_up, out, F, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < F
        gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0).to(tl.float32)
        tl.store(out + row * F + column, gate * tl.sigmoid(gate) * up, mask=inside)

    @triton.jit
    def _swiglu_backward_kernel(gate_up, grad, out, F, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < F
        gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0).to(tl.float32)
        gradient = tl.load(grad + row * F + column, mask=inside, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        grad_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(out + row * 2 * F + column, grad_gate, mask=inside)
        tl.store(out + row * 2 * F + F + column, gradient * gate * sigmoid, mask=inside)

    @triton.jit
    def _rotate_kernel(
        x, out, cos, sin, batch_stride, head_stride, token_stride, angle_stride, T, H, D, P, Q, STEP, GAP,
        SIGN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        """Rotate pairs of one token's heads; pair p is (p // Q * 2 Q + p % Q * STEP, the same + GAP)."""
        row = tl.program_id(0).to(tl.int64)
        head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
        source = x + (row // T) * batch_stride + (row % T) * token_stride + head * head_stride
        target = out + (row * H + head) * D
        pair = tl.arange(0, BLOCK_P)[None, :]
        inside = (head < H) & (pair < P)
        angle = (row // T) * angle_stride + (row % T) * P + pair
        c = tl.load(cos + angle, mask=pair < P, other=0).to(tl.float32)
        s = tl.load(sin + angle, mask=pair < P, other=0).to(tl.float32) * SIGN
        place = pair // Q * 2 * Q + pair % Q * STEP
        first = tl.load(source + place, mask=inside, other=0).to(tl.float32)
        second = tl.load(source + place + GAP, mask=inside, other=0).to(tl.float32)
        tl.store(target + place, first * c - second * s, mask=inside)
        tl.store(target + place + GAP, second * c + first * s, mask=inside)
        if BLOCK_REST > 0:
            rest = 2 * P + tl.arange(0, BLOCK_REST)[None, :]
            inside = (head < H) & (rest < D)
            tl.store(target + rest, tl.load(source + rest, mask=inside, other=0), mask=inside)

    @triton.jit
    def _cross_entropy_kernel(logits, targets, losses, V, BLOCK: tl.constexpr):
        """Write one row's loss, and put the gradient of its logits in their place."""
        row = tl.program_id(0).to(tl.int64)
        row_logits = logits + row * V
        target = tl.load(targets + row)
        columns = tl.arange(0, BLOCK)
        top = float("-inf")
        total = 0.0
        wanted = 0.0
        for start in range(0, V, BLOCK):
            column = start + columns
            part = tl.load(row_logits + column, mask=column < V, other=-float("inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(part))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(part - new_top))
            wanted += tl.sum(tl.where(column == target, part, 0.0))
            top = new_top
        log_total = top + tl.log(total)
        tl.store(losses + row, log_total - wanted)
        for start in range(0, V, BLOCK):
            column = start + columns
            part = tl.load(row_logits + column, mask=column < V, other=0).to(tl.float32)
            tl.store(row_logits + column, tl.exp(part - log_total) - (column == target), mask=column < V)


class SwiGLU(torch.autograd.Function):
    """Compute silu(gate) * up and keep the input only: autograd would keep silu(gate) too, half as much again."""

    @staticmethod
    def forward(ctx, gate_up: torch.Tensor) -> torch.Tensor:
        """Return (..., F) for (..., 2F)."""
        ctx.save_for_backward(gate_up)
        if not has_kernels(gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return nn.functional.silu(gate).mul_(up)
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        width = out.shape[-1]
        with torch.cuda.device_of(out):
            _swiglu_kernel[(out.numel() // width, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the input, (..., 2F)."""
        (gate_up,) = ctx.saved_tensors
        grad_input = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        if has_kernels(gate_up):
            gate_up, grad, width = gate_up.contiguous(), grad.contiguous(), grad.shape[-1]
            with torch.cuda.device_of(grad):
                _swiglu_backward_kernel[(grad.numel() // width, triton.cdiv(width, 1024))](
                    gate_up, grad, grad_input, width, BLOCK=1024
                )
            return grad_input
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate, grad_up = grad_input.chunk(2, dim=-1)
        torch.mul(grad, nn.functional.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grad_input


class Rotation(torch.autograd.Function):
    """Rotate pairs of channels with one kernel; the gradient is rotated back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: int, gap: int) -> torch.Tensor:
        """Return x (B, H, T, D) rotated by cos and sin (B or 1, 1, T, ...), P numbers a token."""
        ctx.save_for_backward(cos, sin)
        ctx.pairs = step, gap
        return launch_rotation(x, cos, sin, step, gap, sign=1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        """Return the gradient of x."""
        return launch_rotation(grad, *ctx.saved_tensors, *ctx.pairs, sign=-1), None, None, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """Compute the summed cross-entropy of a frozen linear layer's outputs without holding them.

    The logits of one chunk of rows exist at a time, and the gradient of the rows is computed along with the loss.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum over all rows, fp32, for states (M, C), weight (V, C) and targets int64 (M,)."""
        loss = torch.zeros((), device=states.device)
        grad = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        num_rows = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(states), num_rows):
            part = slice(start, start + num_rows)
            losses, grad_logits = cross_entropy(states[part] @ weight.T, targets[part])
            loss += losses.sum()
            if grad is not None:
                torch.mm(grad_logits, weight, out=grad[part])
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor) -> tuple:
        """Scale the rows' gradient, (M, C)."""
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None


def launch_rotation(x, cos, sin, step: int, gap: int, sign: int) -> torch.Tensor:
    """Return x (B, H, T, D) with its pairs rotated; in memory the heads of a token lie together."""
    batch, num_heads, num_tokens, dim = x.shape
    cos, sin = cos.flatten(3).contiguous(), sin.flatten(3).contiguous()  # (B or 1, 1, T, P)
    num_pairs = cos.shape[-1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(batch, num_tokens, num_heads, dim)
    block_heads = min(triton.next_power_of_2(num_heads), 32)
    rest = dim - 2 * num_pairs
    with torch.cuda.device_of(x):
        _rotate_kernel[(batch * num_tokens, triton.cdiv(num_heads, block_heads))](
            x, out, cos, sin, x.stride(0), x.stride(1), x.stride(2), cos.stride(0) if len(cos) > 1 else 0,
            num_tokens, num_heads, dim, num_pairs, num_pairs if step == 2 else gap, step, gap,
            SIGN=sign, BLOCK_H=block_heads, BLOCK_P=triton.next_power_of_2(num_pairs),
            BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        )  # fmt: skip
    return out.transpose(1, 2)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses (M,), fp32, and the gradient of the logits (M, V), whose memory may be used for it."""
    if has_kernels(logits):
        losses = torch.empty(len(logits), device=logits.device)
        with torch.cuda.device_of(logits):
            _cross_entropy_kernel[(len(logits),)](logits, targets, losses, logits.shape[-1], BLOCK=4096, num_warps=8)
        return losses, logits
    scores, columns = logits.float(), targets[:, None]
    total = scores.logsumexp(dim=-1, keepdim=True)
    losses = (total - scores.gather(-1, columns)).flatten()
    grad = scores.sub_(total).exp_().scatter_add_(-1, columns, torch.full_like(total, -1))
    return losses, grad.to(logits.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(first half) * second half, (..., 2F) -> (..., F)."""
    return SwiGLU.apply(gate_up)


def linear_cross_entropy(
    states: torch.Tensor,
    linear: nn.Module,
    labels: torch.Tensor,
    positions: torch.Tensor,
    num_items: torch.Tensor | int | None,
) -> torch.Tensor:
    """Compute the causal language model's loss from the states before the output layer.

    Args:
        states: (B, T, C).
        linear: The output layer. Of one that is not a plain frozen Linear, the logits at the positions are held.
        labels: int64 (B, T).
        positions: int64 (M,), places in (B * T) whose next token counts.
        num_items: Divisor of the sum; None: M.
    """
    positions = positions.to(states.device)
    states = states.flatten(0, 1).index_select(0, positions)  # (M, C)
    targets = labels.to(states.device).flatten()[positions + 1]  # (M,)
    if type(linear) is nn.Linear and linear.bias is None and not linear.weight.requires_grad:
        with torch.autocast(states.device.type, enabled=False):
            loss = LinearCrossEntropy.apply(states.to(linear.weight.dtype), linear.weight, targets)
    else:
        loss = nn.functional.cross_entropy(linear(states).float(), targets, reduction="sum")
    return loss / (len(targets) if num_items is None else num_items)
