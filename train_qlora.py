"""Train a LoRA adapter on ChatGLM-6B or ChatGLM2-6B in 4 bit: instruction data + base model -> adapter directory.

    python train_qlora.py --model_name_or_path THUDM/chatglm2-6b --train_args_json chatGLM2_6B_QLoRA.json \
        --train_data_path data/train.jsonl --eval_data_path data/dev.jsonl

Without a GPU or a network: --model_name_or_path models/chatglm2-tiny. The output directory (output_dir of the JSON
file) gets the adapter, its tokenizer files, checkpoints, TensorBoard logs in runs/, results, run_config.json and a
model card.
"""

import functools
from pathlib import Path
from typing import Literal

import glm_utils  # noqa: F401  isort: skip  # before what it silences
import torch
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedTokenizer, Trainer, TrainingArguments

from glm_utils.checkpoint import load_tokenizer, project_path, resolve_checkpoint_dir
from glm_utils.checkpoint_files import check_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.data import Row, read_rows
from glm_utils.encoding import Collator, EncodedRows, EncodingLimits, PackingCollator, encode_rows, show_sample
from glm_utils.family import Family, detect_family, resolve_lora_targets
from glm_utils.memory_plan import MemoryPlan, make_plan
from glm_utils.preflight import memory_advice, memory_explained, num_steps, report_run
from glm_utils.qlora import (
    check_lora_settings,
    make_lora_config,
    make_lora_model,
    make_training_args,
    resolve_compute_dtype,
)
from glm_utils.resume import (
    check_output_dir,
    check_same_run,
    check_unfinished,
    find_checkpoint,
    is_checkpoint_of,
    remove_earlier_run,
)
from glm_utils.run_record import RUN_CONFIG_NAME, make_record, model_card, whole_files, write_json
from glm_utils.trainer import LoraTrainer, leave_processes, make_trainer
from glm_utils.training_args import TrainArgsFile, read_train_args

SAMPLE_TRAIN_PATH, SAMPLE_EVAL_PATH = "data/train.jsonl", "data/dev.jsonl"
NUM_PLAN_ROWS = 4  # whose memory is measured


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
    dry_run: bool = False,
) -> None:
    """Train a LoRA adapter on a 4-bit ChatGLM base model.

    Args:
        train_args_json: JSON file of transformers' TrainingArguments, today's keys or those of transformers 4.30.
            Default: the file shipped for the base model's family.
        model_name_or_path: Directory of the base model, or its hub id.
        train_data_path: JSONL or JSON file of training rows. Default: the project's sample, data/train.jsonl.
        eval_data_path: The same for evaluation. Default: data/dev.jsonl with the sample, else no evaluation.
        seed: Seed of LoRA weights, data order and dropout. Default: the JSON file's, else 42.
        max_input_length: Longest prompt in tokens; longer ones lose old turns, then the end of the question.
        max_output_length: Longest answer in tokens; longer ones are cut, the end token is kept.
        lora_rank: Rank of the LoRA matrices.
        lora_alpha: LoRA scale: the product is multiplied by lora_alpha / lora_rank.
        lora_dropout: Dropout before the LoRA matrices, 0 to below 1.
        resume_from_checkpoint: A checkpoint-N directory, or latest for the newest one of output_dir.
        prompt_text: Text put in front of every question.
        compute_dtype: Number format of the products: fp32, fp16, bf16, or auto (bf16 on a GPU that has it, else fp32).
        lora_targets: Modules that get LoRA: query_key_value, all-linear, or names joined by commas.
        packing: Lay the rows of a batch end to end instead of padding them; the gradients are the same.
        dry_run: Stop before training, once weights, steps and memory have been reported.
    """
    arguments = dict(locals())
    limits = EncodingLimits(max_input_length, max_output_length, prompt_text)
    data_paths = find_data(train_data_path, eval_data_path)
    rows = {name: read_rows(path) for name, path in data_paths.items()}
    check_lora_settings(lora_rank, lora_alpha, lora_dropout)
    args_file = read_train_args(project_path(train_args_json)) if train_args_json else None
    base_dir = resolve_checkpoint_dir(model_name_or_path)  # may download it, so what can be wrong before is checked
    base_config, family = check_trainable(base_dir)
    lora_config = make_lora_config(lora_rank, lora_alpha, lora_dropout, resolve_lora_targets(family, lora_targets))
    args_file = args_file or read_train_args(project_path(family.train_args_json))
    arguments["compute_dtype"] = compute_dtype = resolve_compute_dtype(compute_dtype, args_file)
    training_args = make_training_args(args_file, seed, compute_dtype, "eval" in rows, packing)
    record = make_record(arguments, base_dir, family, data_paths, sorted(lora_config.target_modules), training_args)
    resume_from = resume_from_checkpoint or training_args.resume_from_checkpoint
    steps = num_steps(len(rows["train"]), training_args)
    checkpoint = choose_checkpoint(resume_from, Path(training_args.output_dir), args_file, record["identity"], steps)
    tokenizer = load_tokenizer(base_dir)
    encoded = encode_data(rows, tokenizer, limits, base_config.get(family.max_length_key))
    record["data"] = {name: part.counts for name, part in encoded.items()}
    model = make_lora_model(base_dir, record["base"]["name"], compute_dtype, lora_config, training_args)
    collator = PackingCollator() if packing else Collator(tokenizer.pad_token_id, family.padding_side)
    plan = plan_run(model, encoded["train"], collator, args_file.checkpointing, training_args)
    if dry_run:
        leave_processes()
        return
    begin = functools.partial(begin_run, training_args, record, checkpoint)
    trainer = make_trainer(model, plan, training_args, encoded, tokenizer, collator, begin)
    results = run_trainer(trainer, checkpoint)
    save_adapter(trainer, record, results)
    trainer.end_processes()


def find_data(train_data_path: str | None, eval_data_path: str | None) -> dict[str, Path]:
    """Return the data files by use; without a training file the project's sample is used for what is not given."""
    if train_data_path is None:
        logger.info(f"no --train_data_path: the project's sample {SAMPLE_TRAIN_PATH} is used")
        train_data_path, eval_data_path = SAMPLE_TRAIN_PATH, eval_data_path or SAMPLE_EVAL_PATH
    given = {"train": train_data_path, "eval": eval_data_path}
    return {name: project_path(path) for name, path in given.items() if path}


def check_trainable(base_dir: Path) -> tuple[dict, Family]:
    """Check the base model's files and return its config and family; a base that is quantised already is refused."""
    config, config_path = check_checkpoint(base_dir), base_dir / "config.json"
    if config.get("quantization_bit"):
        raise UserError(
            f"{config_path}: the base is quantised already (quantization_bit {config['quantization_bit']}). "
            "QLoRA quantises by itself: give the fp16 checkpoint"
        )
    return config, detect_family(config, config_path)


def choose_checkpoint(
    resume_from: str | bool | None, output_dir: Path, args_file: TrainArgsFile, identity: dict, steps: int
) -> Path | None:
    """Return the checkpoint to go on from, checked to be of this run with steps left.

    The output directory must be free, or hold that checkpoint.
    """
    checkpoint = find_checkpoint(resume_from, output_dir)
    if checkpoint:
        check_same_run(checkpoint, identity)
        check_unfinished(checkpoint, steps)
    if not is_checkpoint_of(checkpoint, output_dir):
        check_output_dir(output_dir, args_file.overwrite_output_dir)
    return checkpoint


def encode_data(
    rows: dict[str, list[Row]], tokenizer: PreTrainedTokenizer, limits: EncodingLimits, max_length: int | None
) -> dict[str, EncodedRows]:
    """Encode all rows; show sample 0 as tokens, with its trained part in double brackets, and the counts."""
    encoded = {name: encode_rows(part, tokenizer, limits, max_length) for name, part in rows.items()}
    logger.info(f"sample 0, trained in [[ ]]: {show_sample(encoded['train'].dataset[0], tokenizer)}")
    for name, part in encoded.items():
        logger.info(f"{name}: {', '.join(f'{key} {value:,}' for key, value in part.counts.items())}")
    return encoded


def plan_run(
    model: PeftModel,
    encoded: EncodedRows,
    collator: Collator | PackingCollator,
    checkpointing: bool | None,
    training_args: TrainingArguments,
) -> MemoryPlan:
    """Measure what a batch needs, and log it with the weights, tokens and steps of the run."""
    num_rows = min(NUM_PLAN_ROWS, training_args.train_batch_size, len(encoded.dataset))
    sample = collator([encoded.dataset[index] for index in range(num_rows)])
    advice = functools.partial(memory_advice, training_args)
    with memory_explained("the preflight", sample["input_ids"].numel(), advice):
        plan = make_plan(model, sample, checkpointing)
    report_run(model, plan, encoded.dataset["length"], training_args, isinstance(collator, PackingCollator))
    return plan


def begin_run(training_args: TrainingArguments, record: dict, checkpoint: Path | None) -> None:
    """Write run_config.json; what an earlier run left is deleted unless this one goes on from it.

    That is when the first step is due, as a setting that the Trainer refuses must not cost the earlier run.
    """
    if training_args.process_index != 0:
        return
    output_dir = Path(training_args.output_dir)
    if not is_checkpoint_of(checkpoint, output_dir):
        remove_earlier_run(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / RUN_CONFIG_NAME, record)


def run_trainer(trainer: LoraTrainer, checkpoint: Path | None) -> dict:
    """Train, evaluate and write train_results.json, eval_results.json and all_results.json; return all metrics."""
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
    return metrics


def last_evaluation(trainer: Trainer) -> dict:
    """Return the metrics of an evaluation made at the very last step, of the weights that are kept; else nothing."""
    reports = [report for report in trainer.state.log_history if "eval_loss" in report]
    if trainer.args.load_best_model_at_end or not reports or reports[-1]["step"] != trainer.state.global_step:
        return {}
    return {key: value for key, value in reports[-1].items() if key.startswith("eval_") or key == "epoch"}


def save_adapter(trainer: Trainer, record: dict, results: dict) -> None:
    """Write adapter, tokenizer files and model card into the output directory, adapter_config.json last."""
    if not trainer.is_world_process_zero():
        return
    output_dir = Path(trainer.args.output_dir)
    with whole_files(output_dir, last="adapter_config.json") as temporary_dir:
        trainer.model.save_pretrained(temporary_dir, save_embedding_layers=False)
        trainer.processing_class.save_pretrained(temporary_dir)
        (temporary_dir / "README.md").write_text(model_card(record, results), encoding="utf-8")
    losses = ", ".join(f"{key} {value:.4f}" for key, value in results.items() if key.endswith("loss"))
    num_bytes = (output_dir / "adapter_model.safetensors").stat().st_size
    logger.success(f"adapter written to {output_dir}: {num_bytes:,} bytes, {losses}")


if __name__ == "__main__":
    run_cli(train_qlora)
