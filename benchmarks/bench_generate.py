"""Measure answering a file of prompts at 6B size in int4, against one full batch and against one chat after the other.

    python -m benchmarks.bench_generate
    python -m benchmarks.bench_generate --families chatglm2-6b --data_path dev.jsonl --num_prompts 1000

Random weights never end an answer, so each answer ends at the length of the one in the data; the host learns of that
as it learns of an end token. Writes benchmarks/results/generate_<device>.json after each family; prints a table and,
last, the JSON object.
"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizer

from benchmarks.harness.cases import model_name
from benchmarks.harness.published import FIXTURES_DIR, find_family, published_model, small_ids
from benchmarks.harness.random_models import compacted, random_model
from benchmarks.harness.results import RESULTS_DIR, device_name, provenance, write_result
from glm_utils.checkpoint import load_classes, open_checkpoint
from glm_utils.cli import check_minimums, run_cli
from glm_utils.data import Example, read_examples
from glm_utils.device import dtype_name
from glm_utils.early_checks import project_path
from glm_utils.family import PROJECT_DIR, Family
from glm_utils.files import read_json_object
from glm_utils.inference.batch import Answer, GenerationSettings, PendingAnswer, generate_pending
from glm_utils.inference.measure import Workload, stream_generate, time_runs
from glm_utils.inference.memory import peak_memory, reset_peak_memory
from glm_utils.inference.report import summarize
from glm_utils.report_file import check_report_path

SAMPLINGS = {"greedy": 0.0, "sampled": None}  # temperature; None: the family's
MIN_VALUES = {"num_prompts": 1, "num_chats": 1, "batch_size": 1, "new_tokens": 2, "loop_number": 1}
COLUMNS = (  # of the table: title, key of a measurement
    ("tokens/s", "tokens_per_second"),
    ("full batch", "full_batch_tokens_per_second"),
    ("share", "share_of_full_batch"),
    ("one chat after the other", "chat_tokens_per_second"),
    ("times", "times_chat"),
)


def bench_generate(
    *,
    families: str = "chatglm2-6b,chatglm-6b",
    data_path: str = "data/train.jsonl",
    num_prompts: int = 1000,
    num_chats: int = 20,
    batch_size: int = 16,
    new_tokens: int = 128,
    loop_number: int = 3,
    scale: Literal["6b", "tiny"] = "6b",
    output_json: str | None = None,
) -> None:
    """Make and measure the models one after the other, on the first GPU or, without one, on the CPU in fp32.

    Args:
        families: Names joined by commas.
        data_path: Examples whose questions are asked, and whose answers give the lengths.
        num_prompts: The first of them.
        num_chats: Questions that are asked one after the other.
        batch_size: Sequences at once.
        new_tokens: Of the full batch, which is what inference_test.py measures.
        loop_number: Measured repeats of the full batch.
        scale: 6b, or tiny: the sizes of the small models of models/.
        output_json: Result file. Default: benchmarks/results/generate_<device>.json.
    """
    given = dict(locals())
    check_minimums(given, MIN_VALUES)
    records = [find_family(name) for name in families.split(",")]
    examples = read_examples(project_path(data_path))[:num_prompts]
    path = Path(output_json or RESULTS_DIR / f"generate_{device_name()}.json")
    check_report_path(path)
    result = {
        "benchmark": "generate",
        "scale": scale,
        "data": Path(data_path).name,
        "measurements": [],
        **provenance(),
    }
    for family in records:
        model, tokenizer = make_model(family, scale)
        label = model_name(family, scale)
        result["measurements"] += measure(model, tokenizer, label, examples, given)
        del model
        write_result(path, result | provenance())
    print(table(result["measurements"]))
    print(json.dumps(result | provenance(), ensure_ascii=False))


def make_model(family: Family, scale: str) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """Return an int4 model with random weights, and a small tokenizer whose special ids are the model's."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if scale == "6b":
        directory, config = FIXTURES_DIR / family.name / "model", published_model(family.name)["config"]
        config |= small_ids(family.name)
    else:
        directory = PROJECT_DIR / "models" / model_name(family, scale)
        config = read_json_object(directory / "config.json")
    classes = load_classes(family)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = random_model(classes.model, classes.config.from_dict(config), dtype, device)
    model.generation_config.eos_token_id = None
    return compacted(model.quantize(4), device), open_checkpoint(directory).tokenizer


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizer, label: str, examples: list[Example], given: dict
) -> Iterator[dict]:
    """Yield the figures of one model, for greedy and for sampled answers.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        label: Its name.
        examples: Questions, and answers whose lengths are generated.
        given: The benchmark's arguments.
    """
    pending = [
        PendingAnswer(index, 0, tokenizer.encode_prompt(example.query), len(tokenizer.encode_answer(example.answer)))
        for index, example in enumerate(examples)
    ]
    num_prompt = round(statistics.mean(len(one.prompt_ids) for one in pending))
    logger.info(f"{label}: {len(pending)} prompts of {num_prompt} tokens on average")
    longest = max(pending, key=lambda one: len(one.prompt_ids)).prompt_ids
    prompt = (longest * num_prompt)[-num_prompt:]  # ends as a prompt does
    workload = Workload(
        torch.tensor([prompt] * given["batch_size"], device=model.device), given["new_tokens"], given["loop_number"]
    )
    full = summarize(time_runs(stream_generate(model, workload), workload)[1], num_prompt, given["batch_size"])
    for name, temperature in SAMPLINGS.items():
        settings = GenerationSettings(temperature=temperature)
        chat_rate = time_chats(model, tokenizer, examples[: given["num_chats"]], pending, temperature)
        answer_all(model, tokenizer, pending[: 2 * given["batch_size"]], settings, given["batch_size"])  # warm-up
        reset_peak_memory(model.device)
        seconds, answers = answer_all(model, tokenizer, pending, settings, given["batch_size"])
        rate = sum(one.num_tokens for one in answers) / seconds
        yield {
            "label": f"{label} {name}",
            "weight_format": "int4",
            "dtype": dtype_name(model.dtype),
            "batch_size": given["batch_size"],
            "num_prompts": len(answers),
            "num_prompt_tokens": sum(len(one.prompt_ids) for one in pending),
            "num_new_tokens": sum(one.num_tokens for one in answers),
            "seconds": seconds,
            "tokens_per_second": rate,
            "full_batch": full,
            "full_batch_tokens_per_second": full["tokens_per_second"],
            "share_of_full_batch": rate / full["tokens_per_second"],
            "share_of_full_batch_decode": rate / full["decode_tokens_per_second_total"],
            "chat_tokens_per_second": chat_rate,
            "times_chat": rate / chat_rate,
            **peak_memory(model.device),
        }


def answer_all(model, tokenizer, pending, settings, batch_size: int) -> tuple[float, list[Answer]]:
    """Answer prompts as generate.py does; return the seconds and the answers."""
    fresh = [PendingAnswer(one.index, one.sample, one.prompt_ids, one.max_new_tokens) for one in pending]
    start = time.perf_counter()
    answers = list(generate_pending(model, tokenizer, fresh, settings, batch_size))
    return time.perf_counter() - start, answers


def time_chats(model, tokenizer, examples: list[Example], pending, temperature: float | None) -> float:
    """Ask one question after the other with `chat`; return the tokens per second. The first is asked once before."""
    sampling = {"do_sample": False} if temperature == 0 else {"temperature": temperature}

    def ask(index: int) -> None:
        limit = pending[index].max_new_tokens
        model.chat(tokenizer, examples[index].query, max_new_tokens=limit, eos_token_id=[], **sampling)

    ask(0)
    start = time.perf_counter()
    for index in range(len(examples)):
        ask(index)
    return sum(one.max_new_tokens for one in pending[: len(examples)]) / (time.perf_counter() - start)


def table(measurements: list[dict]) -> str:
    """Return a Markdown table with one line for each measurement."""
    lines = [["", *(title for title, _ in COLUMNS)], ["---", *("---:" for _ in COLUMNS)]]
    lines += [[found["label"], *(f"{found[key]:,.2f}" for _, key in COLUMNS)] for found in measurements]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_cli(bench_generate)
