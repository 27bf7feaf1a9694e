"""What a directory holds, and which flag or program takes it: advice for a path given to the wrong one. No torch."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from glm_utils.files import peek_json_object

Kind = Literal["adapter", "model", "glm adapter", "glm model", "gguf model", "unfinished training", "file", "unknown"]
MAX_JSON_BYTES = 10_000_000
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class PathFlags(NamedTuple):
    """The flags of a command that take an adapter and a model."""

    adapter: str
    model: str


USE_FLAGS = PathFlags("--lora_path", "--model_path")
TRAINING_FLAGS = PathFlags("--init_lora_path", "--model_name_or_path")


def directory_kind(path: Path) -> Kind:
    """Say what a path holds, from the names of its files and its two smallest JSON files."""
    if path.is_file():
        return "file"
    config, record = (_peek(path / name) for name in ("config.json", "run_config.json"))
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return "glm adapter" if record.get("stage") == "to_glm" else "adapter"
    if (path / "config.json").is_file():
        return "glm model" if config.get("model_type") == "glm" else "model"
    if _gguf_files(path):
        return "gguf model"
    return "unfinished training" if newest_checkpoint(path) or record.get("stage") == "train_qlora" else "unknown"


def advice(path: Path, flags: PathFlags = USE_FLAGS) -> str:
    """Say what a path holds and what to do with it; what it is not, the caller says.

    Args:
        path: The path.
        flags: Those of the command that it was given to.
    """
    kind, source = directory_kind(path), _made_from(path)
    if kind == "file":
        return f"It is a file: give its directory, {path.parent}"
    if kind == "adapter":
        return f"It is a LoRA adapter. Give it as {flags.adapter} {path}"
    if kind == "model":
        return f"It is a model: give it as {flags.model} {path}"
    if kind == "glm model":
        loader = f"AutoModelForCausalLM.from_pretrained({str(path)!r})"
        return f"It is a model for transformers' GlmForCausalLM, which {loader} loads. {source}"
    if kind == "glm adapter":
        return f"It is an adapter for transformers' GlmForCausalLM, for engines such as vLLM. {source}"
    if kind == "gguf model":
        return f"It is a GGUF file for llama.cpp: llama-cli -m {_gguf_files(path)[0]}. {source}"
    if kind == "unfinished training":
        checkpoint = newest_checkpoint(path)
        finish = "repeat the training's command with --resume_from_checkpoint latest"
        if checkpoint is None:
            return "It is a training that was interrupted before its first checkpoint. Start it again"
        return f"It is a training that has not finished: {finish}, or use its checkpoint, {flags.adapter} {checkpoint}"
    if inner := sorted(path.glob("*/adapter_config.json")):
        return f"It holds adapters in directories of their own: give one of them, {flags.adapter} {inner[0].parent}"
    return "Give the output_dir of a training run"


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint-N of a training that holds an adapter."""
    found = [
        (int(match[1]), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d{1,18})", path.name)) and (path / "adapter_config.json").is_file()
        if any((path / name).is_file() for name in ADAPTER_WEIGHTS)
    ]
    return max(found)[1] if found else None


def _gguf_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.gguf")) if path.is_dir() else []


def _made_from(path: Path) -> str:
    """Say what an export was made from, as its run_config.json records it."""
    arguments = _peek(path / "run_config.json").get("arguments")
    arguments = arguments if isinstance(arguments, dict) else {}
    for key, flag in (("lora_path", "--lora_path"), ("model_name_or_path", "--model_path")):
        if isinstance(arguments.get(key), str):
            return f"Here, give what it was made from: {flag} {arguments[key]}"
    return "Here, give what it was made from: an adapter as --lora_path, or a base model as --model_path"


def _peek(path: Path) -> dict:
    """Return the object in a JSON file, empty for any other file: whoever needs its content reports the fault."""
    try:
        is_small_file = path.is_file() and path.stat().st_size <= MAX_JSON_BYTES  # a pipe would never end
    except OSError:
        return {}
    return peek_json_object(path) if is_small_file else {}
