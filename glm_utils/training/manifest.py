"""Is a checkpoint complete? manifest.json has size and SHA-256 of every file; earlier versions wrote none."""

import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from glm_utils.disk import sync
from glm_utils.files import JSON_ERRORS, peek_json_object, write_json
from glm_utils.run_record import RUN_CONFIG_NAME, sha256

STAGE = "train_qlora"
MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
STATE_NAMES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
RNG_NAMES = ("rng_state.pth", "rng_state_0.pth")  # of one process, of the first of several
NUMBERS = {"global_step": int, "best_global_step": int | None, "epoch": int | float, "best_metric": int | float | None}


def is_own(directory: Path) -> bool:
    """Return whether a run of this project wrote a checkpoint or an output directory."""
    return STAGE in [peek_json_object(directory / name).get("stage") for name in (RUN_CONFIG_NAME, MANIFEST_NAME)]


def write_manifest(directory: Path) -> None:
    """Write size and SHA-256 of every file in a directory, which is complete otherwise."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    write_json(directory / MANIFEST_NAME, {"format": MANIFEST_FORMAT, "stage": STAGE, "files": files})
    sync(directory)


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Say which file of a checkpoint is missing or damaged.

    Returns:
        File and fault; None if the checkpoint is complete.
    """
    incomplete = f"{checkpoint}: not a complete checkpoint"
    if not (checkpoint / RUN_CONFIG_NAME).is_file():
        return f"{incomplete}, {RUN_CONFIG_NAME} missing, so nothing says which run it belongs to"
    if fault := manifest_fault(checkpoint):
        return fault
    is_good = Path.is_file if (checkpoint / MANIFEST_NAME).is_file() else is_readable  # hashes say more
    broken = [name for name in STATE_NAMES if not is_good(checkpoint / name)]
    found = sorted({*RNG_NAMES, *(path.name for path in checkpoint.glob("rng_state_*.pth"))})
    states = [name for name in found if (checkpoint / name).is_file()]
    broken += [name for name in states or RNG_NAMES[:1] if not is_good(checkpoint / name)]
    if broken:
        hint = " (save_only_model writes such checkpoints)" if "optimizer.pt" in broken else ""
        return f"{incomplete}, {', '.join(broken)} missing or truncated{hint}"
    return state_fault(checkpoint / STATE_NAMES[0]) or adapter_fault(checkpoint)


def manifest_fault(checkpoint: Path) -> str | None:
    """Say which file differs from the manifest; None if none does, or if an earlier version wrote no manifest."""
    path = checkpoint / MANIFEST_NAME
    if not path.is_file():
        needed = "format_version" in peek_json_object(checkpoint / RUN_CONFIG_NAME)
        return f"{checkpoint}: not a complete checkpoint, {MANIFEST_NAME} missing or truncated" if needed else None
    files = peek_json_object(path).get("files")
    if not isinstance(files, dict) or not all(map(is_entry, files.items())):
        return f"{path}: broken, expected size and SHA-256 of every file"
    for name, entry in files.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size < entry["bytes"]:
            return f"{checkpoint}: not a complete checkpoint, {name} missing or truncated"
        if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            return f"{file}: its content differs from {MANIFEST_NAME}"
    return None


def adapter_weights_fault(directory: Path, weights: Path) -> str | None:
    """Say that an adapter's weights are not those that its checkpoint was written with; None without a manifest.

    Args:
        directory: A checkpoint; other files of it may have been deleted since.
        weights: The file in it.
    """
    files = peek_json_object(directory / MANIFEST_NAME).get("files")
    entry = files.get(weights.name) if isinstance(files, dict) else None
    is_other = isinstance(entry, dict) and entry.get("sha256") != sha256(weights)
    return f"{weights}: its content differs from {MANIFEST_NAME}" if is_other else None


def is_entry(item: tuple[str, object]) -> bool:
    """Return whether a name and its value are an entry of a manifest: a file inside, its size, its hash."""
    name, entry = item
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(entry, dict) and type(entry.get("bytes")) is int and "sha256" in entry


def is_readable(path: Path) -> bool:
    """Return whether a file exists; if torch wrote it, whether it has its end and the checksums in it are right."""
    if path.suffix == ".json":
        return path.is_file()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        return False


def state_fault(path: Path) -> str | None:
    """Say what the Trainer could not go on from in trainer_state.json."""
    try:
        state = TrainerState.load_from_json(str(path))
    except (OSError, TypeError, *JSON_ERRORS) as error:
        return f"{path}: broken, {error}"
    for name, kind in NUMBERS.items():
        value = getattr(state, name)
        if isinstance(value, bool) or not isinstance(value, kind):
            return f"{path}: {name} is {value!r}, expected a number"
    if state.global_step < 1:
        return f"{path}: global_step is {state.global_step}, expected the number of steps that are done"
    history = state.log_history
    if not isinstance(history, list) or not all(isinstance(entry, dict) and "step" in entry for entry in history):
        return f"{path}: log_history is not a list of reports with their steps"
    return None


def adapter_fault(checkpoint: Path) -> str | None:
    """Say what is wrong with the adapter in a checkpoint."""
    config_path, weights_path = checkpoint / "adapter_config.json", checkpoint / "adapter_model.safetensors"
    if peek_json_object(config_path).get("peft_type") != "LORA":
        return f"{config_path}: missing or broken, expected the configuration of a LoRA adapter"
    try:
        with safe_open(weights_path, framework="pt"):
            return None
    except (OSError, SafetensorError):
        return f"{checkpoint}: not a complete checkpoint, {weights_path.name} missing or truncated"
