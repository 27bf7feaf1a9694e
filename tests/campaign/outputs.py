"""Commands that write an output at the end: merges, exports and answers, with their uninterrupted results."""

import contextlib
import os
import time
from pathlib import Path

import peft
import torch

from glm_utils.checkpoint import open_checkpoint
from glm_utils.load_model import load_base_model
from tests.campaign.harness import once
from tests.campaign.processes import run
from tests.campaign.trainings import write_rows
from tests.conftest import PROJECT_DIR

BASE_DIR = PROJECT_DIR / "models" / "chatglm2-tiny"
MERGE = ["merge_lora_and_quantize.py", "--device=cpu"]
COMMANDS = {  # by name: the command without its input and output
    "fp16": [*MERGE, "--qbits=0"],
    "int8": [*MERGE, "--qbits=8"],
    "int4": [*MERGE, "--qbits=4"],
    "glm": [*MERGE, "--qbits=0", "--export_format=glm"],
    "gguf": [*MERGE, "--qbits=4", "--export_format=gguf"],
    "to_glm": ["-m", "tools.to_glm"],
    "to_glm of an adapter": ["-m", "tools.to_glm"],
    "answers": ["generate.py", "--device=cpu", "--batch_size=2", "--max_new_tokens=12", "--temperature=0"],
}
NUM_PROMPTS = 12


def make_adapter(directory: Path, number: int) -> None:
    """Write an adapter with random weights."""
    model = load_base_model(open_checkpoint(BASE_DIR))
    model.name_or_path = str(BASE_DIR)
    torch.manual_seed(number)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query_key_value", "dense"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(directory)


def command(shared_dir: Path, name: str, output: str, number: int = 0, overwrite: bool = False) -> list[str]:
    """Return the words of a command; `number` chooses the adapter."""
    adapter_dir = once(shared_dir / f"adapter {number}", lambda directory: make_adapter(directory, number))
    words = [*COMMANDS[name], f"--output_path={output}", *(["--overwrite"] if overwrite else [])]
    if name == "to_glm":
        return [*words, f"--model_name_or_path={BASE_DIR}"]
    if name == "answers":
        prompts_dir = once(
            shared_dir / "prompts", lambda directory: write_rows(directory / "prompts.jsonl", NUM_PROMPTS, "prompts")
        )
        words += [f"--data_path={prompts_dir / 'prompts.jsonl'}"]
    return [*words, f"--lora_path={adapter_dir}"]


def output_name(name: str) -> str:
    """Return the name of a command's output: a directory, or the file of answers."""
    return "out.jsonl" if name == "answers" else "out"


def reference(shared_dir: Path, name: str, number: int = 0, overwrite: bool = False) -> Path:
    """Return the output of an uninterrupted run, computed once."""

    def make(directory: Path) -> None:
        if overwrite:  # run_config.json records the flag, so it replaces something here too
            copy_output(reference(shared_dir, name, 1), directory / output_name(name))
        words = command(shared_dir, name, output_name(name), number, overwrite)
        start_seconds = time.monotonic()
        code, log_path = run(words, directory)
        (directory / "seconds.txt").write_text(str(time.monotonic() - start_seconds))
        assert code == 0, log_path.read_text("utf-8")[-3000:]

    return once(shared_dir / f"output {name} {number} {overwrite}", make) / output_name(name)


def copy_output(source: Path, target: Path) -> None:
    """Copy an output, a file or a directory."""
    for path in [source, *source.rglob("*")]:
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True)
        else:
            place.write_bytes(path.read_bytes())


def contents(output: Path) -> dict[str, bytes]:
    """Return the bytes of an output's files by name; empty if it is absent."""
    paths = [output] if output.is_file() else [path for path in sorted(output.rglob("*")) if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Return the names of files that differ or that only one side has."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def listing(directory: Path) -> list:
    """Return what can be seen of an output while it is written: names, and sizes of files in blocks."""
    found = []
    for folder, _, names in os.walk(directory):
        for path in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(OSError):  # gone meanwhile
                found.append((path, os.stat(path).st_size >> 18))
        found.append((folder, None))
    return sorted(found, key=str)


def leftovers(directory: Path) -> list[str]:
    """Return the hidden files that a command left beside its output; locks may stay."""
    return [path.name for path in directory.iterdir() if path.name.startswith(".") and "lock" not in path.name]


def check_complete(tally, directory: Path, place: Path, expected: dict[str, bytes], what: str) -> None:
    """Check that an output is that of an undisturbed run, and that nothing hidden lies beside it."""
    names = differing(contents(place), expected)
    tally.require(not names, "wrong bits", f"{what}: {names} differ from those of an undisturbed run")
    hidden = leftovers(directory)
    tally.require(not hidden, "other", f"{what}: left beside the output: {hidden}")
