"""Write a merged model in the published ChatGLM layout: safetensors, config, tokenizer, remote scripts, model card.

One of the export formats of merge_lora_and_quantize.py, each a module with `check`, `write` and `verify`.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from glm_utils.checkpoint import MODEL_CLASS, TOKENIZER_CLASS, load_tokenizer
from glm_utils.checkpoint_files import read_json_object
from glm_utils.cli import UserError
from glm_utils.merge import MergeJob
from glm_utils.reload_check import check_reload
from glm_utils.run_record import write_json
from glm_utils.shard_writer import ShardWriter
from glm_utils.shards import TensorSpec
from glm_utils.streamed import empty_model, streamed_logits

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForCausalLM": MODEL_CLASS,
    "AutoModelForSeq2SeqLM": MODEL_CLASS,
}
PROBE_TEXT = "你好"
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
OTHER_FILE_BYTES = 20_000_000  # room for tokenizer, scripts and texts


class Reference(NamedTuple):
    """What the merged model computed in memory.

    Attributes:
        input_ids: Token ids of PROBE_TEXT, length T.
        logits: fp32 [T, V].
    """

    input_ids: list[int]
    logits: torch.Tensor


def check(job: MergeJob) -> int:
    """Check that the base holds every weight of its model, before any work.

    Args:
        job: The merge.

    Returns:
        Size of the directory, in bytes.

    Raises:
        UserError: Weights that are missing or of another shape than the config says.
    """
    model = _empty(job, quantization_bit=0)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: spec.shape for name, spec in job.reader.specs.items()}
    missing = sorted(set(expected) - set(found))
    if missing:
        raise UserError(f"{job.base_dir}: {len(missing)} weights are missing, e.g. {missing[0]}. Download it again")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{job.base_dir}: {name} is {list(found[name])}, its config.json implies {list(shape)}")
    return sum(spec.num_bytes for spec in job.specs().values()) + OTHER_FILE_BYTES


def write(job: MergeJob, directory: Path) -> Reference:
    """Write everything but the run's own records; config.json comes last.

    Args:
        job: The merge.
        directory: Where; it exists.

    Returns:
        What the merged model computes, for `verify`.
    """
    reference = write_weights(job, directory)
    copy_scripts(job.scripts_dir, directory)
    write_tokenizer(job, directory)
    write_json(directory / "generation_config.json", generation_config(job))
    write_json(directory / "config.json", merged_config(job))
    return reference


def verify(job: MergeJob, directory: Path, reference: Reference) -> None:
    """Reload the directory in a fresh process and refuse it when its logits differ from those in memory."""
    check_reload(directory, PROBE_TEXT, reference.input_ids, reference.logits, job.device)


def write_weights(job: MergeJob, directory: Path) -> Reference:
    """Merge, quantise and write all weights; the model runs on the probe as its modules are made.

    Args:
        job: The merge.
        directory: Where the shards go.
    """
    input_ids = load_tokenizer(job.base_dir).encode_prompt(PROBE_TEXT)
    specs = in_model_order(job)
    writer = ShardWriter(directory, specs)
    made: dict[str, torch.Tensor] = {}
    left = list(specs)
    with tqdm(total=writer.num_bytes, unit="B", unit_scale=True, desc="merge", mininterval=0.5) as bar:

        def make(key: str) -> torch.Tensor:
            if key not in made:
                for name, tensor in job.make(key.removesuffix("_scale")).items():
                    writer.write(name, tensor)
                    left.remove(name)
                    bar.update(specs[name].num_bytes)
                    made[name] = tensor
            return made.pop(key)

        try:
            logits = streamed_logits(_empty(job), input_ids, make, job.device)
            for name in list(left):  # what no module uses: stored rope frequencies
                if name in left:
                    make(name)
            writer.close()
        finally:
            writer.abandon()
    return Reference(input_ids, logits)


def in_model_order(job: MergeJob) -> dict[str, TensorSpec]:
    """Return the tensors to be written in the order in which the model holds them."""
    specs = job.specs()
    order = [name for name in _empty(job).state_dict() if name in specs]
    return {name: specs[name] for name in [*order, *(name for name in specs if name not in set(order))]}


def _empty(job: MergeJob, **changes: int):
    """Build the merged model without weights, from the remote scripts that go with it."""
    model_class = get_class_from_dynamic_module(MODEL_CLASS, str(job.scripts_dir))
    config = model_class.config_class.from_dict({**merged_config(job), **changes})
    return empty_model(lambda: model_class(config))


def merged_config(job: MergeJob) -> dict:
    """Return config.json of the merged model: the base's, with what changed."""
    config = {key: value for key, value in job.base_config.items() if key != "_name_or_path"}
    config.update(auto_map=AUTO_MAP, torch_dtype="float16", dtype="float16")
    for key in ("quantization_bit", "quantization_embeddings"):
        config.pop(key, None)
    if job.bits:
        config.update(quantization_bit=job.bits)
    return config


def generation_config(job: MergeJob) -> dict:
    """Return the base's generation_config.json, or the token ids of its config."""
    path = job.base_dir / "generation_config.json"
    if path.is_file():
        return read_json_object(path)
    return {key: job.base_config[key] for key in TOKEN_ID_KEYS if job.base_config.get(key) is not None}


def write_tokenizer(job: MergeJob, directory: Path) -> None:
    """Copy the tokenizer files of the base, with an auto_map that names the remote script."""
    config_path = job.base_dir / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    config["tokenizer_class"] = TOKENIZER_CLASS.rpartition(".")[2]
    config["auto_map"] = {"AutoTokenizer": [TOKENIZER_CLASS, None]}
    write_json(directory / "tokenizer_config.json", config)
    for name in (job.family.tokenizer_file, "chat_template.jinja"):
        if (job.base_dir / name).is_file():
            shutil.copyfile(job.base_dir / name, directory / name)


def copy_scripts(scripts_dir: Path, directory: Path) -> None:
    """Copy the remote scripts byte for byte."""
    for path in sorted(scripts_dir.glob("*.py")):
        shutil.copyfile(path, directory / path.name)
