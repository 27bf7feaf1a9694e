"""Measure matmuls with quantized weights: microseconds for the four Linear modules of a layer, by path and rows.

    python -m benchmarks.bench_kernels
    python -m benchmarks.bench_kernels --family chatglm-6b --rows 1,2,8 --dtype bf16

With GemLite installed (`pip install gemlite`, nothing else here needs it) its int4 and int8 kernels are timed too.

Needs a GPU. Each path is first compared with the matmul in fp64, then timed inside a CUDA graph over several copies
of the weight that together exceed the L2 cache, as in a model, where every layer reads weights of its own. Writes
benchmarks/results/kernels_<family>_<dtype>_<device>.json after each printed line, of which there is one per path and
number of rows.
"""

import json
import statistics
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from benchmarks.harness.published import find_family, layer_shapes, remote_function
from benchmarks.harness.results import RESULTS_DIR, device_name, provenance, write_result
from glm_utils.cli import UserError, run_cli

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CACHE_BYTES = 160e6  # more than twice the L2 of an H200
LAUNCHES = 24  # at least this many in a graph
REPEATS = 5


def cublas(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Multiply by a weight that was dequantized before."""
    return F.linear(x, weight)


def dequantized(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Dequantize to memory with the kernel, some rows at a time, and multiply: the path of prompts and training."""
    return remote_function("quantization.linear_in_parts")(x, weight, scale, bits, None)


def triton(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Multiply by the packed weight."""
    return remote_function("quantization.quantized_matmul")(x, weight, scale, bits)


def cuda(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Multiply in the kernel of the generation graph, which takes the dequantized weight too."""
    rows, kind = weight.shape[0], "float" if bits == 16 else f"int{bits}"
    stored = remote_function("cuda_kernels.Weight")(kind, weight, (rows, x.shape[1]), scale)
    out = x.new_empty(x.shape[0], rows)
    remote_function("cuda_kernels.matvec")(x, stored, out)
    return out


def gemlite(x: torch.Tensor, layer, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Multiply by a weight that GemLite packed, with its own choice of kernel."""
    return layer(x)


def pack_for_gemlite(weight: torch.Tensor, scale: torch.Tensor, bits: int):
    """Return a GemLite layer of a stored weight: unsigned codes with one scale and one zero point per row."""
    from gemlite.helper import A16Wn

    codes = (remote_function("quantization.unpack")(weight, bits).int() + 2 ** (bits - 1)).to(torch.uint8)
    zeros = torch.full_like(scale, 2 ** (bits - 1))[:, None]
    packer = A16Wn(device=str(weight.device), dtype=scale.dtype)
    return packer.from_weights(codes, scale[:, None], zeros, W_nbits=bits, group_size=codes.shape[1])


PATHS = {  # name -> function(x, weight, scale, bits), the bits it takes (16: dequantized), its maximum number of rows
    "cublas": (cublas, (16,), None),
    "decoded": (dequantized, (4, 8), None),
    "triton": (triton, (4, 8), 32),
    "cuda": (cuda, (16, 4, 8), 16),
    **({"gemlite": (gemlite, (4, 8), None)} if find_spec("gemlite") else {}),
}


def make_weights(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return copies of a random stored weight that together exceed the L2 cache, and its scales.

    Args:
        shape: (out, in).
        bits: 4 or 8; 16: a dequantized weight.
        dtype: Of a dequantized weight.
    """
    stored_bits = 4 if bits == 16 else bits
    stored_shape = (shape[0], shape[1] * stored_bits // 8)
    weight = torch.randint(-128, 128, stored_shape, dtype=torch.int8, device="cuda")
    scale = (0.01 * torch.rand(shape[0], device="cuda")).half()
    if bits == 16:
        weight = remote_function("quantization.dequantize_rows")(weight, scale, stored_bits, dtype)
    num_copies = max(2, -(-int(CACHE_BYTES) // weight.nbytes))
    return [weight.clone() for _ in range(num_copies)], scale


def relative_error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int):
    """Return the norm of the difference from the matmul in fp64 over the norm of the latter."""
    exact = (
        weight.double()
        if bits == 16
        else remote_function("quantization.dequantize_rows")(weight, scale, bits, torch.float64)
    )
    expected = F.linear(x.double(), exact)
    return ((found.double() - expected).norm() / expected.norm()).item()


def microseconds(run, num_copies: int) -> float:
    """Return the median time of run(copy) inside a CUDA graph that cycles through the copies."""
    run(0)
    graph = torch.cuda.CUDAGraph()
    num_rounds = -(-LAUNCHES // num_copies)
    with torch.cuda.graph(graph):
        for _ in range(num_rounds):
            for copy in range(num_copies):
                run(copy)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / (num_rounds * num_copies))
    return statistics.median(times)


def measure(path: str, bits: int, num_rows: int, shapes: list[tuple[int, int]], dtype: torch.dtype) -> dict:
    """Return error and microseconds of one path over the shapes of a layer."""
    compute = PATHS[path][0]
    result = {"path": path, "bits": bits, "rows": num_rows, "relative_error": 0.0, "us_by_shape": {}}
    for shape in shapes:
        weights, scale = make_weights(shape, bits, dtype)
        x = torch.randn(num_rows, shape[1], device="cuda", dtype=dtype)
        operands = [pack_for_gemlite(weight, scale, bits) for weight in weights] if path == "gemlite" else weights
        error = relative_error(compute(x, operands[0], scale, bits), x, weights[0], scale, bits)
        if not error < torch.finfo(dtype).eps and path != "gemlite":  # which may sum in fp16
            raise UserError(f"{path} at {bits} bits, {num_rows} rows, shape {shape}: relative error {error:.2e}")
        result["relative_error"] = max(error, result["relative_error"])

        def run(copy, x=x, operands=operands, scale=scale):
            return compute(x, operands[copy], scale, bits)

        result["us_by_shape"]["x".join(map(str, shape))] = round(microseconds(run, len(weights)), 2)
    result["us_per_layer"] = round(sum(result["us_by_shape"].values()), 1)
    return result


@torch.no_grad()
def bench_kernels(*, family: str = "chatglm2-6b", rows: str = "1,4,16,64", dtype: str = "fp16") -> None:
    """Run the benchmark.

    Args:
        family: chatglm-6b or chatglm2-6b.
        rows: Numbers of rows of activations, joined by commas.
        dtype: fp16 or bf16.
    """
    if dtype not in DTYPES or not all(map(str.isdigit, rows.split(","))):
        raise UserError(f"--rows {rows} --dtype {dtype}: expected numbers joined by commas, and fp16 or bf16")
    shapes = layer_shapes(find_family(family).name)
    if not torch.cuda.is_available():
        raise UserError("no CUDA device found. Run this on a machine with a GPU")
    torch.manual_seed(0)
    result_path = RESULTS_DIR / f"kernels_{family}_{dtype}_{device_name()}.json"
    record = {"benchmark": "kernels", "family": family, "dtype": dtype, "results": []}
    record |= provenance()
    for path, (_, widths, max_rows) in PATHS.items():
        for bits in widths:
            for num_rows in (n for n in map(int, rows.split(",")) if max_rows is None or n <= max_rows):
                result = measure(path, bits, num_rows, shapes, DTYPES[dtype])
                record["results"].append(result)
                write_result(result_path, record)
                print(json.dumps(result))


if __name__ == "__main__":
    run_cli(bench_kernels)
