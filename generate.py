"""Answer files of prompts with a model: a base or merged directory, or an adapter on its base.

    python generate.py --model_path saved_files/merged_int4 --data_path products.csv --output_path answers.csv
    python generate.py --lora_path saved_files/demo_chatglm2-tiny --data_path data/dev.jsonl --output_path dev.jsonl

Finished answers go to OUTPUT.partial.jsonl at once; a run that was stopped goes on where it was when the same command
is given again. The output has the rows of the input in their order.
"""

from loguru import logger

from glm_utils.cli import UserError, check_minimums, run_cli
from glm_utils.data.find_files import show_paths
from glm_utils.data.forms import Columns
from glm_utils.early_checks import check_device_name, check_model_choice, check_sampling, check_seed
from glm_utils.hub import Hub, check_hub
from glm_utils.inference.answer_file import (
    check_output_path,
    count_rows,
    describe,
    find_inputs,
    lock_answers,
    log_columns,
    log_errors,
    output_rows,
    write_output,
)
from glm_utils.inference.partial_answers import PartialAnswers
from glm_utils.inference.prompt_file import encode_prompts, read_prompts
from glm_utils.run_record import git_commit, versions

MIN_VALUES = {"batch_size": 1, "max_new_tokens": 1, "num_samples": 1}


def generate(
    *,
    model_path: str | None = None,
    lora_path: str | None = None,
    data_path: str,
    output_path: str,
    prompt_column: str | None = None,
    history_column: str | None = None,
    sheet: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_samples: int = 1,
    hub: Hub = "huggingface",
    load_in_4bit: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    device: str = "auto",
) -> None:
    """Answer files of prompts.

    Args:
        model_path: Directory or hub id of a base or merged model.
        lora_path: Directory of an adapter, instead of model_path; its base is found from it.
        data_path: Prompts: JSON, CSV or XLSX as for training, with or without answers, or .txt with one prompt per
            line. Several files or globs are joined by commas; the output's first column then names each row's file.
        output_path: File to write, .jsonl, .csv or .xlsx.
        prompt_column: Column or key that holds the prompt. Default: by the form of the file.
        history_column: Column or key of the earlier turns, likewise.
        sheet: Sheet of an XLSX file that holds several.
        batch_size: Sequences at once. Default: what fits, at most 16 on the fast path.
        max_new_tokens: Most tokens of an answer.
        temperature: Divides the logits; 0: always the most probable token. Default: the model's own.
        top_p: Nucleus probability. Default: the model's own.
        seed: Seed of the sampling.
        num_samples: Answers to each prompt.
        hub: Hub that a model is downloaded from: huggingface, or modelscope (pip install '.[modelscope]').
        load_in_4bit: Quantize the layers to NF4 while loading.
        resume: Go on with what a stopped run of the same job left; False: begin anew.
        overwrite: Replace an output that exists.
        device: Where to work: auto (a GPU when there is one), cpu or cuda:N.
    """
    arguments = dict(locals())
    check_arguments(arguments)
    output = check_output_path(output_path)
    paths = find_inputs(data_path, output, overwrite)
    columns = Columns(prompt=prompt_column, history=history_column, sheet=sheet)
    read_rows = read_prompts(paths, columns)

    from glm_utils.inference.batch import GenerationSettings
    from glm_utils.inference.file_job import answer, find_source, identify

    settings = GenerationSettings(max_new_tokens, temperature, top_p, seed, num_samples)
    source = find_source(model_path, lora_path, load_in_4bit, device, hub)
    rows, prompts = encode_prompts(read_rows, source.checkpoint)
    log_errors(rows)
    log_columns(rows, output)
    identity = identify(source, paths, columns, settings)
    with lock_answers(output, overwrite):
        with PartialAnswers(output, identity, resume) as partial:
            answer(source, prompts, settings, batch_size, partial)
        found = output_rows(rows, partial.answers, num_samples)
        arguments["data_path"] = show_paths(paths)
        record = {"stage": "generate", "arguments": arguments, "job": identity, "counts": count_rows(found)}
        write_output(output, found, record | {"versions": versions(), "commit": git_commit()})
        partial.remove()
    logger.success(f"{describe(count_rows(found))}: {output}")


def check_arguments(arguments: dict) -> None:
    """Refuse values out of range, before anything is read."""
    check_minimums(arguments, MIN_VALUES)
    check_sampling(arguments["temperature"], arguments["top_p"])
    check_seed(arguments["seed"])
    check_device_name(arguments["device"])
    check_hub(arguments["hub"])
    check_model_choice(arguments["model_path"], arguments["lora_path"])
    if arguments["temperature"] == 0 and arguments["num_samples"] > 1:
        raise UserError(f"--num_samples {arguments['num_samples']}: at --temperature 0 all would be the same. Give 1")


if __name__ == "__main__":
    run_cli(generate)
