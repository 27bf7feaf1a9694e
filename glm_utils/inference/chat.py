"""A conversation without a terminal: history, undo and retry, the answer as a stream of pieces, its counts.

A terminal, a web page and an API differ only in where the pieces go.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizer

from glm_utils.cli import UserError
from glm_utils.device import is_out_of_memory

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.001, 1000  # beyond, logits overflow or are all alike
UNFINISHED = "\ufffd"  # what the bytes of an unfinished character decode to


@dataclass(frozen=True)
class ChatSettings:
    """How answers are generated.

    Attributes:
        max_length: Prompt and answer together, in tokens.
        temperature: Divides the logits; 0: always the most probable token.
        top_p: Nucleus probability.
    """

    max_length: int
    temperature: float
    top_p: float

    def arguments(self) -> dict:
        """Return the arguments for `stream_chat`."""
        if not self.temperature:
            return {"max_length": self.max_length, "do_sample": False}
        return {"max_length": self.max_length, "temperature": self.temperature, "top_p": self.top_p}


def chat_settings(
    model: PreTrainedModel | PeftModel, max_length: int | None, temperature: float | None, top_p: float | None
) -> ChatSettings:
    """Fill in the published defaults of the model's family, which are those of its `stream_chat`.

    Args:
        model: The model.
        max_length: Prompt and answer together, in tokens; None: the default, within the model's context.
        temperature: Divides the logits; 0: always the most probable token; None: the default.
        top_p: Nucleus probability; None: the default.

    Raises:
        UserError: A value out of range.
    """
    context = model.config.max_position_embeddings
    given = {"max_length": max_length, "temperature": temperature, "top_p": top_p}
    values = {name: getattr(model, f"chat_{name}") if value is None else value for name, value in given.items()}
    if max_length is None:
        values["max_length"] = min(values["max_length"], context)
    settings = ChatSettings(**values)
    if not 1 <= settings.max_length <= context:
        raise UserError(f"--max_length {settings.max_length}: expected 1 to {context}, the model's context in tokens")
    check_sampling(settings.temperature, settings.top_p)
    return settings


def check_sampling(temperature: float | None, top_p: float | None) -> None:
    """Refuse what a distribution cannot be made of.

    Args:
        temperature: Divides the logits; 0: always the most probable token; None: the default.
        top_p: Nucleus probability; None: the default.

    Raises:
        UserError: A value out of range.
    """
    if temperature and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise UserError(
            f"--temperature {temperature}: expected 0 (most probable token), or {LOWEST_TEMPERATURE} to "
            f"{HIGHEST_TEMPERATURE}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top_p {top_p}: expected more than 0, at most 1")


@dataclass
class AnswerCounts:
    """Tokens and times of an answer.

    Attributes:
        num_prompt: Tokens of the prompt.
        num_tokens: Tokens of the answer, its end token included.
        first_seconds: Time to the first token.
        seconds: Time to the last token.
    """

    num_prompt: int
    num_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0

    def __post_init__(self):
        self._start = time.monotonic()

    def tick(self) -> None:
        """Note that a token has arrived."""
        self.seconds = time.monotonic() - self._start
        self.first_seconds = self.first_seconds or self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer over the whole time, reading the prompt included."""
        return self.num_tokens / max(self.seconds, 1e-9)


class CountingTokenizer:
    """A tokenizer that notes how many ids it decoded last: `stream_chat` decodes the whole answer after each token.

    Counting in a logits processor would keep the decode path from running ahead of the host.

    Args:
        tokenizer: What it stands for.
        counts: Where num_tokens is noted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, counts: AnswerCounts):
        self.tokenizer, self.counts = tokenizer, counts

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def decode(self, ids: list[int], **settings) -> str:
        """Decode the ids of the answer so far."""
        self.counts.num_tokens = len(ids)
        return self.tokenizer.decode(ids, **settings)


class ChatSession:
    """One conversation with a model.

    Args:
        model: From `load_chat_model`.
        tokenizer: Its tokenizer.
        settings: How answers are generated.
        use_adapter: False switches the adapter of a PeftModel off while it answers.

    Attributes:
        history: Questions and answers, oldest first; a stopped answer stands as far as it came.
        counts: Of the last answer.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizer,
        settings: ChatSettings,
        use_adapter: bool = True,
    ):
        self.model, self.tokenizer, self.settings, self.use_adapter = model, tokenizer, settings, use_adapter
        self.history: list[tuple[str, str]] = []
        self.counts: AnswerCounts | None = None

    def count_prompt(self, query: str) -> int:
        """Return the tokens of a question with the history before it.

        Args:
            query: The question.

        Raises:
            UserError: They leave no room for an answer.
        """
        num_prompt, max_length = len(self.tokenizer.encode_prompt(query, self.history)), self.settings.max_length
        if num_prompt >= max_length:
            earlier = f" with the {len(self.history)} turns before it" if self.history else ""
            raise UserError(
                f"the question{earlier} takes {num_prompt} tokens and max_length is {max_length}, which leaves no "
                "room for an answer. Shorten it, undo or clear earlier turns, or raise --max_length"
            )
        return num_prompt

    def ask(self, query: str) -> Iterator[str]:
        """Answer a question piece by piece; the turn is noted at the end, also when the caller stops before.

        Args:
            query: The question.

        Yields:
            What follows in the answer. The newest token is held back: the next one may still change it.

        Raises:
            UserError: A question that is too long, a model that computes NaN, or too little memory.
        """
        self.counts = AnswerCounts(self.count_prompt(query))
        answer = previous = shown = ""
        switch = contextlib.nullcontext() if self.use_adapter else self.model.disable_adapter()
        tokenizer, arguments = CountingTokenizer(self.tokenizer, self.counts), self.settings.arguments()
        try:
            with switch:
                for answer, _ in self.model.stream_chat(tokenizer, query, self.history, **arguments):
                    self.counts.tick()
                    if answer.endswith(UNFINISHED):
                        continue
                    sure, previous = os.path.commonprefix([previous, answer]), answer
                    if len(sure) > len(shown) and sure.startswith(shown):
                        yield sure[len(shown) :]
                        shown = sure
            self.counts.tick()
            yield answer[len(shown) :] if answer.startswith(shown) else f"\n{answer}"
        except FloatingPointError as error:
            raise UserError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory after {self.counts.num_prompt + self.counts.num_tokens} tokens of prompt and answer. "
                "Undo or clear earlier turns, or give --load_in_4bit or an int4 model"
            ) from error
        finally:
            self.history.append((query, answer))

    def undo(self) -> tuple[str, str]:
        """Take the last turn back and return it.

        Raises:
            UserError: There is none.
        """
        if not self.history:
            raise UserError("there is no earlier question")
        return self.history.pop()

    def clear(self) -> None:
        """Forget all turns."""
        self.history.clear()
