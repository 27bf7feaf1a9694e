"""Check a model with real weights end to end and write a report to send in.

python -m tools.self_test --model_path THUDM/chatglm2-6b

Perplexity of fixed texts, in order and shuffled; fp16 against int4 on the same tokens; the three questions of the 2023
project, answered before and after a training of a few steps. Nobody of this project has measured these figures with
the published weights: reports/issues with report.md are welcome.
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import glm_utils  # noqa: F401  isort: skip  # before what it silences
import numpy as np
import torch
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizer

from glm_utils.checkpoint import Checkpoint, open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.data import Example
from glm_utils.device import dtype_name, resolve_device
from glm_utils.evaluation.losses import example_losses
from glm_utils.evaluation.probe import SUBJECTS_OF_2023, read_probe, thin_out
from glm_utils.evaluation.sides import release_memory
from glm_utils.family import PROJECT_DIR
from glm_utils.files import check_apart, check_writable, write_json
from glm_utils.hub import Hub
from glm_utils.inference.batch import GenerationSettings, generate_answers
from glm_utils.inference.request import auto_dtype
from glm_utils.limits import EncodingLimits
from glm_utils.load_model import ModelSource, find_model
from glm_utils.run_record import git_commit, versions
from glm_utils.visible_text import markdown_text

LIMITS = EncodingLimits(512, 512)
NUM_TEXTS, NUM_COMPARED = 20, 10
LEAST_ORDERED, LEAST_SAME_TOKENS = 0.9, 0.75  # shares below which the report says to look
REMEDY = "a GPU with more memory"


def self_test(
    *,
    model_path: str,
    hub: Hub = "huggingface",
    output_dir: str = "saved_files/self_test",
    num_steps: int = 20,
    max_new_tokens: int = 256,
    device: str = "auto",
) -> None:
    """Check a base model end to end and write report.md and report.json.

    Args:
        model_path: Directory or hub id of a base model with floating-point weights.
        hub: Hub that it is downloaded from: huggingface, or modelscope (pip install '.[modelscope]').
        output_dir: Where the report and the adapter of the training go.
        num_steps: Steps of the training.
        max_new_tokens: Most tokens of an answer.
        device: Where to work: auto (a GPU when there is one), cpu or cuda:N.
    """
    checkpoint = open_checkpoint(model_path, hub)
    checkpoint.require_unquantized("the self test quantizes it itself and trains on it")
    place, directory = resolve_device(device), Path(output_dir).expanduser()
    check_apart(directory, [checkpoint.directory], "--output_dir")
    check_writable(directory, "--output_dir")
    dtype = auto_dtype(checkpoint.config, checkpoint.config_path, place)
    source = ModelSource(checkpoint.name, checkpoint, None, False, dtype, place)
    source.check_fits(1, LIMITS.max_input_length + max_new_tokens, REMEDY)
    settings = GenerationSettings(max_new_tokens, temperature=0)
    directory.mkdir(parents=True, exist_ok=True)
    values = check_model(source, settings) | check_training(checkpoint, directory, num_steps, place, settings)
    run = {"model": checkpoint.name, "fingerprint": checkpoint.fingerprint, "dtype": dtype_name(dtype)}
    report = {**run, **values, "versions": versions(), "commit": git_commit()}
    write_json(directory / "report.json", report)
    (directory / "report.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    logger.success(f"report written to {directory / 'report.md'}")


def check_model(source: ModelSource, settings: GenerationSettings) -> dict:
    """Measure perplexity, answer the questions, quantize to int4 and compare."""
    tokenizer, model = source.checkpoint.tokenizer, source.load()
    examples = [question.example for question in thin_out(read_probe(), NUM_TEXTS)]
    logger.info(f"perplexity of {len(examples)} texts, in order and shuffled")
    values = {"perplexity": measure_perplexity(model, tokenizer, examples)}
    answers = {"as it is": answer_questions(model, tokenizer, settings)}
    logger.info(f"int4 against {source.weight_format} on {NUM_COMPARED} texts")
    expected = [answer_log_probs(model, tokenizer, example) for example in examples[:NUM_COMPARED]]
    model.quantize(4)
    found = [answer_log_probs(model, tokenizer, example) for example in examples[:NUM_COMPARED]]
    answers["int4"] = answer_questions(model, tokenizer, settings)
    del model
    release_memory()
    return {**values, "int4": compare_log_probs(expected, found), "answers": answers}


def measure_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizer, examples: Sequence[Example]
) -> dict[str, float]:
    """Return the perplexity of answers and of their words or characters shuffled, and how often the order wins."""
    rng = random.Random(0)
    shuffled = [replace(example, answer=shuffle_text(example.answer, rng)) for example in examples]
    rows = [example_losses(model, tokenizer, chosen, LIMITS, None) for chosen in (examples, shuffled)]
    ordered_wins = rows[0][:, 0] / rows[0][:, 1] < rows[1][:, 0] / rows[1][:, 1]
    in_order, out_of_order = (float(np.exp(part[:, 0].sum() / part[:, 1].sum())) for part in rows)
    return {"in_order": in_order, "shuffled": out_of_order, "share_lower_in_order": float(ordered_wins.mean())}


def shuffle_text(text: str, rng: random.Random) -> str:
    """Return a text with its words, or characters where it has few words, in another order."""
    separator = " " if text.count(" ") > len(text) / 20 else ""
    parts = text.split(separator) if separator else list(text)
    return separator.join(rng.sample(parts, len(parts)))


@torch.no_grad()
def answer_log_probs(model: PreTrainedModel, tokenizer: PreTrainedTokenizer, example: Example) -> torch.Tensor:
    """Return the log probabilities at the tokens of a reference answer, fp32 [tokens, V], on the CPU."""
    prompt, answer = tokenizer.encode_prompt(example.query), tokenizer.encode_answer(example.answer)
    ids = torch.tensor([prompt + answer], device=model.device)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=model.device)
    return model(input_ids=ids, logits_to_keep=places, use_cache=False).logits[0].float().log_softmax(-1).cpu()


def compare_log_probs(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the mean KL divergence in nats and the share of places whose most probable token is the same."""
    pairs = list(zip(expected, found, strict=True))
    divergences = torch.cat([(old.exp() * (old - new)).sum(-1) for old, new in pairs])
    same = torch.cat([old.argmax(-1) == new.argmax(-1) for old, new in pairs])
    return {"kl": divergences.mean().item(), "same_top_1": same.float().mean().item(), "num_tokens": len(same)}


def answer_questions(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizer, settings: GenerationSettings
) -> list[dict]:
    """Answer the three questions of 2023."""
    prompts = [tokenizer.encode_prompt(query) for query in SUBJECTS_OF_2023]
    answers = sorted(generate_answers(model, tokenizer, prompts, settings), key=lambda answer: answer.index)
    return [{"text": answer.text, "num_tokens": answer.num_tokens, "ended": answer.ended} for answer in answers]


def check_training(
    checkpoint: Checkpoint, directory: Path, num_steps: int, place: torch.device, settings: GenerationSettings
) -> dict:
    """Train a few steps in a process of its own, then answer the questions with the adapter.

    Raises:
        UserError: The training fails.
    """
    adapter_dir = directory / "adapter"
    arguments = json.loads((PROJECT_DIR / checkpoint.family.train_args_json).read_text("utf-8"))
    arguments |= {
        "output_dir": str(adapter_dir.resolve()),
        "max_steps": num_steps,
        "logging_steps": 1,
        "eval_strategy": "no",
    }
    arguments |= {"save_strategy": "no", "use_cpu": place.type == "cpu"}
    arguments_path = (directory / "train_args.json").resolve()
    write_json(arguments_path, arguments)
    command = [sys.executable, "train_qlora.py", "--model_name_or_path", str(checkpoint.directory)]
    command += ["--train_data_path", "data/train.jsonl", "--train_args_json", str(arguments_path)]
    logger.info(f"training {num_steps} steps")
    if subprocess.run(command, cwd=PROJECT_DIR, check=False).returncode != 0:
        raise UserError("the training failed, see above. Send that text instead of a report")
    state = json.loads((adapter_dir / "trainer_state.json").read_text("utf-8"))
    results = json.loads((adapter_dir / "train_results.json").read_text("utf-8"))
    base, adapter = find_model(None, str(adapter_dir))
    dtype = auto_dtype(base.config, base.config_path, place)
    model = ModelSource(base.name, base, adapter, True, dtype, place).load()
    kept = ("train_runtime", "train_tokens_per_second", "peak_memory_bytes")
    return {
        "training": {
            "losses": [entry["loss"] for entry in state["log_history"] if "loss" in entry],
            **{key: results[key] for key in kept if key in results},
        },
        "answers after training": answer_questions(model, base.tokenizer, settings),
    }


def findings(report: dict) -> list[tuple[str, str, bool]]:
    """Return (what was checked, what was found, whether that is as expected)."""
    perplexity, int4, losses = report["perplexity"], report["int4"], report["training"]["losses"]
    third = max(1, len(losses) // 3)
    start, end = (sum(part) / len(part) for part in (losses[:third], losses[-third:]))
    answers = [*report["answers"]["as it is"], *report["answers"]["int4"]]
    return [
        (
            f"perplexity in order below shuffled, in {LEAST_ORDERED:.0%} of the texts or more",
            f"{perplexity['in_order']:,.2f} against {perplexity['shuffled']:,.2f}, in "
            f"{perplexity['share_lower_in_order']:.0%} of the texts",
            perplexity["share_lower_in_order"] >= LEAST_ORDERED,
        ),
        (
            f"int4: same most probable token in {LEAST_SAME_TOKENS:.0%} of the places or more",
            f"{int4['same_top_1']:.1%} of {int4['num_tokens']}, KL {int4['kl']:.4f} nats",
            int4["same_top_1"] >= LEAST_SAME_TOKENS,
        ),
        (
            "answers before training are not empty and end by themselves",
            f"{sum(bool(answer['text']) and answer['ended'] for answer in answers)} of {len(answers)}",
            all(answer["text"] and answer["ended"] for answer in answers),
        ),
        ("the loss falls in training", f"{start:.3f} in the first third, {end:.3f} in the last one", end < start),
    ]


def markdown(report: dict) -> str:
    """Write the report as Markdown."""
    lines = ["# Self test", "", f"{report['model']}, {report['dtype']}, {report['versions']['device']}", ""]
    lines += ["| checked | found | |", "|---|---|---|"]
    for name, found, is_expected in findings(report):
        lines.append(f"| {name} | {found} | {'as expected' if is_expected else '**look here**'} |")
    training = report["training"]
    lines += ["", f"Training: {training['train_tokens_per_second']:,.0f} tokens/s"]
    if "peak_memory_bytes" in training:
        lines[-1] += f", peak {training['peak_memory_bytes'] / 1e9:.2f} GB"
    columns = {**report["answers"], "after training": report["answers after training"]}
    for index, query in enumerate(SUBJECTS_OF_2023):
        lines += ["", f"## {markdown_text(query)}", ""]
        for name, answers in columns.items():
            lines.append(f"- **{name}**: {markdown_text(answers[index]['text']) or '(empty)'}")
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", f"{packages}; commit {report['commit']}; weights {report['fingerprint']}", ""])


if __name__ == "__main__":
    run_cli(self_test)
