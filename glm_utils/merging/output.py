"""What a merge says of itself: run_config.json, the model card, the closing line."""

from pathlib import Path

from loguru import logger

from glm_utils.files import write_json
from glm_utils.merging.merge import MergeJob
from glm_utils.model_card import merged_card
from glm_utils.run_record import RUN_CONFIG_NAME, git_commit, versions


def write_records(job: MergeJob, directory: Path, stage: str, arguments: dict, usage: str, library_name: str) -> None:
    """Log the report of the merge, and write run_config.json and the model card.

    Args:
        job: The merge.
        directory: Where they go.
        stage: Name of the command.
        arguments: Its flags.
        usage: How the model is loaded, see `ExportFormat`.
        library_name: Likewise.
    """
    for line in job.report.lines(job.merge_base):
        logger.info(line)
    record = {
        "stage": stage,
        "arguments": arguments,
        "base": {"name": job.adapter.base_name, "family": job.base.family.name},
        "adapter": {"num_updates": len(job.adapter.pairs), "run_config": job.adapter.run_config},
        "report": job.report.record(),
        "versions": versions(),
        "commit": git_commit(),
    }
    write_json(directory / RUN_CONFIG_NAME, record)
    card = merged_card(job.adapter.base_name, job.weight_format, card_properties(job), usage, library_name)
    (directory / "README.md").write_text(card, encoding="utf-8")


def card_properties(job: MergeJob) -> dict[str, str]:
    """Return the table of the model card, values by label."""
    error = job.report.relative_weight_error()
    found = versions()
    return {
        "family": job.base.family.title,
        "weights of the layers": job.weight_format,
        "merged into": f"{job.merge_base} base weights",
        "LoRA updates": str(len(job.adapter.pairs)),
        **({} if error is None else {"squared relative weight error": f"{error:.3g}"}),
        "written with": ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "peft")),
    }


def log_result(job: MergeJob, output_dir: Path, seconds: float) -> None:
    """Log the closing line: format, size, time and place."""
    num_bytes = sum(path.stat().st_size for path in output_dir.iterdir())
    logger.success(f"{job.weight_format} model of {num_bytes:,} bytes in {seconds:.1f} s: {output_dir}")
