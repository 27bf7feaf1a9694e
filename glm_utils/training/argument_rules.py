"""What the settings of a TrainingArguments file must keep together, checked without transformers."""

from __future__ import annotations  # training_args.py imports this file

import importlib.util
from typing import TYPE_CHECKING

from glm_utils.cli import UserError, nearest
from glm_utils.training.argument_keys import ARGUMENTS
from glm_utils.training.json_faults import as_json

if TYPE_CHECKING:
    from glm_utils.training.training_args import TrainArgsFile

TRACKERS = {  # value of report_to: the module that it needs, what pip installs
    **{name: (name, name) for name in ("tensorboard", "wandb", "swanlab", "mlflow", "clearml", "neptune", "dvclive")},
    **{name: (name, name) for name in ("codecarbon", "trackio", "dagshub")},
    "comet_ml": ("comet_ml", "comet-ml"),
    "azure_ml": ("azureml", "azureml-core azureml-mlflow"),
    "flyte": ("flytekit", "flytekit flytekitplugins-deck-standard"),
    "kubeflow": ("kubeflow", "kubeflow"),
}
REFUSED_OPTIMIZERS = {  # by the beginning of their names
    "galore": "GaLore projects the gradients of full weights, and those of LoRA have a low rank already",
    "apollo": "APOLLO projects the gradients of full weights, and those of LoRA have a low rank already",
    "lomo": "LOMO updates weights within the backward pass, which gradient accumulation and clipping exclude",
    "adalomo": "AdaLomo updates weights within the backward pass, which gradient accumulation and clipping exclude",
    "adamw_torch_xla": "it is made for TPUs",
    "adamw_torch_npu": "it is made for NPUs",
}
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_anyprecision"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "stable_adamw", "grokadamw"),
    *("adafactor", "adagrad", "sgd", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
)
DEFAULT_STEPS = 500  # of transformers, between logs, evaluations and checkpoints
ACCELERATOR_KEYS = ("non_blocking", "use_seedable_sampler", "even_batches")


def check_together(file: TrainArgsFile) -> None:
    """Check the settings of a file that depend on each other or on packages.

    Raises:
        UserError: Two settings exclude each other, one needs another, or a package is not installed.
    """
    check_length(file)
    check_best(file)
    check_needs(file)
    check_trackers(file)
    check_optimizer(file)
    check_nested(file)


def check_length(file: TrainArgsFile) -> None:
    """Refuse a run without steps, which would end with an untrained adapter."""
    values = file.values
    epochs = values.get("num_train_epochs", 3)
    if values.get("max_steps", -1) < 1 and epochs <= 0:
        raise UserError(f"{file.at('num_train_epochs')} is {epochs}, expected above 0: nothing would be trained")


def check_best(file: TrainArgsFile) -> None:
    """Refuse to keep the best checkpoint where no evaluation says which one it is."""
    values = file.values
    keeps_best = values.get("load_best_model_at_end") or values.get("save_strategy") == "best"
    key = "save_strategy" if values.get("save_strategy") == "best" else "load_best_model_at_end"
    if keeps_best and values.get("eval_strategy", "no") == "no":
        raise UserError(f"{file.at(key)} needs evaluations. Set eval_strategy to steps or epoch, or delete the line")
    if key == "save_strategy" and not values.get("metric_for_best_model"):
        raise UserError(f'{file.at(key)} is best: by which figure? Add "metric_for_best_model": "eval_loss"')
    if values.get("load_best_model_at_end"):
        check_kept(file, file.at("load_best_model_at_end"))


def check_kept(file: TrainArgsFile, what: str) -> None:
    """Refuse to keep the best step where checkpoints and evaluations do not meet; transformers asks for that.

    Args:
        file: The file; it evaluates.
        what: The setting or flag that keeps the best step.

    Raises:
        UserError: There are no checkpoints, or save_strategy or save_steps do not go with the evaluations.
    """
    values, evaluates = file.values, file.values["eval_strategy"]
    saves = values.get("save_strategy", "steps")
    if saves == "no":
        raise UserError(f"{what} needs checkpoints. Set save_strategy to {evaluates} in {file.path}")
    if saves not in ("best", evaluates):
        raise UserError(
            f"{what} needs checkpoints and evaluations at the same moments: eval_strategy is {evaluates}, "
            f"save_strategy {saves}. Set save_strategy to {evaluates} in {file.path}"
        )
    eval_steps = values.get("eval_steps") or values.get("logging_steps", DEFAULT_STEPS)
    save_steps = values.get("save_steps", DEFAULT_STEPS)
    if saves == "steps" and min(eval_steps, save_steps) >= 1 and save_steps % eval_steps:
        raise UserError(
            f"{what} needs a save_steps that is a multiple of eval_steps: they are {save_steps} and {eval_steps}. Set "
            f"save_steps to {eval_steps} in {file.path}"
        )


def patience_settings(file: TrainArgsFile, patience: int | None) -> dict:
    """Return what --early_stopping_patience adds to a file: the best step is kept, unless the file says it is not.

    Args:
        file: The checked file.
        patience: The flag; None: not given.

    Raises:
        UserError: The file does not evaluate, or saves no checkpoints that could be kept.
    """
    if patience is None:
        return {}
    flag = f"--early_stopping_patience {patience}"
    if file.values.get("eval_strategy", "no") == "no":
        raise UserError(f"{flag} needs evaluations. Set eval_strategy to steps or epoch in {file.path}")
    if file.values.get("load_best_model_at_end") is False:
        return {}
    check_kept(file, flag)
    return {"load_best_model_at_end": True}


def check_needs(file: TrainArgsFile) -> None:
    """Refuse a setting without the one that it belongs to."""
    for key, value in file.values.items():
        needed = ARGUMENTS[key].needs
        if value and needed and not file.values.get(needed):
            raise UserError(f"{file.at(key)} needs {needed} above 0. Set that too, or delete the line")


def check_trackers(file: TrainArgsFile) -> None:
    """Refuse a report_to that no installed package serves."""
    given = file.values.get("report_to") or []
    names = [given] if isinstance(given, str) else given
    for name in names if names not in (["all"], ["none"]) else []:
        if name not in TRACKERS:
            raise UserError(
                f"{file.at('report_to')}: no {as_json(name)}. {nearest(name, [*TRACKERS, 'none'], 'names')}"
            )
        module, packages = TRACKERS[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"{file.at('report_to')} is {name}, which is not installed. Run pip install {packages}, or set it to "
                '"tensorboard"'
            )


def check_optimizer(file: TrainArgsFile) -> None:
    """Refuse optimizers that cannot train LoRA weights, and unknown ones."""
    name = file.values.get("optim", OPTIMIZERS[0])
    for start, reason in REFUSED_OPTIMIZERS.items():
        if name.startswith(start):
            raise UserError(f"{file.at('optim')} {name} is not supported: {reason}. Choose another, e.g. adamw_torch")
    if name not in OPTIMIZERS:
        found = as_json(name)
        raise UserError(
            f"{file.at('optim')} is {found}, which is no such value. {nearest(name, OPTIMIZERS, 'values')}"
        )


def check_nested(file: TrainArgsFile) -> None:
    """Check the settings inside accelerator_config and those of activation checkpointing."""
    for key, value in (file.values.get("accelerator_config") or {}).items():
        where = file.at("accelerator_config")
        if key not in ACCELERATOR_KEYS:
            raise UserError(f"{where}: {as_json(key)} is not supported, only {', '.join(ACCELERATOR_KEYS)}. Delete it")
        if not isinstance(value, bool):
            raise UserError(f"{where}: {as_json(key)} is {as_json(value)}, expected bool")
    kwargs = file.checkpointing_kwargs or {}
    if file.checkpointing_key and kwargs not in ({}, {"use_reentrant": False}):
        raise UserError(
            f"{file.at(file.checkpointing_key + '_kwargs')} is {as_json(kwargs)}: the memory plan decides which "
            "blocks are recomputed, and how. Delete the line"
        )
