"""Load files of remote_scripts outside of transformers, each time afresh."""

import importlib
import itertools
import sys
import types

from glm_utils.family import FAMILIES

_numbers = itertools.count()


def load_script(name):
    """Import a file that both families share, e.g. quantization, with new copies of the siblings that it imports."""
    package = types.ModuleType(f"scripts_under_test_{next(_numbers)}")
    package.__path__ = [str(FAMILIES[0].remote_dir)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{name}")


def door(module):
    """Return the kernels_chatglm that a loaded script asks."""
    return sys.modules[f"{module.__name__.rpartition('.')[0]}.kernels_chatglm"]
