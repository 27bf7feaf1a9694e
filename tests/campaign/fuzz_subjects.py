"""What is fuzzed: per subject the file that is damaged, and the reading stages of the commands that meet it."""

import csv
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from loguru import logger
from safetensors.torch import load_file, save_file

import train_qlora
from glm_utils.adapter import find_base, read_adapter
from glm_utils.checkpoint import open_checkpoint
from glm_utils.data import read_examples
from glm_utils.data.forms import Columns
from glm_utils.device import resolve_device
from glm_utils.encoding import EncodingLimits, encode_examples
from glm_utils.export import EXPORTS
from glm_utils.inference.chat import ChatSession, chat_settings
from glm_utils.inference.prompt_file import encode_prompts, read_prompts
from glm_utils.load_model import find_model, load_base_model
from glm_utils.merging.job import make_job
from glm_utils.merging.shards import CheckpointReader
from tests.campaign import mutations
from tests.campaign.trainings import COMMON
from tests.conftest import FAMILY_BY_NAME, FIXTURES_DIR, PROJECT_DIR

MESSAGES = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
ROWS = [
    {"content": "类型#裙*颜色#白", "summary": "百搭"},
    {"instruction": "你好", "input": "", "output": "好", "history": [["a", "b"], ["c", "d"]]},
    {"messages": MESSAGES},
    {"content": "b" * 700, "summary": "c" * 50},
]
SMALL = {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"}


class Reached(Exception):
    """Everything was read; the work would begin here."""


@dataclass
class Files:
    """A scratch directory with a base, an adapter and data, of which one file is damaged at a time."""

    directory: Path
    family: str

    def __post_init__(self):
        source = FIXTURES_DIR / self.family / "model"
        self.base, self.adapter = self.directory / "base", self.directory / "adapter"
        self.base.mkdir(parents=True)
        for path in source.iterdir():
            if "int4" not in path.name and "int8" not in path.name:
                shutil.copyfile(path, self.base / path.name)
        self.train = self.directory / "train.jsonl"
        self.train.write_bytes(b"\n".join(map(mutations.dump, [ROWS[0]] * 2)))
        self.checkpoint = open_checkpoint(self.base)
        self.tokenizer = self.checkpoint.tokenizer

    def make_adapter(self) -> None:
        """Write an adapter of the base."""
        model = load_base_model(self.checkpoint)
        model.name_or_path = str(self.base)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query_key_value"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(self.adapter)
        (self.adapter / "run_config.json").write_text(json.dumps(RUN_CONFIG))

    def shard(self) -> None:
        """Split the base's weights over two files with an index."""
        path = self.base / "model.safetensors"
        state = load_file(path)
        path.unlink()
        names = sorted(state)
        halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file_name, part in halves.items():
            save_file({name: state[name] for name in part}, self.base / file_name, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, part in halves.items() for n in part}}
        (self.base / "model.safetensors.index.json").write_text(json.dumps(index))


RUN_CONFIG = {
    "stage": "train_qlora",
    "base": {"name": "base", "family": "chatglm2-6b", "fingerprint": "0" * 16},
    "arguments": {"lora_rank": 2, "compute_dtype": "fp32", "prompt_text": ""},
    "training_args": {"max_steps": 2},
    "identity": {"seed": 42, "lora_rank": 2},
    "versions": {"torch": "2.13.0"},
    "commit": None,
}


def read_training(files: Files, args_path: Path | None = None, **flags: object) -> None:
    """Let train_qlora read everything, up to the model."""
    if args_path is None:
        args_path = files.directory / "args.json"
        args_path.write_text(json.dumps({**SMALL, "output_dir": str(files.directory / "out")}))
    values = {
        "train_args_json": str(args_path),
        "train_data_path": str(files.train),
        "eval_data_path": str(files.train),
    }
    with_model = {"model_name_or_path": str(files.base), **values, **flags}
    train_qlora.train_qlora(**with_model, dry_run=True)


def stop_before_the_model() -> None:
    """Let train_qlora raise Reached where it would load the model."""
    from glm_utils.training import lora_model

    def reached(*args: object, **kwargs: object) -> None:
        raise Reached

    lora_model.make_lora_model = reached
    if hasattr(train_qlora, "make_lora_model"):
        train_qlora.make_lora_model = reached


def open_base(files: Files) -> None:
    """Read a base as chat and training do."""
    checkpoint, _ = find_model(str(files.base), None)
    assert checkpoint.model_config
    checkpoint.tokenizer.encode_prompt("你好")
    assert checkpoint.fingerprint


def read_weights(files: Files) -> None:
    """Read every weight of a base as a merge does."""
    open_base(files)
    reader = CheckpointReader(files.base)
    for name in reader.specs:
        reader.read(name)


def read_for_merge(files: Files) -> None:
    """Read an adapter and its base as a merge does, up to the writing."""
    adapter = read_adapter(files.adapter)
    job = make_job(adapter, find_base(adapter), 4, resolve_device("cpu"), None, "nf4")
    EXPORTS["chatglm"].check(job)


def answer(files: Files) -> None:
    """Load a base and answer with two tokens."""
    checkpoint, _ = find_model(str(files.base), None)
    model = load_base_model(checkpoint).eval()
    session = ChatSession(model, checkpoint.tokenizer, chat_settings(model, 16, None, None))
    for _, _piece in zip(range(2), session.ask("a"), strict=False):
        pass


def prompts_file(rng: random.Random, files: Files) -> Path:
    """Write a damaged file of prompts as CSV, text or JSONL."""
    kind = rng.choice(("csv", "txt", "jsonl", "json"))
    path = files.directory / f"prompts.{kind}"
    if kind == "csv":
        out = io.StringIO()
        writer = csv.writer(out, delimiter=rng.choice(",;\t"))
        header = rng.choice((["prompt", "x"], ["content", "summary"], ["a"], [""], ["prompt", "prompt"]))
        writer.writerows(
            [header, *([rng.choice(mutations.ODD_TEXTS) for _ in range(rng.randrange(4))] for _ in "abc")]
        )
        encoding = rng.choice(("utf-8", "utf-8-sig", "gb18030", "utf-16"))  # GBK has no halves of surrogate pairs
        data = out.getvalue().encode(encoding, "replace" if encoding == "gb18030" else "surrogatepass")
    elif kind == "txt":
        data = "\n".join(rng.choices(mutations.ODD_TEXTS, k=4)).encode("utf-8", "surrogatepass")
    else:
        data = mutations.mutate_lines(rng, [{"prompt": "a"}, *ROWS], ("prompt", "content"))
    path.write_bytes(mutations.mutate_bytes(rng, data) if rng.random() < 0.3 else data)
    return path


# ---- the subjects: damage one file, then read


def fuzz_data(rng: random.Random, files: Files) -> None:
    extra = ("history", "input", "messages", "system", "role", "content", "tools", "output")
    rows = [rng.choice(ROWS)] * rng.randint(1, 5) if rng.random() < 0.8 else ROWS  # a file has one form
    files.train.write_bytes(mutations.mutate_lines(rng, rows, extra))
    examples = read_examples(files.train, needs_answer=rng.random() < 0.8)
    limits = EncodingLimits(rng.choice((8, 64, 512)), rng.choice((1, 16, 1536)))
    encode_examples(examples, files.tokenizer, limits, 2048)


def fuzz_prompts(rng: random.Random, files: Files) -> None:
    column = rng.choice((None, None, "prompt", "x", "\x1b[0m"))
    encode_prompts(read_prompts(prompts_file(rng, files), Columns(prompt=column)), files.checkpoint)


def fuzz_settings(rng: random.Random, files: Files) -> None:
    path = files.directory / "settings.json"
    value = {**COMMON, **rng.choice((SMALL, SHIPPED)), "output_dir": str(files.directory / "out")}
    path.write_bytes(mutations.mutate_json(rng, value, ALL_KEYS))
    read_training(files, path)


def fuzz_config(rng: random.Random, files: Files) -> None:
    path = files.base / "config.json"
    path.write_bytes(mutations.mutate_json(rng, CONFIGS[files.family], CONFIG_KEYS))
    open_base(files)
    (read_training if rng.random() < 0.5 else answer)(files)


def fuzz_index(rng: random.Random, files: Files) -> None:
    path = files.base / "model.safetensors.index.json"
    value = json.loads(path.read_bytes())
    if rng.random() < 0.5:
        name = rng.choice(list(value["weight_map"]))
        odd = (
            "../base/model-00001-of-00002.safetensors",
            str(files.base / "x.safetensors"),
            "/etc/passwd",
            ".",
            "a/b",
        )
        value["weight_map"][name] = rng.choice((*odd, *mutations.ODD_VALUES, *mutations.ODD_TEXTS))
        path.write_bytes(mutations.dump(value))
    else:
        path.write_bytes(mutations.mutate_json(rng, value))
    read_weights(files)


def fuzz_adapter_config(rng: random.Random, files: Files) -> None:
    path = files.adapter / "adapter_config.json"
    value = json.loads(path.read_bytes())
    value |= rng.choice(({}, {"rank_pattern": {"query_key_value": 2}}, {"alpha_pattern": {"layers.0": 3}}))
    path.write_bytes(mutations.mutate_json(rng, value, tuple(value)))
    read_for_merge(files)


def fuzz_run_config(rng: random.Random, files: Files) -> None:
    (files.adapter / "run_config.json").write_bytes(mutations.mutate_json(rng, RUN_CONFIG))
    read_for_merge(files)


def fuzz_adapter_weights(rng: random.Random, files: Files) -> None:
    path = files.adapter / "adapter_model.safetensors"
    path.write_bytes(mutations.mutate_safetensors(rng, path.read_bytes()))
    read_for_merge(files)


def fuzz_weights(rng: random.Random, files: Files) -> None:
    path = files.base / "model.safetensors"
    path.write_bytes(mutations.mutate_safetensors(rng, path.read_bytes()))
    read_weights(files)


def fuzz_bin(rng: random.Random, files: Files) -> None:
    path = files.base / "pytorch_model.bin"
    path.write_bytes(mutations.mutate_bytes(rng, path.read_bytes()))
    read_weights(files)


def fuzz_tokenizer_config(rng: random.Random, files: Files) -> None:
    path = files.base / "tokenizer_config.json"
    extra = ("added_tokens_decoder", "chat_template", "padding_side", "tokenizer_class", "auto_map", "bos_token")
    path.write_bytes(mutations.mutate_json(rng, json.loads(path.read_bytes()), (*extra, "model_max_length")))
    open_base(files)


def fuzz_vocabulary(rng: random.Random, files: Files) -> None:
    path = files.base / FAMILY_BY_NAME[files.family].tokenizer_file
    path.write_bytes(mutations.mutate_bytes(rng, path.read_bytes()))
    open_base(files)


def fuzz_generation_config(rng: random.Random, files: Files) -> None:
    value = {"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.8, "do_sample": True}
    path = files.base / "generation_config.json"
    path.write_bytes(mutations.mutate_json(rng, {**value, rng.choice(GENERATION_KEYS): 1}, GENERATION_KEYS))
    answer(files)


def make_bin(files: Files) -> None:
    """Store the base's weights as published ones are."""
    path = files.base / "model.safetensors"
    torch.save(load_file(path), files.base / "pytorch_model.bin")
    path.unlink()


CONFIGS = {name: json.loads((FIXTURES_DIR / name / "model" / "config.json").read_bytes()) for name in FAMILY_BY_NAME}
SHIPPED = json.loads((PROJECT_DIR / "chatGLM2_6B_QLoRA.json").read_bytes())
CONFIG_KEYS = ("num_labels", "id2label", "pruned_heads", "quantization_bit", "rope_ratio", "rmsnorm", "pre_seq_len")
CONFIG_KEYS += ("hidden_dropout", "torch_dtype", "quantization_config", "auto_map", "max_position_embeddings")
CONFIG_KEYS += ("tie_word_embeddings", "architectures", "model_type", "eos_token_id", "attn_implementation")
GENERATION_KEYS = ("num_beams", "num_return_sequences", "max_time", "penalty_alpha", "repetition_penalty")
GENERATION_KEYS += ("max_new_tokens", "max_length", "min_length", "top_k", "typical_p", "no_repeat_ngram_size")
GENERATION_KEYS += (
    "suppress_tokens",
    "forced_bos_token_id",
    "stop_strings",
    "custom_generate",
    "cache_implementation",
)
GENERATION_KEYS += ("watermarking_config", "guidance_scale", "dola_layers", "prompt_lookup_num_tokens", "eos_token_id")


def all_keys() -> tuple[str, ...]:
    """Return the names of all TrainingArguments."""
    import dataclasses

    from transformers import TrainingArguments

    return tuple(field.name for field in dataclasses.fields(TrainingArguments))


ALL_KEYS = all_keys()


@dataclass(frozen=True)
class Subject:
    """What is fuzzed.

    Attributes:
        share: Of 50,000 cases.
        fuzz: Damages one file and reads it.
        prepare: Makes the files that the base alone lacks.
        damaged: The files that are restored between cases, below the scratch directory.
        per_test: Cases of one test; slow subjects have fewer.
    """

    share: int
    fuzz: Callable[[random.Random, Files], None]
    prepare: Callable[[Files], None] = lambda files: None
    damaged: str = "*"
    per_test: int = 500


SUBJECTS = {
    "data files": Subject(8000, fuzz_data),
    "files of prompts": Subject(4000, fuzz_prompts),
    "TrainingArguments JSON": Subject(9000, fuzz_settings, per_test=300),
    "config.json": Subject(6000, fuzz_config, per_test=200),
    "index.json": Subject(3500, fuzz_index, Files.shard, per_test=250),
    "adapter_config.json": Subject(5000, fuzz_adapter_config, Files.make_adapter, per_test=250),
    "run_config.json": Subject(1500, fuzz_run_config, Files.make_adapter, per_test=250),
    "adapter weights": Subject(2500, fuzz_adapter_weights, Files.make_adapter, per_test=250),
    "safetensors": Subject(4000, fuzz_weights, per_test=250),
    "pytorch_model.bin": Subject(1000, fuzz_bin, make_bin, per_test=125),
    "tokenizer_config.json": Subject(2500, fuzz_tokenizer_config, per_test=250),
    "vocabulary": Subject(1500, fuzz_vocabulary, per_test=250),
    "generation_config.json": Subject(1500, fuzz_generation_config, per_test=100),
}


def quiet() -> None:
    """Keep 50,000 warnings out of the log."""
    logger.remove()
