"""The model card of a merged model."""

from pathlib import Path

from glm_utils.merge import MergeJob

LIBRARIES = {"gguf": "gguf"}  # by export format; else transformers
PYTHON_USAGE = """```python
from transformers import AutoModel, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True).half().cuda().eval()
response, history = model.chat(tokenizer, "你好", history=[])
```"""
USAGE = {  # by export format; else PYTHON_USAGE
    "glm": """```python
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
```""",
    "gguf": """```bash
llama-cli -m model.gguf --jinja
ollama create my-chatglm2 -f Modelfile && ollama run my-chatglm2
```""",
}


def merge_card(job: MergeJob, record: dict) -> str:
    """Write the README.md of a merged model.

    Args:
        job: The merge.
        record: The content of its run_config.json.
    """
    base = Path(job.adapter.base_name).name if Path(job.adapter.base_name).is_dir() else job.adapter.base_name
    kind = f"int{job.bits}" if job.bits else "fp16"
    error = record["report"]["relative_weight_error"]
    error_line = f"| squared relative weight error | {error:.3g} |\n" if error is not None else ""
    export_format = record["arguments"]["export_format"]
    usage, library = USAGE.get(export_format, PYTHON_USAGE), LIBRARIES.get(export_format, "transformers")
    packages = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers", "peft"))
    return f"""---
base_model: {base}
library_name: {library}
tags: [chatglm, lora, {kind}]
---
# {base} with a merged LoRA adapter, {kind}

{usage}

| | |
|---|---|
| family | {job.family.title} |
| weights of the layers | {kind} |
| merged into | {job.merge_base} base weights |
| LoRA updates | {len(job.adapter.pairs)} |
{error_line}| written with | {packages} |

run_config.json holds all arguments, versions and the training's settings.
"""
