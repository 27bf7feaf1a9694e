"""The NF4 layers of a model: finds them, and keeps bitsandbytes from repacking them."""

import sys
from collections.abc import Iterator

import torch


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU.

    On a CPU with avx512_bf16 `Linear4bit` repacks its weights in place in the first evaluation forward. Training then
    continues through a matmul without gradient: the LoRA gradients of earlier layers are exactly 0, and dequantizing
    returns garbage. Source: bitsandbytes 0.50.2, nn/modules.py, `Linear4bit.forward`.
    """
    for _, module in layers_in_4bit(model):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def layers_in_4bit(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the layers with NF4 weights and their names; a model without them does not need bitsandbytes imported."""
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn import Linear4bit

        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))
