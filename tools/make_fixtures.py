"""Copy the golden vectors of both families to tests/fixtures in a form that can be committed.

    python -m tools.make_fixtures GOLDEN_DIR ADGEN_JSONL [--out tests/fixtures]

File names stay the same; the README.md that this tool writes lists what changes. The result is a few megabytes and
contains no sentence of the ADGEN data set.
"""

import argparse
import json
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

FAMILIES = ("chatglm-6b", "chatglm2-6b")
PROJECT_TEXT = "类型#上衣*材质#牛仔布*颜色#白色"  # the golden vectors' own P1, which happens to open an ADGEN example
WINDOW = 15  # characters shared with an ADGEN text that make a string count as copied from it
MAX_BYTES = 6_000_000
LOGITS_STRIDE = 4  # train_single.npz: every 4th position is enough beside its loss and gradients

README = """# Golden vectors

Made by `python -m tools.make_fixtures` from reference numbers (CPU, fp32) of tiny random-weight models. Do not edit.

* `model/model.safetensors`: fp16, which holds every weight exactly (a tensor that fp16 cannot hold stays fp32).
* `model/model_int8.safetensors`, `model_int4.safetensors`: only the tensors that differ from `model.safetensors`.
  The full checkpoint is `{**model, **model_int4}` with the replaced `weight` entries int8.
* `train_single.npz`: `logits` at `logits_positions` only.
* `variants.npz`: without the P-tuning entries.
* `*.model`: without the paths of the training run.
* JSON entries with ADGEN sentences are left out.
"""


def fold(text: str) -> str:
    """Fold compatibility forms, so that a decoded (normalized) sentence is compared like its original."""
    return unicodedata.normalize("NFKC", text)


class AdgenFilter:
    """Recognizes strings that come from the ADGEN data set.

    Args:
        path: JSON lines with instruction and output.
    """

    def __init__(self, path: Path):
        examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = {fold(example[key]) for example in examples for key in ("instruction", "output")}
        self.texts = texts
        self.windows = {text[i : i + WINDOW] for text in texts for i in range(len(text) - WINDOW + 1)}

    def matches(self, value: object) -> bool:
        """Return whether any string inside a JSON value is an ADGEN text or shares WINDOW characters with one."""
        if isinstance(value, dict):
            return any(self.matches(item) for pair in value.items() for item in pair)
        if isinstance(value, list):
            return any(self.matches(item) for item in value)
        if not isinstance(value, str) or value == PROJECT_TEXT:
            return False
        text = fold(value.replace(PROJECT_TEXT, "\0"))
        return text in self.texts or any(text[i : i + WINDOW] in self.windows for i in range(len(text) - WINDOW + 1))

    def prune(self, value: object) -> object:
        """Return a JSON value without the list items and dictionary entries that match."""
        if isinstance(value, dict):
            pruned = {key: self.prune(item) for key, item in value.items()}
            return {key: item for key, item in pruned.items() if not self.matches(item)}
        if isinstance(value, list):
            return [item for item in value if not self.matches(item)]
        return value


def copy_json(source: Path, target: Path, adgen: AdgenFilter) -> None:
    """Copy a JSON file without ADGEN entries, and without indentation if it is large."""
    data = json.loads(source.read_text(encoding="utf-8"))
    if not adgen.matches(data) and source.stat().st_size < 10_000 or source.name == "state_dict_6b.json":
        shutil.copyfile(source, target)
        return
    text = json.dumps(adgen.prune(data), ensure_ascii=False, separators=(",", ":"))
    target.write_text(text + "\n", encoding="utf-8")


def copy_arrays(source: Path, target: Path) -> None:
    """Compress an npz file, without the arrays that no test needs."""
    with np.load(source) as arrays:
        kept = {name: arrays[name] for name in arrays.files if not name.startswith("ptuning.")}
    if source.name == "train_single.npz":
        positions = np.arange(0, kept["logits"].shape[1], LOGITS_STRIDE)
        kept["logits"], kept["logits_positions"] = kept["logits"][:, positions], positions
    np.savez_compressed(target, **kept)


def copy_weights(source: Path, target: Path, known: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy a safetensors file in fp16 without the tensors that are in `known`; returns all of its tensors."""
    tensors = {}
    for name, tensor in load_file(source).items():
        half = tensor.half() if tensor.is_floating_point() else tensor
        tensors[name] = half if torch.equal(half.to(tensor.dtype), tensor) else tensor
    new = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in known or tensor.dtype != known[name].dtype or not torch.equal(tensor, known[name])
    }
    save_file(new, target, metadata={"format": "pt"})
    target.chmod(0o644)  # save_file leaves it readable by its owner only
    return tensors


def copy_vocabulary(source: Path, target: Path) -> None:
    """Copy a sentencepiece model without the paths of its training files."""
    model = ModelProto.FromString(source.read_bytes())
    model.trainer_spec.ClearField("input")
    model.trainer_spec.ClearField("model_prefix")
    target.write_bytes(model.SerializeToString())


def copy_family(source: Path, target: Path, adgen: AdgenFilter) -> None:
    """Copy one family's golden directory."""
    (target / "model").mkdir(parents=True)
    known = copy_weights(source / "model/model.safetensors", target / "model/model.safetensors", {})
    for path in sorted(p for p in source.rglob("*") if p.is_file() and p.name != "model.safetensors"):
        copy = target / path.relative_to(source)
        if path.suffix == ".npz":
            copy_arrays(path, copy)
        elif path.suffix == ".json":
            copy_json(path, copy, adgen)
        elif path.suffix == ".safetensors":
            copy_weights(path, copy, known)
        elif path.suffix == ".model":
            copy_vocabulary(path, copy)
        else:
            sys.exit(f"{path}: no rule for this kind of file, add one to copy_family")


def main() -> None:
    """Write the fixtures and print their size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden_dir", type=Path, help="directory with one golden directory per family")
    parser.add_argument("adgen_jsonl", type=Path, help="ADGEN examples whose text must not be copied")
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures"), help="replaced family by family")
    args = parser.parse_args()
    adgen = AdgenFilter(args.adgen_jsonl)
    for family in FAMILIES:
        if not (args.golden_dir / family).is_dir():
            sys.exit(f"{args.golden_dir} has no directory {family}: give the directory that holds both families")
    for family in FAMILIES:
        shutil.rmtree(args.out / family, ignore_errors=True)
        copy_family(args.golden_dir / family, args.out / family, adgen)
    (args.out / "README.md").write_text(README, encoding="utf-8")
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {size / 1e6:.2f} MB")
    if size > MAX_BYTES:
        sys.exit(f"more than {MAX_BYTES / 1e6} MB: leave out more")


if __name__ == "__main__":
    main()
