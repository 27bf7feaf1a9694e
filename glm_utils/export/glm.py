"""Write a merged ChatGLM2-6B for transformers' own GlmForCausalLM: no remote code, and a fast tokenizer.

Implements `ExportFormat` of glm_utils/export/__init__.py. The weights are fp16, since Glm has no int8 or int4 layout.
"""

from functools import partial
from pathlib import Path

import torch

from glm_utils.cli import UserError
from glm_utils.export.chatglm import OTHER_FILE_BYTES, generation_config
from glm_utils.export.fast_tokenizer import chat_template, fast_tokenizer
from glm_utils.export.glm_names import check_native, native_class, native_config, native_tensors
from glm_utils.files import write_json
from glm_utils.merging.merge import MergeJob
from glm_utils.merging.reload_check import check_reload
from glm_utils.merging.write import PROBE_TEXT, Reference, check_base, empty_merged, write_weights

LIBRARY_NAME = "transformers"
USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path).cuda().eval()
messages = [{"role": "user", "content": "你好"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").to(model.device)
answer_ids = model.generate(**inputs, max_new_tokens=512)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer_ids, skip_special_tokens=True))
```

```bash
vllm serve . --served-model-name chatglm2
```"""
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "additional_special_tokens": ["<s>", "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"],
    "split_special_tokens": True,  # "</s>" in a text is encoded as text
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
}


def check(job: MergeJob) -> int:
    """Check that Glm supports the merged model and that the base is complete.

    Returns:
        Size of the directory, in bytes.

    Raises:
        UserError: Another family, int8 or int4 weights, a vocabulary that cannot be converted, or a broken base.
    """
    check_native(job)
    if job.bits:
        raise UserError(
            f"--qbits {job.bits}: --export_format glm writes fp16, because Glm has no int{job.bits} layout. Give "
            "--qbits 0, and let the engine quantize when it loads; --export_format chatglm has int8 and int4"
        )
    check_base(job)
    fast_tokenizer(job.base.vocabulary_path, job.base.tokenizer)
    return sum(spec.num_bytes for spec in job.specs().values()) + OTHER_FILE_BYTES


def write(job: MergeJob, directory: Path) -> Reference:
    """Write weights, fast tokenizer, chat template and configs; returns what ChatGLM2-6B computes in fp32."""
    config = empty_merged(job, bits=0).config
    reference = write_weights(job, directory, partial(native_tensors, config=config), torch.float32)
    fast_tokenizer(job.base.vocabulary_path, job.base.tokenizer).save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {**TOKENIZER_CONFIG, "model_max_length": config.seq_length})
    write_chat_template(job, directory)
    token_ids = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    write_json(directory / "generation_config.json", {**generation_config(job), **token_ids})
    write_json(directory / "config.json", native_config(config, native_class(job)))
    return reference


def write_chat_template(job: MergeJob, directory: Path) -> None:
    """Write the chat template as a file, where transformers and engines look for it."""
    template = chat_template(job.base.tokenizer.prompt_text)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def verify(job: MergeJob, directory: Path, reference: Reference) -> None:
    """Reload the directory without remote code in a fresh process and compare its logits with ChatGLM2-6B's.

    Raises:
        UserError: It does not load, or token ids or logits differ.
    """
    check_reload(directory, PROBE_TEXT, reference.input_ids, reference.logits, job.device, form="native")
