"""Compare the weights in a model's files with those that its config.json implies, by name, dtype and shape alone."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from glm_utils.cli import UserError
from glm_utils.model_files.tensor_files import TensorSpec

LAYER = re.compile(r".*\.layers\.(\d{1,9})\..*")


def check_num_layers(num_layers: int, specs: Mapping[str, TensorSpec], config_path: Path) -> None:
    """Refuse more layers than the files hold: even without weights, a model of many layers takes long to build.

    Args:
        num_layers: What config.json says.
        specs: The stored tensors.
        config_path: Path of config.json, for the message.

    Raises:
        UserError: The files hold fewer layers.
    """
    stored = {match[1] for name in specs if (match := LAYER.fullmatch(name))}
    if num_layers > len(stored):
        raise UserError(
            f"{config_path}: num_layers is {num_layers}, but the weight files hold {len(stored)} layers. Download "
            "both again, from the same revision"
        )


def check_stored_weights(
    directory: Path, config: PretrainedConfig, model_class: type[PreTrainedModel], specs: Mapping[str, TensorSpec]
) -> None:
    """Refuse files that do not hold exactly the weights of a model, before memory for it is taken.

    Args:
        directory: The model's directory, for messages.
        config: Its configuration.
        model_class: The family's model.
        specs: The stored tensors.

    Raises:
        UserError: Weights are missing, unexpected, or of another shape or kind of number.
    """
    check_num_layers(config.num_hidden_layers, specs, directory / "config.json")
    with torch.device("meta"):
        model = model_class(config)
    state = model.state_dict(keep_vars=True)
    stored_ids = {id(tensor) for name, tensor in state.items() if name in specs}
    mismatched = [
        f"{name} is {_words(specs[name].dtype, specs[name].shape)}, its config.json implies "
        f"{_words(tensor.dtype, tensor.shape)}"
        for name, tensor in state.items()
        if name in specs
        and (
            specs[name].shape != tuple(tensor.shape)
            or specs[name].dtype.is_floating_point != tensor.dtype.is_floating_point
        )
    ]
    # of weights that are one (tied, or an output layer that shares a quantized embedding) one name is enough
    missing = [name for name, tensor in state.items() if name not in specs and id(tensor) not in stored_ids]
    check_weights(directory, mismatched=mismatched, missing=missing, unexpected=specs.keys() - state.keys())


def _words(dtype: torch.dtype, shape: Iterable[int]) -> str:
    """Describe a tensor; every floating-point format can be loaded for every other."""
    return f"{list(shape)}" + ("" if dtype.is_floating_point else f" of {str(dtype).removeprefix('torch.')}")


def check_weights(checkpoint_dir: Path, **faults: Iterable[str]) -> None:
    """Refuse weights that do not match config.json.

    Args:
        checkpoint_dir: The model's directory, for messages.
        **faults: Names of weights by fault: missing, mismatched (a shape may follow the name), unexpected. Rotary
            frequencies may be missing or unexpected: the models compute them, whether they are stored or not.

    Raises:
        UserError: There are such weights.
    """
    for kind, names in faults.items():
        counted = sorted(name for name in names if kind == "mismatched" or not name.endswith("inv_freq"))
        if counted:
            raise UserError(
                f"{checkpoint_dir}: {len(counted)} {kind} weights, e.g. {counted[0]}. The weights must match "
                "config.json; download both again, from the same revision"
            )
