"""Train a LoRA adapter on ChatGLM-6B or ChatGLM2-6B in 4 bit: instruction data + base model -> adapter directory.

    python train_qlora.py --model_name_or_path THUDM/chatglm2-6b --train_args_json chatGLM2_6B_QLoRA.json \
        --train_data_path data/train.jsonl --eval_data_path data/dev.jsonl

Without a GPU or a network: --model_name_or_path models/chatglm2-tiny. The output directory (output_dir of the JSON
file) gets the adapter, its tokenizer files, checkpoints, TensorBoard logs in runs/, results, loss curves,
run_config.json and a model card.
"""

import functools
from pathlib import Path
from typing import Literal

import glm_utils  # noqa: F401  isort: skip  # before the libraries that it silences
import torch
from loguru import logger
from transformers import Trainer

from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.device import resolve_device
from glm_utils.encoding import EncodedExamples, encode_examples, show_example
from glm_utils.evaluation.at_end import check_evaluation, evaluate_output
from glm_utils.files import atomic_files
from glm_utils.signals import note_if_interrupted, release_signals
from glm_utils.training.curves import write_curves
from glm_utils.training.lora_model import make_lora_model
from glm_utils.training.preflight import plan_run
from glm_utils.training.record import TrainingRecord, begin_run, make_record
from glm_utils.training.resume import choose_checkpoint
from glm_utils.training.settings import TrainingSettings, read_inputs, resolve_settings
from glm_utils.training.trainer import LoraTrainer, leave_process_group, make_trainer


def train_qlora(
    *,
    train_args_json: str | None = None,
    model_name_or_path: str = "THUDM/chatglm2-6b",
    train_data_path: str | None = None,
    eval_data_path: str | None = None,
    seed: int | None = None,
    max_input_length: int = 512,
    max_output_length: int = 1536,
    lora_rank: int = 4,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    resume_from_checkpoint: str | bool | None = None,
    prompt_text: str = "",
    compute_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto",
    lora_targets: str | list[str] = "query_key_value",
    packing: bool = True,
    log_samples: int = 0,
    dry_run: bool = False,
    evaluate_after: bool = False,
) -> None:
    """Train a LoRA adapter on a 4-bit ChatGLM base model.

    Args:
        train_args_json: JSON file of TrainingArguments, today's keys or those of 2023. Default: the one of the family.
        model_name_or_path: Directory of the base model, or its hub id.
        train_data_path: JSONL or JSON file of training examples. Default: the project's sample, data/train.jsonl.
        eval_data_path: The same for evaluation. Default: data/dev.jsonl with the sample, else no evaluation.
        seed: Seed of LoRA weights, data order and dropout. Default: the JSON file's, else 42.
        max_input_length: Longest prompt in tokens; a longer one loses its oldest turns, then the end of the question.
        max_output_length: Longest answer in tokens; a longer one is truncated and keeps its end token.
        lora_rank: Rank of the LoRA matrices.
        lora_alpha: LoRA scale; the update is multiplied by lora_alpha / lora_rank.
        lora_dropout: Dropout before the LoRA matrices, from 0 to below 1.
        resume_from_checkpoint: A checkpoint-N directory, or latest for the newest one of output_dir.
        prompt_text: Text put before every question.
        compute_dtype: Dtype of the matmuls: fp32, fp16, bf16, or auto (bf16 on a GPU that supports it, else fp32).
        lora_targets: Modules that get LoRA: query_key_value, all-linear, or names joined by commas.
        packing: Pack the examples of a batch into one sequence instead of padding them; the gradients are the same.
        log_samples: Evaluation examples whose answers TensorBoard's text tab shows at each evaluation.
        dry_run: Report trained weights, steps and memory, then stop before training.
        evaluate_after: Judge the adapter on the evaluation data when it is written, as evaluate_adapter.py does; the
            report goes to a directory beside output_dir, named output_dir + "_evaluation".
    """
    inputs = read_inputs(dict(locals()))
    note_if_interrupted("no step was done, so there is nothing to save")
    base = open_checkpoint(model_name_or_path)
    settings = resolve_settings(inputs, base)
    if evaluate_after:
        check_evaluation_data(settings)
        check_evaluation(settings.output_dir)
    checkpoint = choose_checkpoint(settings)
    encoded = encode_data(settings)
    model = make_lora_model(base, settings.compute_dtype, settings.lora_config, settings.training_args)
    plan = plan_run(settings, model, encoded["train"])
    if dry_run:
        logger.info("dry run: nothing was trained or written")
        leave_process_group()
        return
    record = make_record(settings, encoded)
    begin = functools.partial(begin_run, settings, record, checkpoint)
    trainer = make_trainer(settings, model, plan, encoded, begin)
    results = run_trainer(trainer, checkpoint)
    save_adapter(trainer, record, results)
    trainer.end_processes()
    if evaluate_after:
        del model, trainer  # their memory is needed by the model that is judged, read back from the adapter's files
        evaluate_run(settings)


def check_evaluation_data(settings: TrainingSettings) -> None:
    """Refuse --evaluate_after without evaluation data."""
    if "eval" not in settings.data_paths:
        raise UserError("--evaluate_after true: no evaluation data. Give --eval_data_path")


def encode_data(settings: TrainingSettings) -> dict[str, EncodedExamples]:
    """Encode all examples; log the counts, and the first example as tokens with its trained part in brackets."""
    tokenizer, max_length = settings.base.tokenizer, settings.base.context_length
    encoded = {
        name: encode_examples(part, tokenizer, settings.limits, max_length) for name, part in settings.examples.items()
    }
    logger.info(f"first example, trained part in [[ ]]: {show_example(encoded['train'].dataset[0], tokenizer)}")
    for name, part in encoded.items():
        logger.info(f"{name}: {part.describe_counts()}")
    return encoded


def run_trainer(trainer: LoraTrainer, checkpoint: Path | None) -> dict:
    """Train, evaluate, write result files and loss curves; return all metrics."""
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    metrics["train_tokens_per_second"] = trainer.run_log.tokens_per_second(trainer.state)
    if torch.cuda.is_available():
        metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        eval_metrics = last_evaluation(trainer) or trainer.evaluate()
        trainer.save_metrics("eval", eval_metrics)
        metrics = {**metrics, **eval_metrics}
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_curves(Path(trainer.args.output_dir), trainer.state.log_history)
    return metrics


def last_evaluation(trainer: Trainer) -> dict:
    """Return the metrics of an evaluation at the last step, if that evaluated the weights that are saved."""
    reports = [report for report in trainer.state.log_history if "eval_loss" in report]
    if trainer.args.load_best_model_at_end or not reports or reports[-1]["step"] != trainer.state.global_step:
        return {}
    return {key: value for key, value in reports[-1].items() if key.startswith("eval_") or key == "epoch"}


def save_adapter(trainer: Trainer, record: TrainingRecord, results: dict) -> None:
    """Write adapter, tokenizer files and model card to the output directory, adapter_config.json last."""
    if not trainer.is_world_process_zero():
        return
    output_dir = Path(trainer.args.output_dir)
    with atomic_files(output_dir, last="adapter_config.json") as temporary_dir:
        trainer.model.save_pretrained(temporary_dir, save_embedding_layers=False)
        trainer.processing_class.save_pretrained(temporary_dir)
        (temporary_dir / "README.md").write_text(record.card(results), encoding="utf-8")
    losses = ", ".join(f"{key} {value:.4f}" for key, value in results.items() if key.endswith("loss"))
    num_bytes = (output_dir / "adapter_model.safetensors").stat().st_size
    logger.success(f"adapter written to {output_dir}: {num_bytes:,} bytes, {losses}")


def evaluate_run(settings: TrainingSettings) -> None:
    """Judge the adapter that was written, on the 4-bit base it was trained on, in the first process."""
    args, out = settings.training_args, settings.output_dir
    release_signals("the adapter is written, but not evaluated")
    if args.process_index == 0:
        device = resolve_device("cpu" if args.use_cpu else "auto")
        evaluate_output(out, out, settings.data_paths["eval"], device, load_in_4bit=True, seed=args.seed)


if __name__ == "__main__":
    run_cli(train_qlora)
