"""Check the JSON files of a tokenizer before transformers reads them, and the tokenizer against the model's config."""

from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedTokenizer

from glm_utils.cli import UserError
from glm_utils.model_files.config_checks import COUNT, Range, value_fault
from glm_utils.model_files.model_json import read_model_json, shown

CONFIG_NAME = "tokenizer_config.json"
TOKEN = str | dict | None
SETTINGS: dict[str, tuple[Any, Range | None]] = {
    "name_or_path": (str | None, None),
    "tokenizer_class": (str | None, None),
    "do_lower_case": (bool | None, None),
    "remove_space": (bool | None, None),
    "num_image_tokens": (int, COUNT),
    "prompt_text": (str, None),
    "model_max_length": (float | None, None),
    "padding_side": (Literal["left", "right"] | None, None),
    "truncation_side": (Literal["left", "right"] | None, None),
    "clean_up_tokenization_spaces": (bool | None, None),
    "split_special_tokens": (bool | None, None),
    "chat_template": (str | list | dict | None, None),
    "additional_special_tokens": (list | None, None),
    "extra_special_tokens": (list | dict | None, None),
    "added_tokens_decoder": (dict, None),
    "model_specific_special_tokens": (dict | None, None),
    "model_input_names": (list[str] | None, None),
    "init_inputs": (list, None),
}
ADDED_TOKEN_FIELDS = {"__type", "content", "lstrip", "rstrip", "normalized", "single_word", "special"}
CONTROL_IDS = ("bos_token_id", "mask_token_id", "gmask_token_id")  # from which positions are counted
OTHER_FILES = ("special_tokens_map.json", "added_tokens.json")


def check_tokenizer_files(directory: Path, vocab_size: int) -> None:
    """Check the settings of a tokenizer.

    Args:
        directory: The model's directory.
        vocab_size: Rows of the embedding.

    Raises:
        UserError: A file is broken, or a value is of a wrong type or out of range.
    """
    path = directory / CONFIG_NAME
    settings = read_model_json(path, byte_order_mark=False) if path.is_file() else {}
    check_settings(settings, path)
    num_images = settings.get("num_image_tokens", 0)
    if num_images > vocab_size:
        raise UserError(f"{path}: num_image_tokens is {num_images}, expected at most the vocabulary's {vocab_size}")
    for path in (directory / name for name in OTHER_FILES):
        if path.is_file():
            found = read_model_json(path, byte_order_mark=False)
            if path.name == "added_tokens.json":
                check_added_tokens({str(index): token for token, index in found.items()}, path)
            else:
                check_settings(found, path)


def check_settings(settings: dict, path: Path) -> None:
    """Check the values of tokenizer_config.json or special_tokens_map.json.

    Raises:
        UserError: A value of a wrong type, or a token that is not one.
    """
    for key, value in settings.items():
        hint, allowed = SETTINGS.get(key, (TOKEN, None) if key.endswith("_token") else (None, None))
        if hint is not None and (fault := value_fault(value, hint, allowed)):
            raise UserError(f"{path}: {key} is {shown(value)}, {fault}")
        several = list(value.values()) if isinstance(value, dict) else value or []
        for token in several if key.endswith("_special_tokens") else [value] if key.endswith("_token") else []:
            check_token(token, f"{path}: {key}")
    check_added_tokens(settings.get("added_tokens_decoder", {}), path)
    if settings.get("init_inputs"):
        raise UserError(f"{path}: init_inputs is {shown(settings['init_inputs'])}, expected none")


def check_added_tokens(tokens: dict, path: Path) -> None:
    """Check tokens by the text of their id.

    Raises:
        UserError: An id is not a number, or a token is not one.
    """
    for index, token in tokens.items():
        if not (index.isascii() and index.isdecimal() and len(index) < 10):
            raise UserError(f"{path}: {shown(index)} is not the id of a token, expected a whole number")
        check_token(token, f"{path}: the token with id {index}")


def check_token(token: object, where: str) -> None:
    """Check that a token is a text, or an object as transformers writes an AddedToken.

    Raises:
        UserError: It is neither.
    """
    if isinstance(token, dict):
        flags = [value for key, value in token.items() if key not in ("content", "__type")]
        if set(token) <= ADDED_TOKEN_FIELDS and type(token.get("content")) is str and {*map(type, flags)} <= {bool}:
            return
    elif token is None or isinstance(token, str):
        return
    raise UserError(f"{where} is {shown(token)}, expected a text, or an object with content and flags")


def check_fits_model(tokenizer: PreTrainedTokenizer, config: PretrainedConfig, directory: Path) -> None:
    """Refuse a tokenizer whose ids are not those of the model.

    Args:
        tokenizer: The tokenizer.
        config: The model's configuration.
        directory: Where both were read, for messages.

    Raises:
        UserError: An id is not a row of the embedding, or a control token has another id than config.json says.
    """
    ids = [*tokenizer.encode_prompt("a"), *tokenizer.encode_answer("a")]
    ids += [len(tokenizer) - 1, *tokenizer.added_tokens_decoder]
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has ids from {min(ids)} to {max(ids)}, config.json has room for 0 to "
            f"{config.vocab_size - 1}. Both must come from the same model"
        )
    for key in CONTROL_IDS:
        expected, found = getattr(tokenizer, key, None), getattr(config, key, None)
        if None not in (expected, found) and expected != found:
            raise UserError(
                f"{directory / 'config.json'}: {key} is {found}, but the tokenizer's is {expected}. Both must come "
                "from the same model"
            )
