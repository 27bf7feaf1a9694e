"""Base models from a hub, Hugging Face's or ModelScope's: config, tokenizer and weights, never code. No torch."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.family import FAMILIES

Hub = Literal["huggingface", "modelscope"]
PATTERNS = ["*.json", "*.model", "*.safetensors", "pytorch_model*.bin"]  # never *.py
MIRROR = "https://hf-mirror.com"


def check_hub(hub: Hub) -> None:
    """Refuse a hub whose package is not installed.

    Raises:
        UserError: It is not.
    """
    if hub == "modelscope" and importlib.util.find_spec("modelscope") is None:
        raise UserError(
            "--hub modelscope: the package modelscope is not installed. Run pip install '.[modelscope]' -c "
            "constraints.txt, or leave out --hub to take the model from Hugging Face"
        )


def id_on_hub(name: str, hub: Hub) -> str:
    """Return the id of a published base model on a hub, whichever hub's id is given; any other id as it is."""
    for family in FAMILIES:
        here, elsewhere = family.hub_ids, family.modelscope_ids
        if hub == "modelscope":
            here, elsewhere = elsewhere, here
        if name in elsewhere and name not in here:
            logger.info(f"{name} is {here[0]} on {hub}")
            return here[0]
    return name


def download(name: str, hub: Hub) -> Path:
    """Download config, tokenizer and weights of a model, or find them in the hub's cache.

    Args:
        name: Its id; the published ids of one hub serve for the other too.
        hub: The hub.

    Raises:
        UserError: No such model, or it cannot be downloaded and is not in the cache.
    """
    check_hub(hub)
    hub_id = id_on_hub(name, hub)
    try:
        return Path(from_modelscope(hub_id) if hub == "modelscope" else from_huggingface(hub_id))
    except Exception as error:  # without a network, whatever the HTTP library of the hub's package raises
        raise UserError(f"{hub_id}: {explain(error, hub_id, hub)}") from error


def from_huggingface(hub_id: str) -> str:
    """Return the directory of a model of Hugging Face's hub."""
    import huggingface_hub

    try:
        names = huggingface_hub.HfApi().list_repo_files(hub_id)
    except Exception:
        names = []  # no network: snapshot_download finds an earlier download, or raises
    return huggingface_hub.snapshot_download(hub_id, allow_patterns=PATTERNS, ignore_patterns=unneeded(names))


def from_modelscope(hub_id: str) -> str:
    """Return the directory of a model of ModelScope."""
    import modelscope
    from modelscope.hub.api import HubApi

    def fetch(**where: bool) -> str:
        return modelscope.snapshot_download(hub_id, allow_patterns=PATTERNS, ignore_patterns=ignored, **where)

    ignored = None
    try:
        ignored = unneeded([file["Path"] for file in HubApi().get_model_files(hub_id, recursive=True)])
        return fetch()
    except Exception as error:
        return found_earlier(fetch, error)


def found_earlier(fetch: Callable[..., str], error: Exception) -> str:
    """Return the directory of an earlier download, where a network that fails is no fault; else raise the error."""
    if status_of(error) is None:
        try:
            directory = fetch(local_files_only=True)
        except Exception:
            directory = ""
        if directory and (Path(directory) / "config.json").is_file():
            return directory
    raise error


def unneeded(names: list[str]) -> list[str] | None:
    """Return the pattern of the .bin files of a model that has safetensors too; None otherwise."""
    return ["*.bin"] if any(name.endswith(".safetensors") for name in names) else None


def status_of(error: Exception) -> int | None:
    """Return the status of the hub's answer, e.g. 404; None if there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: Exception, hub_id: str, hub: Hub) -> str:
    """Say in one line why a download failed, and what to do.

    Args:
        error: What the hub's package raised.
        hub_id: The model.
        hub: The hub.
    """
    by_hub = {
        "huggingface": ("Hugging Face", f"hf download {hub_id} --local-dir DIR"),
        "modelscope": ("ModelScope", f"modelscope download --model {hub_id} --local_dir DIR"),
    }
    title, command = by_hub[hub]
    if status_of(error) in (401, 403, 404):  # Hugging Face answers 401 where there is no such model
        known = [family.modelscope_ids[0] if hub == "modelscope" else family.hub_ids[0] for family in FAMILIES]
        return f"no such model on {title}, or none that may be read without a login. Known: {', '.join(known)}"
    elsewhere = (
        f"Where huggingface.co cannot be reached, set HF_ENDPOINT={MIRROR}, a mirror, or give --hub modelscope"
        if hub == "huggingface"
        else "Or leave out --hub to take it from Hugging Face"
    )
    return (
        f"could not be downloaded ({type(error).__name__}: {str(error).partition(chr(10))[0]}). Without a network, "
        f"copy the checkpoint here and give its directory; on a machine with one, run {command}. {elsewhere}"
    )
