"""Resolve and check the settings of a training run before its model is loaded: flags, JSON file, base, data."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import peft
from loguru import logger
from transformers import TrainingArguments

from glm_utils.checkpoint import Checkpoint, project_path
from glm_utils.cli import UserError
from glm_utils.data import Example, read_examples
from glm_utils.encoding import Collator, EncodingLimits, PackingCollator
from glm_utils.family import resolve_lora_targets
from glm_utils.run_record import sha256
from glm_utils.training.lora_model import check_lora_settings, make_lora_config
from glm_utils.training.precision import precision_settings, resolve_compute_dtype
from glm_utils.training.sample_answers import check_log_samples
from glm_utils.training.training_args import TrainArgsFile, read_train_args

DEFAULT_SEED = 42
SAMPLE_TRAIN_PATH, SAMPLE_EVAL_PATH = "data/train.jsonl", "data/dev.jsonl"
IDENTITY_ARGUMENTS: tuple[str, ...] = ("lora_rank", "lora_alpha", "lora_dropout", "max_input_length")
IDENTITY_ARGUMENTS += ("max_output_length", "prompt_text", "compute_dtype", "packing")
IDENTITY_TRAINING_ARGS = ("seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy")


@dataclass(frozen=True)
class RunInputs:
    """What the flags name besides the base model, read and checked.

    Attributes:
        arguments: The script's flags by name.
        limits: Limits of the prompt and the answer.
        data_paths: Data files under "train" and, optionally, "eval".
        examples: Their examples under the same keys.
        args_file: The TrainingArguments file; None: the one shipped for the base's family.
    """

    arguments: dict
    limits: EncodingLimits
    data_paths: dict[str, Path]
    examples: dict[str, list[Example]]
    args_file: TrainArgsFile | None


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
    def num_log_samples(self) -> int:
        """How many evaluation examples are answered in TensorBoard's text tab."""
        return self.arguments["log_samples"]

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


def read_inputs(arguments: dict) -> RunInputs:
    """Read and check what the flags of train_qlora.py name besides the base, which may have to be downloaded first.

    Args:
        arguments: The flags by name.

    Raises:
        UserError: A flag, the JSON file or the data is wrong.
    """
    flags = SimpleNamespace(**arguments)
    limits = EncodingLimits(flags.max_input_length, flags.max_output_length, flags.prompt_text)
    data_paths = find_data(flags.train_data_path, flags.eval_data_path)
    examples = {name: read_examples(path) for name, path in data_paths.items()}
    check_lora_settings(flags.lora_rank, flags.lora_alpha, flags.lora_dropout)
    args_file = read_train_args(project_path(flags.train_args_json)) if flags.train_args_json else None
    return RunInputs(arguments, limits, data_paths, examples, args_file)


def resolve_settings(inputs: RunInputs, base: Checkpoint) -> TrainingSettings:
    """Resolve the settings that depend on the base model.

    Args:
        inputs: The flags and files.
        base: The base model.

    Raises:
        UserError: The base is quantized, or settings contradict each other, the base or the hardware.
    """
    flags = SimpleNamespace(**inputs.arguments)
    base.require_unquantized("QLoRA quantizes by itself")
    targets = resolve_lora_targets(base.family, flags.lora_targets)
    args_file = inputs.args_file or read_train_args(project_path(base.family.train_args_json))
    compute_dtype = resolve_compute_dtype(flags.compute_dtype, args_file)
    has_eval = "eval" in inputs.examples
    training_args = make_training_args(args_file, flags.seed, compute_dtype, has_eval, flags.packing)
    check_log_samples(flags.log_samples, has_eval, training_args)
    return TrainingSettings(
        arguments={**inputs.arguments, "compute_dtype": compute_dtype},
        base=base,
        data_paths=inputs.data_paths,
        examples=inputs.examples,
        limits=inputs.limits,
        lora_config=make_lora_config(flags.lora_rank, flags.lora_alpha, flags.lora_dropout, targets),
        compute_dtype=compute_dtype,
        packing=flags.packing,
        args_file=args_file,
        training_args=training_args,
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


def make_training_args(
    args_file: TrainArgsFile, seed: int | None, compute_dtype: str, has_eval: bool, packing: bool
) -> TrainingArguments:
    """Build the TrainingArguments of a run.

    Args:
        args_file: The checked JSON file.
        seed: Overrides the file's seed; None: the file's, else 42.
        compute_dtype: fp32, fp16 or bf16.
        has_eval: Whether there is evaluation data.
        packing: Whether batches are packed; if not, they are made of examples of similar length.

    Raises:
        UserError: Settings that contradict each other or the hardware.
    """
    values, overrides = args_file.values, precision_settings(args_file, compute_dtype)
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
