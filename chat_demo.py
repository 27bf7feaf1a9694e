"""Chat with a model in the terminal: a base or merged directory, or an adapter on its base.

    python chat_demo.py --lora_path saved_files/chatGLM2_6B_QLoRA_t32
    python chat_demo.py --model_path saved_files/merged_int4 --prompt "类型#裙*颜色#白色"

Ctrl-C stops an answer; help lists the commands. Answers go to stdout, all else to stderr.
"""

import contextlib
import functools
import shutil
import sys

import torch
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizer

from glm_utils.cli import UserError, run_cli
from glm_utils.device import resolve_device
from glm_utils.inference.chat import AnswerCounts, ChatSession, chat_settings, check_sampling
from glm_utils.inference.side_by_side import side_by_side
from glm_utils.load_model import ModelSource, find_model

with contextlib.suppress(ImportError):  # Windows has its own line editing
    import readline  # noqa: F401

LEAST_TOKENS = 256  # whose keys and values must fit beside the weights
COMMANDS = {
    "clear": "forget all turns",
    "undo": "take the last question and its answer back",
    "retry": "answer the last question again",
    "stop": "leave, as Ctrl-D does",
    "help": "show this list",
}


def chat_demo(
    *,
    model_path: str | None = None,
    lora_path: str | None = None,
    load_in_4bit: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    prompt: str | None = None,
    compare: bool = False,
    device: str = "auto",
) -> None:
    """Chat with a model, or answer one prompt.

    Args:
        model_path: Directory or hub id of a base or merged model.
        lora_path: Directory of an adapter, instead of model_path; its base is found from it.
        load_in_4bit: Quantise the layers to NF4 while loading.
        temperature: Divides the logits; 0: always the most probable token. Default: the model's own.
        top_p: Nucleus probability. Default: the model's own.
        max_length: Prompt and answer together, in tokens. Default: the model's own.
        seed: Seed of the sampling. Default: another one each time.
        prompt: Answer this and leave.
        compare: Answer twice, without and with the adapter of lora_path, side by side.
        device: Where to work: auto (a GPU when there is one), cpu or cuda:N.
    """
    if compare and not lora_path:
        raise UserError("--compare needs --lora_path: it answers without and with that adapter")
    check_sampling(temperature, top_p)
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: expected 0 to {2**64 - 1}")
    model, tokenizer = load_chat_model(model_path, lora_path, load_in_4bit, device, merge_adapter=not compare)
    settings = chat_settings(model, max_length, temperature, top_p)
    sessions = {"": ChatSession(model, tokenizer, settings)}
    if compare:
        base = ChatSession(model, tokenizer, settings, use_adapter=False)
        sessions = {"without the adapter": base, "with the adapter": sessions[""]}
    if seed is not None:
        torch.manual_seed(seed)
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks is no reason to leave
    if prompt is not None:
        answer(sessions, prompt)
    else:
        converse(sessions)


def load_chat_model(
    model_path: str | None, lora_path: str | None, load_in_4bit: bool, device: str, merge_adapter: bool
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizer]:
    """Load a model, in fp16 on a GPU and in fp32 on the CPU, and its tokenizer.

    Args:
        model_path: Directory or hub id of a base or merged model.
        lora_path: Directory of an adapter, instead of model_path.
        load_in_4bit: Quantize the layers to NF4 while loading.
        device: auto, cpu or cuda:N.
        merge_adapter: False keeps the adapter apart, so that it can be disabled.

    Raises:
        UserError: No model, two models, a broken one, one that is quantized already, or one that does not fit.
    """
    place = resolve_device(device)
    checkpoint, adapter = find_model(model_path, lora_path)
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    source = ModelSource(str(checkpoint.directory), checkpoint, adapter, load_in_4bit, dtype, place)
    source.check_fits(1, LEAST_TOKENS, "an int4 model or --load_in_4bit")
    logger.info(f"loading {checkpoint.directory}{f' with {adapter.directory}' if adapter else ''} on {place}")
    return source.load(merge_adapter), checkpoint.tokenizer


def converse(sessions: dict[str, ChatSession]) -> None:
    """Read lines until the end: commands, and questions for every session.

    Args:
        sessions: The sessions by their titles; a single one needs none.
    """
    sys.stdin.reconfigure(errors="replace")  # nor is a broken byte
    note(f"{', '.join(COMMANDS)} are commands; Ctrl-C stops an answer")
    while (line := read_line()) not in (None, "stop"):
        try:
            if line in COMMANDS:
                run_command(line, sessions)
            elif line.strip():
                answer(sessions, line)
        except (UserError, KeyboardInterrupt) as error:
            note(str(error))


def read_line() -> str | None:
    """Return the next line, empty after Ctrl-C; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        note("\n(stop or Ctrl-D leaves)")
        return ""


def run_command(command: str, sessions: dict[str, ChatSession]) -> None:
    """Run a command on all sessions.

    Args:
        command: One of COMMANDS but stop.
        sessions: The sessions by their titles.

    Raises:
        UserError: There is nothing to undo or to answer again.
    """
    if command == "help":
        for name, text in COMMANDS.items():
            note(f"{name:<6} {text}")
        note("A space in front makes a question of such a word.")
    elif command == "clear":
        for session in sessions.values():
            session.clear()
        note("(a new conversation)")
    else:
        query = [session.undo() for session in sessions.values()][0][0]
        if command == "retry":
            answer(sessions, query)
        else:
            note(f"(taken back: {query})")


def answer(sessions: dict[str, ChatSession], query: str) -> None:
    """Print the answer as it comes, or those of several sessions side by side; Ctrl-C stops the one being written.

    Args:
        sessions: The sessions by their titles.
        query: The question.

    Raises:
        UserError: The question is too long, or the model computes NaN, or memory runs out.
    """
    for session in sessions.values():
        session.count_prompt(query)  # of all before the first answer, so that they stay in step
    is_compared, faults = len(sessions) > 1, []
    write = (lambda text: None) if is_compared else functools.partial(print, end="", flush=True)
    for title, session in sessions.items():
        ending = ""
        with contextlib.closing(session.ask(query)) as pieces:
            try:
                for piece in pieces:
                    write(piece)
            except KeyboardInterrupt:
                ending = ", stopped"
            except UserError as error:  # the other sessions answer all the same
                faults.append(error)
        write("\n")
        note((f"{title}: " if title else "") + describe(session.counts, session.settings.max_length) + ending)
    if is_compared:
        answers = {title: session.history[-1][1] for title, session in sessions.items()}
        print(side_by_side(answers, shutil.get_terminal_size().columns), flush=True)
    if faults:
        raise faults[0]


def describe(counts: AnswerCounts, max_length: int) -> str:
    """Say how long an answer is and how quickly it came."""
    text = f"{counts.num_tokens} tokens, {counts.tokens_per_second:.1f} tokens/s"
    text += f", the first after {counts.first_seconds:.2f} s"
    return text + (", cut at max_length" if counts.num_prompt + counts.num_tokens >= max_length else "")


def note(text: str) -> None:
    """Print what is no answer to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_cli(chat_demo)
