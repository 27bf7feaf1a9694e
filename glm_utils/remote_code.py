"""Load classes of remote scripts through transformers' loader, also where caches cannot be written.

The loader copies the scripts into a cache in the home directory. In a container that may be read-only or absent; then
this and the caches of triton and matplotlib go to a private temporary directory, which is removed at the end.
"""

import atexit
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import dynamic_module_utils

from glm_utils.cli import UserError
from glm_utils.disk import existing_parent

OTHER_CACHES = {  # by the variable that moves them; where they are without it
    "TRITON_CACHE_DIR": ("~/.triton/cache",),
    "MPLCONFIGDIR": ("~/.config/matplotlib", "~/.cache/matplotlib"),
}


def remote_code(reference: str, scripts_dir: Path) -> Any:
    """Return a class or function of remote scripts.

    Args:
        reference: module.name.
        scripts_dir: Directory of the scripts.

    Raises:
        UserError: Neither the cache nor a temporary directory can be written to.
    """
    move_other_caches()
    try:
        return dynamic_module_utils.get_class_from_dynamic_module(reference, str(scripts_dir))
    except OSError as error:
        if error.errno is None:  # a script is missing
            raise
        move_modules_cache(error)
        return dynamic_module_utils.get_class_from_dynamic_module(reference, str(scripts_dir))


@functools.cache
def private_dir() -> Path:
    """Make a directory that only this user can look into, and remove it when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="chatglm-caches-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def move_modules_cache(fault: OSError) -> None:
    """Let the loader copy scripts to a private directory, in this process and its children.

    Args:
        fault: Why it cannot copy them to where it wanted.

    Raises:
        UserError: There is no temporary directory.
    """
    old = dynamic_module_utils.HF_MODULES_CACHE
    try:
        new = str(private_dir() / "modules")
    except OSError as error:
        raise UserError(
            f"{old}: cannot be written to ({fault.strerror}), and there is no temporary directory. Set "
            "HF_MODULES_CACHE or TMPDIR to a directory that can be written to"
        ) from error
    logger.info(
        f"{old}: cannot be written to ({fault.strerror}); the model code is copied to a private temporary directory. "
        "Set HF_MODULES_CACHE to keep it elsewhere"
    )
    os.environ["HF_MODULES_CACHE"] = new
    dynamic_module_utils.HF_MODULES_CACHE = new  # read from the environment when transformers was imported
    dynamic_module_utils.init_hf_modules()
    sys.path.remove(new)
    sys.path.insert(0, new)  # before the old place, which may hold some of the scripts
    sys.modules.pop(dynamic_module_utils.TRANSFORMERS_DYNAMIC_MODULE_NAME, None)  # it knows only the old place


@functools.cache
def move_other_caches() -> None:
    """Point libraries whose cache cannot be written to a private directory, before they are imported or used."""
    for variable, places in OTHER_CACHES.items():
        if variable not in os.environ and not all(map(can_be_written, places)):
            try:
                os.environ[variable] = str(private_dir() / variable.lower())
            except OSError:  # without a temporary directory the library says itself what it misses
                return


def can_be_written(place: str) -> bool:
    """Return whether a directory, which need not exist, can be created and written to; `~` is the home directory."""
    path = os.path.expanduser(place)
    try:
        with tempfile.TemporaryFile(dir=existing_parent(Path(path))):
            return not path.startswith("~")  # a user without a home directory
    except OSError:
        return False
