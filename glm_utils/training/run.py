"""The parts of a run: encode the data, train and evaluate, write the adapter."""

from dataclasses import asdict
from pathlib import Path

import torch
from loguru import logger

from glm_utils.encoding import EncodedExamples, encode_examples, show_example
from glm_utils.file_modes import give_usual_modes
from glm_utils.files import atomic_files, write_json
from glm_utils.run_record import RUN_CONFIG_NAME
from glm_utils.training.curves import write_curves
from glm_utils.training.record import TrainingRecord
from glm_utils.training.settings import TrainingSettings
from glm_utils.training.trainer import LoraTrainer


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
    if trainer.state.global_step == trainer.run_log.first_step:  # only the end was due
        metrics.pop("train_loss")
    metrics |= {"kept_step": trainer.kept_step, "last_step": trainer.state.global_step}
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


def last_evaluation(trainer: LoraTrainer) -> dict:
    """Return the metrics of the last evaluation of the weights that are saved; nothing if there was none."""
    step = trainer.kept_step
    reports = [report for report in trainer.state.log_history if "eval_loss" in report and report["step"] == step]
    found = reports[-1] if reports else {}
    return {key: value for key, value in found.items() if key.startswith("eval_") or key == "epoch"}


def save_adapter(trainer: LoraTrainer, record: TrainingRecord, results: dict) -> None:
    """Write adapter, tokenizer files and model card to the output directory, adapter_config.json last."""
    if not trainer.is_world_process_zero():
        return
    output_dir = Path(trainer.args.output_dir)
    with atomic_files(output_dir, last="adapter_config.json") as temporary_dir:
        trainer.model.save_pretrained(temporary_dir, save_embedding_layers=False)
        trainer.processing_class.save_pretrained(temporary_dir)
        (temporary_dir / "README.md").write_text(record.card(results), encoding="utf-8")
        write_json(temporary_dir / RUN_CONFIG_NAME, {**asdict(record), "kept_step": trainer.kept_step})
        give_usual_modes(temporary_dir)
    losses = ", ".join(f"{key} {value:.4f}" for key, value in results.items() if key.endswith("loss"))
    num_bytes = (output_dir / "adapter_model.safetensors").stat().st_size
    best = "" if trainer.kept_step == trainer.state.global_step else f", of the best step, {trainer.kept_step}"
    logger.success(f"adapter written to {output_dir}: {num_bytes:,} bytes, {losses}{best}")
