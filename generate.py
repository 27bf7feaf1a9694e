"""Answer a file of prompts with a model: a base or merged directory, or an adapter on its base.

    python generate.py --model_path saved_files/merged_int4 --data_path products.csv --output_path answers.csv
    python generate.py --lora_path saved_files/demo_chatglm2-tiny --data_path data/dev.jsonl --output_path dev.jsonl

Finished answers go to OUTPUT.partial.jsonl at once; a run that was stopped goes on where it was when the same command
is given again. The output has the rows of the input in their order.
"""

import dataclasses
import time
from pathlib import Path

import torch
from loguru import logger
from tqdm import tqdm

from glm_utils.cli import UserError, check_minimums, run_cli
from glm_utils.device import out_of_memory_explained, resolve_device
from glm_utils.inference.answer_file import (
    check_output_path,
    count_rows,
    describe,
    log_errors,
    output_rows,
    write_output,
)
from glm_utils.inference.batch import GenerationSettings, PendingAnswer, generate_pending
from glm_utils.inference.chat import check_sampling
from glm_utils.inference.partial_answers import PartialAnswers
from glm_utils.inference.prompt_file import encode_prompts, read_prompts
from glm_utils.load_model import ModelSource, find_model
from glm_utils.run_record import git_commit, sha256, versions
from glm_utils.signals import Terminated, note_if_interrupted

MIN_VALUES = {"batch_size": 1, "max_new_tokens": 1, "num_samples": 1}
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")


def generate(
    *,
    model_path: str | None = None,
    lora_path: str | None = None,
    data_path: str,
    output_path: str,
    prompt_column: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_samples: int = 1,
    load_in_4bit: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    device: str = "auto",
) -> None:
    """Answer a file of prompts.

    Args:
        model_path: Directory or hub id of a base or merged model.
        lora_path: Directory of an adapter, instead of model_path; its base is found from it.
        data_path: Prompts: JSONL or JSON as for training, with or without answers, CSV with a header, or .txt with one
            prompt per line.
        output_path: File to write, .jsonl or .csv.
        prompt_column: Column or key that holds the prompt. Default: content, instruction (with input), prompt, query
            or question.
        batch_size: Sequences at once. Default: what fits, at most 16 on the fast path.
        max_new_tokens: Most tokens of an answer.
        temperature: Divides the logits; 0: always the most probable token. Default: the model's own.
        top_p: Nucleus probability. Default: the model's own.
        seed: Seed of the sampling.
        num_samples: Answers to each prompt.
        load_in_4bit: Quantize the layers to NF4 while loading.
        resume: Go on with what a stopped run of the same job left; False: begin anew.
        overwrite: Replace an output that exists.
        device: Where to work: auto (a GPU when there is one), cpu or cuda:N.
    """
    arguments = dict(locals())
    check_arguments(arguments)
    output = check_output_path(output_path, data_path, overwrite)
    settings = GenerationSettings(max_new_tokens, temperature, top_p, seed, num_samples)
    read_rows = read_prompts(Path(data_path).expanduser(), prompt_column)
    source = find_source(model_path, lora_path, load_in_4bit, device)
    rows, prompts = encode_prompts(read_rows, source.checkpoint)
    log_errors(rows)
    identity = identify(source, Path(data_path).expanduser(), prompt_column, settings)
    with PartialAnswers(output, identity, resume) as partial:
        answer(source, prompts, settings, batch_size, partial)
    found = output_rows(rows, partial.answers, num_samples)
    record = {"stage": "generate", "arguments": arguments, "job": identity, "counts": count_rows(found)}
    write_output(output, found, record | {"versions": versions(), "commit": git_commit()})
    partial.remove()
    logger.success(f"{describe(count_rows(found))}: {output}")


def check_arguments(arguments: dict) -> None:
    """Refuse values out of range, before anything is read."""
    check_minimums(arguments, MIN_VALUES)
    check_sampling(arguments["temperature"], arguments["top_p"])
    if not 0 <= arguments["seed"] < 2**64:
        raise UserError(f"--seed {arguments['seed']}: expected 0 to {2**64 - 1}")
    if arguments["temperature"] == 0 and arguments["num_samples"] > 1:
        raise UserError(f"--num_samples {arguments['num_samples']}: at --temperature 0 all would be the same. Give 1")


def find_source(model_path: str | None, lora_path: str | None, load_in_4bit: bool, device: str) -> ModelSource:
    """Find the model, in fp16 on a GPU and in fp32 on the CPU; nothing is loaded."""
    place = resolve_device(device)
    checkpoint, adapter = find_model(model_path, lora_path)
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    return ModelSource(str(checkpoint.directory), checkpoint, adapter, load_in_4bit, dtype, place)


def identify(source: ModelSource, data_path: Path, prompt_column: str | None, settings: GenerationSettings) -> dict:
    """Return what the answers depend on."""
    paths = [source.adapter.directory / name for name in WEIGHT_NAMES] if source.adapter else []
    return {
        "data_sha256": sha256(data_path),
        "prompt_column": prompt_column,
        "model": source.checkpoint.fingerprint,
        "adapter_sha256": next((sha256(path) for path in paths if path.is_file()), None),
        "weights": source.weight_format,
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


if __name__ == "__main__":
    run_cli(generate)
