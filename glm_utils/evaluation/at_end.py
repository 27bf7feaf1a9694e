"""The evaluation that training and merging run at their end, with the defaults of evaluate_adapter.py."""

from collections.abc import Sequence
from pathlib import Path

import torch
from loguru import logger

from glm_utils.data import Example
from glm_utils.evaluation import MAX_NEW_TOKENS, NUM_SAMPLES
from glm_utils.evaluation.job import check_output_dir, make_job
from glm_utils.evaluation.metrics import check_packages
from glm_utils.evaluation.sides import release_memory
from glm_utils.evaluation.two_models import find_sides
from glm_utils.evaluation.write import evaluate
from glm_utils.hub import Hub
from glm_utils.inference.batch import GenerationSettings


def evaluation_dir(output_dir: Path) -> Path:
    """Return the directory of the report about what lies in output_dir: a sibling."""
    return output_dir.with_name(f"{output_dir.name}_evaluation")


def check_evaluation(output_dir: Path) -> None:
    """Check before the work what its evaluation needs: packages and a directory.

    Raises:
        UserError: A package is not installed, or the directory holds something else.
    """
    check_packages()
    check_output_dir(evaluation_dir(output_dir), sides=())


def evaluate_output(
    output_dir: Path,
    lora_dir: Path,
    data_path: str | list[str],
    examples: Sequence[Example],
    device: torch.device,
    merged_dir: Path | None = None,
    load_in_4bit: bool = False,
    seed: int = 42,
    hub: Hub = "huggingface",
) -> None:
    """Write the report and log its verdict.

    Args:
        output_dir: What the work wrote; the report goes to `evaluation_dir`.
        lora_dir: The adapter.
        data_path: Where they are from, for the record: a file, several, or a text.
        examples: The examples that are judged.
        device: Where the models run.
        merged_dir: The model that the adapter was merged to, which is compared with the adapter on its base; None:
            the base without and with the adapter.
        load_in_4bit: Quantize the base to NF4 while loading.
        seed: Seed of the draw of examples and of the intervals.
        hub: Where to download the base from, if that is no directory.
    """
    release_memory()
    sides = find_sides(str(merged_dir) if merged_dir else None, str(lora_dir), load_in_4bit, device, hub)
    arguments = {"lora_path": str(lora_dir), "model_path": merged_dir and str(merged_dir), "data_path": data_path}
    job = make_job(
        sides,
        examples,
        evaluation_dir(output_dir),
        GenerationSettings(MAX_NEW_TOKENS, temperature=0, seed=seed),
        NUM_SAMPLES,
        arguments=arguments,
    )
    logger.success(f"{evaluate(job).verdict}; report in {job.output_dir}")
