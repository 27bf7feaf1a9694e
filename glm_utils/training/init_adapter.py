"""An adapter from whose weights a new run goes on, --init_lora_path: read, and checked against its base."""

from pathlib import Path

from loguru import logger

from glm_utils.adapter import Adapter, check_trained_on, read_updates
from glm_utils.checkpoint import Checkpoint
from glm_utils.cli import UserError
from glm_utils.family import resolve_lora_targets
from glm_utils.model_files.checkpoint_files import adapter_weights, stored_tensors
from glm_utils.training.lora_flags import contradiction
from glm_utils.training.manifest import adapter_weights_fault


def read_init_adapter(arguments: dict, base: Checkpoint) -> Adapter | None:
    """Read the adapter of --init_lora_path; None without that flag.

    Args:
        arguments: The flags by name.
        base: The base model of the run.

    Raises:
        UserError: Its weights are damaged, NaN or of another shape, or it was trained on another base.
    """
    if arguments["init_lora_path"] is None:
        return None
    adapter = read_updates(Path(arguments["init_lora_path"]).expanduser())
    if fault := adapter_weights_fault(adapter.directory, adapter_weights(adapter.directory)):
        raise UserError(f"--init_lora_path: {fault}. Give an older checkpoint, or the output_dir")
    check_trained_on(adapter, base)
    adapter.check_fit(linear_shapes(base), f"{base.directory} ({base.family.title})")
    logger.info(f"going on from the weights of {adapter.directory}, with a new optimizer and schedule")
    return adapter


def linear_shapes(base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shapes [out, in] of a base's Linear modules, by path, from the headers of its files."""
    return {
        name.removesuffix(".weight"): spec.shape
        for name, spec in stored_tensors(base.directory).items()
        if name.endswith(".weight") and name.split(".")[-2] in base.family.linear_names
    }


def continued_targets(adapter: Adapter, base: Checkpoint, given: str | list[str] | None) -> list[str]:
    """Return the modules to adapt: those of an adapter.

    Args:
        adapter: The adapter, which fits the base.
        base: The base model.
        given: --lora_targets; None: not given.

    Returns:
        Names such as query_key_value where every module of that name is adapted, else whole paths.

    Raises:
        UserError: Others are given.
    """
    names = {path.rpartition(".")[2] for path in adapter.pairs}
    paths = {path for path in linear_shapes(base) if path.rpartition(".")[2] in names}
    targets = (
        sorted(names, key=base.family.linear_names.index) if paths == adapter.pairs.keys() else sorted(adapter.pairs)
    )
    if given is not None and set(resolve_lora_targets(base.family, given)) != set(targets):
        shown = (
            ",".join(targets) if len(targets) <= len(base.family.linear_names) else f"{len(targets)} single modules"
        )
        raise contradiction("lora_targets", given, shown, adapter.directory)
    return targets
