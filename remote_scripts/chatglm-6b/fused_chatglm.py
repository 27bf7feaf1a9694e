"""Operations that keep less for the backward pass than autograd would, and take fewer kernels on a GPU.

Each is plain torch, the reference, and a Triton kernel where kernels_chatglm.py says that it takes the input. (This
file is byte-identical in both families' directories.)

Shapes: B batch, T tokens, H heads, D head_dim, P rotated pairs of a head, M tokens whose loss is computed, C hidden,
F ffn, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from .kernels_chatglm import jit, tl, triton, triton_takes

CHUNK_LOGITS = 512 * 65024  # held at once by the loss: 512 tokens of ChatGLM2-6B


@jit
def _swiglu_kernel(gate_up, out, F, BLOCK: tl.constexpr):
    """Compute silu(gate) * up; a program owns BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)  # row * 2 F exceeds 2^31 from 78,000 tokens of ChatGLM2-6B on
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * F + column, gate * tl.sigmoid(gate) * up, mask=inside)


@jit
def _swiglu_backward_kernel(gate_up, grad, out, F, BLOCK: tl.constexpr):
    """Compute both halves of the input's gradient in one pass: silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))."""
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


@jit
def _rotate_kernel(
    x, out, cos, sin, batch_stride, head_stride, token_stride, angle_stride, T, H, D, P, Q, STEP, GAP,
    SIGN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate pairs of one token's heads; pair p is (p // Q * 2 Q + p % Q * STEP, the same + GAP)."""
    token = tl.program_id(0).to(tl.int64)  # of all sequences
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    # x is read through its strides: it is a view of the fused projection, and a copy would cost as much as rotating.
    source = x + (token // T) * batch_stride + (token % T) * token_stride + head * head_stride
    target = out + (token * H + head) * D
    pair = tl.arange(0, BLOCK_P)[None, :]
    inside = (head < H) & (pair < P)
    angle = (token // T) * angle_stride + (token % T) * P + pair
    c = tl.load(cos + angle, mask=pair < P, other=0).to(tl.float32)
    s = tl.load(sin + angle, mask=pair < P, other=0).to(tl.float32) * SIGN
    place = pair // Q * 2 * Q + pair % Q * STEP
    first = tl.load(source + place, mask=inside, other=0).to(tl.float32)
    second = tl.load(source + place + GAP, mask=inside, other=0).to(tl.float32)
    tl.store(target + place, first * c - second * s, mask=inside)
    tl.store(target + place + GAP, second * c + first * s, mask=inside)
    if BLOCK_REST > 0:  # what is not rotated is copied, so that nothing has to be concatenated
        rest = 2 * P + tl.arange(0, BLOCK_REST)[None, :]
        inside = (head < H) & (rest < D)
        tl.store(target + rest, tl.load(source + rest, mask=inside, other=0), mask=inside)


@jit
def _cross_entropy_kernel(logits, targets, losses, V, BLOCK: tl.constexpr):
    """Write one token's loss, and put the gradient of its logits in their place."""
    token = tl.program_id(0).to(tl.int64)
    token_logits = logits + token * V
    target = tl.load(targets + token)
    columns = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    wanted = 0.0
    # Online softmax: one pass finds the maximum and the sum, which is rescaled whenever the maximum grows.
    for start in range(0, V, BLOCK):
        column = start + columns
        part = tl.load(token_logits + column, mask=column < V, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(part))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(part - new_top))
        wanted += tl.sum(tl.where(column == target, part, 0.0))
        top = new_top
    log_total = top + tl.log(total)
    tl.store(losses + token, log_total - wanted)
    # The gradient softmax - onehot(target) takes the logits' memory: nobody reads them again.
    for start in range(0, V, BLOCK):
        column = start + columns
        part = tl.load(token_logits + column, mask=column < V, other=0).to(tl.float32)
        tl.store(token_logits + column, tl.exp(part - log_total) - (column == target), mask=column < V)


class SwiGLU(torch.autograd.Function):
    """Compute silu(gate) * up and keep the input only: autograd would keep silu(gate) too, half as much again."""

    @staticmethod
    def forward(ctx, gate_up: torch.Tensor) -> torch.Tensor:
        """Return (..., F) for (..., 2F)."""
        ctx.save_for_backward(gate_up)
        if not triton_takes(gate_up):
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
        if triton_takes(gate_up):
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
    """Rotate pairs of elements with one kernel; the gradient is rotated back, so that x is not kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """Return x (B, H, T, D) rotated; see `rotate_pairs`."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return launch_rotation(x, cos, sin, interleaved, sign=1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        """Return the gradient of x."""
        return launch_rotation(grad, *ctx.saved_tensors, ctx.interleaved, sign=-1), None, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """Compute the summed cross-entropy of a frozen linear layer's outputs without holding them.

    The logits of one chunk of tokens exist at a time, and the gradient of their states is computed along with the
    loss: backward would otherwise need the logits again.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum over all tokens, fp32, for states (M, C), weight (V, C) and targets int64 (M,)."""
        loss = torch.zeros((), device=states.device)
        grad = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        num_tokens = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(states), num_tokens):
            part = slice(start, start + num_tokens)
            losses, grad_logits = cross_entropy(states[part] @ weight.T, targets[part])
            loss += losses.sum()
            if grad is not None:
                torch.mm(grad_logits, weight, out=grad[part])
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor) -> tuple:
        """Scale the gradient of the states, (M, C)."""
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None


def launch_rotation(x, cos, sin, interleaved: bool, sign: int) -> torch.Tensor:
    """Return x (B, H, T, D) with its pairs rotated by the kernel; in memory the heads of a token lie together."""
    batch, num_heads, num_tokens, head_dim = x.shape
    half_part = cos.shape[-1]
    cos, sin = cos.flatten(3).contiguous(), sin.flatten(3).contiguous()  # (B or 1, 1, T, P)
    num_pairs = cos.shape[-1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(batch, num_tokens, num_heads, head_dim)
    block_heads = min(triton.next_power_of_2(num_heads), 32)
    rest = head_dim - 2 * num_pairs
    period, step, gap = (num_pairs, 2, 1) if interleaved else (half_part, 1, half_part)
    with torch.cuda.device_of(x):
        _rotate_kernel[(batch * num_tokens, triton.cdiv(num_heads, block_heads))](
            x, out, cos, sin, x.stride(0), x.stride(1), x.stride(2), cos.stride(0) if len(cos) > 1 else 0,
            num_tokens, num_heads, head_dim, num_pairs, period, step, gap,
            SIGN=sign, BLOCK_H=block_heads, BLOCK_P=triton.next_power_of_2(num_pairs),
            BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        )  # fmt: skip
    return out.transpose(1, 2)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs of elements at the start of each head; what lies behind them passes through.

    Args:
        x: (B, H, T, D).
        cos: Interleaved: (B or 1, 1, T, P). Else (B or 1, 1, T, Z, P / Z) for Z parts of a head, one after the other.
        sin: As cos.
        interleaved: Pair p is the elements 2 p and 2 p + 1; else the two halves of a part are paired.

    Returns:
        (B, H, T, D).
    """
    if triton_takes(x):
        return Rotation.apply(x, cos, sin, interleaved)
    num_rotated = 2 * cos.shape[3:].numel()
    shape, pair_dim = ((-1, 2), -1) if interleaved else ((cos.shape[3], 2, -1), -2)
    first, second = x[..., :num_rotated].unflatten(-1, shape).unbind(pair_dim)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=pair_dim).flatten(3)
    return rotated if num_rotated == x.shape[-1] else torch.cat((rotated, x[..., num_rotated:]), dim=-1)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses (M,), fp32, and the gradient of the logits (M, V), whose memory may be used for it."""
    if triton_takes(logits):
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
        linear: The output layer. Unless it is a plain frozen Linear, the logits at the positions are held.
        labels: int64 (B, T).
        positions: int64 (M,), indices into (B * T) of the tokens whose next token counts.
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
