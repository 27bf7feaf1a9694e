"""Resolve and check the settings of a training run before its model is loaded: flags, JSON file, base, data."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from loguru import logger
from transformers import TrainingArguments

from glm_utils.checkpoint import Checkpoint, open_checkpoint, project_path
from glm_utils.cli import UserError
from glm_utils.data import Example, read_examples
from glm_utils.encoding import Collator, EncodingLimits, PackingCollator
from glm_utils.family import resolve_lora_targets
from glm_utils.run_record import sha256
from glm_utils.training.lora_model import check_lora_settings, make_lora_config
from glm_utils.training.training_args import TrainArgsFile, read_train_args

DEFAULT_SEED = 42
SAMPLE_TRAIN_PATH, SAMPLE_EVAL_PATH = "data/train.jsonl", "data/dev.jsonl"
IDENTITY_ARGUMENTS: tuple[str, ...] = ("lora_rank", "lora_alpha", "lora_dropout", "max_input_length")
IDENTITY_ARGUMENTS += ("max_output_length", "prompt_text", "compute_dtype", "packing")
IDENTITY_TRAINING_ARGS = ("seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy")


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a run, resolved and checked.

    Attributes:
        arguments: The script's flags by name, with compute_dtype resolved.
        base: The base model.
        data_paths: Data files under "train" and, optionally, "eval".
        examples: Their examples under the same keys.
        limits: Limits of the prompt and the answer.
        lora_config: Settings of LoRA.
        compute_dtype: fp32, fp16 or bf16.
        packing: Whether the examples of a batch are packed into one sequence instead of padded.
        args_file: The TrainingArguments file.
        training_args: The TrainingArguments made from it.
    """

    arguments: dict
    base: Checkpoint
    data_paths: dict[str, Path]
    examples: dict[str, list[Example]]
    limits: EncodingLimits
    lora_config: peft.LoraConfig
    compute_dtype: str
    packing: bool
    args_file: TrainArgsFile
    training_args: TrainingArguments

    @property
    def output_dir(self) -> Path:
        """Directory that the run writes to."""
        return Path(self.training_args.output_dir)

    @property
    def resume_from(self) -> str | bool | None:
        """The checkpoint to resume from, by the flag or else by the JSON file; see `find_checkpoint` in resume.py."""
        return self.arguments["resume_from_checkpoint"] or self.training_args.resume_from_checkpoint

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run, those before a checkpoint included."""
        return num_steps(len(self.examples["train"]), self.training_args)

    @cached_property
    def collator(self) -> Collator | PackingCollator:
        """Turns encoded examples into batches."""
        if self.packing:
            return PackingCollator()
        return Collator(self.base.tokenizer.pad_token_id, self.base.family.padding_side)

    @cached_property
    def identity(self) -> dict:
        """Settings that a resumed run must share: they fix the weights' shapes, the data order and the randomness."""
        return {
            "base_fingerprint": self.base.fingerprint,
            "lora_targets": sorted(self.lora_config.target_modules),
            "train_data_sha256": sha256(self.data_paths["train"]),
            **{key: self.arguments[key] for key in IDENTITY_ARGUMENTS},
            **{key: getattr(self.training_args, key) for key in IDENTITY_TRAINING_ARGS},
            "rows_per_step": examples_per_step(self.training_args),
        }


def resolve_settings(arguments: dict) -> TrainingSettings:
    """Resolve the flags of train_qlora.py; all that can be checked without the base is checked before its download.

    Args:
        arguments: The flags by name.

    Raises:
        UserError: A flag, the JSON file, the data or the base is wrong.
    """
    flags = SimpleNamespace(**arguments)
    limits = EncodingLimits(flags.max_input_length, flags.max_output_length, flags.prompt_text)
    data_paths = find_data(flags.train_data_path, flags.eval_data_path)
    examples = {name: read_examples(path) for name, path in data_paths.items()}
    check_lora_settings(flags.lora_rank, flags.lora_alpha, flags.lora_dropout)
    args_file = read_train_args(project_path(flags.train_args_json)) if flags.train_args_json else None
    base = open_checkpoint(flags.model_name_or_path)
    base.require_unquantized("QLoRA quantizes by itself")
    targets = resolve_lora_targets(base.family, flags.lora_targets)
    args_file = args_file or read_train_args(project_path(base.family.train_args_json))
    compute_dtype = resolve_compute_dtype(flags.compute_dtype, args_file)
    return TrainingSettings(
        arguments={**arguments, "compute_dtype": compute_dtype},
        base=base,
        data_paths=data_paths,
        examples=examples,
        limits=limits,
        lora_config=make_lora_config(flags.lora_rank, flags.lora_alpha, flags.lora_dropout, targets),
        compute_dtype=compute_dtype,
        packing=flags.packing,
        args_file=args_file,
        training_args=make_training_args(args_file, flags.seed, compute_dtype, "eval" in examples, flags.packing),
    )


def find_data(train_data_path: str | None, eval_data_path: str | None) -> dict[str, Path]:
    """Return the data files under "train" and, optionally, "eval"; without a training file, the project's samples."""
    if train_data_path is None:
        logger.info(f"no --train_data_path: using the project's sample {SAMPLE_TRAIN_PATH}")
        train_data_path, eval_data_path = SAMPLE_TRAIN_PATH, eval_data_path or SAMPLE_EVAL_PATH
    given = {"train": train_data_path, "eval": eval_data_path}
    return {name: project_path(path) for name, path in given.items() if path}


def examples_per_step(training_args: TrainingArguments) -> int:
    """Return the examples per optimizer step, on all GPUs together."""
    return training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size


def num_steps(num_examples: int, training_args: TrainingArguments) -> int:
    """Return the number of optimizer steps of a run, as the Trainer counts them.

    Raises:
        UserError: dataloader_drop_last drops the only batch, as it is not full.
    """
    batch_size = training_args.per_device_train_batch_size * training_args.world_size
    drop_last = training_args.dataloader_drop_last
    num_batches = num_examples // batch_size if drop_last else math.ceil(num_examples / batch_size)
    if not num_batches:
        raise UserError(
            f"{num_examples} training examples do not fill a batch of {batch_size}, and dataloader_drop_last drops a "
            "batch that is not full: nothing would be trained. Delete dataloader_drop_last, or lower "
            "per_device_train_batch_size"
        )
    if training_args.max_steps > 0:
        return training_args.max_steps
    per_epoch = max(1, math.ceil(num_batches / training_args.gradient_accumulation_steps))
    return math.ceil(training_args.num_train_epochs * per_epoch)


def uses_gpu(args_file: TrainArgsFile) -> bool:
    """Return whether a run with this file uses a GPU."""
    return torch.cuda.is_available() and not args_file.values.get("use_cpu")


def resolve_compute_dtype(compute_dtype: str, args_file: TrainArgsFile) -> str:
    """Resolve auto: the file's fp16 or bf16, else bf16 on a GPU that supports it, else fp32.

    Args:
        compute_dtype: auto, fp32, fp16 or bf16.
        args_file: The checked JSON file.
    """
    if compute_dtype != "auto":
        return compute_dtype
    has_bf16 = uses_gpu(args_file) and torch.cuda.is_bf16_supported(including_emulation=False)
    given = [dtype for dtype in ("fp16", "bf16") if args_file.values.get(dtype)]
    resolved = given[0] if given else "bf16" if has_bf16 else "fp32"
    logger.info(f"--compute_dtype auto: {resolved}")
    return resolved


def make_training_args(
    args_file: TrainArgsFile, seed: int | None, compute_dtype: str, has_eval: bool, packing: bool
) -> TrainingArguments:
    """Build the TrainingArguments of a run.

    On a GPU fp16 turns on mixed precision, for its loss scaling. With bf16 all frozen weights are bf16 already and the
    LoRA matmuls cast by themselves, so autocast would only add casts and stays off. On a CPU either affects only the
    4-bit matmuls.

    Args:
        args_file: The checked JSON file.
        seed: Overrides the file's seed; None: the file's, else 42.
        compute_dtype: fp32, fp16 or bf16.
        has_eval: Whether there is evaluation data.
        packing: Whether batches are packed; if not, they are made of examples of similar length.

    Raises:
        UserError: Settings that contradict each other or the hardware.
    """
    values, on_gpu = args_file.values, uses_gpu(args_file)
    overrides: dict[str, object] = {}
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
        overrides |= {"bf16": False, "fp16": compute_dtype == "fp16"}
    if on_gpu:  # the next batch is copied while the GPU computes
        overrides["accelerator_config"] = values.get("accelerator_config") or {"non_blocking": True}
    else:
        overrides["use_cpu"] = True
    if not has_eval and (values.get("eval_strategy", "no") != "no" or values.get("eval_on_start")):
        raise UserError(f"{args_file.path}: eval_strategy asks for evaluation. Give --eval_data_path, or set it to no")
    if packing and values.get("neftune_noise_alpha"):
        raise UserError(
            f"{args_file.path}: neftune_noise_alpha scales its noise by the length of a sequence, and a packed batch "
            "is one long sequence. Give --packing=false, or delete the line"
        )
    if not packing and "train_sampling_strategy" not in values:
        overrides["train_sampling_strategy"] = "group_by_length"
    if "ddp_find_unused_parameters" not in values:  # every LoRA weight takes part in every batch
        overrides["ddp_find_unused_parameters"] = False
    overrides["seed"] = values.get("seed", DEFAULT_SEED) if seed is None else seed
    training_args = args_file.build(**overrides, label_names=["labels"])
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training_args, name) < 1:
            raise UserError(f"{args_file.path}: {name} is {getattr(training_args, name)}, expected 1 or more")
    if not 0 <= training_args.seed < 2**32:
        raise UserError(f"seed {training_args.seed}: expected 0 to {2**32 - 1}")
    if training_args.n_gpu > 1:  # the Trainer would wrap the 4-bit model into DataParallel, which cannot copy it
        logger.warning(f"1 of {training_args.n_gpu} GPUs is used; for all of them: torchrun --nproc_per_node N ...")
        training_args._n_gpu = 1
    return training_args
