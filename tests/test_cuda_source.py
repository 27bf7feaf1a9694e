"""Every CUDA kernel that the decode path can ask for, compiled for GPUs that are not there; needs NVRTC, no GPU."""

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.fresh_scripts import load_script

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")  # without and with programmatic dependent launch
NUM_SMS = (28, 132)  # few and many tiles a multiprocessor choose different tunings


def open_nvrtc():
    """Return NVRTC from the library path or the nvidia packages, or None."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    packaged = (str(path) for root in roots for path in sorted(Path(root).glob("*/lib/libnvrtc.so.*")))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", *packaged):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@pytest.fixture(scope="module")
def kernels():
    """Load cuda_kernels.py of one family, whose files are those of the other."""
    return load_script("cuda_kernels")


@pytest.fixture
def launches(kernels, monkeypatch):
    """Note (name, defines, grid, threads, shared bytes) of every launch instead of launching."""
    noted = []

    class Recorder:
        def __init__(self, name, device, defines):
            self.name, self.defines = name, defines

        def launch(self, grid, num_threads, *arguments, shared_bytes=0):
            noted.append((self.name, self.defines, grid, num_threads, shared_bytes))

    monkeypatch.setattr(kernels, "_kernel", Recorder)
    return noted


def launch_everything(kernels, monkeypatch, has_clusters):
    """Ask for every kernel through the functions that the decode path calls."""
    for num_sms in NUM_SMS:
        monkeypatch.setattr(kernels, "_num_sms", lambda device, num_sms=num_sms: num_sms)
        monkeypatch.setattr(kernels, "_has_clusters", lambda device: has_clusters)
        for dtype in (torch.float16, torch.bfloat16):
            for num_rows in (1, 8, 9, 16):
                x = torch.empty(num_rows, 64, dtype=dtype)
                for kind in kernels.FORMATS:
                    for num_outputs in (16, 27392):
                        weight = kernels.Weight(kind, torch.empty(0), (num_outputs, 64))
                        for epilogue in kernels.EPILOGUES:
                            kernels.matvec(x, weight, torch.empty(0, dtype=dtype), epilogue)
            for bias in (None, x):
                kernels.norm(x, x, bias, 1e-5, x)
            for head_dim in (64, 128):
                cache = (torch.empty(1, 2, 256, head_dim, dtype=dtype),) * 2
                scratch = kernels.attention_scratch(1, 2, 256, head_dim, torch.device("cpu"))
                qkv, out = torch.empty(1, 6 * head_dim, dtype=dtype), torch.empty(1, 2 * head_dim, dtype=dtype)
                for two_d in (False, True):
                    kernels.decode_attention(qkv, cache, (x, x), x, x, x, scratch, out, two_d)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(kernels, launches, monkeypatch, architecture):
    """NVRTC takes each instance; its assembler refuses too many registers and too much static shared memory."""
    nvrtc = open_nvrtc()
    if nvrtc is None:
        pytest.skip("no NVRTC library")
    launch_everything(kernels, monkeypatch, has_clusters=architecture != "sm_80")
    instances = sorted({(name, defines) for name, defines, *_ in launches})
    matvecs = {name for name, _ in instances if name.startswith("matvec")}
    assert len(matvecs) == 4 * 2 * 2 * 4  # formats, dtypes, row tiles, epilogues
    assert len({name for name, _ in instances} - matvecs) == 4 + 8
    for name, defines in instances:
        cubin, mangled = kernels.compile_cubin(nvrtc, name, architecture, defines)
        assert cubin[:4] == b"\x7fELF"
        assert name.partition("<")[0].encode() in mangled


@pytest.mark.parametrize("has_clusters", [False, True])
def test_launches_cover_their_outputs(kernels, launches, monkeypatch, has_clusters):
    """Blocks and threads are those of the compilation, no empty grid, shared memory for the NF4 table alone."""
    launch_everything(kernels, monkeypatch, has_clusters)
    assert launches
    for name, defines, grid, num_threads, shared_bytes in launches:
        settings = dict(define.split("=") for define in defines)
        assert min(grid) >= 1, name
        if name.startswith("matvec"):
            assert num_threads == 32 * int(settings["WARPS"])
            is_nf4 = name.startswith(f"matvec<{kernels.FORMATS['nf4']},")
            assert shared_bytes == (kernels.NF4_TABLE_BYTES if is_nf4 else 0)
        if name.startswith("decode_attention"):
            assert grid[0] % int(settings["CLUSTER"]) == 0
            assert (settings["CLUSTER"] != "1") == has_clusters


def test_blocks_that_share_the_keys_of_a_sequence(kernels, monkeypatch):
    """A full GPU shares nothing; one that is not takes clusters, then more of them as the context grows."""
    monkeypatch.setattr(kernels, "_num_sms", lambda device: 132)
    for has_clusters in (False, True):
        monkeypatch.setattr(kernels, "_has_clusters", lambda device, found=has_clusters: found)
        for batch, num_kv_heads, slots in ((1, 2, 256), (1, 2, 32768), (1, 32, 2048), (16, 2, 512), (16, 32, 2048)):
            cluster, splits = kernels._attention_blocks(batch, num_kv_heads, slots, None)
            num_blocks = cluster * splits * batch * num_kv_heads
            assert cluster in ((1, 2, 4, 8) if has_clusters else (1,))
            assert num_blocks <= max(2 * 132, batch * num_kv_heads)
            assert num_blocks >= min(132, batch * num_kv_heads * -(-slots // kernels.MIN_KEYS_PER_BLOCK))


def test_a_kernel_that_does_not_compile_says_why(kernels):
    """The error names the instance and carries the compiler's log."""
    nvrtc = open_nvrtc()
    if nvrtc is None:
        pytest.skip("no NVRTC library")
    with pytest.raises(RuntimeError, match=r"norm<7> does not compile for sm_90:\n(.|\n)*error"):
        kernels.compile_cubin(nvrtc, "norm<7>", "sm_90")


def test_fits_is_whole_words(kernels):
    """Rows of every format are whole 16-byte words; NF4 rows also whole blocks."""
    for kind, bits in {"float": 16, "int8": 8, "int4": 4, "nf4": 4}.items():
        step = 64 if kind == "nf4" else 128 // bits
        assert kernels.fits(kind, (3, 5 * step))
        assert not kernels.fits(kind, (3, 5 * step + step // 2))
