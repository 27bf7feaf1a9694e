"""The model cards, README.md of an adapter and of a merged model, with the metadata for the hub."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from glm_utils.run_record import RUN_CONFIG_NAME
from glm_utils.visible_text import markdown_text, visible

MAX_SHOWN_FILES = 20


def base_label(base_name: str) -> str:
    """Return the hub id of a base model, or the name of its directory without the path."""
    return Path(base_name).name if Path(base_name).is_dir() else base_name


def table_rows(values: dict[str, str]) -> str:
    """Return the rows of a two-column Markdown table; names and values are shown as they are."""
    return "\n".join(f"| {markdown_text(name)} | {markdown_text(value)} |" for name, value in values.items())


def describe_files(files: list[dict]) -> str:
    """Name data files, with the examples that were used where not all of them were.

    Args:
        files: As in run_config.json.
    """
    shown = [
        markdown_text(Path(file["path"]).name)
        + (f" ({file['num_used']} of {file['num_rows']})" if file["num_used"] < file["num_rows"] else "")
        for file in files[:MAX_SHOWN_FILES]
    ]
    more = [f"and {len(files) - MAX_SHOWN_FILES} more files"] if len(files) > MAX_SHOWN_FILES else []
    return ", ".join([*shown, *more])


def adapter_card(record: dict, results: dict, settings: dict) -> str:
    """Write the card of a LoRA adapter.

    Args:
        record: The content of run_config.json.
        results: Metrics as in all_results.json.
        settings: Values for the card's table of settings, by name.
    """
    base = base_label(record["base"]["name"])
    losses = {name: f"{value:.4f}" for name, value in results.items() if name.endswith("loss")}
    data = "\n".join(
        f"- {name}: {describe_files(record['data_files'][name])}, {counts['num_rows']} examples, "
        + (f"of which the first {counts['num_checked']} have " if "num_checked" in counts else "")
        + f"{counts['num_tokens']} tokens ({counts['num_trained_tokens']} trained)"
        for name, counts in record["data"].items()
    )
    text = f"""# LoRA adapter for {markdown_text(base)}

A LoRA adapter for {record["base"]["family"]}, trained by `train_qlora.py` on the base in 4-bit NF4 with double
quantization. Load it with `load_chat_model(lora_path=adapter_directory, load_in_4bit=True)` of `glm_utils.chat_model`,
or on the base with `peft.PeftModel.from_pretrained(base, adapter_directory)`.{continued(record)}

## Data

{data}

## Losses

The weights are those of step {results["kept_step"]} of {results["last_step"]}{best_of(results)}.

| | |
|---|---|
{table_rows(losses)}

## Settings

| setting | value |
|---|---|
{table_rows({name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()})}

{RUN_CONFIG_NAME} holds all arguments, package versions and the commit."""
    return _with_metadata(text, base, "peft", ["lora", "qlora", "chatglm"])


def best_of(results: dict) -> str:
    """Say why the weights are not those of the last step; empty if they are."""
    return "" if results["kept_step"] == results["last_step"] else ", where eval_loss was lowest"


def continued(record: dict) -> str:
    """Return the paragraph about the adapter that a training went on from; empty if it began anew."""
    path, digest = record["arguments"].get("init_lora_path"), record["identity"].get("init_lora_sha256")
    if not digest:
        return ""
    name = markdown_text(Path(path).resolve().name)
    return f"\n\nContinued from the adapter {name} (SHA-256 of its weights: {digest}); all figures are of this run."


def merged_card(base_name: str, kind: str, properties: dict[str, str], usage: str, library_name: str) -> str:
    """Write the card of a merged model.

    Args:
        base_name: Directory or hub id of the base.
        kind: fp16, int8 or int4.
        properties: Values for the card's table, by name.
        usage: How to load and run it, in Markdown.
        library_name: The hub's name of the library that loads it.
    """
    base = base_label(base_name)
    text = f"""# {markdown_text(base)} with a merged LoRA adapter, {kind}

{usage}

| | |
|---|---|
{table_rows(properties)}

{RUN_CONFIG_NAME} holds all arguments, versions and the training's settings."""
    return _with_metadata(text, base, library_name, ["chatglm", "lora", kind])


def _with_metadata(text: str, base: str, library_name: str, tags: list[str]) -> str:
    """Prepend the YAML block to a card's text."""
    metadata = ModelCardData(base_model=visible(base), library_name=library_name, tags=tags)
    return str(ModelCard("\n".join(("---", metadata.to_yaml(), "---", text, ""))))
