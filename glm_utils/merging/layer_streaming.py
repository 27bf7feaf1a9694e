"""Run a model whose weights are fetched when a module needs them and dropped afterwards.

So logits of a 6B model are computed in the memory of its largest module, in the very pass that merges and writes the
weights, and again from the written files.
"""

from collections.abc import Callable, Container

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel


def empty_model(make: Callable[[], PreTrainedModel], dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    """Build a model for evaluation whose weights take no memory; buffers outside the checkpoint are real.

    Args:
        make: Builds the model.
        dtype: Dtype of its floating weights.
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
        fetch: Returns the tensor of a state-dict key; its values are used in the model's dtype.
        stored: Keys that can be fetched; of others the model must hold the values.
        device: Where the model runs.

    Returns:
        Logits in fp32 on the CPU, [T, V].
    """
    owners = [(f"{path}.{name}", module, name) for path, module in model.named_modules() for name in own(module)]
    for buffer_owner in model.modules():  # what is not fetched is small and real: rope frequencies
        for name, buffer in buffer_owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffer_owner._buffers[name] = buffer.to(device)
    handles = []
    for module in model.modules():
        keys = {name: key for key, owner, name in owners if owner is module and key in stored}
        if keys:
            handles.append(module.register_forward_pre_hook(make_filler(keys, fetch, device)))
            handles.append(module.register_forward_hook(make_dropper(keys)))
    try:
        ids = torch.tensor([input_ids], device=device)
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    finally:
        for handle in handles:
            handle.remove()


def own(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters and buffers."""
    tensors = {**module._parameters, **module._buffers}
    return [name for name, tensor in tensors.items() if tensor is not None]


def make_filler(keys: dict[str, str], fetch: Callable[[str], torch.Tensor], device) -> Callable:
    """Return a hook that gives a module its tensors."""

    def fill(module: nn.Module, args: tuple) -> None:
        for name, key in keys.items():
            place(module, name, fetch(key).to(device, getattr(module, name).dtype))

    return fill


def make_dropper(keys: dict[str, str]) -> Callable:
    """Return a hook that takes a module's tensors away again."""

    def drop(module: nn.Module, args: tuple, output: object) -> None:
        for name in keys:
            place(module, name, getattr(module, name).detach().to("meta"))

    return drop


def place(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
