"""The parts of a run: encode the data, train and evaluate, write the adapter."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from loguru import logger

from glm_utils.data.indexed import read_first
from glm_utils.encoding import EncodedExamples, show_example
from glm_utils.file_modes import give_usual_modes
from glm_utils.files import atomic_files, write_json
from glm_utils.report_file import write_report_file
from glm_utils.run_record import RUN_CONFIG_NAME
from glm_utils.training.curves import write_curves
from glm_utils.training.data_page import data_page, print_page, report_document, truncation_warnings
from glm_utils.training.data_report import BatchFigures, TrainingDataReport, report_data
from glm_utils.training.preflight import batch_figures
from glm_utils.training.record import TrainingRecord
from glm_utils.training.settings import TrainingSettings
from glm_utils.training.streamed import StreamedExamples, worker_errors_unwrapped
from glm_utils.training.trainer import LoraTrainer


def encode_data(settings: TrainingSettings) -> dict[str, EncodedExamples]:
    """Encode all examples; the first process reports on them, and shows the first one as tokens.

    Raises:
        UserError: An example cannot be encoded, none is left, or the report cannot be written.
    """
    encoded = settings.encoded
    if settings.training_args.process_index != 0:
        return encoded
    first = show_example(encoded["train"].dataset[0], settings.base.tokenizer)
    logger.info(f"first example, trained part in [[ ]]: {first}")
    batches = batch_figures(encoded["train"].lengths, settings)
    reports = {name: report_part(settings, name, batches if name == "train" else None) for name in encoded}
    for name, report in reports.items():
        logger.info(f"{name}: {encoded[name].describe_counts()}")
        for warning in truncation_warnings(name, report, settings.limits):
            logger.warning(warning)
        print_page(data_page(name, report))
    settings.data.log_token_shares(encoded["train"].lengths.tolist())
    if output_json := settings.arguments["output_json"]:
        write_report_file(report_document(settings, reports), output_json)
        logger.info(f"report on the data written to {output_json}")
    return {
        name: replace(part, counts={**part.counts, "num_duplicates": reports[name].duplicates.count})
        for name, part in encoded.items()
    }


def report_part(settings: TrainingSettings, name: str, batches: BatchFigures | None) -> TrainingDataReport:
    """Report on the examples of one part of the data; of streamed ones, on the first."""
    examples, part = settings.loss_examples[name], settings.encoded[name]
    if isinstance(part, StreamedExamples):
        return report_data(read_first(examples), part.first, batches, num_examples=len(examples))
    return report_data(examples, part, batches)


@worker_errors_unwrapped()
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
