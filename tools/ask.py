"""Answer one question with a base model, or with a LoRA adapter on it: the before and after of `make demo`.

python tools/ask.py --model_name_or_path models/chatglm2-tiny --lora_path saved_files/demo_chatglm2-tiny --query TEXT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_utils.checkpoint import load_adapter, load_base_model, load_tokenizer, resolve_checkpoint_dir  # noqa: E402
from glm_utils.cli import run_cli  # noqa: E402


def ask(*, model_name_or_path: str, query: str, lora_path: str | None = None, max_new_tokens: int = 128) -> None:
    """Print the greedy answer to one question.

    Args:
        model_name_or_path: Directory or hub id of the base model.
        query: The question.
        lora_path: Directory of a LoRA adapter.
        max_new_tokens: Longest answer, in tokens.
    """
    base_dir = resolve_checkpoint_dir(model_name_or_path)
    tokenizer = load_tokenizer(base_dir)
    model = load_base_model(base_dir)
    if lora_path:
        model = load_adapter(model, Path(lora_path)).merge_and_unload()
    max_length = len(tokenizer.encode_prompt(query)) + max_new_tokens
    answer, _ = model.eval().chat(tokenizer, query, history=[], max_length=max_length, do_sample=False)
    print(f"question: {query}\nanswer:   {answer}")


if __name__ == "__main__":
    run_cli(ask)
