"""The product of a LoRA layer with a backward pass written by hand, in place of peft's chain of small operations.

peft casts the input to the LoRA weights' fp32, drops out, multiplies twice, scales and adds: each step is a pass over
(tokens, channels), and autograd keeps three of the results. Here the input, the dropout mask and the product of rank
size are kept, and the 4-bit weight is dequantised where it is used. Modules, weights and files stay peft's.

Shapes: T tokens, K in, N out, r rank.
"""

import types

import bitsandbytes
import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn


class LoraProduct(torch.autograd.Function):
    """Compute y = x W^T + b + s drop(x) A^T B^T with a frozen W."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, linear: nn.Module, scale: float, drop: float):
        """Return y (T, N) in the dtype of x.

        Args:
            ctx: Autograd's context.
            x: (T, K).
            a: fp32 (r, K).
            b: fp32 (N, r).
            linear: The frozen layer.
            scale: s.
            drop: Probability that an element of x is zeroed for the LoRA matrices.
        """
        dropped, mask = torch.native_dropout(x, drop, True) if drop else (x, None)
        ctx.dtype, a, b = a.dtype, a.to(x.dtype), b.to(x.dtype)
        product = dropped @ a.T  # (T, r)
        bias = linear.bias if linear.bias is None else linear.bias.to(x.dtype)
        y = nn.functional.linear(x, frozen_weight(linear, x.dtype), bias)
        ctx.save_for_backward(x, mask, product, a, b)
        ctx.linear, ctx.scale, ctx.keep = linear, scale, 1 - drop
        return y.addmm_(product, b.T, alpha=scale)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        """Return the gradients of x, A and B."""
        x, mask, product, a, b = ctx.saved_tensors
        grad_product = (grad @ b).mul_(ctx.scale)  # (T, r)
        grad_b = (grad.T @ product).to(ctx.dtype).mul_(ctx.scale)
        dropped = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / ctx.keep)
        grad_a = (grad_product.T @ dropped).to(ctx.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None, None, None
        grad_x = grad @ frozen_weight(ctx.linear, grad.dtype)
        if mask is None:
            grad_x.addmm_(grad_product, a)
        else:
            grad_x += torch.ops.aten.native_dropout_backward(grad_product @ a, mask, 1 / ctx.keep)
        return grad_x, grad_a, grad_b, None, None, None


def frozen_weight(linear: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight (N, K) of a Linear or Linear4bit in a dtype.

    It is freed after one product, and torch's allocator hands the same memory out for the next one.
    """
    state = getattr(linear.weight, "quant_state", None)
    weight = linear.weight if state is None else bitsandbytes.functional.dequantize_4bit(linear.weight.data, state)
    return weight.to(dtype)


def lean_forward(self: LoraLayer, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Compute a LoRA layer, (..., K) -> (..., N), in the frozen layer's compute dtype."""
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x, *args, **kwargs)
    (name,), linear = self.active_adapters, self.get_base_layer()
    dtype = getattr(linear, "compute_dtype", None) or linear.weight.dtype
    drop = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
    weights = self.lora_A[name].weight, self.lora_B[name].weight
    with torch.autocast(x.device.type, enabled=False):
        y = LoraProduct.apply(x.to(dtype).flatten(0, -2), *weights, linear, self.scaling[name], drop)
    return y.unflatten(0, x.shape[:-1]).to(x.dtype)


def use_lean_products(model: peft.PeftModel) -> None:
    """Compute all LoRA layers of a model with one plain adapter through `LoraProduct`; changed in place.

    Args:
        model: Its targets are Linear or 4-bit Linear layers.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = types.MethodType(lean_forward, module)
