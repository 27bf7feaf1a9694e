"""Sampling, streaming and chat (this file is byte-identical in both families' directories).

The published code hid NaN logits behind a fixed token, lost the last token of a stream, and could sample ids that
have no text. Here NaN logits are an error, every token is yielded, and ids without text cannot be sampled in chat.

Shapes: B batch, T new tokens, S all tokens, V vocabulary.
"""

import collections
import copy
import logging

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicCache

from .batching_chatglm import ContinuousBatch, Sampling
from .decoding_chatglm import DecodeGraph, Unsupported, capture

logger = logging.getLogger(__name__)

# Settings that only `generate` handles, with the value that asks for nothing.
GENERATE_ONLY = {
    "constraints": None,
    "dola_layers": None,
    "force_words_ids": None,
    "max_time": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "return_dict_in_generate": False,
    "stop_strings": None,
    "token_healing": False,
}


INVALID_LOGITS = (
    "the model returned NaN or infinite logits at token {} of the sequence. Usual causes: weights that were damaged "
    "or only partly loaded, or fp16 overflow; run in bf16 or fp32, and check the checkpoint."
)


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Refuse NaN and infinite logits instead of hiding them; -inf is how processors before it rule a token out."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) unchanged.

        Raises:
            FloatingPointError: When a score is NaN or +inf.
        """
        if not (scores < float("inf")).all():
            raise FloatingPointError(INVALID_LOGITS.format(input_ids.shape[1]))
        return scores


class UnusedTokenLogitsProcessor(LogitsProcessor):
    """Keep ids without a token from being sampled.

    Args:
        num_tokens: The tokenizer's size; the output layer's rows from here on are padding.
    """

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) with those ids at -inf."""
        if scores.shape[-1] <= self.num_tokens:
            return scores
        unused = torch.arange(scores.shape[-1], device=scores.device) >= self.num_tokens
        return scores.masked_fill(unused, float("-inf"))


class TokenSampler:
    """Pick the next token of every sequence and keep the tokens so far.

    `pick` works on the GPU alone, so that it can be captured; whoever calls or replays it adds 1 to `num_ids`.

    Args:
        input_ids: The prompt, (B, T).
        num_new: The most tokens to pick.
        processors: Logits processors, in order.
        config: GenerationConfig with do_sample and pad_token_id.
        eos: End tokens, int64 (E,).
    """

    # What may be captured in a CUDA graph: a function of the scores alone.
    SCORE_PROCESSORS = (UnusedTokenLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

    def __init__(self, input_ids: torch.Tensor, num_new: int, processors: LogitsProcessorList, config, eos):
        batch, self.num_ids = input_ids.shape
        device = input_ids.device
        self.do_sample, self.pad = config.do_sample, config.pad_token_id or 0
        self.processors = processors
        self.all_ids = torch.cat((input_ids, input_ids.new_zeros(batch, num_new)), dim=1)
        self.column = torch.tensor([self.num_ids], device=device)
        self.eos = eos
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.token = None

    @property
    def ids(self) -> torch.Tensor:
        """The tokens so far, (B, T + n)."""
        return self.all_ids[:, : self.num_ids]

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the next token of every sequence, (B, 1), for logits (B, V)."""
        scores = self.processors(self.ids, logits.float())
        if self.do_sample:
            # torch.multinomial without its asserts: on a GPU, NaN would trip them and end all use of CUDA.
            scores = scores.softmax(-1)
            scores = scores / torch.empty_like(scores).exponential_()
        token = scores.argmax(-1, keepdim=True)
        self.token = token.masked_fill(self.finished[:, None], self.pad)
        self.all_ids.index_copy_(1, self.column, self.token)
        self.column += 1
        self.finished |= (self.token == self.eos).any(-1)
        return self.token


class GraphSteps:
    """Generate with a DecodeGraph; the host reads a token while the GPU computes the next.

    Args:
        graph: Filled with the prompt.
        sampler: Has picked the first token.
    """

    def __init__(self, graph: DecodeGraph, sampler: TokenSampler):
        self.graph, self.sampler = graph, sampler
        # To check the logits would make every step wait for the GPU: the host reads the verdict with the token.
        kept = [item for item in sampler.processors if not isinstance(item, InvalidScoreLogitsProcessor)]
        self.checks = len(kept) < len(sampler.processors)
        sampler.processors = LogitsProcessorList(kept)
        self.can_capture = all(type(item) in TokenSampler.SCORE_PROCESSORS for item in kept)
        # One step is launched before the last is read; but a processor of the caller's may keep count of its calls,
        # and must not see a token behind the end.
        self.num_ahead = int(self.can_capture)
        self.replay_pick, self.captured_for = None, None
        batch, device = graph.token.shape[0], graph.token.device
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)
        self.status = torch.empty(batch + 2, dtype=torch.long, device=device)  # tokens, all finished, all finite
        graph.token.copy_(sampler.token)

    def run(self, num_new: int, on_host: bool):
        """Yield the ids so far, (B, T + n), after each of up to num_new tokens.

        Without an end token nothing waits for the GPU. With one, or when the ids are wanted on the host, step n + 1
        is launched before token n is read, unless a processor of the caller's would notice.

        Args:
            num_new: The most tokens to add.
            on_host: Yield CPU tensors.

        Raises:
            FloatingPointError: NaN or infinite logits, where the processors check that.
        """
        if not on_host and not len(self.sampler.eos):
            for _ in range(num_new):
                self._launch()
                yield self.sampler.ids
            self._check(bool(self.is_finite), self.sampler.num_ids)  # the one wait, at the end
            return
        ids, sent = self.sampler.ids.cpu() if on_host else None, []
        for step in range(num_new):
            self._launch()
            sent.append(self._send())
            # The GPU is num_ahead steps ahead of what is yielded; in the last round everything that was sent is read.
            while len(sent) > (self.num_ahead if step + 1 < num_new else 0):
                status, arrived, num_ids = sent.pop(0)
                arrived.synchronize()
                *tokens, finished, is_finite = status.tolist()
                self._check(is_finite, num_ids)
                ids = torch.cat((ids, torch.tensor(tokens)[:, None]), dim=1) if on_host else None
                yield ids if on_host else self.sampler.all_ids[:, :num_ids]
                if finished:
                    return

    def _launch(self) -> None:
        """Compute the next logits and pick the next token."""
        if self.graph.length == self.graph.slots:
            self.graph = self.graph.grown()
        self.graph.step()
        if self.captured_for is self.graph:
            self.replay_pick()
        else:
            self._pick()  # for real: it is this step's token, and the run that a capture must have seen before
            if self.can_capture:
                self.replay_pick, self.captured_for = capture(self._pick, self.status.device), self.graph
        self.sampler.num_ids += 1

    def _pick(self) -> None:
        """Sample on the GPU alone, into buffers that stay where they are: this is what a graph replays."""
        logits = self.graph.logits
        if self.checks:
            self.is_finite &= logits.float().sum() < float("inf")
        token = self.sampler.pick(logits)
        self.graph.token.copy_(token)
        self.status[:-2] = token[:, 0]
        self.status[-2] = self.sampler.finished.all()
        self.status[-1] = self.is_finite

    def _send(self) -> tuple[torch.Tensor, torch.cuda.Event, int]:
        """Start copying the newest status to the host."""
        status = torch.empty(self.status.shape, dtype=torch.long, pin_memory=True)
        status.copy_(self.status, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.status.device))
        return status, arrived, self.sampler.num_ids

    @staticmethod
    def _check(is_finite: bool, num_ids: int) -> None:
        if not is_finite:
            raise FloatingPointError(INVALID_LOGITS.format(num_ids))


class ChatGLMGenerationMixin:
    """Add streaming and chat to a model with GenerationMixin.

    Attributes:
        chat_max_length: Default limit of `chat` and `stream_chat` on prompt and answer together, in tokens.
        chat_top_p: Their default nucleus probability.
        chat_temperature: Their default temperature.
    """

    chat_max_length: int
    chat_top_p: float
    chat_temperature: float

    def _apply(self, fn, recurse=True):
        DecodeGraph.forget(self)  # it would hold the weights as they were before `to`, `half` and the like
        return super()._apply(fn, recurse)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """Leave the (B, S) mask as it is: forward builds the full one."""
        return attention_mask

    def build_inputs(self, tokenizer, query: str, history: list[tuple[str, str]] | None = None) -> dict:
        """Encode a prompt, with control strings typed by the user kept as text.

        Returns:
            input_ids (1, T) and attention_mask (1, T) on the model's device.
        """
        input_ids = torch.tensor([tokenizer.encode_prompt(query, history)], device=self.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def process_response(self, response: str) -> str:
        """Tidy a decoded answer."""
        return response.strip().replace("[[训练时间]]", "2023年")

    def chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_length: int | None = None,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor=None,
        **kwargs,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer a query.

        Args:
            tokenizer: The ChatGLMTokenizer of this checkpoint.
            query: The user's text.
            history: Earlier turns as (question, answer) pairs.
            max_length: Limit on prompt and answer together, in tokens; None: ``chat_max_length``.
            num_beams: Beam search width.
            do_sample: Sample, or take the most probable token.
            top_p: Nucleus probability; None: ``chat_top_p``.
            temperature: Divides the logits; None: ``chat_temperature``.
            logits_processor: Further logits processors.
            **kwargs: Passed on to ``generate``, but ``use_cuda_graph``, see stream_generate.

        Returns:
            The answer, and the history with this turn.
        """
        history = list(history or [])
        inputs = self.build_inputs(tokenizer, query, history)
        use_cuda_graph = kwargs.pop("use_cuda_graph", True)
        settings = {
            **self._chat_settings(max_length, do_sample, top_p, temperature),
            "num_beams": num_beams,
            "logits_processor": self._chat_processors(tokenizer, logits_processor),
            **kwargs,
        }
        _, unknown, not_streamed = self._merge_settings(**settings)
        if unknown or not_streamed:  # `generate` handles the latter, and says what is wrong with the former
            output = self.generate(**inputs, tokenizer=tokenizer, **settings)
        else:
            steps = self._stream_steps(**inputs, on_host=True, use_cuda_graph=use_cuda_graph, **settings)
            [(output, _)] = collections.deque(steps, maxlen=1)
        response = self.process_response(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :].tolist()))
        return response, [*history, (query, response)]

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_length: int | None = None,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor=None,
        **kwargs,
    ):
        """Answer a query piece by piece.

        Args:
            tokenizer: See `chat`, also for the arguments not described here.
            query: As there.
            history: As there.
            max_length: As there.
            do_sample: As there.
            top_p: As there.
            temperature: As there.
            logits_processor: As there.
            **kwargs: Passed on to ``stream_generate``.

        Yields:
            The answer so far and the history with it, after each token.
        """
        history = list(history or [])
        settings = self._chat_settings(max_length, do_sample, top_p, temperature) | kwargs
        inputs = self.build_inputs(tokenizer, query, history)
        for text, _ in self._stream_text(tokenizer, inputs, logits_processor, settings):
            response = self.process_response(text)
            yield response, [*history, (query, response)]

    def _chat_settings(self, max_length, do_sample: bool, top_p, temperature) -> dict:
        """Return the generation settings of a chat; None stands for the family's default."""
        settings = {"max_length": self.chat_max_length if max_length is None else max_length, "do_sample": do_sample}
        if do_sample:
            settings["top_p"] = self.chat_top_p if top_p is None else top_p
            settings["temperature"] = self.chat_temperature if temperature is None else temperature
        return settings

    def _chat_processors(self, tokenizer, logits_processor) -> LogitsProcessorList:
        return LogitsProcessorList(
            [InvalidScoreLogitsProcessor(), UnusedTokenLogitsProcessor(len(tokenizer)), *(logits_processor or [])]
        )

    def _stream_text(self, tokenizer, inputs, logits_processor, settings):
        """Yield (decoded answer so far, cache) after each token."""
        num_prompt = inputs["input_ids"].shape[1]
        processors = self._chat_processors(tokenizer, logits_processor)
        for ids, cache in self._stream_steps(**inputs, logits_processor=processors, on_host=True, **settings):
            yield tokenizer.decode(ids[0, num_prompt:].tolist()), cache

    def _merge_settings(self, generation_config=None, logits_processor=None, **settings):
        """Return a GenerationConfig as `generate` would merge it, and what keeps it from being streamed.

        Args:
            generation_config: Its settings that are not None stand above the model's own.
            logits_processor: No setting: not looked at.
            **settings: Stand above both.

        Returns:
            The config, the names that no GenerationConfig has, and those that only `generate` handles.
        """
        config = copy.deepcopy(self.generation_config)
        given = {} if generation_config is None else generation_config.to_dict()
        given = {name: value for name, value in given.items() if value is not None}
        unknown = config.update(**{**given, **settings})
        config.top_k = 50 if config.top_k is None else config.top_k  # as in generate
        config.temperature = float(1 if config.temperature is None else config.temperature)  # 2 is one too
        not_streamed = [
            name for name, none in GENERATE_ONLY.items() if getattr(config, name, None) not in (None, none)
        ]
        return config, sorted(unknown), not_streamed

    def stream_generate(self, input_ids: torch.Tensor, **kwargs):
        """Generate token by token.

        On CUDA the tokens after the first come from a captured graph where decoding_chatglm.py covers the model;
        ``use_cuda_graph=False`` prevents that. Without an end token (``eos_token_id=[]``) nothing waits for the GPU.
        Streams of one model may run in turn: each has a graph of its own. The last one to end leaves its graph, cache
        included, to the next stream; ``model.to`` and the like free it.

        Args:
            input_ids: (B, T).
            **kwargs: What ``generate`` takes, except GENERATE_ONLY; ``max_length`` counts the prompt.

        Yields:
            All ids so far, (B, T + n), after each of the n new tokens, the last one included.

        Raises:
            ValueError: At the first step: settings that are unknown or not streamed, or no room for a token.
        """
        for ids, _ in self._stream_steps(input_ids=input_ids, **kwargs):
            yield ids

    @torch.no_grad()
    def _stream_steps(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        logits_processor=None,
        generation_config=None,
        use_cuda_graph=True,
        on_host=False,
        **settings,
    ):
        """Yield (ids so far, cache) after each new token; see stream_generate.

        ``on_host`` asks for ids on the CPU. The cache is None once a CUDA graph has taken over.
        """
        use_cuda_graph = use_cuda_graph and past_key_values is None
        cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        num_past = int(cache.get_seq_length())
        attention_mask = self._token_mask(attention_mask)
        sampler, num_new = self._make_sampler(
            input_ids, attention_mask, num_past, logits_processor, generation_config, settings
        )
        if position_ids is None:
            position_ids = self._prompt_positions(input_ids, attention_mask, num_past)
        step_ids = input_ids
        for num_left in reversed(range(num_new)):
            logits = self(
                input_ids=step_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            step_ids = sampler.pick(logits)
            sampler.num_ids += 1
            yield sampler.ids.cpu() if on_host else sampler.ids, cache
            if not num_left or sampler.finished.all():
                return
            # Behind the first token the graph takes over, or is not asked again: what rules it out does not change.
            graph = self._decode_graph(cache, attention_mask, position_ids, num_left) if use_cuda_graph else None
            if graph:
                cache, steps = None, GraphSteps(graph, sampler)  # the graph has copied the cache: free it
                try:
                    for ids in steps.run(num_left, on_host):
                        yield ids, cache
                finally:
                    steps.graph.give_back(self)
                return
            use_cuda_graph = False
            position_ids = self._next_positions(position_ids)
            if attention_mask is not None:
                attention_mask = torch.cat((attention_mask, attention_mask.new_ones(len(step_ids), 1)), dim=1)

    def _make_sampler(
        self, input_ids, attention_mask, num_past: int, logits_processor, generation_config, settings: dict
    ) -> tuple[TokenSampler, int]:
        """Return the sampler of a stream, and the most tokens that it may pick.

        Raises:
            ValueError: Settings that are unknown or not streamed, or no room for a token.
        """
        config, unknown, not_streamed = self._merge_settings(generation_config, **settings)
        if unknown:
            raise ValueError(f"unknown generation settings {unknown}: pass those of GenerationConfig")
        if not_streamed:
            raise ValueError(f"{', '.join(not_streamed)} cannot be streamed: use chat or generate, or leave it out")
        num_prompt = num_past + input_ids.shape[1]
        num_new = config.max_new_tokens or (config.max_length or 0) - num_prompt
        if num_new <= 0:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and max_length is {config.max_length}, which leaves "
                "nothing to generate: raise max_length or shorten the history"
            )
        config.max_length = num_prompt + num_new
        eos = torch.tensor(_as_list(config.eos_token_id), dtype=torch.long, device=input_ids.device)
        config._eos_token_tensor = eos if len(eos) else None  # where transformers' processors look for it
        logits_processor = LogitsProcessorList(logits_processor or [])
        if config.do_sample and not any(isinstance(item, InvalidScoreLogitsProcessor) for item in logits_processor):
            logits_processor.insert(0, InvalidScoreLogitsProcessor())  # a draw from NaN would be noise
        processors = self._get_logits_processor(
            config,
            input_ids.shape[1],
            encoder_input_ids=input_ids,
            logits_processor=logits_processor,
            device=input_ids.device,
            model_kwargs={"attention_mask": attention_mask},
        )
        return TokenSampler(input_ids, num_new, processors, config, eos), num_new

    def continuous_batch(
        self,
        tokenizer,
        batch_size: int,
        num_slots: int,
        temperature: float | None = None,
        top_p: float | None = None,
        use_cuda_graph: bool = True,
    ) -> ContinuousBatch:
        """Return an empty batch whose sequences begin and end independently, see batching_chatglm.py.

        Args:
            tokenizer: The ChatGLMTokenizer of this checkpoint.
            batch_size: Sequences at once.
            num_slots: Tokens of a sequence that there is room for at first.
            temperature: Divides the logits; 0: always the most probable token; None: ``chat_temperature``.
            top_p: Nucleus probability; None: ``chat_top_p``.
            use_cuda_graph: See stream_generate.

        Raises:
            ValueError: The generation config asks for what such a batch does not do.
        """
        config, _, not_streamed = self._merge_settings(do_sample=False)
        config._eos_token_tensor = None
        processors = self._get_logits_processor(config, 1, logits_processor=LogitsProcessorList(), device=self.device)
        if refused := not_streamed + [type(processor).__name__ for processor in processors]:
            raise ValueError(f"generation_config.json asks for {', '.join(refused)}, which a batch does not apply")
        sampling = Sampling(
            self.chat_temperature if temperature is None else temperature,
            config.top_k,
            self.chat_top_p if top_p is None else top_p,
            len(tokenizer),
        )
        return ContinuousBatch(self, batch_size, num_slots, sampling, use_cuda_graph)

    def _decode_graph(self, cache, attention_mask, position_ids, num_new: int) -> DecodeGraph | None:
        """Return the decode graph behind a prompt, or None where there is none for this model."""
        try:
            return DecodeGraph.of(self, cache, attention_mask, position_ids, num_new)
        except Unsupported as reason:
            logger.info("generating through the model's forward: %s", reason)
            return None

    @staticmethod
    def _token_mask(attention_mask):
        """Reduce a published 4-D mask (True = blocked) to (B, S), 1 = keep: its last query sees all but padding."""
        if attention_mask is None or attention_mask.dim() == 2:
            return attention_mask
        return (~attention_mask[:, 0, -1].bool()).long()


def _as_list(value) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
