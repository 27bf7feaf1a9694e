"""The 6B checkpoints without their weights: configs, shapes and the kernels' functions.

Configs and shapes come from tests/fixtures/<family>/state_dict_6b.json, those of other sizes from the model class.
"""

import functools
import json
from collections.abc import Callable

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from glm_utils.checkpoint import load_classes
from glm_utils.cli import UserError, nearest
from glm_utils.family import FAMILIES, LINEAR_NAMES, PROJECT_DIR, Family

FIXTURES_DIR = PROJECT_DIR / "tests" / "fixtures"


def find_family(name: str) -> Family:
    """Return a family by its name.

    Raises:
        UserError: No family has this name.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UserError(f"--family {name}: expected one of {', '.join(family.name for family in FAMILIES)}")


def published_model(family: str) -> dict:
    """Return config, n_params and shapes (of every tensor, by name) of a family's 6B checkpoint."""
    return json.loads((FIXTURES_DIR / family / "state_dict_6b.json").read_text())


def resized_model(family: str, config_overrides: dict) -> dict:
    """Return what `published_model` does, for a model of another size.

    Args:
        family: Its name.
        config_overrides: Values by configuration key, in place of the 6B checkpoint's.

    Raises:
        UserError: A key that the 6B checkpoint's configuration does not have.
    """
    config = published_model(family)["config"]
    for key in config_overrides:
        if key not in config:
            raise UserError(f"--config_overrides: {key} is not a key of {family}. {nearest(key, config, 'keys')}")
    config |= config_overrides
    classes = load_classes(find_family(family))
    with torch.device("meta"):
        model = classes.model(classes.config.from_dict(config))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {"config": config, "n_params": sum(map(torch.Tensor.numel, model.parameters())), "shapes": shapes}


def small_ids(family: str) -> dict:
    """Return the special ids of the tests' small tokenizer, by configuration key."""
    small = json.loads((FIXTURES_DIR / family / "model" / "config.json").read_text())
    return {key: value for key, value in small.items() if key.endswith("token_id")}


def layer_shapes(family: str) -> list[tuple[int, int]]:
    """Return (out, in) of the four Linear modules of a 6B checkpoint's layer, in the order of LINEAR_NAMES."""
    shapes = {
        name.split(".")[-2]: tuple(shape)
        for name, shape in published_model(family)["shapes"].items()
        if ".layers.0." in name and name.endswith(".weight")
    }
    return [shapes[name] for name in LINEAR_NAMES]


@functools.cache
def remote_function(name: str) -> Callable:
    """Return a function of the remote scripts, module.name, from a file that is the same for both families."""
    return get_class_from_dynamic_module(name, str(FAMILIES[1].remote_dir))
