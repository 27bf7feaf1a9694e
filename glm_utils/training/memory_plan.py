"""What a training step needs of memory, and how many blocks are recomputed in the backward pass so that it fits.

What a block keeps is counted in one forward pass over a few real rows, so the numbers hold for any LoRA target, dtype
and attention. Recomputed are the first blocks: what the last ones keep is free again by then. The choice is made for
each batch anew, from its tokens.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

GRADIENT_AND_ADAM_BYTES = 12  # fp32 gradient and two fp32 moments per trained weight
USABLE_SHARE, RESERVED_BYTES = 0.97, 200 << 20  # the rest is for the allocator's rounding and libraries' workspaces


@dataclass(frozen=True)
class MemoryPlan:
    """A model's need of memory by the tokens of a batch.

    Attributes:
        layers: The blocks, first to last.
        fixed_bytes: Weights, gradients, optimizer state, one dequantised weight and its gradient's operand.
        saved_bytes: Kept by one block for the backward pass, per token.
        state_bytes: One hidden state, all that a recomputed block keeps, per token.
        limit_bytes: What this process may use.
        checkpointing: True: all blocks are recomputed; False: none; None: as many as it takes.
    """

    layers: list[GradientCheckpointingLayer]
    fixed_bytes: float
    saved_bytes: float
    state_bytes: float
    limit_bytes: float
    checkpointing: bool | None

    def peak_bytes(self, num_tokens: int, num_recomputed: int, offloaded: bool = False) -> float:
        """Estimate a step's peak: a block that goes backward needs what it keeps and about as much again."""
        num_kept = max(len(self.layers) - num_recomputed, 1)
        states = 0 if offloaded else num_recomputed * self.state_bytes
        return self.fixed_bytes + num_tokens * ((num_kept + 1) * self.saved_bytes + states)

    def num_recomputed(self, num_tokens: int) -> int:
        """Return how many blocks are recomputed for a batch of so many tokens."""
        if self.checkpointing is not None:
            return len(self.layers) * self.checkpointing
        fitting = (n for n in range(len(self.layers)) if self.peak_bytes(num_tokens, n) <= self.limit_bytes)
        return next(fitting, len(self.layers))

    def is_offloaded(self, num_tokens: int) -> bool:
        """Return whether the states between the blocks go to the host's memory: only where nothing else helps."""
        on_gpu = next(self.layers[0].parameters()).is_cuda
        return self.checkpointing is None and on_gpu and self.num_recomputed(num_tokens) == len(self.layers)

    def needed_bytes(self, num_tokens: int) -> float:
        """Estimate the peak under this plan."""
        return self.peak_bytes(num_tokens, self.num_recomputed(num_tokens), self.is_offloaded(num_tokens))

    @contextlib.contextmanager
    def applied(self, num_tokens: int) -> Iterator[None]:
        """Run a step's forward and backward pass with what this number of tokens asks for."""
        if self.checkpointing is None:
            num_recomputed = self.num_recomputed(num_tokens)
            for index, layer in enumerate(self.layers):
                layer.gradient_checkpointing = index < num_recomputed
        offloaded = self.is_offloaded(num_tokens)
        with torch.autograd.graph.save_on_cpu(pin_memory=True) if offloaded else contextlib.nullcontext():
            yield


def make_plan(model: nn.Module, batch: dict, checkpointing: bool | None) -> MemoryPlan:
    """Count what a model keeps for the backward pass, and what is free.

    Args:
        model: The loaded model with its LoRA layers; it stays as it is.
        batch: A few rows as the collator makes them.
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
    """Return the bytes that a forward pass keeps for the backward pass, weights not counted.

    They are let go at the end of each block, as no backward pass follows: counting needs less than any step will.

    Args:
        model: The model; neither it nor the random state is changed.
        layers: Its blocks.
        batch: Its arguments, on its device.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}  # until the block ends, so that no other tensor gets the address
    num_bytes = 0

    def count(tensor: torch.Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            held.setdefault(address, tensor.detach())

    def let_go(*_: object) -> None:
        nonlocal num_bytes
        num_bytes += sum(tensor.untyped_storage().nbytes() for tensor in held.values())
        held.clear()

    was_training, ids = model.training, batch["input_ids"]
    own_gpu = [ids.device] if ids.is_cuda else []  # by default every GPU of the host is initialised
    hooks = [layer.register_forward_pre_hook(let_go) for layer in layers]
    try:
        with torch.random.fork_rng(own_gpu), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.train()(**batch).loss
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    del loss
    let_go()
    return num_bytes


def memory_of(device: torch.device) -> tuple[int, int]:
    """Return what this process uses of a device's memory now, and what it may use, in bytes."""
    if device.type != "cuda":
        used = psutil.Process().memory_info().rss
        return used, used + psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    allowed = min(
        free + torch.cuda.memory_reserved(device), total * torch.cuda.get_per_process_memory_fraction(device)
    )
    return torch.cuda.memory_allocated(device), int(USABLE_SHARE * allowed - RESERVED_BYTES)
