"""Load a written model directory in a fresh process, as a user would, and compare its logits with the expected ones.

    python -m glm_utils.merging.reload_check request.json

`check_reload` runs this command; the request names the directory, a text, the device and the result file. Models of
more than FULL_RELOAD_MAX_BYTES are built without weights, which are then loaded module by module while the model runs,
so that the check takes no more memory than the merge.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from loguru import logger
from safetensors.torch import load_file, save_file

from glm_utils.cli import UserError
from glm_utils.family import PROJECT_DIR
from glm_utils.merging.layer_streaming import empty_model, streamed_logits
from glm_utils.merging.shards import CheckpointReader
from glm_utils.signals import end_with_parent

FULL_RELOAD_MAX_BYTES = 2_000_000_000
MAX_LOGGED_LINES = 30  # of what the fresh process said before it failed
FULL, BY_MODULE = "from_pretrained", "from_config, filled module by module"


class Form(NamedTuple):
    """How a directory is loaded and checked.

    Attributes:
        auto_class: Class of transformers that loads it.
        remote_code: Whether the model code is in the directory.
        dtype: What the check computes in.
        tolerance: Largest allowed difference of a logit, relative to the largest logit.
    """

    auto_class: str
    remote_code: bool
    dtype: torch.dtype
    tolerance: float


FORMS = {
    # 1e-3 is one rounding of fp16: the same code on the same machine gives 0
    "published": Form("AutoModel", remote_code=True, dtype=torch.float16, tolerance=1e-3),
    # another implementation, which sums in fp32 in another order
    "native": Form("AutoModelForCausalLM", remote_code=False, dtype=torch.float32, tolerance=1e-4),
}


def check_reload(
    directory: Path,
    text: str,
    input_ids: list[int],
    logits: torch.Tensor,
    device: torch.device,
    form: str = "published",
) -> None:
    """Reload a directory in a fresh process and compare token ids and logits of a prompt.

    Args:
        directory: The written directory.
        text: The prompt.
        input_ids: Its expected token ids, length T.
        logits: Its expected logits, fp32 [T, V].
        device: Device of the reloaded model.
        form: A key of FORMS.

    Raises:
        UserError: The directory does not load, or its token ids or logits differ.
    """
    # in the directory, which can be written to; the system's temporary directory may be small, or read-only
    with tempfile.TemporaryDirectory(dir=directory, prefix=".reload-") as scratch:
        result_path, request_path = Path(scratch, "result.safetensors"), Path(scratch, "request.json")
        request: dict = {"directory": str(directory), "text": text, "device": str(device), "form": form}
        request |= {"result": str(result_path), "parent_id": os.getpid()}
        request_path.write_text(json.dumps(request), encoding="utf-8")
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "glm_utils.merging.reload_check", str(request_path)]
        child = subprocess.run(command, cwd=PROJECT_DIR, env=environment, capture_output=True, text=True)
        if child.returncode:
            lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            for line in lines[-MAX_LOGGED_LINES:-1]:
                logger.info(line)
            raise UserError(f"the written model does not load in a fresh process: {lines[-1]}")
        result = load_file(result_path)
    if result["input_ids"].tolist() != input_ids:
        raise UserError(f"the written tokenizer differs: {result['input_ids'].tolist()}, expected {input_ids}")
    difference = (result["logits"] - logits).abs().max().item()
    largest = logits.abs().max().item()
    if not difference <= FORMS[form].tolerance * largest:  # NaN compares as False and is refused
        raise UserError(f"the written model differs: logits by up to {difference:g}, the largest is {largest:g}")
    logger.info(
        f"fresh process, {FORMS[form].auto_class}.{reload_method(directory)}: {logits.numel()} logits of {text!r} "
        f"differ by at most {difference:g} (largest {largest:.3g})"
    )


def reload_method(directory: Path) -> str:
    """Return FULL or, for a large model, BY_MODULE."""
    num_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return FULL if num_bytes <= FULL_RELOAD_MAX_BYTES else BY_MODULE


def main(request_path: Path) -> None:
    """Run in the fresh process: write token ids and logits of the request's text to its result file."""
    request = json.loads(request_path.read_text(encoding="utf-8"))
    end_with_parent(request["parent_id"])
    directory, device, form = Path(request["directory"]), request["device"], FORMS[request["form"]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=form.remote_code)
    if form.remote_code:
        input_ids = tokenizer.encode_prompt(request["text"])
    else:
        messages = [{"role": "user", "content": request["text"]}]
        input_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    compute_logits = full_logits if reload_method(directory) == FULL else by_module_logits
    logits = compute_logits(directory, input_ids, device, form)
    save_file({"input_ids": torch.tensor(input_ids), "logits": logits.contiguous()}, request["result"])


@torch.no_grad()
def full_logits(directory: Path, input_ids: list[int], device: str, form: Form) -> torch.Tensor:
    """Load a directory with from_pretrained and compute logits, fp32 [T, V]; exit if a weight is missing."""
    auto_class = getattr(transformers, form.auto_class)
    model, info = auto_class.from_pretrained(
        directory, trust_remote_code=form.remote_code, output_loading_info=True, device_map={"": device}
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"missing {sorted(info['missing_keys'])[:5]}, mismatched {info['mismatched_keys']}")
    model = model.to(form.dtype).eval()
    ids = torch.tensor([input_ids], device=device)
    return model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def by_module_logits(directory: Path, input_ids: list[int], device: str, form: Form) -> torch.Tensor:
    """Load a directory's weights module by module while the model runs; returns logits, fp32 [T, V]."""
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=form.remote_code)
    from_config = getattr(transformers, form.auto_class).from_config
    model = empty_model(lambda: from_config(config, trust_remote_code=form.remote_code, dtype=form.dtype), form.dtype)
    reader = CheckpointReader(directory)
    return streamed_logits(model, input_ids, reader.read, reader.specs, device)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
