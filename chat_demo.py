"""Chat with a model in the terminal: a base or merged directory, or an adapter on its base.

    python chat_demo.py --lora_path saved_files/chatGLM2_6B_QLoRA_t32
    python chat_demo.py --model_path saved_files/merged_int4 --prompt "类型#裙*颜色#白色"

Ctrl-C stops an answer; help lists the commands. Answers go to stdout, everything else to stderr.
"""

import sys

from glm_utils.cli import UserError, run_cli
from glm_utils.early_checks import check_device_name, check_model_choice, check_sampling, check_seed
from glm_utils.hub import Hub, check_hub


def chat_demo(
    *,
    model_path: str | None = None,
    lora_path: str | None = None,
    hub: Hub = "huggingface",
    load_in_4bit: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    prompt: str | None = None,
    conversation: bool = False,
    compare: bool = False,
    device: str = "auto",
) -> None:
    """Chat with a model, or answer one prompt.

    Args:
        model_path: Directory or hub id of a base or merged model.
        lora_path: Directory of an adapter, instead of model_path; it names its base.
        hub: Hub that a model is downloaded from: huggingface, or modelscope (pip install '.[modelscope]').
        load_in_4bit: Quantize the layers to NF4 while loading.
        temperature: Divides the logits; 0: always the most probable token. Default: the model's own.
        top_p: Nucleus probability. Default: the model's own.
        max_length: Prompt and answer together, in tokens. Default: the model's own.
        seed: Seed for sampling. Default: a different one each time.
        prompt: Answer this and exit.
        conversation: Keep the history between piped lines. Otherwise each is a conversation of its own, as a file of
            prompts means it; at a terminal the history is always kept.
        compare: Answer twice, without and with the adapter of lora_path, side by side.
        device: Where to run: auto (a GPU when there is one), cpu or cuda:N.
    """
    if compare and not lora_path:
        raise UserError("--compare needs --lora_path: it answers without and with that adapter")
    check_sampling(temperature, top_p)
    check_seed(seed)
    check_device_name(device)
    check_hub(hub)
    check_model_choice(model_path, lora_path)

    import torch

    from glm_utils.chat_model import load_chat_model
    from glm_utils.inference.chat import ChatSession, chat_settings
    from glm_utils.inference.terminal import converse, print_answers, tolerate_any_text

    model, tokenizer = load_chat_model(model_path, lora_path, load_in_4bit, device, not compare, hub)
    settings = chat_settings(model, max_length, temperature, top_p)
    uses_adapter = {"without the adapter": False, "with the adapter": True} if compare else {"": True}
    sessions = {title: ChatSession(model, tokenizer, settings, use) for title, use in uses_adapter.items()}
    if seed is not None:
        torch.manual_seed(seed)
    tolerate_any_text(sys.stdout)  # a terminal may lack a character of the answer
    if prompt is not None:
        print_answers(prompt, sessions)
    else:
        converse(sessions, keep_history=conversation or sys.stdin.isatty())


if __name__ == "__main__":
    run_cli(chat_demo)
