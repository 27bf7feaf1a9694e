"""Resolve the arguments of a merge (adapter, base, remote scripts) into a MergeJob; refuse what cannot be merged."""

from pathlib import Path

import torch

from glm_utils.adapter import Adapter
from glm_utils.checkpoint import Checkpoint
from glm_utils.cli import UserError
from glm_utils.family import FAMILIES, Family
from glm_utils.merging.merge import MergeJob
from glm_utils.merging.shards import CheckpointReader

CONFIG_SCRIPT = "configuration_chatglm.py"

MAX_COPY_THREADS = 4  # a 6B merge on 16 cores: 6.0 s with 16 threads, 4.4 s with 4; copying the files takes 4.1 s


def find_scripts(remote_scripts_dir: str | None, family: Family) -> Path:
    """Return the directory of the remote scripts that go with the model.

    Args:
        remote_scripts_dir: Path of a directory. None: this project's own for the family.
        family: The base model's family.

    Raises:
        UserError: The directory lacks one of the scripts, or holds those of another family.
    """
    if remote_scripts_dir is None:
        return family.remote_dir
    path = Path(remote_scripts_dir).expanduser().resolve()
    missing = [script.name for script in sorted(family.remote_dir.glob("*.py")) if not (path / script.name).is_file()]
    if missing:
        raise UserError(
            f"--remote_scripts_dir {path}: {missing[0]} is missing. Expected a copy of {family.remote_dir}"
        )
    text = (path / CONFIG_SCRIPT).read_text(encoding="utf-8")
    found = [known.title for known in FAMILIES if all(marker in text for marker in known.config_markers)]
    if found != [family.title]:
        names = " and ".join(found) or "no known family"
        raise UserError(
            f"--remote_scripts_dir {path}: scripts of {names}, the base model is {family.title}. Omit the flag, or "
            f"give a copy of {family.remote_dir}"
        )
    return path


def nf4_dtype(run_config: dict) -> torch.dtype:
    """Return the dtype that the base weights had when training quantized them to NF4.

    Only bf16 changes the result: fp32 and fp16 both represent the values of an fp16 checkpoint exactly.

    Args:
        run_config: The run_config.json that train_qlora.py wrote; empty if there is none.
    """
    on_cpu = run_config.get("training_args", {}).get("use_cpu")
    is_bf16 = run_config.get("arguments", {}).get("compute_dtype") == "bf16"
    return torch.bfloat16 if is_bf16 and not on_cpu else torch.float32


def make_job(
    adapter: Adapter, base: Checkpoint, qbits: int, device: torch.device, scripts_dir: str | None, merge_base: str
) -> MergeJob:
    """Put together a merge of an adapter into its base.

    Args:
        adapter: The adapter.
        base: The base model that the adapter was trained on.
        qbits: 0 (fp16), 4 or 8.
        device: Device of the arithmetic.
        scripts_dir: Directory of remote scripts. None: the family's own.
        merge_base: "original" or "nf4".

    Raises:
        UserError: The remote scripts or the adapter do not fit the base, or the base has a setting that this project's
            model does not compute.
    """
    base.model_config  # noqa: B018  # parsing it refuses settings that the model does not compute, before any work
    return MergeJob(
        base=base,
        adapter=adapter,
        scripts_dir=find_scripts(scripts_dir, base.family),
        bits=qbits,
        device=device,
        merge_base=merge_base,
        nf4_dtype=nf4_dtype(adapter.run_config),
        reader=CheckpointReader(base.directory),
    )


def limit_threads(job: MergeJob) -> None:
    """Merge to fp16 on a few CPU threads: the disk is the limit, and more threads wait for pages."""
    if job.device.type == "cpu" and not job.bits:
        torch.set_num_threads(min(torch.get_num_threads(), MAX_COPY_THREADS))
