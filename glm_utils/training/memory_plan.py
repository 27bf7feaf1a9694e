"""How much memory a training step needs, and in how many blocks activation checkpointing makes it fit.

The activations that a block saves are counted in one forward pass over a few real examples, so the numbers hold for
any LoRA target, dtype and attention. The first blocks are the ones recomputed: by then the backward pass has freed the
activations of the last ones. Each batch gets its own choice, from its number of tokens.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import peft
import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

GRADIENT_AND_ADAM_BYTES = 12  # per trained weight: fp32 gradient and two fp32 moments
USABLE_SHARE, RESERVED_BYTES = 0.97, 200 << 20  # room for the allocator's rounding and for libraries' workspaces


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a model needs for a batch, as a function of its tokens.

    Attributes:
        layers: The blocks, first to last.
        fixed_bytes: Weights, gradients, optimizer state, one dequantized weight and its gradient's operand.
        saved_bytes: Activations that one block saves for the backward pass, per token.
        state_bytes: One hidden state per token, all that a block with activation checkpointing saves.
        limit_bytes: Memory that this process may use.
        checkpointing: Activation checkpointing. True: in all blocks; False: in none; None: in as many as necessary.
    """

    layers: list[GradientCheckpointingLayer]
    fixed_bytes: float
    saved_bytes: float
    state_bytes: float
    limit_bytes: float
    checkpointing: bool | None

    def peak_bytes(self, num_tokens: int, num_recomputed: int, offloaded: bool = False) -> float:
        """Estimate the peak of a step: the block in its backward pass needs its activations about twice."""
        num_kept = max(len(self.layers) - num_recomputed, 1)
        states = 0 if offloaded else num_recomputed * self.state_bytes
        return self.fixed_bytes + num_tokens * ((num_kept + 1) * self.saved_bytes + states)

    def num_recomputed(self, num_tokens: int) -> int:
        """Return how many blocks use activation checkpointing for a batch of this many tokens."""
        if self.checkpointing is not None:
            return len(self.layers) * self.checkpointing
        fitting = (n for n in range(len(self.layers)) if self.peak_bytes(num_tokens, n) <= self.limit_bytes)
        return next(fitting, len(self.layers))

    def is_offloaded(self, num_tokens: int) -> bool:
        """Return whether the hidden states between blocks are offloaded to the host, which is the last resort."""
        on_gpu = next(self.layers[0].parameters()).is_cuda
        return self.checkpointing is None and on_gpu and self.num_recomputed(num_tokens) == len(self.layers)

    def needed_bytes(self, num_tokens: int) -> float:
        """Estimate the peak of a step under this plan."""
        return self.peak_bytes(num_tokens, self.num_recomputed(num_tokens), self.is_offloaded(num_tokens))

    @contextlib.contextmanager
    def applied(self, num_tokens: int) -> Iterator[None]:
        """Run a forward and backward pass with the checkpointing and offloading that this many tokens need."""
        if self.checkpointing is None:
            num_recomputed = self.num_recomputed(num_tokens)
            for index, layer in enumerate(self.layers):
                layer.gradient_checkpointing = index < num_recomputed
        offloaded = self.is_offloaded(num_tokens)
        with torch.autograd.graph.save_on_cpu(pin_memory=True) if offloaded else contextlib.nullcontext():
            yield


def make_plan(model: PreTrainedModel | peft.PeftModel, batch: dict, checkpointing: bool | None) -> MemoryPlan:
    """Measure what a model saves for the backward pass, and the memory that it may use.

    Args:
        model: The loaded model with its LoRA layers; it is not changed.
        batch: A few examples, collated.
        checkpointing: See MemoryPlan.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    embedding = model.get_input_embeddings().weight
    batch = {key: value.to(embedding.device) if torch.is_tensor(value) else value for key, value in batch.items()}
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    linears = [module for module in layers[0].modules() if hasattr(module, "out_features")]
    widest = max(linear.in_features * linear.out_features for linear in linears) * embedding.element_size()
    used_bytes, limit_bytes = memory_of(embedding.device)
    return MemoryPlan(
        layers=layers,
        fixed_bytes=used_bytes + num_trained * GRADIENT_AND_ADAM_BYTES + 2 * widest,
        saved_bytes=count_saved_bytes(model, layers, batch) / batch["input_ids"].numel() / len(layers),
        state_bytes=embedding.shape[1] * embedding.element_size(),
        limit_bytes=limit_bytes,
        checkpointing=checkpointing,
    )


def count_saved_bytes(model: nn.Module, layers: list[nn.Module], batch: dict) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without the weights.

    No backward pass follows, so they are released after each block: counting needs less memory than any step.

    Args:
        model: The model; neither it nor the random state is changed.
        layers: Its blocks.
        batch: Its keyword arguments, on its device.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}  # until the block ends, so that no other tensor gets the same address
    num_bytes = 0

    def count(tensor: torch.Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            held.setdefault(address, tensor.detach())

    def release(*_: object) -> None:
        nonlocal num_bytes
        num_bytes += sum(tensor.untyped_storage().nbytes() for tensor in held.values())
        held.clear()

    was_training, ids = model.training, batch["input_ids"]
    own_gpu = [ids.device] if ids.is_cuda else []  # by default fork_rng initializes every GPU of the host
    hooks = [layer.register_forward_pre_hook(release) for layer in layers]
    try:
        with torch.random.fork_rng(own_gpu), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.train()(**batch).loss
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    del loss
    release()
    return num_bytes


def memory_of(device: torch.device) -> tuple[int, int]:
    """Return how many bytes of a device's memory this process uses now, and how many it may use."""
    if device.type != "cuda":
        used = psutil.Process().memory_info().rss
        return used, used + psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    allowed = min(
        free + torch.cuda.memory_reserved(device), total * torch.cuda.get_per_process_memory_fraction(device)
    )
    return torch.cuda.memory_allocated(device), int(USABLE_SHARE * allowed - RESERVED_BYTES)
