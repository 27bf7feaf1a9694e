"""Write a merged ChatGLM2-6B for transformers' own GlmForCausalLM: no remote code, and a fast tokenizer.

One of the export formats of merge_lora_and_quantize.py, each a module with `check`, `write` and `verify`. The weights
are fp16: Glm has no int8 or int4 layout of its own.
"""

from functools import partial
from pathlib import Path

import torch

from glm_utils.checkpoint import load_tokenizer
from glm_utils.cli import UserError
from glm_utils.export_chatglm import OTHER_FILE_BYTES, generation_config
from glm_utils.fast_tokenizer import CHAT_TEMPLATE, fast_tokenizer
from glm_utils.merge import MergeJob
from glm_utils.merge_write import PROBE_TEXT, Reference, check_base, empty_merged, write_weights
from glm_utils.native_glm import check_native, native_config, native_tensors
from glm_utils.reload_check import check_reload
from glm_utils.run_record import write_json

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "additional_special_tokens": ["<s>", "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"],
    "split_special_tokens": True,  # control strings in a text stay text
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
}


def check(job: MergeJob) -> int:
    """Check before any work that the merged model can be written for Glm.

    Args:
        job: The merge.

    Returns:
        Size of the directory, in bytes.

    Raises:
        UserError: Another family, quantised weights, a vocabulary that cannot be converted, or a broken base.
    """
    check_native(job)
    if job.bits:
        raise UserError(
            f"--qbits {job.bits}: --export_format glm writes fp16, because Glm has no layout for int{job.bits} rows. "
            "Give --qbits 0, and let the engine quantise when it loads; --export_format chatglm has int8 and int4"
        )
    check_base(job)
    fast_tokenizer(job.base_dir / job.family.tokenizer_file, load_tokenizer(job.base_dir))
    return sum(spec.num_bytes for spec in job.specs().values()) + OTHER_FILE_BYTES


def write(job: MergeJob, directory: Path) -> Reference:
    """Write everything but the run's own records; config.json comes last.

    Args:
        job: The merge.
        directory: Where; it exists.

    Returns:
        What the merged ChatGLM2-6B computes in fp32, for `verify`.
    """
    config = empty_merged(job, bits=0).config
    reference = write_weights(job, directory, partial(native_tensors, config=config), torch.float32)
    fast_tokenizer(job.base_dir / job.family.tokenizer_file, load_tokenizer(job.base_dir)).save(
        str(directory / "tokenizer.json")
    )
    write_json(directory / "tokenizer_config.json", {**TOKENIZER_CONFIG, "model_max_length": config.seq_length})
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    token_ids = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    write_json(directory / "generation_config.json", {**generation_config(job), **token_ids})
    write_json(directory / "config.json", native_config(config, job.family.native_class))
    return reference


def verify(job: MergeJob, directory: Path, reference: Reference) -> None:
    """Reload the directory without remote code in a fresh process and refuse it when its logits differ."""
    check_reload(directory, PROBE_TEXT, reference.input_ids, reference.logits, job.device, form="native")
