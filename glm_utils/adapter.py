"""Read a LoRA adapter, W' = W + scale * B @ A for each adapted weight, and open the base that it names.

Nothing of the files reaches peft: the settings are checked first (adapter_config.py), ranks and shapes are compared
with them, and `LoraPair` is what a merge and `load_model` take.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger
from safetensors.torch import load_file

from glm_utils.adapter_record import read_training_record
from glm_utils.checkpoint import Checkpoint, open_checkpoint
from glm_utils.cli import UserError
from glm_utils.hub import Hub
from glm_utils.model_files.adapter_config import MERGE_ELSEWHERE, AdapterConfig, base_name, check_plain_lora
from glm_utils.model_files.checkpoint_files import adapter_weights, check_adapter_files
from glm_utils.model_files.model_json import shown
from glm_utils.model_files.module_names import is_module_name, summarize
from glm_utils.model_files.tensor_files import list_bin, list_tensors, load_bin
from glm_utils.prompt_text import adapter_prompt_text, log_prompt_text

LORA_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraPair:
    """The update scale * b @ a of one weight [out, in].

    Attributes:
        a: fp32 [r, in].
        b: fp32 [out, r].
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that is updated."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that can be merged.

    Attributes:
        directory: Directory that it was read from.
        base_name: Directory or hub id of the base that it was trained on.
        pairs: The updates by module path in the base model, e.g. "transformer.layers.0.attention.dense".
        run_config: What train_qlora.py recorded beside it; empty for adapters of other tools.
        config: Its settings; those of no file for the adapter without updates that stands for a plain base.
    """

    directory: Path
    base_name: str
    pairs: dict[str, LoraPair]
    run_config: dict = field(default_factory=dict)
    config: AdapterConfig = field(default_factory=AdapterConfig)

    def check_fit(self, linears: Mapping[str, tuple[int, ...]], base: str) -> None:
        """Check that the adapter updates the Linear modules that its settings name, all of them and no others.

        Args:
            linears: Shapes [out, in] of the weights of the base's Linear modules, by path.
            base: The base, for messages.

        Raises:
            UserError: The adapter belongs to another model, or its file is incomplete.
        """
        where = f"{self.directory}: the adapter does not fit this base model, {base}:"
        if unknown := self.pairs.keys() - linears.keys():
            raise UserError(
                f"{where} the base has no Linear {summarize(unknown)}. Was it trained on a model of another family?"
            )
        for path, pair in self.pairs.items():
            if tuple(linears[path]) != pair.shape:
                raise UserError(f"{where} {path} is {list(linears[path])}, the adapter updates {list(pair.shape)}")
        if self.config.targets is None:
            return
        named = {path for path in linears if self.config.is_adapted(path)}
        if missing := named - self.pairs.keys():
            raise UserError(f"{where} its weights of {summarize(missing)} are missing. Copy the adapter again")
        if unexpected := self.pairs.keys() - named:
            raise UserError(
                f"{where} unexpected weights of {summarize(unexpected)}, which target_modules of {self.config.path} "
                "does not name. Copy the adapter again"
            )


def read_adapter(adapter_dir: Path) -> Adapter:
    """Read an adapter directory written by peft, including peft 0.4 (adapter_model.bin), and find its base's name.

    Raises:
        UserError: Not an adapter, settings beyond plain LoRA, weights that are incomplete or of the wrong shape, or no
            base that could be opened.
    """
    adapter = read_updates(adapter_dir)
    return Adapter(adapter_dir, base_name(adapter.config), adapter.pairs, adapter.run_config, adapter.config)


def read_updates(adapter_dir: Path) -> Adapter:
    """Read an adapter that need not name its base; its base_name is then empty.

    Raises:
        UserError: See `read_adapter`.
    """
    config = check_adapter_files(adapter_dir)
    check_plain_lora(config)
    recorded = read_training_record(adapter_dir)
    return Adapter(adapter_dir, "", read_pairs(adapter_dir, config), recorded, config)


def find_base(adapter: Adapter, hub: Hub = "huggingface") -> Checkpoint:
    """Open the base model that an adapter names, a directory or an id of a hub; check that it was trained on that.

    Its tokenizer puts before every question what the training put there.

    Raises:
        UserError: The base cannot be found, is broken or quantized, or is another revision, or both record a
            prompt_text.
    """
    text = adapter_prompt_text(adapter.directory, adapter.run_config)
    try:
        base = open_checkpoint(adapter.base_name, hub)
    except UserError as error:
        raise UserError(
            f"the base model of {adapter.directory} cannot be opened. {error}. If the base has moved, write its path "
            f"to base_model_name_or_path in {adapter.directory / 'adapter_config.json'}"
        ) from error
    base.require_unquantized(
        f"a LoRA update cannot be added to integer weights (base_model_name_or_path of {adapter.directory})"
    )
    check_trained_on(adapter, base)
    log_prompt_text(text)
    return base.with_prompt_text(text, str(adapter.directory))


def check_trained_on(adapter: Adapter, base: Checkpoint) -> None:
    """Check that an adapter was trained on a base; one without a record is believed, with a warning.

    Raises:
        UserError: It was trained on another one, or another revision.
    """
    trained_on = adapter.run_config.get("identity", {}).get("base_fingerprint")
    if trained_on and trained_on != base.fingerprint:
        raise UserError(
            f"{base.directory} is not the base that {adapter.directory} was trained on: its fingerprint is "
            f"{base.fingerprint}, run_config.json recorded {shown(trained_on)}. Restore that revision of the "
            "base, or train on this one"
        )
    if not trained_on:
        logger.warning(
            f"{adapter.directory} has no run_config.json: assuming that its base is {base.directory}, unchanged"
        )


def read_pairs(adapter_dir: Path, config: AdapterConfig) -> dict[str, LoraPair]:
    """Read the A and B matrices of every adapted module.

    Args:
        adapter_dir: A checked adapter directory.
        config: Its settings.

    Returns:
        The pairs by module path.

    Raises:
        UserError: A key that is not a LoRA matrix of a Linear, A without B, a rank other than the config's, or numbers
            that are not finite.
    """
    path = adapter_weights(adapter_dir)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        match = LORA_KEY.fullmatch(key) if isinstance(key, str) else None
        if not match or not is_module_name(match["path"]):
            raise UserError(f"{path}: weight {shown(key)} is not a LoRA matrix of a Linear. {MERGE_ELSEWHERE}")
        matrices = sides.setdefault(match["path"], {})
        if match["side"] in matrices:
            raise UserError(f"{path}: lora_{match['side']} of {match['path']} stands twice. Copy the adapter again")
        matrices[match["side"]] = tensor
    if not sides:
        raise UserError(f"{path}: the adapter holds no weights. Was the training interrupted?")
    return {module: make_pair(module, matrices, config, path) for module, matrices in sides.items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checked file, mapped into memory.

    Raises:
        UserError: The file is damaged, or holds something other than tensors.
    """
    if path.suffix == ".safetensors":
        list_tensors(path)
        return load_file(path)
    tensors = load_bin(path)
    list_bin(path, tensors)
    return tensors


def make_pair(module: str, matrices: dict[str, torch.Tensor], config: AdapterConfig, path: Path) -> LoraPair:
    """Check the two matrices of a module and put them together.

    Args:
        module: Path of the module.
        matrices: By side, A and B.
        config: The adapter's settings.
        path: The file, for messages.

    Raises:
        UserError: See `read_pairs`.
    """
    if set(matrices) != {"A", "B"}:
        found, missing = ("lora_A", "lora_B") if "A" in matrices else ("lora_B", "lora_A")
        raise UserError(f"{path}: {module} has only {found}, {missing} is missing. Is the file incomplete?")
    a, b = matrices["A"], matrices["B"]
    rank, shapes = config.rank(module), f"A {list(a.shape)}, B {list(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank or 0 in (*a.shape, *b.shape):
        raise UserError(f"{path}: {module} has {shapes}, but adapter_config.json says rank {rank}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise UserError(f"{path}: {module} has A of {a.dtype}, B of {b.dtype}, expected floating-point numbers")
    a, b = a.float(), b.float()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UserError(f"{path}: {module} holds NaN or infinite numbers. The training diverged; train again")
    return LoraPair(a, b, config.scale(module))
