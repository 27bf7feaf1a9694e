"""The Triton kernels against the reference: on a GPU where there is one, else the same tests in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so `test_kernels_in_the_interpreter` runs this file again
in a process of its own.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.fresh_scripts import door, load_script

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LAYER_SHAPES = {  # (N, K) of the four Linear modules of a layer
    "chatglm2-6b": [(4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696)],
    "chatglm-6b": [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)],
}


Q = load_script("quantization")
OVERRIDES = door(Q).OVERRIDES
_on_kernels = (lambda test: test) if INTERPRETED else pytest.mark.gpu


def _stored(num_rows, num_columns, bits, scale_dtype=torch.float16, seed=0):
    """Return a weight of random bytes, which hold all codes, -8 and -128 too, and scales of both signs and 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (num_rows, num_columns * bits // 8), dtype=torch.int8, generator=generator)
    scale = 0.01 * torch.randn(num_rows, generator=generator)
    scale[num_rows // 2 :: 7] = 0
    return weight.to(DEVICE), scale.to(DEVICE, scale_dtype)


def _random(*shape, dtype=torch.float16, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _exact(x, weight, scale, bits, bias=None):
    """Return the matmul in fp64: neither the weight nor a sum is rounded."""
    dequantized = Q.dequantize_rows(weight, scale, bits, torch.float64)
    return F.linear(x.double(), dequantized, None if bias is None else bias.double())


def _rounding(dtype):
    """Return the largest relative error of one rounding; the interpreter cuts bf16 off instead of rounding it."""
    cuts_off = INTERPRETED and dtype == torch.bfloat16
    return torch.finfo(dtype).eps * (1 if cuts_off else 0.5)


def _assert_close(found, expected, terms):
    """Compare with an exact matmul: one rounding of the result and the fp32 rounding of a sum of that many terms."""
    assert found.shape == expected.shape
    largest = expected.abs().max().item()
    error = (found.double() - expected).abs()
    allowed = _rounding(found.dtype) * expected.abs() + 2**-24 * terms**0.5 * largest + torch.finfo(found.dtype).tiny
    assert (error <= 1.01 * allowed).all(), (error / allowed).max().item()


def _dtypes_of(num_rows):
    """Return the dtypes that can be tested: the interpreter's tl.dot multiplies bf16's bit patterns as integers."""
    return [torch.float16] if INTERPRETED and num_rows > Q.MATVEC_ROWS else [torch.float16, torch.bfloat16]


@pytest.mark.skipif(INTERPRETED or Q.triton is None, reason="needs Triton, outside its interpreter")
@pytest.mark.slow
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


# ---- the kernels


@_on_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_every_byte_is_dequantized_as_the_reference_does(bits):
    every_byte = torch.arange(-128, 128).to(torch.int8).to(DEVICE)
    for weight in (every_byte.reshape(8, 32), every_byte[:255].reshape(5, 51)):  # int32 words, then bytes
        scale = torch.linspace(-0.02, 0.03, len(weight), device=DEVICE).half()
        for dtype in (torch.float16, torch.float32):
            expected = Q.dequantize_rows(weight, scale, bits, dtype)
            assert torch.equal(Q.triton_dequantize_rows(weight, scale, bits, dtype), expected)


@_on_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows, num_columns", [(1, 2), (37, 1062), (5, 4104), (130, 64)])
def test_dequantizing_a_weight(bits, num_rows, num_columns):
    weight, scale = _stored(num_rows, num_columns, bits)
    assert torch.equal(
        Q.triton_dequantize_rows(weight, scale, bits, torch.float16),
        Q.dequantize_rows(weight, scale, bits, torch.float16),
    )
    expected = Q.dequantize_rows(weight, scale, bits, torch.float32)
    error = (Q.triton_dequantize_rows(weight, scale, bits, torch.bfloat16).float() - expected).abs()
    assert (error <= 2 * _rounding(torch.bfloat16) * expected.abs()).all()


@_on_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 17, 32])
@pytest.mark.parametrize("num_outputs, num_columns", [(37, 1064), (19, 1062), (1, 6), (16, 2048)])
def test_matmuls_of_ragged_sizes(bits, num_rows, num_outputs, num_columns):
    weight, scale = _stored(num_outputs, num_columns, bits)
    for dtype in _dtypes_of(num_rows):
        x, bias = _random(num_rows, num_columns, dtype=dtype), _random(num_outputs, dtype=dtype, seed=2)
        for added in (None, bias):
            found = Q.quantized_matmul(x, weight, scale, bits, added)
            assert found.dtype == dtype
            _assert_close(found, _exact(x, weight, scale, bits, added), num_columns)


@_on_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [1, 3, 17])
def test_scales_in_fp32(bits, num_rows):
    weight, scale = _stored(24, 136, bits, torch.float32)
    x = _random(num_rows, 136)
    _assert_close(Q.quantized_matmul(x, weight, scale, bits), _exact(x, weight, scale, bits), 136)


@_on_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [1, 3, 17])
def test_strides_batches_and_offsets(bits, num_rows):
    """Neither activations nor weights have to be contiguous or to start at a multiple of 4 bytes."""
    weight, scale = _stored(24, 128, bits)
    x = _random(128, num_rows).T  # columns apart
    expected = _exact(x, weight, scale, bits)
    _assert_close(Q.quantized_matmul(x, weight, scale, bits), expected, 128)
    batch = x.reshape(num_rows, 1, 1, 128)
    found = Q.quantized_matmul(batch, weight, scale, bits)
    assert found.shape == (num_rows, 1, 1, 24)
    _assert_close(found.flatten(0, 2), expected, 128)
    shifted = torch.cat((weight.new_zeros(1), weight.flatten()))[1:].view_as(weight)
    _assert_close(Q.quantized_matmul(x, shifted, scale, bits), expected, 128)
    _assert_close(Q.quantized_matmul(x, weight.T.contiguous().T, scale, bits), expected, 128)
    x_shifted = torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)
    _assert_close(Q.quantized_matmul(x_shifted, weight, scale, bits), expected, 128)


@_on_kernels
@pytest.mark.parametrize("num_rows", [1, 17])
def test_large_activations_do_not_overflow(num_rows):
    """Codes times activations exceed fp16's range long before their sum, scaled, does."""
    weight = torch.full((8, 128), 127, dtype=torch.int8, device=DEVICE)
    scale = torch.full((8,), 2.0**-14, device=DEVICE).half()
    x = torch.full((num_rows, 128), 60000.0, device=DEVICE).half()
    _assert_close(Q.quantized_matmul(x, weight, scale, 8), _exact(x, weight, scale, 8), 128)


@_on_kernels
def test_activations_of_another_width_are_refused():
    weight, scale = _stored(8, 64, 4)
    with pytest.raises(ValueError, match="expected 64 columns of activations, found 32"):
        Q.quantized_matmul(_random(1, 32), weight, scale, 4)


# ---- real sizes and modules, on a GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", sorted({shape for shapes in LAYER_SHAPES.values() for shape in shapes}))
def test_matmuls_of_real_sizes(bits, shape):
    weight, scale = _stored(*shape, bits)
    for num_rows in (1, 2, 4, 16, 32):
        for dtype in (torch.float16, torch.bfloat16):
            x = _random(num_rows, shape[1], dtype=dtype)
            _assert_close(Q.quantized_matmul(x, weight, scale, bits), _exact(x, weight, scale, bits), shape[1])
    expected = Q.dequantize_rows(weight, scale, bits, torch.bfloat16)
    assert torch.equal(Q.triton_dequantize_rows(weight, scale, bits, torch.bfloat16), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_module_and_its_gradients(monkeypatch, bits, num_rows, dtype):
    """Forward and gradients with kernels and with the reference agree to the rounding of the dequantized weight."""
    linear = torch.nn.Linear(1064, 96, dtype=dtype, device="cuda")
    module = Q.QuantizedLinear.from_linear(linear, bits)
    x, grad = _random(num_rows, 1064, dtype=dtype), _random(num_rows, 96, dtype=dtype, seed=2)
    results = []
    for uses_kernels in (True, False):
        monkeypatch.setitem(OVERRIDES, "triton", uses_kernels)
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.backward(grad)
        results.append((y.detach().double(), inputs.grad, module.bias.grad.clone()))
    (y, grad_x, grad_bias), (expected, expected_grad_x, expected_grad_bias) = results
    assert y.shape == expected.shape
    assert ((y - expected).norm() <= torch.finfo(dtype).eps * expected.norm()).item()
    assert torch.equal(grad_x, expected_grad_x)
    assert torch.equal(grad_bias, expected_grad_bias)


@pytest.mark.gpu
def test_matmuls_in_a_cuda_graph():
    weight, scale = _stored(96, 1064, 4)
    x = _random(1, 1064)
    Q.quantized_linear(x, weight, scale, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = Q.quantized_linear(x, weight, scale, 4)
    x.copy_(_random(1, 1064, seed=3))
    graph.replay()
    _assert_close(y, _exact(x, weight, scale, 4), 1064)


# ---- the dispatcher, on any machine


@pytest.fixture
def calls(monkeypatch):
    """Let the door choose the kernels, and note which of them runs."""
    noted = []

    def note(name, compute):
        monkeypatch.setattr(Q, name, lambda *args: noted.append(name) or compute(*args))

    def matmul(x, weight, scale, bits, bias):
        return F.linear(x, Q.dequantize_rows(weight, scale, bits, x.dtype), bias)

    monkeypatch.setitem(OVERRIDES, "triton", True)
    note("quantized_matmul", matmul)
    note("triton_dequantize_rows", Q.dequantize_rows)
    return noted


@pytest.mark.parametrize("shape", [(1, 8), (2, 2, 8), (Q.MATMUL_ROWS, 8), (Q.MATMUL_ROWS + 1, 8), (2, 0, 8)])
def test_door_chooses_by_rows(calls, shape):
    weight = Q.pack_int4(torch.randint(-8, 8, (6, 8), dtype=torch.int8))
    scale = 2.0 ** torch.randint(-3, 3, (6,))  # sums of codes times powers of two are exact, in any order
    x = torch.randn(shape, requires_grad=True)
    y = Q.quantized_linear(x, weight, scale, 4)
    few = 0 < x.shape[:-1].numel() <= Q.MATMUL_ROWS
    assert calls == ["quantized_matmul" if few else "triton_dequantize_rows"]
    assert y.shape == (*shape[:-1], 6)
    y.sum().backward()
    assert calls[1:] == ["triton_dequantize_rows"]
    assert torch.equal(x.grad, Q.dequantize_rows(weight, scale, 4, torch.float32).sum(0).expand(shape))


@pytest.mark.parametrize(
    "capability, dtype, expected",
    [
        ((7, 0), torch.float16, False),
        ((7, 5), torch.float16, True),
        ((7, 5), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
        ((9, 0), torch.float64, False),
    ],
)
def test_devices_and_dtypes_with_kernels(monkeypatch, capability, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")
    monkeypatch.setattr(door(Q), "triton", object())
    monkeypatch.delitem(OVERRIDES, "triton", raising=False)
    assert Q.triton_takes_quantized(x) is expected
    assert not Q.triton_takes_quantized(torch.zeros(1, dtype=dtype))  # a CPU tensor
    monkeypatch.setitem(OVERRIDES, "triton", False)
    assert not Q.triton_takes_quantized(x)


def test_file_works_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    alone = load_script("quantization")
    assert alone.triton is None
    assert not alone.triton_takes_quantized(SimpleNamespace(is_cuda=True, dtype=torch.float16))
    stored, scale = alone.quantize_rows(torch.randn(6, 8), 4)
    assert alone.quantized_linear(torch.randn(2, 8), stored, scale, 4).shape == (2, 6)


def _compile(kernel, capability, dtype, word, block_m, bits, tile):
    """Compile a kernel for a GPU that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = {"x": dtype, "y": dtype, "bias": dtype, "out": dtype, "weight": word, "scale": "fp16"}
    signature = {name: f"*{types[name]}" if name in types else "i32" for name in kernel.arg_names}
    constants = {"BITS": bits, "BLOCK_N": tile[0], "BLOCK_K": tile[1]}
    if block_m:
        constants |= {"BLOCK_M": block_m, "STAGES": 3, "SLICES": tile[2]}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tile[2]})


@pytest.mark.skipif(INTERPRETED or Q.triton is None, reason="needs Triton, outside its interpreter")
@pytest.mark.parametrize("word", ["i32", "i8"])
@pytest.mark.parametrize("capability, dtype", [(75, "fp16"), (80, "bf16"), (86, "fp16"), (90, "bf16"), (120, "fp16")])
def test_kernels_compile_for_every_gpu(monkeypatch, capability, dtype, word):
    """Triton and the assembler take the kernels, PTX included, and their shared memory fits the smallest GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    module = load_script("quantization")
    for (bits, block_m), tile in module._TILES.items():
        matvec = block_m <= module.MATVEC_ROWS
        kernel = module._quantized_matvec_kernel if matvec else module._quantized_matmul_kernel
        compiled = _compile(kernel, capability, dtype, word, block_m, bits, tile)
        assert compiled.metadata.shared <= 64 * 1024, (bits, block_m)
        assert "0x6a" in compiled.asm["ptx"].lower()
    for bits in (4, 8):
        _compile(module._dequantize_rows_kernel, capability, dtype, word, 0, bits, (4, 1024, 4))
