"""Open a base or merged model once, as a record that knows its config, family, tokenizer and classes.

Everything that can be wrong with its files, but for the weights' values, is refused here, before memory is taken.

Code that lies beside a checkpoint or on the hub is never executed: only config, tokenizer and weight files are read,
and the classes come from this project through transformers' own loader.
"""

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer

from glm_utils.cli import UserError
from glm_utils.early_checks import local_model_dir, project_path
from glm_utils.family import Family, detect_family
from glm_utils.hub import Hub, download
from glm_utils.model_files.checkpoint_files import check_checkpoint_files, fingerprint, stored_tensors
from glm_utils.model_files.config_checks import check_config
from glm_utils.model_files.generation_checks import check_streamable, read_generation_settings
from glm_utils.model_files.model_json import read_config, shown
from glm_utils.model_files.tokenizer_checks import check_fits_model, check_tokenizer_files
from glm_utils.model_files.weight_checks import check_stored_weights
from glm_utils.prompt_text import recorded_prompt_text
from glm_utils.remote_code import remote_code

MODEL_CLASS = "modeling_chatglm.ChatGLMForConditionalGeneration"
TOKENIZER_CLASS = "tokenization_chatglm.ChatGLMTokenizer"


class Classes(NamedTuple):
    """The three classes of a family, from remote_scripts."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    tokenizer: type[PreTrainedTokenizer]


@dataclass(frozen=True)
class Checkpoint:
    """A base or merged model directory in the published layout, opened and checked by `open_checkpoint`.

    Attributes:
        name: What an adapter records as its base: the hub id, or the absolute directory.
        directory: Directory of config.json, weights and vocabulary.
        config: The settings in config.json that the model knows, checked.
        family: The model's family.
        classes: The family's configuration, model and tokenizer class.
        prompt_text: What its tokenizer puts before every question, if not what tokenizer_config.json says; None: that.
    """

    name: str
    directory: Path
    config: dict
    family: Family
    classes: Classes
    prompt_text: str | None = None

    @property
    def config_path(self) -> Path:
        """Path of config.json, for messages."""
        return self.directory / "config.json"

    @property
    def quantization_bits(self) -> int:
        """Bits per stored weight of the layers: 4, 8, or 0 for floating-point weights."""
        return self.config.get("quantization_bit") or 0

    @property
    def context_length(self) -> int | None:
        """Longest sequence in tokens; None when config.json does not say."""
        return self.config.get(self.family.max_length_key)

    @property
    def vocabulary_path(self) -> Path:
        """Path of the sentencepiece file."""
        return self.directory / self.family.tokenizer_file

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with config.json and the weights."""
        return fingerprint(self.directory)

    @cached_property
    def model_config(self) -> PretrainedConfig:
        """The configuration object.

        Raises:
            UserError: A setting that this project's model does not support.
        """
        try:
            return self.classes.config.from_dict(self.config)
        except Exception as error:  # ValueError from this project's class, anything from that of transformers
            raise UserError(f"{self.config_path}: {' '.join(str(error).split())}") from error

    @cached_property
    def generation_settings(self) -> dict:
        """What generation_config.json, or without one config.json, says of generation; checked.

        Raises:
            UserError: The file is broken, or a value is of a wrong type or out of range.
        """
        return read_generation_settings(self.directory, self.model_config.vocab_size)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizer:
        """The tokenizer.

        Raises:
            UserError: Its files cannot be read, or are another model's.
        """
        given = {} if self.prompt_text is None else {"prompt_text": self.prompt_text}
        try:
            tokenizer = self.classes.tokenizer.from_pretrained(self.directory, **given)
            tokenizer.decode(tokenizer.encode_prompt("a"))
        except Exception as error:  # what transformers raises for its settings depends on the setting
            fault = " ".join(str(error).split())
            raise UserError(f"{self.vocabulary_path} or tokenizer_config.json: {fault}") from error
        check_fits_model(tokenizer, self.model_config, self.directory)
        return tokenizer

    def with_prompt_text(self, text: str | None, source: str) -> "Checkpoint":
        """Return the checkpoint with the text that was put before every question in a training on it.

        Args:
            text: The text, which may be empty; None: nothing is known of it.
            source: What records the text, for messages.

        Raises:
            UserError: The checkpoint itself records another text.
        """
        own = recorded_prompt_text(self.directory) or ""
        if text is None or text == own:
            return self
        if own:
            raise UserError(
                f"{self.directory}: prompt_text of tokenizer_config.json is {shown(own)}, but {source} says "
                f"{shown(text)}, and one text stands before every question. Give the base that the training ran on"
            )
        return replace(self, prompt_text=text)

    def check(self) -> None:
        """Compare config.json, generation settings, tokenizer settings and stored weights; no weight is read.

        Raises:
            UserError: They are wrong, or do not belong together.
        """
        check_stored_weights(self.directory, self.model_config, self.classes.model, stored_tensors(self.directory))
        check_tokenizer_files(self.directory, self.model_config.vocab_size)
        self.generation_settings  # noqa: B018  # reading them checks them

    def require_streamable(self) -> None:
        """Refuse generation settings that cannot be followed token by token.

        Raises:
            UserError: There are such settings.
        """
        generate_only = sys.modules[self.classes.model.stream_generate.__module__].GENERATE_ONLY
        check_streamable(self.generation_settings, generate_only, self.directory)

    def require_unquantized(self, why: str) -> None:
        """Refuse a checkpoint whose layers hold int4 or int8 weights.

        Args:
            why: Why that does not work, as the end of a sentence.

        Raises:
            UserError: The checkpoint is quantized.
        """
        if self.quantization_bits:
            raise UserError(
                f"{self.config_path}: the weights are quantized already (quantization_bit {self.quantization_bits}), "
                f"and {why}. Give the fp16 checkpoint, e.g. {self.family.hub_ids[0]}"
            )


def open_checkpoint(name_or_path: str | Path, hub: Hub = "huggingface") -> Checkpoint:
    """Find a base or merged model, download it if it is a hub id, and check its files.

    Args:
        name_or_path: Directory, or hub id such as THUDM/chatglm2-6b.
        hub: Where to download it from.

    Raises:
        UserError: Neither a directory nor a reachable hub id, an unknown family, or files that are missing, broken or
            do not belong together.
    """
    directory = find_checkpoint_dir(name_or_path, hub)
    config = read_config(directory)
    family = detect_family(config, directory / "config.json")
    check_checkpoint_files(directory, config, family)
    classes = load_classes(family)
    name = str(directory) if project_path(name_or_path).is_dir() else str(name_or_path)
    config = check_config(config, classes.config, directory / "config.json")
    checkpoint = Checkpoint(name, directory, config, family, classes)
    checkpoint.check()
    return checkpoint


def find_checkpoint_dir(name_or_path: str | Path, hub: Hub = "huggingface") -> Path:
    """Find a model: a local directory, or a hub id, of which config, tokenizer and weights are downloaded.

    Args:
        name_or_path: Directory, or hub id such as THUDM/chatglm2-6b.
        hub: Where to download it from.

    Raises:
        UserError: Neither a directory nor a reachable hub id.
    """
    return local_model_dir(name_or_path) or download(str(name_or_path), hub)


def load_classes(family: Family) -> Classes:
    """Load a family's classes through transformers' loader for remote code.

    The config class is taken from the model class: loaded by itself it would be a different object, and a directory
    saved with that one does not reload.
    """
    model = remote_code(MODEL_CLASS, family.remote_dir)
    return Classes(model.config_class, model, load_tokenizer_class(family))


def load_tokenizer_class(family: Family) -> type[PreTrainedTokenizer]:
    """Load only a family's tokenizer class, which is faster than `load_classes`."""
    return remote_code(TOKENIZER_CLASS, family.remote_dir)
