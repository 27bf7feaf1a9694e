"""QLoRA's own settings: LoRA on a 4-bit base, which number formats go together, and what is logged while it runs."""

import datetime
import os
import shutil
import time
from pathlib import Path

import peft
import torch
from loguru import logger
from transformers import (
    PreTrainedTokenizer,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from glm_utils.checkpoint import load_base_model
from glm_utils.cli import UserError
from glm_utils.encoding import Collator, EncodedRows
from glm_utils.run_record import RUN_CONFIG_NAME
from glm_utils.training_args import TrainArgsFile

DEFAULT_SEED = 42


def make_lora_config(rank: int, alpha: int, dropout: float, targets: list[str]) -> peft.LoraConfig:
    """Check the LoRA settings.

    Args:
        rank: Rank of the matrices.
        alpha: The product is multiplied by alpha / rank.
        dropout: Dropout before the matrices.
        targets: Module names.

    Raises:
        UserError: A value out of range.
    """
    if rank < 1:
        raise UserError(f"--lora_rank={rank}: expected 1 or more")
    if alpha < 1:
        raise UserError(f"--lora_alpha={alpha}: expected 1 or more")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora_dropout={dropout}: expected 0 to below 1")
    return peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )


def make_training_args(
    args_file: TrainArgsFile, seed: int | None, compute_dtype: str, has_eval: bool
) -> TrainingArguments:
    """Build the TrainingArguments of a run.

    A compute_dtype of fp16 or bf16 turns the mixed precision of the same name on, which the loss scaling of fp16
    needs; on the CPU it changes the 4-bit products only.

    Args:
        args_file: The checked JSON file.
        seed: Wins over the file's seed; None: the file's, else 42.
        compute_dtype: fp32, fp16 or bf16.
        has_eval: Whether there is evaluation data.

    Raises:
        UserError: Settings that contradict each other or the hardware.
    """
    values, overrides = args_file.values, {}
    on_gpu = torch.cuda.is_available() and not values.get("use_cpu")
    for dtype, other in (("fp16", "bf16"), ("bf16", "fp16")):
        if values.get(other) and compute_dtype == dtype:
            raise UserError(f"--compute_dtype {dtype} contradicts {other} in {args_file.path}. Give one of them")
    wants_bf16 = compute_dtype == "bf16" or values.get("bf16")
    if on_gpu and wants_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name()} has no bf16. Use fp16 or fp32 instead")
    if not on_gpu and values.get("fp16"):
        raise UserError(f"{args_file.path}: fp16 needs a GPU for its loss scaling. Delete the line, or set bf16")
    if not on_gpu and compute_dtype == "fp16":
        logger.warning("--compute_dtype fp16 is several times slower than bf16 or fp32 on a CPU")
    if on_gpu and compute_dtype != "fp32":
        overrides[compute_dtype] = True
    if not on_gpu:
        overrides["use_cpu"] = True
    if not has_eval and (values.get("eval_strategy", "no") != "no" or values.get("eval_on_start")):
        raise UserError(f"{args_file.path}: eval_strategy asks for evaluation. Give --eval_data_path, or set it to no")
    overrides["seed"] = values.get("seed", DEFAULT_SEED) if seed is None else seed
    training_args = args_file.build(**overrides, label_names=["labels"])
    if training_args.n_gpu > 1:  # the Trainer would wrap the 4-bit model into DataParallel, which cannot copy it
        logger.warning(f"1 of {training_args.n_gpu} GPUs is used; for all of them: torchrun --nproc_per_node N ...")
        training_args._n_gpu = 1
    return training_args


def make_lora_model(
    base_dir: Path, base_name: str, compute_dtype: str, lora_config: peft.LoraConfig, training_args: TrainingArguments
) -> peft.PeftModel:
    """Load the base in 4 bit and put fresh LoRA weights (fp32) on it.

    The weights that stay unquantised (embedding, norms, output layer) are frozen and have the compute dtype: peft's
    prepare_model_for_kbit_training would make them fp32 in any case, 1 GB more at 6B size. On a CPU they are fp32.

    Args:
        base_dir: The base model's directory.
        base_name: Directory or hub id that the adapter names as its base.
        compute_dtype: fp32, fp16 or bf16.
        lora_config: Settings of LoRA.
        training_args: Their seed fixes the LoRA weights.
    """
    on_gpu = training_args.device.type == "cuda"
    device = {"": int(os.environ.get("LOCAL_RANK", 0)) if on_gpu else "cpu"}
    model = load_base_model(base_dir, True, compute_dtype, device, dtype=None if on_gpu else "fp32")
    model.name_or_path = base_name  # peft writes it into adapter_config.json
    set_seed(training_args.seed)
    peft_model = peft.get_peft_model(model, lora_config)
    trainable, total = peft_model.get_nb_trainable_parameters()
    logger.info(f"LoRA on {', '.join(sorted(lora_config.target_modules))}: {trainable:,} of {total:,} weights train")
    return peft_model


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar without its own line for each report."""

    def on_log(self, args, state, control, **kwargs) -> None:
        """Leave the report to RunCallback."""


class RunCallback(TrainerCallback):
    """Log losses and the time left, and keep the run's settings in every checkpoint."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        """Start the clock."""
        self.first_step, self.start_seconds = state.global_step, time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control, logs=None, **kwargs) -> None:
        """Log one line for each report of the Trainer."""
        if not state.is_world_process_zero or not logs:
            return
        numbers = [
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}"
            for key, value in logs.items()
            if isinstance(value, float | int)
        ]
        num_done = state.global_step - self.first_step
        if num_done and state.global_step < state.max_steps:
            seconds = (time.monotonic() - self.start_seconds) / num_done * (state.max_steps - state.global_step)
            numbers.append(f"{datetime.timedelta(seconds=round(seconds))} left")
        logger.info(f"step {state.global_step}/{state.max_steps}: {', '.join(numbers)}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        """Copy run_config.json into the checkpoint, where resume compares it."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            shutil.copyfile(Path(args.output_dir) / RUN_CONFIG_NAME, checkpoint / RUN_CONFIG_NAME)


def make_trainer(
    model: peft.PeftModel,
    training_args: TrainingArguments,
    encoded: dict[str, EncodedRows],
    tokenizer: PreTrainedTokenizer,
    padding_side: str,
) -> Trainer:
    """Build transformers' Trainer with this project's batches and log lines.

    Args:
        model: LoRA model.
        training_args: Its settings.
        encoded: Rows under "train" and, optionally, "eval".
        tokenizer: Saved in every checkpoint.
        padding_side: Of the batches.
    """
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=encoded["train"].dataset,
        eval_dataset=encoded["eval"].dataset if "eval" in encoded else None,
        data_collator=Collator(tokenizer.pad_token_id, padding_side),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback if training_args.disable_tqdm else ProgressCallback)
    if not training_args.disable_tqdm:
        trainer.add_callback(QuietProgress())
    trainer.add_callback(RunCallback())
    return trainer
