"""The kernels of the decode path in plain torch, with the signatures of cuda_kernels.py: what they are tested against.

Everything is computed in fp64 from the stored numbers and rounded once.
"""

import torch
from torch.nn import functional

NF4_BLOCK = 64


def nibbles(packed):
    """Bytes (N, K/2) -> unsigned nibbles (N, K), the high one first."""
    packed = packed.to(torch.uint8)
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2).long()


def dequantized(weight):
    """Return a Weight as fp64 (N, K)."""
    rows, columns = weight.shape
    if weight.kind == "float":
        return weight.data.double()
    if weight.kind == "nf4":
        code, maxima = weight.scale[:16].double(), weight.scale[16:].double()
        values = code[nibbles(weight.data.view(rows, columns // 2))]
        return values * maxima.view(rows, -1).repeat_interleave(NF4_BLOCK, dim=1)
    codes = weight.data if weight.kind == "int8" else (nibbles(weight.data) ^ 8) - 8
    return codes.double() * weight.scale.double()[:, None]


def matvec(x, weight, out, epilogue="store", residual=None, alpha=1.0, lora_t=None):
    """Multiply by a weight; see cuda_kernels.matvec."""
    x = x.double()
    y = x @ dequantized(weight).T
    if weight.bias is not None:
        y += weight.bias.double()
    if weight.lora_a is not None:
        lora_t.copy_(x @ weight.lora_a.double().T)
        y += lora_t.double() @ weight.lora_b.double().T
    if epilogue == "residual":
        y += alpha * residual.double()
    elif epilogue == "gelu":
        y = functional.gelu(y, approximate="tanh")
    elif epilogue == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = functional.silu(gate) * up
    out.copy_(y)


def norm(x, weight, bias, eps, out):
    """Normalize rows; see cuda_kernels.norm."""
    x = x.double()
    if bias is not None:
        out.copy_(functional.layer_norm(x, x.shape[-1:], weight.double(), bias.double(), eps))
    else:
        out.copy_(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double())


def rotate(x, positions, rotary, two_d):
    """Rotate heads (B, heads, D) at positions (B, 2)."""
    x, (cos, sin) = x.double(), (table.double() for table in rotary)
    positions = positions.long()
    if two_d:
        first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, heads, 2, D / 4)
        cos, sin = cos[positions][:, None], sin[positions][:, None]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)
    cos, sin = cos[positions[:, 0]][:, None], sin[positions[:, 0]][:, None]
    half, rest = x.chunk(2, dim=-1)
    even, odd = half[..., 0::2], half[..., 1::2]
    return torch.cat((torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2), rest), dim=-1)


def decode_attention(qkv, cache, rotary, positions, starts, length, scratch, out, two_d):
    """Attend with one new token; see cuda_kernels.decode_attention."""
    keys, values = cache
    batch, num_kv_heads, _, head_dim = keys.shape
    num_heads = out.shape[1] // head_dim
    if two_d:
        query, key, value = qkv.view(batch, num_heads, 3, head_dim).unbind(2)
    else:
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        query, key, value = (part.view(batch, -1, head_dim) for part in qkv.split(sizes, dim=-1))
    slot = int(length)
    keys[:, :, slot], values[:, :, slot] = rotate(key, positions, rotary, two_d).to(keys.dtype), value
    heads_per_kv = num_heads // num_kv_heads
    query = rotate(query, positions, rotary, two_d)
    keys, values = keys[:, :, : slot + 1], values[:, :, : slot + 1]  # what lies behind is never read
    scores = torch.einsum("bhd,bhsd->bhs", query, keys.double().repeat_interleave(heads_per_kv, dim=1)) / head_dim**0.5
    seen = torch.arange(slot + 1, device=qkv.device) >= starts[:, None]
    probabilities = scores.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
    context = torch.einsum("bhs,bhsd->bhd", probabilities, values.double().repeat_interleave(heads_per_kv, dim=1))
    out.copy_(context.flatten(1))


def attention_scratch(batch, num_kv_heads, slots, head_dim, device):
    """Nothing to combine."""
    return torch.empty(0), torch.empty(0)
