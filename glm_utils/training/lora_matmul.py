"""The matmuls of 4-bit training with hand-written backward passes: LoRA layers and frozen 4-bit layers.

peft casts the input to fp32, the dtype of the LoRA weights, applies dropout, multiplies by A and B, scales and adds:
each of these is a pass over (tokens, features), and autograd saves three of the results. Here only the input, the
dropout mask and the rank-sized x A^T are saved, and the 4-bit weight is dequantized again in the backward pass, also
in layers without LoRA. Modules, weights and files stay those of peft and bitsandbytes.

Shapes: T tokens, K in, N out, r rank.
"""

import types

import bitsandbytes
import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from glm_utils.training.nf4_kernel import dequantize_nf4


class LoraMatmul(torch.autograd.Function):
    """Compute y = x W^T + bias + s drop(x) A^T B^T with a frozen W."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, linear: nn.Linear, scale: float, drop: float):
        """Return y (T, N) in the dtype of x.

        Args:
            ctx: Autograd's context.
            x: (T, K).
            a: fp32 (r, K).
            b: fp32 (N, r).
            linear: The frozen layer with W and bias.
            scale: s.
            drop: Dropout probability of x before A.
        """
        dropped, mask = torch.native_dropout(x, drop, True) if drop else (x, None)
        ctx.dtype, a, b = a.dtype, a.to(x.dtype), b.to(x.dtype)
        down = dropped @ a.T  # (T, r)
        y = frozen_linear(x, linear)
        # not `dropped`, which x and the mask give again, and not W, which is dequantized again
        ctx.save_for_backward(x, mask, down, a, b)
        ctx.linear, ctx.scale, ctx.keep = linear, scale, 1 - drop
        return y.addmm_(down, b.T, alpha=scale)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        """Return the gradients of x, A and B."""
        x, mask, down, a, b = ctx.saved_tensors
        grad_down = (grad @ b).mul_(ctx.scale)  # (T, r)
        grad_b = (grad.T @ down).to(ctx.dtype).mul_(ctx.scale)
        dropped = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / ctx.keep)
        grad_a = (grad_down.T @ dropped).to(ctx.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None, None, None
        grad_x = grad @ frozen_weight(ctx.linear, grad.dtype)
        if mask is None:
            grad_x.addmm_(grad_down, a)
        else:
            grad_x += torch.ops.aten.native_dropout_backward(grad_down @ a, mask, 1 / ctx.keep)
        return grad_x, grad_a, grad_b, None, None, None


class FrozenMatmul(torch.autograd.Function):
    """Compute y = x W^T + bias with a frozen W; nothing is saved for the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """Return y (T, N) in the dtype of x.

        Args:
            ctx: Autograd's context.
            x: (T, K).
            linear: The frozen layer with W and bias.
        """
        ctx.linear = linear
        return frozen_linear(x, linear)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        """Return the gradient of x."""
        return grad @ frozen_weight(ctx.linear, grad.dtype), None


def frozen_weight(linear: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight (N, K) of a Linear or Linear4bit in a dtype.

    It is freed after one matmul, and torch's allocator reuses the memory for the next one. A 4-bit weight must have
    the layout in which it was quantized, see `keep_4bit_layout` in nf4_layers.py.
    """
    state = getattr(linear.weight, "quant_state", None)
    weight = linear.weight if state is None else dequantize_nf4(linear.weight.data, state)
    return weight.to(dtype)


def frozen_linear(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """Return x W^T + bias, (T, K) -> (T, N), in the dtype of x."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return nn.functional.linear(x, frozen_weight(linear, x.dtype), bias)


def apply_flat(matmul: type[torch.autograd.Function], x: torch.Tensor, dtype: torch.dtype, *args: object):
    """Apply a matmul of (T, K) in a dtype to (..., K), and return (..., N) in the dtype of x."""
    with torch.autocast(x.device.type, enabled=False):
        y = matmul.apply(x.to(dtype).flatten(0, -2), *args)
    return y.unflatten(0, x.shape[:-1]).to(x.dtype)


def lora_forward(self: LoraLayer, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Compute a LoRA layer, (..., K) -> (..., N), in the compute dtype of its frozen layer."""
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x, *args, **kwargs)
    (name,), linear = self.active_adapters, self.get_base_layer()
    dtype = getattr(linear, "compute_dtype", None) or linear.weight.dtype
    drop = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
    weights = self.lora_A[name].weight, self.lora_B[name].weight
    return apply_flat(LoraMatmul, x, dtype, *weights, linear, self.scaling[name], drop)


def frozen_forward(self: bitsandbytes.nn.Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """Compute a 4-bit layer, (..., K) -> (..., N), in its compute dtype.

    bitsandbytes computes it without gradients, before its first forward has chosen a compute dtype, and if the bias is
    trained.
    """
    trains_bias = self.bias is not None and self.bias.requires_grad
    if not x.requires_grad or self.compute_dtype is None or trains_bias:
        return type(self).forward(self, x)
    return apply_flat(FrozenMatmul, x, self.compute_dtype, self)


def use_lean_matmuls(model: peft.PeftModel) -> None:
    """Make all LoRA layers and 4-bit layers of a model compute with the matmuls above; the model is changed in place.

    Args:
        model: A model with one plain LoRA adapter on Linear or 4-bit Linear layers.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = types.MethodType(lora_forward, module)
        elif isinstance(module, bitsandbytes.nn.Linear4bit):
            module.forward = types.MethodType(frozen_forward, module)  # type: ignore[method-assign]  # this instance only
