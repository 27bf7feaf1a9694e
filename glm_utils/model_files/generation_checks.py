"""Read and check generation_config.json, or what config.json says of generation, before a model is loaded."""

import copy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from glm_utils.cli import UserError
from glm_utils.model_files.config_checks import (
    COUNT,
    POSITIONS,
    SHARE,
    Range,
    check_token_ids,
    value_fault,
)
from glm_utils.model_files.model_json import read_model_json, shown

POSITIVE = Range(1e-6, 1e6)
SETTINGS: dict[str, tuple[Any, Range | None]] = {
    "max_length": (int | None, POSITIONS),
    "max_new_tokens": (int | None, POSITIONS),
    "min_length": (int | None, COUNT),
    "min_new_tokens": (int | None, COUNT),
    "do_sample": (bool | None, None),
    "use_cache": (bool | None, None),
    "num_beams": (int | None, POSITIONS),
    "num_beam_groups": (int | None, POSITIONS),
    "num_return_sequences": (int | None, POSITIONS),
    "max_time": (float | None, Range(0, 1e9)),
    "penalty_alpha": (float | None, SHARE),
    "temperature": (float | None, Range(0, 1e6)),
    "top_k": (int | None, COUNT),
    "top_p": (float | None, SHARE),
    "min_p": (float | None, SHARE),
    "top_h": (float | None, Range(1e-6, 1)),
    "typical_p": (float | None, Range(1e-6, 1)),
    "epsilon_cutoff": (float | None, SHARE),
    "eta_cutoff": (float | None, SHARE),
    "repetition_penalty": (float | None, POSITIVE),
    "encoder_repetition_penalty": (float | None, POSITIVE),
    "length_penalty": (float | None, Range(-1e6, 1e6)),
    "diversity_penalty": (float | None, Range(-1e6, 1e6)),
    "guidance_scale": (float | None, POSITIVE),
    "no_repeat_ngram_size": (int | None, COUNT),
    "encoder_no_repeat_ngram_size": (int | None, COUNT),
    "renormalize_logits": (bool | None, None),
    "remove_invalid_values": (bool | None, None),
    "return_dict_in_generate": (bool | None, None),
    "token_healing": (bool | None, None),
    "low_memory": (bool | None, None),
    "output_attentions": (bool | None, None),
    "output_hidden_states": (bool | None, None),
    "output_scores": (bool | None, None),
    "output_logits": (bool | None, None),
    "bos_token_id": (int | None, COUNT),
    "eos_token_id": (int | list[int] | None, COUNT),
    "pad_token_id": (int | None, COUNT),
    "decoder_start_token_id": (int | None, COUNT),
    "forced_bos_token_id": (int | None, COUNT),
    "forced_eos_token_id": (int | list[int] | None, COUNT),
    "suppress_tokens": (list[int] | None, COUNT),
    "begin_suppress_tokens": (list[int] | None, COUNT),
    "bad_words_ids": (list[list[int]] | None, COUNT),
    "stop_strings": (str | list[str] | None, None),
    "transformers_version": (str | None, None),
    "_from_model_config": (bool | None, None),
}
KNOWN = {*GenerationConfig().to_dict(), *SETTINGS}


def read_generation_settings(directory: Path, vocab_size: int) -> dict:
    """Read how a model generates by default.

    Args:
        directory: The model's directory; config.json counts where there is no generation_config.json.
        vocab_size: Rows of the embedding.

    Returns:
        The settings that GenerationConfig knows.

    Raises:
        UserError: The file is broken, or a value is of a wrong type or out of range.
    """
    path = directory / "generation_config.json"
    is_own = path.is_file()
    path = path if is_own else directory / "config.json"
    found = read_model_json(path) | ({} if is_own else {"_from_model_config": True})
    settings = {key: value for key, value in found.items() if key in KNOWN}
    for key in settings.keys() & SETTINGS:
        if fault := value_fault(settings[key], *SETTINGS[key]):
            raise UserError(f"{path}: {key} is {shown(settings[key])}, {fault}")
        if SETTINGS[key][0] == float | None and settings[key] is not None:
            settings[key] = float(settings[key])  # 2 is one too, but not to transformers
    _check_pairs(settings, path)
    ids = {key: value for key, value in settings.items() if key.endswith(("_token_id", "suppress_tokens"))}
    ids["bad_words_ids"] = [token for word in settings.get("bad_words_ids") or [] for token in word]
    ids["sequence_bias"] = [token for tokens, _ in settings.get("sequence_bias") or [] for token in tokens]
    check_token_ids(ids, vocab_size, path)
    make_generation_config(settings, path)
    return settings


def _check_pairs(settings: dict, path: Path) -> None:
    """Check the two settings that are made of pairs: of a length and a factor, and of tokens and a bias.

    Raises:
        UserError: They are not.
    """
    decay, biases = settings.get("exponential_decay_length_penalty"), settings.get("sequence_bias")
    is_pair = isinstance(decay, list) and len(decay) == 2 and settings.get("eos_token_id") is not None
    if decay is not None and not (is_pair and _are(decay, int, POSITIVE)):
        expected = "expected a length and a factor, beside an eos_token_id"
        raise UserError(f"{path}: exponential_decay_length_penalty is {shown(decay)}, {expected}")
    for pair in biases if isinstance(biases, list) else [] if biases is None else [biases]:
        if not (isinstance(pair, list) and len(pair) == 2 and _are(pair, list[int], Range(-1e6, 1e6))):
            raise UserError(f"{path}: sequence_bias holds {shown(pair)}, expected token ids and a number")


def _are(pair: list, first: Any, second: Range) -> bool:
    """Return whether a pair holds a count, or a list of them, and a number in a range."""
    return not value_fault(pair[0], first, COUNT) and not value_fault(pair[1], float, second)


def make_generation_config(settings: dict, path: Path) -> GenerationConfig:
    """Make the object of transformers, which checks how the settings go together.

    Raises:
        UserError: transformers refuses them.
    """
    try:
        return GenerationConfig.from_dict(copy.deepcopy(settings))
    except Exception as error:  # of settings that are not in SETTINGS, each in its own way
        raise UserError(f"{path}: refused by transformers ({type(error).__name__}: {_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())


def check_streamable(settings: dict, generate_only: dict, directory: Path) -> None:
    """Refuse settings that cannot be followed token by token.

    Args:
        settings: Checked settings.
        generate_only: Settings that only `generate` handles, with the value that asks for nothing.
        directory: The model's directory, for the message.

    Raises:
        UserError: There is such a setting.
    """
    for key, none in generate_only.items():
        if settings.get(key) not in (None, none):
            raise UserError(
                f"{directory}: generation_config.json or config.json asks for {key} {shown(settings[key])}, which is "
                "not done here: chat and evaluation generate token by token. Delete the key there"
            )
