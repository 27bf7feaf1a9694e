"""Run a model whose weights are fetched when a module needs them and dropped afterwards.

This computes logits of a 6B model in the memory of its largest module: once while its weights are merged and written,
and again from the written files.
"""

from collections.abc import Callable, Container

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel


def empty_model(make: Callable[[], PreTrainedModel], dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    """Build a model in eval mode whose weights are on the meta device; buffers keep their values.

    Args:
        make: Builds the model.
        dtype: Dtype of its floating-point weights.
    """
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does
    try:
        with init_empty_weights(include_buffers=False):
            return make().eval()
    finally:
        torch.set_default_dtype(default_dtype)


@torch.no_grad()
def streamed_logits(
    model: PreTrainedModel,
    input_ids: list[int],
    fetch: Callable[[str], torch.Tensor],
    stored: Container[str],
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Compute logits, fetching each module's tensors just before it runs.

    Args:
        model: From `empty_model`.
        input_ids: Token ids of one sequence, length T.
        fetch: Returns the tensor of a state-dict key; it is cast to the model's dtype.
        stored: Keys that can be fetched. Tensors under other keys must be in the model already.
        device: Device of the model.

    Returns:
        Logits in fp32 on the CPU, [T, V].
    """
    handles = []
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():  # not on meta: rope frequencies, which are small
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
        keys = {name: f"{path}.{name}" for name in tensor_names(module) if f"{path}.{name}" in stored}
        if keys:
            handles.append(module.register_forward_pre_hook(make_filler(keys, fetch, device)))
            handles.append(module.register_forward_hook(make_dropper(keys)))
    try:
        ids = torch.tensor([input_ids], device=device)
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    finally:
        for handle in handles:
            handle.remove()


def tensor_names(module: nn.Module) -> list[str]:
    """Return the names of a module's parameters and buffers, without those of its submodules."""
    tensors = {**module._parameters, **module._buffers}
    return [name for name, tensor in tensors.items() if tensor is not None]


def make_filler(keys: dict[str, str], fetch: Callable[[str], torch.Tensor], device: str | torch.device) -> Callable:
    """Return a forward pre-hook that fetches a module's tensors; `keys` are state-dict keys by attribute name."""

    def fill(module: nn.Module, args: tuple) -> None:
        for name, key in keys.items():
            set_tensor(module, name, fetch(key).to(device, getattr(module, name).dtype))

    return fill


def make_dropper(keys: dict[str, str]) -> Callable:
    """Return a forward hook that moves a module's tensors to the meta device."""

    def drop(module: nn.Module, args: tuple, output: object) -> None:
        for name in keys:
            set_tensor(module, name, getattr(module, name).detach().to("meta"))

    return drop


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or buffer."""
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
