"""The fused operations: Triton kernels against plain torch, with gradients.

Without a GPU the kernels run in Triton's interpreter, on the same tests.
"""

import pytest
import torch
from torch.nn import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # every test runs where there is a GPU too


@pytest.fixture(params=[True, False], ids=["kernel", "reference"])
def fused(sibling, monkeypatch, request):
    """The module of each family in turn, with its kernels and without them."""
    if request.param:
        pytest.importorskip("triton")
    monkeypatch.setitem(sibling("kernels_chatglm").OVERRIDES, "triton", request.param)
    return sibling("fused_chatglm")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def with_gradients(function, *inputs):
    inputs = [part.clone().requires_grad_() for part in inputs]
    out = function(*inputs)
    weights = torch.arange(out.numel(), device=out.device).view(out.shape).sin()
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_equal(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.float() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 10), (1, 5, 2 * 1025), (2, 1, 2 * 1024)])
def test_swiglu(fused, shape):
    expected = with_gradients(lambda x: functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], noise(*shape))
    assert_equal(with_gradients(fused.swiglu, noise(*shape)), expected)
    strided = noise(*shape[:-1], 2 * shape[-1])[..., ::2]
    assert_equal(with_gradients(fused.swiglu, strided), with_gradients(fused.swiglu, strided.contiguous()))


@pytest.mark.parametrize("num_heads", [1, 3, 40])
@pytest.mark.parametrize("dim", [16, 24, 128])
@pytest.mark.parametrize("num_batches", [1, 2])
def test_rotation(sibling, family, num_heads, dim, num_batches, monkeypatch):
    """Each family's own pairs of elements, on views of the projection, with angles shared by the batch or not."""
    pytest.importorskip("triton")
    modeling, overrides = sibling("modeling_chatglm"), sibling("kernels_chatglm").OVERRIDES
    parts = (2,) if family.name == "chatglm-6b" else ()
    angles = noise(num_batches, 1, 5, *parts, dim // 4, seed=1)
    mixed, results = noise(2, 5, num_heads, 3 * dim), []
    for on in (True, False):
        monkeypatch.setitem(overrides, "triton", on)
        results.append(
            with_gradients(
                lambda x: modeling.apply_rotary(x[..., dim : 2 * dim].transpose(1, 2), angles.cos(), angles.sin()),
                mixed,
            )
        )
    assert_equal(*results)


@pytest.mark.parametrize("num_classes", [7, 4096, 5000])
def test_cross_entropy(fused, num_classes):
    logits, targets = 10 * noise(4, num_classes), torch.tensor([0, num_classes - 1, 3, 2], device=DEVICE)
    logits[3] += 1000  # no overflow
    expected = functional.cross_entropy(logits.requires_grad_(), targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    losses, found = fused.cross_entropy(logits.detach().clone(), targets)
    assert_equal([losses], [expected])
    assert_equal([found[:3], found[3]], [gradient[:3], gradient[3]], 1e-4)  # at 1000 a step of fp32 is 6e-5


@pytest.mark.gpu
def test_kernels_in_bf16_at_full_width(fused):
    """The widths of ChatGLM2-6B, where an index passes 2^31 and a row is not a multiple of a block."""
    gate_up = noise(1, 77, 27392).bfloat16()
    exact = with_gradients(lambda x: functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], gate_up.float())
    assert_equal(with_gradients(fused.swiglu, gate_up), exact, 1e-2)
    logits, targets = noise(9, 65024).bfloat16(), torch.arange(9, device=DEVICE)
    exact = functional.cross_entropy(logits.float(), targets, reduction="none")
    assert_equal([fused.cross_entropy(logits, targets)[0]], [exact], 1e-2)
    wide = torch.zeros(1, 80_000, 27392, dtype=torch.bfloat16, device=DEVICE)
    wide[0, -1] = 1
    assert fused.swiglu(wide)[0, -1].float().mean().item() == pytest.approx(0.7311, abs=1e-2)
