"""The keys of a TrainingArguments file: which there are, their JSON types and ranges, and those that are refused.

A static list, so that a file is checked before transformers is imported, which takes seconds. It covers every
supported version of transformers; tests/test_training_args.py compares it with the installed one.
Source: transformers 5.17 to 5.23, `TrainingArguments`, and 4.30 for the keys of 2023.
"""

from collections.abc import Callable
from dataclasses import dataclass

MAX_INT, MAX_FLOAT = 2**31 - 1, 1e300


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may have.

    Attributes:
        least: The smallest one; with `open_below` it is the largest one that is too small.
        most: The largest one; with `open_above` it is the smallest one that is too large.
        open_below: Whether `least` itself is excluded.
        open_above: Whether `most` itself is excluded.
    """

    least: float = 0
    most: float = MAX_FLOAT
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, number: float) -> bool:
        """Return whether a finite number lies in the range."""
        above = number > self.least if self.open_below else number >= self.least
        return above and (number < self.most if self.open_above else number <= self.most)

    def __str__(self) -> str:
        """Say the range in words."""
        start = f"above {self.least:,}" if self.open_below else f"{self.least:,}"
        if self.most in (MAX_FLOAT, MAX_INT):
            return start if self.open_below else f"{start} or more"
        return f"{start} to below {self.most:,}" if self.open_above else f"{start} to {self.most:,}"


@dataclass(frozen=True)
class Argument:
    """A key of a TrainingArguments file.

    Attributes:
        kind: Type of its value as an annotation; a float may be written as an int.
        range: Which numbers are valid.
        choices: Which texts are valid; None: any.
        refused: Why this project does not support the setting, and what to do instead; a value that is false, empty
            or null turns it off and passes.
        needs: Key without which the setting has no meaning and torch raises an error.
    """

    kind: object
    range: Range | None = None
    choices: tuple[str, ...] | None = None
    refused: str | None = None
    needs: str | None = None


ANY_RATE, POSITIVE = Range(), Range(0, open_below=True)
COUNT, NUMBER = Range(1, MAX_INT), Range(0, MAX_INT)
DECAY = Range(0, 1, open_above=True)
SEEDS = Range(0, 2**32 - 1)  # as numpy takes them
INTERVALS = ("no", "steps", "epoch")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
SCHEDULES = (
    *("linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "warmup_stable_decay"),
    *("cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr"),
    *("reduce_lr_on_plateau", "greedy"),
)
NOT_LOSS = "only the loss is measured during training; evaluate_adapter.py judges the answers. Delete the line"
ONE_MODEL = "each process holds the complete 4-bit model, as torchrun starts it. Delete the line"
NO_JIT = "SIGTERM saves a checkpoint without it, and it writes half-trained adapters as finished. Delete the line"
NO_COMPILE = "how many blocks are recomputed changes with each batch. Delete the line"
NO_UPLOAD = "nothing is uploaded while training. Delete the line, and upload the adapter afterwards: hf upload"
ROUNDED = "the LoRA weights would be rounded before they are saved. Delete the line"
LIGER = "it does not support ChatGLM; fused kernels are used without it. Delete the line"


def _each(argument: Argument, names: str) -> dict[str, Argument]:
    return dict.fromkeys(names.split(), argument)


ARGUMENTS: dict[str, Argument] = {
    # the run
    "output_dir": Argument(str),
    "num_train_epochs": Argument(float, Range(-1, 1_000_000)),  # above 0 without max_steps, see argument_rules.py
    "max_steps": Argument(int, Range(-1, MAX_INT)),
    "seed": Argument(int, SEEDS),
    "data_seed": Argument(int | None, SEEDS),
    "resume_from_checkpoint": Argument(str | bool | None),
    **_each(Argument(bool), "do_train do_eval do_predict full_determinism ignore_data_skip use_cpu"),
    "restore_callback_states_from_checkpoint": Argument(bool),
    # batches
    **_each(Argument(int, COUNT), "per_device_train_batch_size per_device_eval_batch_size"),
    "gradient_accumulation_steps": Argument(int, COUNT),
    **_each(Argument(bool), "auto_find_batch_size average_tokens_across_devices"),
    "train_sampling_strategy": Argument(str, choices=("random", "sequential", "group_by_length")),
    "length_column_name": Argument(str),
    "label_names": Argument(list[str] | None),
    "dataloader_num_workers": Argument(int, Range(0, 256)),
    **_each(Argument(bool), "dataloader_drop_last dataloader_pin_memory remove_unused_columns"),
    **_each(Argument(bool, needs="dataloader_num_workers"), "dataloader_persistent_workers"),
    "dataloader_in_order": Argument(bool),
    "dataloader_prefetch_factor": Argument(int | None, Range(1, 1024), needs="dataloader_num_workers"),
    "dataloader_multiprocessing_context": Argument(
        str | None, choices=("fork", "spawn", "forkserver"), needs="dataloader_num_workers"
    ),
    "accelerator_config": Argument(dict | None),
    # optimizer and schedule
    "optim": Argument(str),  # see argument_rules.py
    "optim_args": Argument(str | None),
    "optim_target_modules": Argument(
        str | list[str] | None, refused="it belongs to GaLore and APOLLO, which are made for full weights. Delete it"
    ),
    **_each(Argument(float, ANY_RATE), "learning_rate weight_decay max_grad_norm"),
    **_each(Argument(float, DECAY), "adam_beta1 adam_beta2"),
    "adam_epsilon": Argument(float, POSITIVE),
    "lr_scheduler_type": Argument(str, choices=SCHEDULES),
    "lr_scheduler_kwargs": Argument(dict | None),
    "warmup_steps": Argument(float, NUMBER),
    "neftune_noise_alpha": Argument(float | None, ANY_RATE),
    "label_smoothing_factor": Argument(
        float,
        refused="the Trainer would compare each position with its own token, not with the next one. Delete the line",
    ),
    # number formats and memory
    **_each(Argument(bool), "bf16 fp16"),
    "tf32": Argument(bool | None),
    **_each(Argument(bool, refused=ROUNDED), "bf16_full_eval fp16_full_eval"),
    **_each(Argument(bool | None), "activation_checkpointing gradient_checkpointing"),
    **_each(Argument(dict | None), "activation_checkpointing_kwargs gradient_checkpointing_kwargs"),
    "torch_empty_cache_steps": Argument(int | None, COUNT),
    "torch_compile": Argument(bool, refused=NO_COMPILE),
    **_each(Argument(str | None, refused=NO_COMPILE), "torch_compile_backend torch_compile_mode"),
    "use_liger_kernel": Argument(bool, refused=LIGER),
    "liger_kernel_config": Argument(dict | None, refused=LIGER),
    "use_cache": Argument(bool, refused="keys and values are not needed for training. Delete the line"),
    # evaluation
    "eval_strategy": Argument(str, choices=INTERVALS),
    "eval_steps": Argument(float | None, ANY_RATE),
    "eval_delay": Argument(float, ANY_RATE),
    "eval_accumulation_steps": Argument(int | None, COUNT),
    **_each(Argument(bool), "eval_on_start eval_do_concat_batches eval_use_gather_object prediction_loss_only"),
    "include_for_metrics": Argument(list[str], refused=NOT_LOSS),
    "batch_eval_metrics": Argument(bool, refused=NOT_LOSS),
    # logs
    "logging_strategy": Argument(str, choices=INTERVALS),
    "logging_steps": Argument(float, ANY_RATE),
    **_each(Argument(bool), "logging_first_step log_on_each_node logging_nan_inf_filter skip_memory_metrics"),
    **_each(Argument(str, choices=(*LOG_LEVELS, "passive")), "log_level log_level_replica"),
    "include_num_input_tokens_seen": Argument(str | bool, choices=("all", "non_padding", "no")),
    "disable_tqdm": Argument(bool | None),
    "report_to": Argument(str | list[str]),
    **_each(Argument(str | None), "run_name trackio_space_id trackio_bucket_id"),
    "trackio_static_space_id": Argument(str | bool | None),
    "project": Argument(str),
    "debug": Argument(str | list[str], refused="a loss or weight that is NaN is found without it. Delete the line"),
    # checkpoints
    "save_strategy": Argument(str, choices=(*INTERVALS, "best")),
    "save_steps": Argument(float, ANY_RATE),
    "save_total_limit": Argument(int | None, COUNT),
    **_each(Argument(bool), "save_only_model save_on_each_node load_best_model_at_end"),
    "enable_jit_checkpoint": Argument(bool, refused=NO_JIT),
    "metric_for_best_model": Argument(str | None, choices=("loss", "eval_loss")),
    "greater_is_better": Argument(
        bool | None, refused="the kept model would be the one with the highest loss. Delete the line"
    ),
    "push_to_hub": Argument(bool, refused=NO_UPLOAD),
    "hub_token": Argument(str | None, refused=f"{NO_UPLOAD}. Every checkpoint would hold the token"),
    **_each(Argument(bool | None), "hub_private_repo hub_always_push"),
    **_each(Argument(str | None), "hub_model_id hub_revision"),
    "hub_strategy": Argument(str, choices=("end", "every_save", "checkpoint", "all_checkpoints")),
    # several processes
    **_each(Argument(bool | None), "ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph"),
    "ddp_bucket_cap_mb": Argument(int | None, COUNT),
    "ddp_backend": Argument(str | None, choices=("nccl", "gloo", "mpi")),
    "ddp_timeout": Argument(int, COUNT),
    "local_rank": Argument(int, Range(-1, MAX_INT)),
    "fsdp": Argument(str | bool | list[str] | None, refused=ONE_MODEL),
    "fsdp_config": Argument(dict | str | None, refused=ONE_MODEL),
    "deepspeed": Argument(dict | str | None, refused=ONE_MODEL),
    "parallelism_config": Argument(dict | None, refused=ONE_MODEL),
}

# ---- keys of 2023

RENAMED_KEYS: dict[str, tuple[str, Callable | None]] = {
    "evaluation_strategy": ("eval_strategy", None),
    "no_cuda": ("use_cpu", None),
    "group_by_length": ("train_sampling_strategy", lambda value: "group_by_length" if value else "random"),
    "include_inputs_for_metrics": ("include_for_metrics", lambda value: ["inputs"] if value else []),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", None),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", None),
    "torchdynamo": ("torch_compile_backend", None),
    "push_to_hub_token": ("hub_token", None),
    "push_to_hub_model_id": ("hub_model_id", None),
}
DROPPED_KEYS = {
    "save_safetensors": "adapters and checkpoints are always safetensors",
    **dict.fromkeys(("half_precision_backend", "fp16_backend", "fp16_opt_level"), "torch's own autocast is used"),
    **dict.fromkeys(("tpu_num_cores", "tpu_metrics_debug", "mp_parameters", "ray_scope"), "it is not supported here"),
    **dict.fromkeys(("use_mps_device", "use_ipex", "xpu_backend"), "the device is found without it"),
    **dict.fromkeys(("jit_mode_eval", "past_index", "use_legacy_prediction_loop"), "evaluation does not use it"),
    "push_to_hub_organization": "hub_model_id holds it",
}
KEPT_KEYS = {"overwrite_output_dir": bool, "logging_dir": str | None}
OTHER_KEYS = ("warmup_ratio", "adafactor", *RENAMED_KEYS, *DROPPED_KEYS, *KEPT_KEYS)
CHECKPOINTING_KEYS = ("activation_checkpointing", "gradient_checkpointing")  # 5.23 and later, before
FLAGS = (  # of train_qlora.py, which people write into the file; tests/test_training_args.py compares them
    *("train_args_json", "model_name_or_path", "hub", "init_lora_path", "train_data_path", "eval_data_path"),
    *("eval_ratio", "max_input_length", "prompt_column", "response_column", "history_column", "sheet"),
    *("max_output_length", "lora_rank", "lora_alpha", "lora_dropout", "prompt_text", "compute_dtype", "lora_targets"),
    *("truncated_answers", "loss_on", "packing", "early_stopping_patience", "log_samples", "dry_run", "output_json"),
    "evaluate_after",
)
JSON_ONLY = dict.fromkeys(  # what people give as a flag, with what they should do
    [key for key in ARGUMENTS if key not in ("seed", "resume_from_checkpoint")],
    "It is a key of the JSON file that --train_args_json names: set it there",
)
