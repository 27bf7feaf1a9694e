"""Resolve and check the settings of a training run before its model is loaded: flags, JSON file, base, data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import peft
from transformers import TrainingArguments

from glm_utils.adapter import Adapter
from glm_utils.checkpoint import Checkpoint, open_checkpoint
from glm_utils.collators import Collator, PackingCollator
from glm_utils.data import Example
from glm_utils.data.drawn import DrawnData
from glm_utils.data.find_files import show_paths
from glm_utils.data.indexed import is_streamed
from glm_utils.data.turns import AnsweredTurns
from glm_utils.encoding import EncodedExamples, encode_examples
from glm_utils.family import resolve_lora_targets
from glm_utils.limits import EncodingLimits
from glm_utils.model_files.checkpoint_files import adapter_weights
from glm_utils.prompt_text import check_only_one, log_prompt_text
from glm_utils.run_record import sha256, sha256_of_files
from glm_utils.training.build_args import make_training_args, try_training_args
from glm_utils.training.init_adapter import continued_targets, read_init_adapter
from glm_utils.training.inputs import RunInputs
from glm_utils.training.lora_flags import check_init_apart
from glm_utils.training.lora_model import continued_lora_config, make_lora_config
from glm_utils.training.precision import resolve_compute_dtype
from glm_utils.training.sample_answers import check_log_samples
from glm_utils.training.shipped_args import check_args_family, shipped_args
from glm_utils.training.steps import examples_per_step, num_steps
from glm_utils.training.streamed import check_streamable, encode_streamed
from glm_utils.training.training_args import TrainArgsFile

IDENTITY_ARGUMENTS: tuple[str, ...] = ("lora_rank", "lora_alpha", "lora_dropout", "max_input_length")
IDENTITY_ARGUMENTS += ("max_output_length", "prompt_text", "compute_dtype", "packing")
IDENTITY_ARGUMENTS += ("prompt_column", "response_column", "history_column", "sheet")
IDENTITY_ARGUMENTS += ("truncated_answers", "loss_on")
IDENTITY_DEFAULTS = {  # of runs that did not record them yet
    **dict.fromkeys(("eval_ratio", "train_mixture", "init_lora_sha256")),
    "truncated_answers": "cut_and_end",
    "loss_on": "last",
}
IDENTITY_TRAINING_ARGS = ("seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy")


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a run, resolved and checked.

    Attributes:
        arguments: The script's flags by name, with compute_dtype and prompt_text resolved.
        base: The base model.
        data: Examples and the files that they are from, under "train" and, optionally, "eval".
        loss_examples: What the loss covers, under the same keys: these examples, or one for each answered turn.
        limits: Limits of the prompt and the answer.
        lora_config: Settings of LoRA.
        init_adapter: The adapter whose weights the run begins with; None: new weights.
        compute_dtype: fp32, fp16 or bf16.
        packing: Whether the examples of a batch are packed into one sequence instead of padded.
        args_file: The TrainingArguments file.
        training_args: The TrainingArguments made from it.
    """

    arguments: dict
    base: Checkpoint
    data: DrawnData
    loss_examples: Mapping[str, Sequence[Example]]
    limits: EncodingLimits
    lora_config: peft.LoraConfig
    init_adapter: Adapter | None
    compute_dtype: str
    packing: bool
    args_file: TrainArgsFile
    training_args: TrainingArguments

    @property
    def examples(self) -> Mapping[str, Sequence[Example]]:
        """The examples under "train" and, optionally, "eval"."""
        return self.data.examples

    @property
    def output_dir(self) -> Path:
        """Directory that the run writes to."""
        return Path(self.training_args.output_dir)

    @property
    def resume_from(self) -> str | bool | None:
        """The checkpoint to resume from, by the flag or else by the JSON file; see `find_checkpoint` in resume.py."""
        return self.arguments["resume_from_checkpoint"] or self.training_args.resume_from_checkpoint

    @property
    def described_arguments(self) -> dict:
        """The flags, with the data files that were taken."""
        named = [name for name in self.data.files if name == "train" or not self.data.held_out]
        return {**self.arguments, **{f"{name}_data_path": show_paths(self.data.paths(name)) for name in named}}

    @property
    def num_log_samples(self) -> int:
        """How many evaluation examples are answered in TensorBoard's text tab."""
        return self.arguments["log_samples"]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run, those before a checkpoint included."""
        if self.limits.truncated_answers == "drop":  # how many are left out is known when they are encoded
            return num_steps(len(self.encoded["train"].dataset), self.training_args)
        return num_steps(len(self.loss_examples["train"]), self.training_args)

    @cached_property
    def encoded(self) -> dict[str, EncodedExamples]:
        """The examples that the loss covers, encoded once."""
        tokenizer, max_length = self.base.tokenizer, self.base.context_length
        return {
            name: (encode_streamed if is_streamed(part) else encode_examples)(part, tokenizer, self.limits, max_length)
            for name, part in self.loss_examples.items()
        }

    @cached_property
    def collator(self) -> Collator | PackingCollator:
        """Turns encoded examples into batches."""
        if self.packing:
            return PackingCollator()
        return Collator(self.base.tokenizer.pad_token_id, self.base.family.padding_side)

    @cached_property
    def identity(self) -> dict:
        """Settings that a resumed run must share: they fix the weights' shapes, the data order and the randomness."""
        init = self.init_adapter
        return {
            "init_lora_sha256": sha256(adapter_weights(init.directory)) if init else None,
            "base_fingerprint": self.base.fingerprint,
            "lora_targets": sorted(self.lora_config.target_modules),
            "train_data_sha256": sha256_of_files(self.data.paths("train")),
            **self.data.identity,
            **self._evaluation_identity(),
            **{key: self.arguments[key] for key in IDENTITY_ARGUMENTS},
            **{key: getattr(self.training_args, key) for key in IDENTITY_TRAINING_ARGS},
            "rows_per_step": examples_per_step(self.training_args),
        }

    def _evaluation_identity(self) -> dict:
        """Return the hash of the evaluation data where it decides which step is kept, or where the run stops."""
        decides = self.training_args.load_best_model_at_end or self.arguments["early_stopping_patience"]
        if not decides or self.data.held_out or "eval" not in self.data.files:
            return {}
        return {"eval_data_sha256": sha256_of_files(self.data.paths("eval"))}


def resolve_settings(inputs: RunInputs) -> TrainingSettings:
    """Open the base model, and resolve the settings that depend on it.

    Args:
        inputs: The flags and files. A TrainingArguments file among them is checked before the base is downloaded.

    Raises:
        UserError: The base cannot be opened or is quantized, or settings contradict each other, the base or the
            hardware.
    """
    flags = SimpleNamespace(**inputs.arguments)
    early = resolve_training_args(inputs, inputs.args_file) if inputs.args_file else None
    base = open_checkpoint(flags.model_name_or_path, flags.hub)
    base.require_unquantized("QLoRA quantizes by itself")
    if flags.init_lora_path is None:  # an adapter of a base with a text recorded that text
        check_only_one(flags.prompt_text, base.directory)
    base = base.with_prompt_text(flags.prompt_text or None, flags.init_lora_path or "--prompt_text")
    log_prompt_text(base.tokenizer.prompt_text)
    args_file = inputs.args_file or shipped_args(base.family)
    if inputs.family is None:  # a hub id that told nothing before it was downloaded
        check_args_family(args_file, base.family, base.name)
    check_init_apart(flags.init_lora_path, args_file.values["output_dir"])
    init_adapter = read_init_adapter(inputs.arguments, base)
    lora_config = resolve_lora(flags, base, init_adapter)
    resolved = early or resolve_training_args(inputs, args_file)
    decided = {
        "compute_dtype": resolved.compute_dtype,
        "prompt_text": base.tokenizer.prompt_text,
        "lora_targets": flags.lora_targets or sorted(lora_config.target_modules),
    }
    return TrainingSettings(
        arguments={**inputs.arguments, **decided},
        base=base,
        data=resolved.data,
        loss_examples=resolved.loss_examples,
        limits=inputs.limits,
        lora_config=lora_config,
        init_adapter=init_adapter,
        compute_dtype=resolved.compute_dtype,
        packing=flags.packing,
        args_file=args_file,
        training_args=resolved.training_args,
    )


class Resolved(NamedTuple):
    """What follows from a TrainingArguments file: number format, arguments and, drawn by their seed, the data."""

    compute_dtype: str
    training_args: TrainingArguments
    data: DrawnData
    loss_examples: Mapping[str, Sequence[Example]]


def resolve_lora(flags: SimpleNamespace, base: Checkpoint, init_adapter: Adapter | None) -> peft.LoraConfig:
    """Return the settings of LoRA: those of the flags, or of the adapter from which the run goes on.

    Raises:
        UserError: --lora_targets names no module of the family, or others than the adapter has.
    """
    if init_adapter:
        targets = continued_targets(init_adapter, base, flags.lora_targets)
        return continued_lora_config(init_adapter, flags.lora_dropout, targets)
    targets = resolve_lora_targets(base.family, flags.lora_targets)
    return make_lora_config(flags.lora_rank, flags.lora_alpha, flags.lora_dropout, targets)


def resolve_training_args(inputs: RunInputs, args_file: TrainArgsFile) -> Resolved:
    """Make the TrainingArguments of a run, try them, and draw its data.

    Raises:
        UserError: Settings that contradict each other or the hardware, or that a library does not take.
    """
    flags = SimpleNamespace(**inputs.arguments)
    has_eval = inputs.data.has_eval
    compute_dtype = resolve_compute_dtype(flags.compute_dtype, args_file)
    training_args = make_training_args(
        args_file, flags.seed, compute_dtype, has_eval, flags.packing, flags.early_stopping_patience
    )
    check_log_samples(flags.log_samples, has_eval, training_args)
    data = inputs.data.draw(training_args.seed)
    check_streamable(data.examples, args_file, training_args, flags.loss_on)
    loss_examples: Mapping[str, Sequence[Example]] = {
        name: AnsweredTurns(part) if flags.loss_on == "all" else part for name, part in data.examples.items()
    }
    try_training_args(args_file, training_args, num_steps(len(loss_examples["train"]), training_args))
    return Resolved(compute_dtype, training_args, data, loss_examples)
