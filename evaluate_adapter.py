"""Judge what a training did: an adapter + data -> answers and losses without and with it, one report with a verdict.

    python evaluate_adapter.py --lora_path saved_files/chatGLM2_6B_QLoRA_t32 --data_path data/dev.jsonl \
        --output_dir saved_files/evaluation

Two models instead, as fp16 and int4 of one merge: --model_path saved_files/merged_fp16,saved_files/merged_int4. With
--lora_path and one model the adapter on its base is compared with what it was merged to. The output directory gets
report.html, report.md, report.json, plots, generated_predictions.jsonl and run_config.json.
"""

from pathlib import Path

from loguru import logger

from glm_utils.cli import as_list, check_minimums, run_cli
from glm_utils.data import read_examples
from glm_utils.data.find_files import find_files, show_paths
from glm_utils.data.forms import Columns
from glm_utils.data.recorded import warn_of_recorded
from glm_utils.early_checks import check_device_name, check_model_path, check_number_of_models, check_sampling
from glm_utils.evaluation import MAX_NEW_TOKENS, NUM_SAMPLES
from glm_utils.hub import Hub, check_hub
from glm_utils.model_files.adapter_config import read_adapter_config
from glm_utils.run_record import read_run_config

MIN_VALUES = {"num_samples": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0}


def evaluate_adapter(
    *,
    lora_path: str | None = None,
    model_path: str | list[str] | None = None,
    data_path: str = "data/dev.jsonl",
    prompt_column: str | None = None,
    response_column: str | None = None,
    history_column: str | None = None,
    sheet: str | None = None,
    output_dir: str = "saved_files/evaluation",
    num_samples: int = NUM_SAMPLES,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 42,
    batch_size: int | None = None,
    hub: Hub = "huggingface",
    load_in_4bit: bool = False,
    prompt_text: str | None = None,
    probe: bool | int = True,
    device: str = "auto",
) -> None:
    """Compare a base model without and with its adapter, or two models, and write a report.

    Args:
        lora_path: Directory of an adapter; its base is found from it, and is what it is compared with.
        model_path: Two base or merged models joined by a comma, instead; the first one is what is compared with. Or,
            beside lora_path, the model that the adapter was merged to: what did merging and quantizing change?
        data_path: JSON, CSV or XLSX files of examples that were not trained on, several or globs joined by commas.
            Without reference answers, the figures that need them are left out.
        prompt_column: Key or column of the question. Default: by the form of the file.
        response_column: Key or column of the reference answer, likewise.
        history_column: Key or column of the earlier turns, likewise.
        sheet: Sheet of an XLSX file that holds several.
        output_dir: Where the report goes; an earlier one there is replaced.
        num_samples: Examples to judge, drawn from the files.
        max_new_tokens: Most tokens of an answer.
        temperature: Divides the logits; 0: always the most probable token.
        seed: Seed of the draw of examples, of the sampling and of the intervals.
        batch_size: Answers at once. Default: what fits.
        hub: Hub that a model is downloaded from: huggingface, or modelscope (pip install '.[modelscope]').
        load_in_4bit: Quantize the layers to NF4 while loading, as in training.
        prompt_text: Text in front of every question. Default: that of the training.
        probe: Ask the general questions of data/probe.jsonl too: true, false or how many of them.
        device: Where to work: auto (a GPU when there is one), cpu or cuda:N.
    """
    arguments = dict(locals())
    check_arguments(arguments)
    columns = Columns(prompt_column, response_column, history_column, sheet)
    paths = find_files(data_path)
    examples = read_examples(paths, needs_answer=False, columns=columns)
    if lora_path:
        warn_of_recorded(read_run_config(Path(lora_path).expanduser()), examples)

    from glm_utils.device import resolve_device
    from glm_utils.evaluation.job import make_job
    from glm_utils.evaluation.markdown_page import figure_table
    from glm_utils.evaluation.two_models import find_sides
    from glm_utils.evaluation.write import evaluate
    from glm_utils.inference.batch import GenerationSettings

    sides = find_sides(model_path, lora_path, load_in_4bit, resolve_device(device), hub)
    job = make_job(
        sides,
        examples=examples,
        output_dir=Path(output_dir).expanduser(),
        generation=GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed),
        num_samples=num_samples,
        prompt_text=prompt_text,
        probe=probe,
        batch_size=batch_size,
        arguments=arguments | {"data_path": show_paths(paths)},
    )
    report = evaluate(job)
    print("\n".join(figure_table(report)), f"\n\n{report.verdict}")
    logger.success(f"report written to {job.output_dir}")


def check_arguments(arguments: dict) -> None:
    """Refuse numbers out of range, and models that are not there."""
    check_minimums(arguments, MIN_VALUES)
    check_sampling(arguments["temperature"], None)
    check_device_name(arguments["device"])
    check_hub(arguments["hub"])
    model_paths = as_list(arguments["model_path"])
    check_number_of_models(model_paths, arguments["lora_path"])
    if arguments["lora_path"]:
        read_adapter_config(Path(arguments["lora_path"]).expanduser())
    for path in model_paths:
        check_model_path(path)


if __name__ == "__main__":
    run_cli(evaluate_adapter)
