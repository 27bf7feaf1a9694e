"""Measure a merge at 6B size with random weights: peak host memory, and wall time against copying the same files.

    python -m benchmarks.bench_merge --work_dir /data/bench --qbits 0,0,0,4 --device cpu

Each merge is the shipped command in its own process. Copying is a plain read and write of the base's weight files on
the same disk, just before each merge. Peak memory is the resident set, mapped pages of the read file included, of the
merging process and of the process that checks the result. Writes benchmarks/results/merge_<device>.json and prints it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness.cases import run_python
from benchmarks.harness.checkpoints import LORA_TARGETS, write_random_adapter
from benchmarks.harness.results import RESULTS_DIR, provenance, write_result
from glm_utils.cli import UserError, run_cli
from glm_utils.family import LINEAR_NAMES, PROJECT_DIR
from glm_utils.model_files.checkpoint_files import weight_files

COPY_BYTES = 1 << 24


def bench_merge(
    *,
    work_dir: str,
    family: str = "chatglm2-6b",
    qbits: str = "0,8,4",
    device: str = "cpu",
    all_linear: bool = False,
    remote_scripts_dir: str | None = None,
) -> None:
    """Create a random base and adapter, then copy and merge in turn.

    Args:
        work_dir: Directory to create for the benchmark's files, 40 GB; deleted afterwards.
        family: chatglm-6b or chatglm2-6b.
        qbits: Bits to merge to, joined by commas; a value may be repeated.
        device: cpu or cuda:N.
        all_linear: Adapt all four Linear modules instead of query_key_value.
        remote_scripts_dir: As for the merge.
    """
    root = Path(work_dir).resolve()
    if root.exists():
        raise UserError(f"--work_dir {root}: exists. Give a new directory")
    try:
        base_dir, adapter_dir = root / "base", root / "adapter"
        # in its own process: its memory would count as that of a merge, which starts as a copy of this process
        run_python("-m", "benchmarks.random_checkpoint", "--output_path", base_dir, "--family", family)
        targets = list(LINEAR_NAMES) if all_linear else LORA_TARGETS
        write_random_adapter(base_dir, adapter_dir, targets)
        extra = ["--remote_scripts_dir", remote_scripts_dir] if remote_scripts_dir else []
        num_bytes = sum(path.stat().st_size for path in weight_files(base_dir))
        result = {"benchmark": "merge", "family": family, "targets": targets, "base_bytes": num_bytes, "merges": []}
        copy_files(base_dir, root / "copy")  # the first read may come from the disk, all later ones from memory
        for bits in qbits.split(","):
            os.sync()  # no write of an earlier step is pending
            copy_seconds = copy_files(base_dir, root / "copy")
            os.sync()
            merge = run_merge(adapter_dir, root / "merged", bits, device, extra)
            merge["copy_seconds"] = copy_seconds
            merge["merge_to_copy"] = merge["merge_seconds"] / copy_seconds
            result["merges"].append({"qbits": int(bits), **merge})
            print(json.dumps(result["merges"][-1]), file=sys.stderr)
        result |= {"run_on": device, "num_threads": torch.get_num_threads()}
        result |= provenance()
        name = f"merge_{family}_{device.split(':')[0]}{'_all_linear' if all_linear else ''}.json"
        write_result(RESULTS_DIR / name, result)
        print(json.dumps(result))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def copy_files(source_dir: Path, target_dir: Path) -> float:
    """Copy the weight files through user space, as any program that reads and writes must; return the seconds."""
    shutil.rmtree(target_dir, ignore_errors=True)
    target_dir.mkdir()
    buffer = bytearray(COPY_BYTES)
    start = time.perf_counter()
    for path in weight_files(source_dir):
        with path.open("rb", buffering=0) as source, (target_dir / path.name).open("wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(memoryview(buffer)[:count])
    seconds = time.perf_counter() - start
    shutil.rmtree(target_dir)
    return seconds


def run_merge(adapter_dir: Path, output_dir: Path, bits: str, device: str, extra: list[str]) -> dict:
    """Run the merge command; return its times, as it logs them, and the peak memory of its processes."""
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [sys.executable, str(PROJECT_DIR / "merge_lora_and_quantize.py"), "--lora_path", str(adapter_dir)]
    command += ["--output_path", str(output_dir), "--qbits", bits, "--device", device, *extra]
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise UserError(f"the merge failed:\n{log[-3000:]}")
    merge_seconds = float(re.search(r"merged and written in ([\d.]+) s", log)[1])
    verify_seconds = float(re.search(r"verified in ([\d.]+) s", log)[1])
    output_bytes = sum(path.stat().st_size for path in output_dir.iterdir())
    shutil.rmtree(output_dir)
    return {
        "merge_seconds": merge_seconds,
        "verify_seconds": verify_seconds,
        "total_seconds": seconds,
        "peak_host_bytes": usage.ru_maxrss * 1024,
        "output_bytes": output_bytes,
    }


if __name__ == "__main__":
    run_cli(bench_merge)
