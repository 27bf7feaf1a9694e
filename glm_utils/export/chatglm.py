"""Write a merged model in the published ChatGLM layout: safetensors, config, tokenizer, remote scripts.

Implements `ExportFormat` of glm_utils/export/__init__.py.
"""

import shutil
from pathlib import Path

from loguru import logger

from glm_utils.checkpoint import MODEL_CLASS, TOKENIZER_CLASS
from glm_utils.files import read_json_object, write_json
from glm_utils.merging.merge import MergeJob
from glm_utils.merging.reload_check import check_reload
from glm_utils.merging.write import PROBE_TEXT, Reference, check_base, merged_config, write_weights

LIBRARY_NAME = "transformers"
USAGE = """```python
from transformers import AutoModel, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True).half().cuda().eval()
response, history = model.chat(tokenizer, "你好", history=[])
```"""
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForCausalLM": MODEL_CLASS,
    "AutoModelForSeq2SeqLM": MODEL_CLASS,
}
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
OTHER_FILE_BYTES = 20_000_000  # an upper bound for tokenizer, scripts and text files


def check(job: MergeJob) -> int:
    """Check that the base is complete.

    Returns:
        Size of the directory, in bytes.

    Raises:
        UserError: Weights are missing, unexpected or of another shape than config.json implies.
    """
    check_base(job)
    return sum(spec.num_bytes for spec in job.specs().values()) + OTHER_FILE_BYTES


def write(job: MergeJob, directory: Path) -> Reference:
    """Write weights, remote scripts, tokenizer and configs; returns what the merged model computes."""
    reference = write_weights(job, directory)
    copy_scripts(job.scripts_dir, directory)
    write_tokenizer(job, directory)
    write_json(directory / "generation_config.json", generation_config(job))
    write_json(directory / "config.json", published_config(job))
    return reference


def verify(job: MergeJob, directory: Path, reference: Reference) -> None:
    """Reload the directory in a fresh process and compare its logits with those computed in memory.

    Raises:
        UserError: It does not load, or token ids or logits differ.
    """
    check_reload(directory, PROBE_TEXT, reference.input_ids, reference.logits, job.device)


def published_config(job: MergeJob) -> dict:
    """Return config.json of the merged model: the base's with new bits, dtype and auto_map."""
    return {**merged_config(job, job.bits), "auto_map": AUTO_MAP, "torch_dtype": "float16", "dtype": "float16"}


def generation_config(job: MergeJob) -> dict:
    """Return the base's generation_config.json; without one, the token ids of its config.json."""
    if (job.base.directory / "generation_config.json").is_file():
        return job.base.generation_settings
    return {key: job.base.config[key] for key in TOKEN_ID_KEYS if job.base.config.get(key) is not None}


def write_tokenizer(job: MergeJob, directory: Path) -> None:
    """Copy the tokenizer files of the base; auto_map then names the remote script in this directory.

    What the training put before every question is recorded; a chat template that somebody gave the base knows nothing
    of it.
    """
    config_path = job.base.directory / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    config["tokenizer_class"] = TOKENIZER_CLASS.rpartition(".")[2]
    config["auto_map"] = {"AutoTokenizer": [TOKENIZER_CLASS, None]}
    if prompt_text := job.base.tokenizer.prompt_text:
        config["prompt_text"] = prompt_text
        if "chat_template" in config or (job.base.directory / "chat_template.jinja").is_file():
            logger.warning(
                f"the chat template of {job.base.directory} is copied as it is: apply_chat_template will not put "
                "prompt_text before the questions, encode_prompt and chat do"
            )
    write_json(directory / "tokenizer_config.json", config)
    for name in (job.base.family.tokenizer_file, "chat_template.jinja"):
        if (job.base.directory / name).is_file():
            shutil.copyfile(job.base.directory / name, directory / name)


def copy_scripts(scripts_dir: Path, directory: Path) -> None:
    """Copy the remote scripts byte for byte."""
    for path in sorted(scripts_dir.glob("*.py")):
        shutil.copyfile(path, directory / path.name)
