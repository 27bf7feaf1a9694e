"""Answer the prompts of files: find the model, say what the answers depend on, generate what is not there yet."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from loguru import logger
from tqdm import tqdm

from glm_utils.cli import UserError
from glm_utils.data.forms import Columns
from glm_utils.device import out_of_memory_explained, resolve_device
from glm_utils.hub import Hub
from glm_utils.inference.batch import GenerationSettings, PendingAnswer, generate_pending
from glm_utils.inference.partial_answers import PartialAnswers
from glm_utils.load_model import ModelSource, find_model
from glm_utils.model_files.checkpoint_files import ADAPTER_WEIGHT_NAMES
from glm_utils.run_record import sha256, sha256_of_files
from glm_utils.signals import Terminated, note_if_interrupted


def find_source(
    model_path: str | None, lora_path: str | None, load_in_4bit: bool, device: str, hub: Hub
) -> ModelSource:
    """Find the model, in fp16 on a GPU and in fp32 on the CPU; nothing is loaded."""
    place = resolve_device(device)
    checkpoint, adapter = find_model(model_path, lora_path, hub)
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    return ModelSource(str(checkpoint.directory), checkpoint, adapter, load_in_4bit, dtype, place)


def identify(source: ModelSource, data_paths: Sequence[Path], columns: Columns, settings: GenerationSettings) -> dict:
    """Return what the answers depend on."""
    paths = [source.adapter.directory / name for name in ADAPTER_WEIGHT_NAMES] if source.adapter else []
    return {
        "data_sha256": sha256_of_files(data_paths),
        "columns": dataclasses.asdict(columns),
        "model": source.checkpoint.fingerprint,
        "adapter_sha256": next((sha256(path) for path in paths if path.is_file()), None),
        "weights": source.weight_format,
        "prompt_text": source.checkpoint.tokenizer.prompt_text or None,
        **dataclasses.asdict(settings),
    }


def answer(
    source: ModelSource,
    prompts: list[list[int] | None],
    settings: GenerationSettings,
    batch_size: int | None,
    partial: PartialAnswers,
) -> None:
    """Load the model and generate what is not there yet.

    Args:
        source: The model.
        prompts: Their token ids; None: a row that is not answered.
        settings: How answers are generated.
        batch_size: Sequences at once; None: what fits.
        partial: Gets the answers.

    Raises:
        UserError: The model does not fit, memory runs out, or the model computes NaN.
    """
    pending = [
        PendingAnswer(index, sample, ids, settings.max_new_tokens)
        for index, ids in enumerate(prompts)
        for sample in range(settings.num_samples)
        if ids and (index, sample) not in partial.answers
    ]
    if not pending:
        return
    longest = max(len(one.prompt_ids) for one in pending) + settings.max_new_tokens
    context = source.checkpoint.model_config.max_position_embeddings
    source.check_fits(1, min(longest, context), "an int4 model, --load_in_4bit or fewer --max_new_tokens")
    logger.info(f"loading {source.label}{f' with {source.adapter.directory}' if source.adapter else ''}")
    model = source.load(merge_adapter=True)
    num_done, num_generated, start = len(partial.answers), 0, time.monotonic()

    def message() -> str:
        return (
            f"out of memory after {len(partial.answers)} answers, which are kept. Repeat the command with a smaller "
            "--batch_size"
        )

    try:
        with (
            out_of_memory_explained(message),
            tqdm(total=num_done + len(pending), initial=num_done, desc="answers", unit="answer") as bar,
        ):
            for one in generate_pending(model, source.checkpoint.tokenizer, pending, settings, batch_size):
                partial.add(one)
                num_generated += one.num_tokens
                bar.set_postfix_str(f"{num_generated / (time.monotonic() - start):,.0f} tokens/s", refresh=False)
                bar.update()
    except (KeyboardInterrupt, Terminated):
        note_if_interrupted(f"{len(partial.answers)} answers are in {partial.path}; the same command goes on")
        raise
    except FloatingPointError as error:
        raise UserError(str(error)) from error
