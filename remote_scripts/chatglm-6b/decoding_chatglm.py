"""Generate one token per step with fused CUDA kernels in a CUDA graph (byte-identical in both directories).

After the prompt has gone through the model (prefill), each new token is the same sequence of launches (a decode step):
embedding, per layer norm, qkv, attention, dense, norm, two MLP matmuls, then the output layer. Launched one by one the
host is the limit; here they are captured once per batch size and cache size, in well under a second, and replayed.
Token, positions and cache length live on the GPU and advance inside the graph, so that nothing waits for the host.

Covered: where kernels_chatglm.py finds NVRTC and a GPU for it, fp16 and bf16 models, fp16/bf16, int8, int4 and NF4
(bitsandbytes) weights, LoRA adapters that are not merged, up to 16 sequences, left padding. For anything else
`DecodeGraph.of` says why not, and generation goes on through the model's forward.

A graph serves one stream at a time: `of` takes a model's idle graph or makes one, the stream gives it back at its end.

Shapes: B batch, T prompt tokens, S cache slots, L layers, H query heads, G key/value heads, D head_dim, C hidden,
V vocabulary, R LoRA rank.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .cuda_kernels import MAX_BATCH, Weight, attention_scratch, decode_attention, fits, matvec, norm
from .kernels_chatglm import nvrtc_runs_on
from .quantization import QuantizedLinear

MIN_SLOTS = 256
HEAD_DIMS = (64, 128)
MAX_HEADS_PER_KV_HEAD = 16
MAX_HIDDEN = 16384  # of the norm kernel


class Unsupported(Exception):
    """The decode path does not cover this model or input; the message says why."""


@dataclass(frozen=True)
class Block:
    """The modules of one layer; in a _Plan, what `read_norm` and `read_linear` make of them.

    Attributes:
        input_norm: RMSNorm or LayerNorm.
        query_key_value: Linear C -> (H + 2 G) D.
        dense: Linear H D -> C.
        post_norm: As input_norm.
        up: Linear of the MLP into the wide layer.
        down: Linear of the MLP out of it.
    """

    input_norm: nn.Module
    query_key_value: nn.Module
    dense: nn.Module
    post_norm: nn.Module
    up: nn.Module
    down: nn.Module


@dataclass(frozen=True)
class DecodeParts:
    """What the decode path needs to know of a model.

    Attributes:
        embedding: ids -> (..., C).
        blocks: The layers.
        final_norm: The last norm.
        lm_head: Linear C -> V.
        rotary: Number of positions -> cos and sin, each (positions, D / 4), in the model's dtype.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        activation: Epilogue of the up matmul: swiglu or gelu.
        residual_scale: None: the residual is a block's input; else its normalized input times this.
        two_d: ChatGLM-6B's qkv layout and two positions per token.
    """

    embedding: nn.Module
    blocks: list[Block]
    final_norm: nn.Module
    lm_head: nn.Module
    rotary: Callable
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    residual_scale: float | None
    two_d: bool


def read_linear(module: nn.Module, dtype: torch.dtype) -> Weight:
    """Describe a Linear of any supported kind to the kernels.

    Args:
        module: nn.Linear, QuantizedLinear, a bitsandbytes Linear4bit (NF4), or a peft LoRA layer around one.
        dtype: The activations' dtype.

    Returns:
        The weight; tensors are shared with the module where they fit.

    Raises:
        Unsupported: Another kind of module, dtype or shape.
    """
    if hasattr(module, "lora_A"):
        return _with_lora(read_linear(module.base_layer, dtype), module, dtype)
    stored, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    bias = None if bias is None else bias.to(dtype)
    state = getattr(stored, "quant_state", None)
    if isinstance(module, QuantizedLinear):
        shape = (module.out_features, module.in_features)
        weight = Weight(f"int{module.bits}", stored, shape, module.weight_scale.half(), bias)
    elif state is not None:
        weight = Weight("nf4", stored.data, tuple(state.shape), _nf4_scale(state), bias)
    elif type(module) is nn.Linear and type(stored) is nn.Parameter and stored.dtype == dtype:
        weight = Weight("float", stored.data, tuple(stored.shape), None, bias)
    else:
        found = getattr(stored, "dtype", "no")
        raise Unsupported(f"a {type(module).__name__} with {found} weights in a {dtype} model")
    if not fits(weight.kind, weight.shape):
        raise Unsupported(f"{weight.kind} weights of shape {weight.shape}")
    return replace(weight, data=_aligned(weight.data))


def read_norm(module: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Return weight, bias and epsilon of an RMSNorm or a LayerNorm to the kernel.

    Args:
        module: The norm.
        dtype: The activations' dtype.

    Raises:
        Unsupported: Parameters in another dtype.
    """
    if any(tensor.dtype != dtype for tensor in module.parameters()):
        raise Unsupported(f"norm weights of another dtype in a {dtype} model")
    bias = getattr(module, "bias", None)
    return _aligned(module.weight.data), None if bias is None else _aligned(bias.data), module.eps


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as the kernels read it, contiguous and in 16-byte words: itself, or a copy."""
    is_fit = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if is_fit else tensor.clone(memory_format=torch.contiguous_format)


def _nf4_scale(state) -> torch.Tensor:
    """Return the code values and the block maxima of a bitsandbytes QuantState, as matvec reads them."""
    if state.quant_type != "nf4" or state.blocksize != 64:
        raise Unsupported(f"bitsandbytes {state.quant_type} weights in blocks of {state.blocksize}")
    maxima = state.absmax
    if state.nested:
        try:
            from bitsandbytes.functional import dequantize_blockwise
        except ImportError as error:
            raise Unsupported(f"bitsandbytes: {error}") from error
        maxima = dequantize_blockwise(maxima, state.state2) + state.offset
    return torch.cat((state.code.flatten(), maxima.flatten())).half()


def _with_lora(weight: Weight, module: nn.Module, dtype: torch.dtype) -> Weight:
    """Add the active adapters of a peft layer to its base weight."""
    if module.disable_adapters or module.merged:
        return weight
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return weight
    if any(module.lora_variant.get(name) for name in names) or any(module.lora_bias.get(name) for name in names):
        raise Unsupported("DoRA, a LoRA bias or another variant of LoRA")
    lora_a = torch.cat([module.lora_A[name].weight for name in names]).to(dtype).contiguous()
    scaled = [module.lora_B[name].weight * module.scaling[name] for name in names]
    lora_b = torch.cat(scaled, dim=1).to(dtype).contiguous()
    if not fits("float", tuple(lora_a.shape)):
        raise Unsupported(f"a LoRA matrix of shape {tuple(lora_a.shape)}")
    return replace(weight, lora_a=lora_a, lora_b=lora_b)


class _Plan:
    """The weights of a model in the kernels' form, and how they are put together.

    Args:
        model: A ChatGLM model with `decode_parts`.
        signature: Its `_signature`.

    Raises:
        Unsupported: The path does not cover the model.
    """

    def __init__(self, model: nn.Module, signature: tuple):
        self.parts, self.dtype, self.device = parts, dtype, device = model.decode_parts(), model.dtype, model.device
        self.signature = signature
        self.sources = _tensors(model)  # alive, so that no other tensor gets an address of the signature
        if devices := {str(tensor.device) for tensor in self.sources if tensor.device != device}:
            raise Unsupported(f"weights on {device} and {sorted(devices)}")
        if dtype not in (torch.float16, torch.bfloat16):
            raise Unsupported(f"a {dtype} model")
        if parts.head_dim not in HEAD_DIMS or parts.num_heads > MAX_HEADS_PER_KV_HEAD * parts.num_kv_heads:
            raise Unsupported(f"{parts.num_heads} heads of {parts.head_dim} over {parts.num_kv_heads} key/value heads")
        self.blocks = [
            replace(
                block,
                input_norm=read_norm(block.input_norm, dtype),
                query_key_value=read_linear(block.query_key_value, dtype),
                dense=read_linear(block.dense, dtype),
                post_norm=read_norm(block.post_norm, dtype),
                up=read_linear(block.up, dtype),
                down=read_linear(block.down, dtype),
            )
            for block in parts.blocks
        ]
        self.final_norm, self.lm_head = read_norm(parts.final_norm, dtype), read_linear(parts.lm_head, dtype)
        if self.lm_head.shape[1] > MAX_HIDDEN:
            raise Unsupported(f"hidden size {self.lm_head.shape[1]}, more than {MAX_HIDDEN}")
        linears = [self.lm_head] + [
            linear for block in self.blocks for linear in (block.query_key_value, block.dense, block.up, block.down)
        ]
        self.max_rank = max((len(linear.lora_a) for linear in linears if linear.lora_a is not None), default=0)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _signature(model: nn.Module) -> tuple:
    """Return what changes when a model's weights, adapters or their use change."""
    adapters = [
        (module.disable_adapters, bool(module.merged), tuple(module.active_adapters), tuple(module.scaling.items()))
        for module in model.modules()
        if hasattr(module, "lora_A")
    ]
    tensors = _tensors(model)
    versions = ((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
    return (*versions, *adapters)


class SequenceSlots:
    """Keys and values of B sequences in S slots: all end at the same slot, each begins at its own.

    Rotary embedding is applied before keys are cached, so that a sequence may be moved to other slots.

    Attributes:
        caches: Keys and values of each layer, (B, G, S, D) each.
        token: int64 (B, 1), the token to feed; whoever samples writes it here.
        positions: (B, ...), of that token.
        starts: (B,), the first slot of each sequence.
        batch: B.
        slots: S.
        length: The slot behind the last token, as the host knows it.
    """

    caches: list[tuple[torch.Tensor, torch.Tensor]]
    token: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    batch: int
    slots: int
    length: int

    def place(self, index: int, cache, row: int, num_cached: int, token: int, position: torch.Tensor) -> None:
        """Put a prompt in the place of a sequence; what it has cached must fit before `length`.

        Args:
            index: Which sequence is replaced.
            cache: A transformers cache of L layers, keys and values (N, G, T, D), padded on the left.
            row: The prompt's row there.
            num_cached: Tokens of the prompt there: all but the last.
            token: The prompt's last token, which the next step feeds.
            position: Its position or positions.
        """
        begin = self.length - num_cached
        for (keys, values), layer in zip(self.caches, cache.layers, strict=True):
            first = layer.keys.shape[2] - num_cached
            keys[index, :, begin : self.length] = layer.keys[row, :, first:]
            values[index, :, begin : self.length] = layer.values[row, :, first:]
        self.starts[index], self.token[index] = begin, token
        self.positions[index].view(-1).copy_(position.flatten())  # a single one is written twice where there are two

    def clear(self, index: int) -> None:
        """Make a sequence that has ended an empty one, so that its positions do not outgrow the slots."""
        self.starts[index] = self.length
        self.positions[index] = 0

    def end_at(self, length: int) -> None:
        """Move all sequences to other slots.

        Args:
            length: The slot behind their last tokens; those that are longer lose their first tokens.
        """
        num_kept = min(self.length, length)
        for cache in (tensor for pair in self.caches for tensor in pair):
            # a copy first: the ranges overlap
            cache[:, :, length - num_kept : length] = cache[:, :, self.length - num_kept : self.length].clone()
        self.starts += length - self.length
        self.starts.clamp_(min=0)
        self.length = length


class DecodeGraph(SequenceSlots):
    """A captured decode step for B sequences and up to S tokens of context.

    Attributes:
        logits: (B, V) in the model's dtype, of the newest token.
    """

    _idle: "weakref.WeakKeyDictionary[nn.Module, DecodeGraph]" = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model, cache, attention_mask, position_ids, num_new: int) -> "DecodeGraph":
        """Return a graph that goes on from a prompt's cache: the model's idle one where it fits, else a new one.

        It is the caller's until `give_back`.

        Args:
            model: A ChatGLM model with `decode_parts`.
            cache: The prompt's transformers cache of L layers, keys and values (B, G, T, D).
            attention_mask: (B, T) with 1 = keep, or None.
            position_ids: The prompt's, (B, T) or (B, 2, T).
            num_new: Tokens that will follow.

        Raises:
            Unsupported: This path does not cover the model or the input.
        """
        batch, length = cache.layers[0].keys.shape[0], cache.get_seq_length()
        starts, positions = _padding(attention_mask, batch, model.device), _last_positions(position_ids, batch, length)
        graph = cls.take(model, batch, length + min(num_new, MIN_SLOTS))
        graph.fill(cache, starts, positions)
        return graph

    @classmethod
    def take(cls, model, batch: int, num_slots: int) -> "DecodeGraph":
        """Return a graph with room for a context: the model's idle one where it fits, else a new one.

        It is the caller's until `give_back`; its cache holds what an earlier stream left there.

        Args:
            model: A ChatGLM model with `decode_parts`.
            batch: B.
            num_slots: Tokens that it must hold.

        Raises:
            Unsupported: This path does not cover the model or the batch.
        """
        if not nvrtc_runs_on(model.device):
            raise Unsupported(f"{model.device}: the kernels need CUDA, NVRTC and compute capability 8.0")
        if batch > MAX_BATCH:
            raise Unsupported(f"{batch} sequences, more than {MAX_BATCH}")
        if model.training:
            raise Unsupported("a model in training mode, which may drop out")
        embedding = model.get_input_embeddings()  # is called as a module, hooks and all
        modules = (module for module in model.modules() if module is not embedding)
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            raise Unsupported("forward hooks, which the kernels would not call")
        graph, signature = cls._idle.pop(model, None), _signature(model)
        if graph is None or graph.plan.signature != signature:
            graph, plan = None, _Plan(model, signature)
        else:
            plan = graph.plan
        if graph is None or graph.batch != batch or graph.slots < num_slots:
            graph = None  # frees its memory first
            graph = cls(plan, batch, bucket(num_slots))
        return graph

    @classmethod
    def forget(cls, model: nn.Module) -> None:
        """Free a model's idle graph, and with it what it holds of the model's weights."""
        cls._idle.pop(model, None)

    def give_back(self, model: nn.Module) -> None:
        """Leave this graph to the model's next stream."""
        self._idle[model] = self

    @torch.inference_mode(False)  # a later stream, outside of inference mode, writes to the buffers too
    @torch.no_grad()
    def __init__(self, plan: _Plan, batch: int, slots: int):
        """Allocate the buffers and capture the graph.

        Args:
            plan: The model.
            batch: B.
            slots: S.
        """
        parts, device = plan.parts, plan.device
        new = {"dtype": plan.dtype, "device": device}
        self.plan, self.batch, self.slots, self.length = plan, batch, slots, 0
        shape = (batch, parts.num_kv_heads, slots, parts.head_dim)
        self.caches = [(torch.zeros(shape, **new), torch.zeros(shape, **new)) for _ in plan.blocks]
        self.rotary = tuple(table.contiguous() for table in parts.rotary(slots))
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self.advance = torch.tensor([0, 1] if parts.two_d else [1, 0], dtype=torch.int32, device=device)
        self.starts = torch.zeros(batch, dtype=torch.int32, device=device)
        self.length_on_device = torch.zeros(1, dtype=torch.int32, device=device)
        self.scratch = attention_scratch(batch, parts.num_kv_heads, slots, parts.head_dim, device)
        self.lora_t = torch.empty(batch * plan.max_rank, dtype=torch.float32, device=device)
        self.logits = torch.empty(batch, plan.lm_head.shape[0], **new)
        self._run()  # compiles the kernels, which a capture must not do
        self.replay = capture(self._run, device)

    def fill(self, cache, starts: torch.Tensor, positions: torch.Tensor) -> None:
        """Take over a prompt.

        Args:
            cache: See `of`.
            starts: int32 (B,), padding columns of each sequence.
            positions: (B, 2), both positions of the last token of each sequence.
        """
        self.length = cache.get_seq_length()
        for (keys, values), layer in zip(self.caches, cache.layers, strict=True):
            keys[:, :, : self.length] = layer.keys
            values[:, :, : self.length] = layer.values
        self.positions.copy_(positions)
        self.positions += self.advance
        self.starts.copy_(starts)
        self.length_on_device.fill_(self.length)

    def end_at(self, length: int) -> None:
        """Move all sequences to other slots; see SequenceSlots."""
        super().end_at(length)
        self.length_on_device.fill_(length)

    def step(self) -> None:
        """Feed `token`: `logits` are then those of the next one."""
        self.replay()
        self.length += 1

    def grown(self) -> "DecodeGraph":
        """Return a graph of twice the slots in the same state; this one is done with."""
        graph = DecodeGraph(self.plan, self.batch, 2 * self.slots)
        for mine, other in zip(self.caches, graph.caches, strict=True):
            for source, target in zip(mine, other, strict=True):
                target[:, :, : self.slots] = source
        for name in ("token", "positions", "starts", "length_on_device"):
            getattr(graph, name).copy_(getattr(self, name))
        graph.length = self.length
        return graph

    def cached(self, config, length: int) -> DynamicCache:
        """Return the first tokens' keys and values as transformers' cache, in tensors of its own.

        Args:
            config: The model's.
            length: How many tokens.
        """
        cache = DynamicCache(config=config)
        for index, pair in enumerate(self.caches):
            cache.update(*(tensor[:, :, :length].clone() for tensor in pair), index)
        return cache

    def _matmul(self, x: torch.Tensor, weight: Weight, epilogue: str = "store", residual=None, alpha=1.0):
        """Return x times a weight in a new tensor; see matvec."""
        columns = weight.shape[0] // (2 if epilogue == "swiglu" else 1)
        out = torch.empty(self.batch, columns, dtype=x.dtype, device=x.device)
        rank = 0 if weight.lora_a is None else weight.lora_a.shape[0]
        lora_t = self.lora_t[: self.batch * rank].view(self.batch, rank) if rank else None
        matvec(x, weight, out, epilogue, residual, alpha, lora_t)
        return out

    @staticmethod
    def _normalize(x: torch.Tensor, parameters: tuple) -> torch.Tensor:
        out = torch.empty_like(x)
        norm(x, *parameters, out)
        return out

    def _run(self) -> None:
        """Launch one decode step.

        All of this is captured: shapes, pointers and scalars are those of the capture at every replay, so whatever
        changes from token to token (token, positions, length) is read from and advanced in GPU memory.
        """
        parts = self.plan.parts
        hidden = parts.embedding(self.token)[:, 0].contiguous()  # (B, C)
        for block, cache in zip(self.plan.blocks, self.caches, strict=True):
            normed = self._normalize(hidden, block.input_norm)
            mixed = self._matmul(normed, block.query_key_value)
            context = hidden.new_empty(self.batch, parts.num_heads * parts.head_dim)
            decode_attention(
                mixed,
                cache,
                self.rotary,
                self.positions,
                self.starts,
                self.length_on_device,
                self.scratch,
                context,
                parts.two_d,
            )
            # ChatGLM2 adds to a block's input, ChatGLM-6B to the scaled output of each norm.
            residual, scale = (hidden, 1.0) if parts.residual_scale is None else (normed, parts.residual_scale)
            hidden = self._matmul(context, block.dense, "residual", residual, scale)
            normed = self._normalize(hidden, block.post_norm)
            wide = self._matmul(normed, block.up, parts.activation)
            residual = hidden if parts.residual_scale is None else normed
            hidden = self._matmul(wide, block.down, "residual", residual, scale)
        matvec(self._normalize(hidden, self.plan.final_norm), self.plan.lm_head, self.logits)
        self.positions += self.advance
        self.length_on_device += 1


def capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture what a function launches on a device, without running it; it must have run once before.

    Returns:
        What replays it.
    """
    graph = torch.cuda.CUDAGraph()
    # PyTorch's own capture stream belongs to the device that was current when a process first captured.
    # thread_local: what other threads allocate or wait for meanwhile does not end the capture.
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph.replay


def bucket(num_slots: int) -> int:
    """Return the next power of two, at least MIN_SLOTS."""
    return max(MIN_SLOTS, 1 << (num_slots - 1).bit_length())


def _padding(attention_mask: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
    """Return the number of padding columns of each sequence, (B,).

    Raises:
        Unsupported: Padding that is not on the left.
    """
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.int32, device=device)
    mask = attention_mask.bool()
    if not bool((mask.int().diff(dim=1) >= 0).all()):
        raise Unsupported("an attention mask with holes")
    return (~mask).sum(dim=1).to(torch.int32)


def _last_positions(position_ids: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Return both positions of the last token of each sequence, (B, 2); a single one twice.

    Args:
        position_ids: (B or 1, T) or (B or 1, 2, T).
        batch: B.
        length: T.

    Raises:
        Unsupported: Positions that the rotary table, one entry per slot, would not hold.
    """
    last = position_ids[..., -1].reshape(len(position_ids), -1).expand(batch, 2)
    if not bool(((last >= 0) & (last < length)).all()):
        raise Unsupported("positions that do not count the tokens")
    return last
