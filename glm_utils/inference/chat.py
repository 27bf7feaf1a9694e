"""A conversation with a model: history, undo, the answer as a stream of pieces, its token counts.

It knows nothing of a terminal: a web page or an API only sends the pieces somewhere else.
"""

from __future__ import annotations  # peft is imported for its types only

import contextlib
import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm_utils.cli import UserError
from glm_utils.device import is_out_of_memory
from glm_utils.early_checks import check_sampling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizer

UNFINISHED = "\ufffd"  # the first bytes of a character decode to this


@dataclass(frozen=True)
class ChatSettings:
    """How answers are generated.

    Attributes:
        max_length: Prompt and answer together, in tokens.
        temperature: Divides the logits; 0: always the most probable token.
        top_p: Nucleus probability, above 0 and at most 1.
        max_new_tokens: Limit of the model's generation config on an answer alone, in tokens; None: none.
    """

    max_length: int
    temperature: float
    top_p: float
    max_new_tokens: int | None = None

    def arguments(self) -> dict:
        """Return the keyword arguments of `stream_chat`."""
        if not self.temperature:
            return {"max_length": self.max_length, "do_sample": False}
        return {"max_length": self.max_length, "temperature": self.temperature, "top_p": self.top_p}


def chat_settings(
    model: PreTrainedModel | PeftModel, max_length: int | None, temperature: float | None, top_p: float | None
) -> ChatSettings:
    """Check settings and fill in the published defaults of the model's family, those of its `stream_chat`.

    Args:
        model: Supplies defaults and context length.
        max_length: Prompt and answer together, in tokens; None: the default, but at most the model's context.
        temperature: Divides the logits; 0: always the most probable token; None: the default.
        top_p: Nucleus probability; None: the default.

    Raises:
        UserError: A value is out of range.
    """
    context = model.config.max_position_embeddings
    settings = ChatSettings(
        max_length=min(model.chat_max_length, context) if max_length is None else max_length,
        temperature=model.chat_temperature if temperature is None else temperature,
        top_p=model.chat_top_p if top_p is None else top_p,
        max_new_tokens=model.generation_config.max_new_tokens,
    )
    if not 1 <= settings.max_length <= context:
        raise UserError(f"--max_length {settings.max_length}: expected 1 to {context}, the model's context in tokens")
    check_sampling(settings.temperature, settings.top_p)
    return settings


@dataclass
class AnswerCounts:
    """Tokens and times of an answer; the clock starts when this is created.

    Attributes:
        num_prompt: Tokens of the prompt.
        num_tokens: Tokens of the answer, its end token included.
        first_seconds: Time to the first token.
        seconds: Time to the last token.
    """

    num_prompt: int = 0
    num_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0

    def __post_init__(self):
        self._start = time.monotonic()

    def tick(self) -> None:
        """Record that a token has arrived."""
        self.seconds = time.monotonic() - self._start
        self.first_seconds = self.first_seconds or self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer over the total time, prefill included."""
        return self.num_tokens / max(self.seconds, 1e-9)


class CountingTokenizer:
    """A wrapper that records how many ids it decoded last: `stream_chat` decodes all of the answer after each token.

    Counting in a logits processor instead would keep the fast path from running ahead of the host.

    Args:
        tokenizer: The tokenizer that does everything else.
        counts: Its num_tokens is updated.
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
        model: A model of this project, or one wrapped by peft.
        tokenizer: The model's tokenizer.
        settings: How answers are generated.
        use_adapter: False disables the adapter of a PeftModel while it answers.

    Attributes:
        history: Questions and answers, oldest first; of a stopped answer what was generated until then.
        counts: Tokens and times of the last answer, zero before the first.
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
        self.counts = AnswerCounts()

    def count_prompt(self, query: str) -> int:
        """Return how many tokens a question and the history before it take.

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

    def ask(self, query: str) -> Generator[str, None, None]:
        """Answer a question piece by piece; the turn joins the history at the end, also when the caller stops early.

        Yields:
            The next piece of the answer. The newest token is held back: the one after it may still change its text.

        Raises:
            UserError: The question is too long, the model computed NaN, memory ran out, or the model's generation
                config asks for what does not go together.
        """
        self.counts = AnswerCounts(self.count_prompt(query))
        answer = previous = shown = ""
        switch = contextlib.nullcontext() if self.use_adapter else self.model.disable_adapter()
        tokenizer = CountingTokenizer(self.tokenizer, self.counts)
        arguments = self.settings.arguments()
        if self.settings.max_new_tokens:  # would stand above max_length
            num_left = self.settings.max_length - self.counts.num_prompt
            arguments["max_new_tokens"] = min(num_left, self.settings.max_new_tokens)
        try:
            with switch:
                for answer, _ in self.model.stream_chat(tokenizer, query, self.history, **arguments):
                    self.counts.tick()
                    if answer.endswith(UNFINISHED):
                        continue
                    # Only what two successive texts share is shown: a comma becomes full-width when a Chinese
                    # character follows it.
                    sure, previous = os.path.commonprefix([previous, answer]), answer
                    if len(sure) > len(shown) and sure.startswith(shown):
                        yield sure[len(shown) :]
                        shown = sure
            self.counts.tick()
            # The cleaned answer may differ in what was shown already: then all of it follows on a new line.
            yield answer[len(shown) :] if answer.startswith(shown) else f"\n{answer}"
        except (FloatingPointError, ValueError) as error:  # ValueError: what the generation config asks for
            raise UserError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory after {self.counts.num_prompt + self.counts.num_tokens} tokens of prompt and answer. "
                "Undo or clear earlier turns, or use --load_in_4bit or an int4 model"
            ) from error
        finally:
            self.history.append((query, answer))

    def undo(self) -> tuple[str, str]:
        """Remove the last turn and return it.

        Raises:
            UserError: The history is empty.
        """
        if not self.history:
            raise UserError("there is no earlier question")
        return self.history.pop()

    def clear(self) -> None:
        """Forget all turns."""
        self.history.clear()
