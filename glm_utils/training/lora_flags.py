"""The flags of the LoRA weights and their base: given, by default, or those of the adapter of --init_lora_path.

Needs no torch.
"""

from pathlib import Path
from types import SimpleNamespace

from glm_utils.adapter_record import read_training_record
from glm_utils.cli import UserError
from glm_utils.early_checks import check_model_dir, project_path
from glm_utils.family import Family
from glm_utils.model_files.adapter_config import base_name, check_plain_lora, read_adapter_config
from glm_utils.model_files.directory_kind import TRAINING_FLAGS, directory_kind
from glm_utils.prompt_text import adapter_prompt_text

DEFAULTS = {  # of flags that follow the adapter of --init_lora_path, where there is one
    "model_name_or_path": "THUDM/chatglm2-6b",
    "lora_rank": 4,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_targets": "query_key_value",
    "prompt_text": "",
}


def resolve_lora_flags(arguments: dict) -> dict:
    """Fill in what was left out, check the rest.

    Args:
        arguments: All flags by name; None: not given.

    Returns:
        The same without None, but for the targets of an adapter, which are known when its weights are read.

    Raises:
        UserError: A value out of range, an adapter that cannot be trained further, or a flag that contradicts it.
    """
    given = {name: arguments[name] for name in DEFAULTS}
    inherited = (
        inherited_flags(Path(arguments["init_lora_path"]).expanduser(), given) if is_continued(arguments) else {}
    )
    defaults = {**DEFAULTS, **inherited}
    resolved = {name: defaults[name] if value is None else value for name, value in given.items()}
    flags = SimpleNamespace(**resolved)
    check_lora_settings(flags.lora_rank, flags.lora_alpha, flags.lora_dropout, is_continued(arguments))
    return {**arguments, **resolved}


def is_continued(arguments: dict) -> bool:
    """Return whether a run goes on from the weights of an earlier adapter."""
    return arguments["init_lora_path"] is not None


def check_lora_settings(rank: int, alpha: float, dropout: float, is_continued: bool = False) -> None:
    """Check the numbers for `make_lora_config`.

    Args:
        rank: Rank of the LoRA matrices.
        alpha: LoRA scale.
        dropout: Dropout before them.
        is_continued: Whether rank and alpha are those of an adapter, which may have any alpha.

    Raises:
        UserError: A value out of range.
    """
    if rank < 1:
        raise UserError(f"--lora_rank={rank}: expected 1 or more")
    if alpha < 1 and not is_continued:
        raise UserError(f"--lora_alpha={alpha}: expected 1 or more")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora_dropout={dropout}: expected 0 to below 1")


def check_base_dir(name_or_path: str, init_lora_path: str | None) -> Family | None:
    """Check that the base model is there, or is a hub id; return its family, None if only a download tells.

    Args:
        name_or_path: Its directory or hub id.
        init_lora_path: The adapter that names it; None: a flag or the default does.

    Raises:
        UserError: It is not there, or is no base model.
    """
    if directory_kind(project_path(name_or_path)) == "adapter":
        raise UserError(
            f"--model_name_or_path {name_or_path}: a LoRA adapter, not a base model. To train it further, give it as "
            f"--init_lora_path {name_or_path}; to train a new one, give its base, which its adapter_config.json names"
        )
    try:
        return check_model_dir(name_or_path)
    except UserError as error:
        if init_lora_path is None:
            raise
        raise UserError(
            f"the base model of --init_lora_path {init_lora_path} cannot be opened. {error}. If it has moved, give "
            "its directory as --model_name_or_path"
        ) from error


def inherited_flags(adapter_dir: Path, given: dict) -> dict:
    """Return the flags that an adapter implies.

    Args:
        adapter_dir: Directory of the adapter, an output_dir or a checkpoint-N.
        given: The flags that were given; None: not given.

    Raises:
        UserError: Not an adapter of plain LoRA, or a flag that contradicts it.
    """
    config = read_adapter_config(adapter_dir, TRAINING_FLAGS)
    check_plain_lora(config)
    prompt_text = adapter_prompt_text(adapter_dir, read_training_record(adapter_dir))
    fixed = {"lora_rank": config.values["r"], "lora_alpha": config.values["lora_alpha"], "prompt_text": prompt_text}
    for name, value in fixed.items():
        if given[name] is not None and value is not None and given[name] != value:
            raise contradiction(name, given[name], value, adapter_dir)
    return {
        "model_name_or_path": given["model_name_or_path"] or base_name(config),
        "lora_rank": fixed["lora_rank"],
        "lora_alpha": fixed["lora_alpha"],
        "lora_dropout": config.values.get("lora_dropout") or 0.0,
        "lora_targets": None,
        "prompt_text": prompt_text or "",
    }


def contradiction(name: str, given: object, value: object, adapter_dir: Path) -> UserError:
    """Return the error for a flag that differs from what the adapter of --init_lora_path has."""
    return UserError(
        f"--{name} {given!r}: the adapter of --init_lora_path {adapter_dir} has {value!r}. Leave the flag out, or "
        "leave --init_lora_path out to train a new adapter"
    )


def check_init_apart(init_lora_path: str | None, output_dir: str) -> None:
    """Refuse an output directory that is, or holds, the adapter from which the run goes on.

    Args:
        init_lora_path: Directory of the adapter; None: there is none.
        output_dir: The run's output directory.

    Raises:
        UserError: The run would replace what it begins from.
    """
    if init_lora_path is None:
        return
    source, target = (Path(path).expanduser().resolve() for path in (init_lora_path, output_dir))
    if source == target or target in source.parents:
        raise UserError(
            f"output_dir {output_dir} is or holds the adapter of --init_lora_path {init_lora_path}, which would be "
            "replaced. Choose another output_dir; to go on with the same data, give --resume_from_checkpoint latest "
            "instead of --init_lora_path"
        )
