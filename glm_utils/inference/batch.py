"""Answer many prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizer


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        max_new_tokens: Most tokens of an answer, its end token included.
        temperature: Divides the logits; 0: always the most probable token; None: the family's default.
        top_p: Nucleus probability; None: the family's default.
        seed: Seed of the sampling.
        num_samples: Answers to each prompt.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    num_samples: int = 1


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        index: Place of the prompt in the input.
        sample: 0 .. num_samples - 1.
        token_ids: Generated ids, the end token included if there is one.
        text: Decoded and post-processed as `chat` does.
        num_tokens: Number of token_ids.
        ended: True: by an end token; False: by max_new_tokens or at the context's end.
    """

    index: int
    sample: int
    token_ids: list[int]
    text: str
    num_tokens: int
    ended: bool


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizer,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    batch_size: int | None = None,
) -> Iterator[Answer]:
    """Yield answers in the order in which they finish.

    Args:
        model: A model of this project in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, special tokens included.
        settings: How answers are generated.
        batch_size: Sequences at once; None: what fits.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    end_ids = base.generation_config.eos_token_id or []
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
    temperature = base.chat_temperature if settings.temperature is None else settings.temperature
    sampling = {"do_sample": False}
    if temperature:
        top_p = base.chat_top_p if settings.top_p is None else settings.top_p
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=base.device)
        num_new = min(settings.max_new_tokens, base.config.max_position_embeddings - len(prompt))
        for sample in range(settings.num_samples):
            torch.manual_seed(hash((settings.seed, index, sample)) % 2**63)
            *_, found = base.stream_generate(ids, max_new_tokens=num_new, eos_token_id=end_ids, **sampling)
            new = found[0, len(prompt) :].tolist()
            text = base.process_response(tokenizer.decode(new))
            yield Answer(index, sample, new, text, len(new), new[-1] in end_ids)
