"""Sampling, streaming and chat (this file is byte-identical in both families' directories).

The published code hid NaN logits behind a fixed token, lost the last token of a stream, and could sample ids that
have no text. Here NaN logits are an error, every token is yielded, and ids without text cannot be sampled in chat.

Shapes: B batch, T new tokens, S all tokens, V vocabulary.
"""

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
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from .batching_chatglm import ContinuousBatch, Sampling
from .decoding_chatglm import DecodeGraph, Unsupported, capture

logger = logging.getLogger(__name__)
REASONS_SAID: set[str] = set()  # why the decode path was not used, so far

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


# Arguments of a stream that are no settings.
NO_SETTINGS = ("past_key_values", "position_ids", "use_cuda_graph", "stopping_criteria", "prefix_allowed_tokens_fn")

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
    """Pick the next token of every sequence, keep the tokens so far, and know which sequences have ended.

    `pick` works on the GPU alone, so that it can be captured; whoever calls or replays it calls `picked` after it.

    Args:
        input_ids: The prompt, (B, T).
        num_new: The most tokens to pick.
        processors: Logits processors, in order.
        criteria: Stopping criteria. End tokens and the length are checked on the GPU, others on the host.
        config: The GenerationConfig that `generate` prepared.

    Attributes:
        num_ids: Tokens so far, the prompt's included.
        eos: End tokens, int64 (E,).
        finished: (B,), whether a sequence has ended.
        host_criteria: The criteria that the host checks after each token.
        scores: What the processors made of the logits, one (B, V) per token; None: not kept.
        raw_logits: The logits, likewise.
        cache: The cache behind the last token, where it is wanted.
    """

    # What may be captured in a CUDA graph: a function of the scores alone.
    SCORE_PROCESSORS = (UnusedTokenLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

    def __init__(self, input_ids, num_new: int, processors: LogitsProcessorList, criteria, config):
        batch, self.num_ids = input_ids.shape
        device = input_ids.device
        self.do_sample, self.processors = config.do_sample, processors
        pad = getattr(config, "_pad_token_tensor", None)  # where `generate` leaves it, the end token if there is none
        self.pad = 0 if pad is None else int(pad)
        self.all_ids = torch.cat((input_ids, input_ids.new_zeros(batch, num_new)), dim=1).long()
        self.column = torch.tensor([self.num_ids], device=device)
        ends = [item.eos_token_id.to(device).view(-1) for item in criteria if type(item) is EosTokenCriteria]
        self.eos = torch.cat(ends) if ends else torch.empty(0, dtype=torch.long, device=device)
        known = (EosTokenCriteria, MaxLengthCriteria)  # the latter is num_new; classes of the caller's may differ
        self.host_criteria = StoppingCriteriaList(item for item in criteria if type(item) not in known)
        # as in transformers: without an end token, a sequence that a criterion ended goes on with the others
        self.pads = any(hasattr(item, "eos_token_id") for item in criteria)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        is_kept = config.return_dict_in_generate
        self.scores = [] if is_kept and config.output_scores else None
        self.raw_logits = [] if is_kept and config.output_logits else None
        self.cache = self.token = self.last_scores = self.last_logits = None

    @property
    def ids(self) -> torch.Tensor:
        """The tokens so far, (B, T + n)."""
        return self.all_ids[:, : self.num_ids]

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the next token of every sequence, (B, 1), for logits (B, V)."""
        self.last_logits = logits.float()
        scores = self.last_scores = self.processors(self.ids, self.last_logits)
        if self.do_sample:
            # torch.multinomial without its asserts: on a GPU, NaN would trip them and end all use of CUDA.
            scores = scores.softmax(-1)
            scores = scores / torch.empty_like(scores).exponential_()
        token = scores.argmax(-1, keepdim=True)
        self.token = token.masked_fill(self.finished[:, None], self.pad) if self.pads else token
        self.all_ids.index_copy_(1, self.column, self.token)
        self.column += 1
        self.finished |= (self.token == self.eos).any(-1)
        return self.token

    def picked(self) -> None:
        """Count the token that `pick` chose, and keep its scores if they are wanted."""
        self.num_ids += 1
        for kept, last in ((self.scores, self.last_scores), (self.raw_logits, self.last_logits)):
            if kept is not None:
                kept.append(last.clone())

    def check_on_host(self, num_ids: int) -> None:
        """Ask the criteria of the caller's which sequences end with the token before column num_ids."""
        if self.host_criteria:
            scores = None if self.scores is None else tuple(self.scores)
            self.finished |= self.host_criteria(self.all_ids[:, :num_ids], scores)


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
        # One step is launched before the last is read; but a processor or criterion of the caller's may keep count of
        # its calls, and must not see a token behind the end.
        self.num_ahead = int(self.can_capture and not sampler.host_criteria)
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
        if not on_host and not len(self.sampler.eos) and not self.sampler.host_criteria:
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
                self.sampler.check_on_host(num_ids)
                yield ids if on_host else self.sampler.all_ids[:, :num_ids]
                if finished or (self.sampler.host_criteria and self.sampler.finished.all()):
                    return

    def _launch(self) -> None:
        """Compute the next logits and pick the next token."""
        if self.graph.length == self.graph.slots:
            self.graph = self.graph.grown()
        self.graph.step()
        if self.captured_for is self.graph:
            self.replay_pick()
            self.sampler.picked()
            return
        self._pick()  # for real: it is this step's token, and the run that a capture must have seen before
        self.sampler.picked()
        if self.can_capture:
            self.replay_pick, self.captured_for = capture(self._pick, self.status.device), self.graph

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
            **kwargs: Passed on to ``generate``.

        Returns:
            The answer, and the history with this turn.
        """
        history = list(history or [])
        inputs = self.build_inputs(tokenizer, query, history)
        settings = {
            **self._chat_settings(max_length, do_sample, top_p, temperature),
            "num_beams": num_beams,
            "logits_processor": self._chat_processors(tokenizer, logits_processor),
            **kwargs,
        }
        output = self.generate(**inputs, tokenizer=tokenizer, **settings)
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
            # 2 is a temperature too
            settings["temperature"] = float(self.chat_temperature if temperature is None else temperature)
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
        config.temperature = 1.0 if config.temperature is None else config.temperature
        not_streamed = [
            name for name, none in GENERATE_ONLY.items() if getattr(config, name, None) not in (None, none)
        ]
        return config, sorted(unknown), not_streamed

    def stream_generate(self, input_ids: torch.Tensor, **kwargs):
        """Generate token by token.

        On CUDA the tokens after the first come from a captured graph where decoding_chatglm.py covers the model;
        ``use_cuda_graph=False`` prevents that, here and in ``generate``. Without an end token (``eos_token_id=[]``)
        nothing waits for the GPU. Streams of one model may run in turn: each has a graph of its own. The last one to
        end leaves its graph, cache included, to the next stream; ``model.to`` and the like free it.

        Args:
            input_ids: (B, T); behind ``past_key_values`` the new tokens alone.
            **kwargs: What ``generate`` takes, except GENERATE_ONLY; ``max_length`` counts the prompt.

        Yields:
            All ids so far, (B, T + n), after each of the n new tokens, the last one included.

        Raises:
            ValueError: At the first step: settings that are unknown or not streamed, or no room for a token.
        """
        for ids, _ in self._stream_steps(input_ids, **kwargs):
            yield ids

    def _stream_steps(self, input_ids, attention_mask=None, on_host=False, **settings):
        """Return what yields (ids so far, cache) after each new token; see stream_generate.

        ``on_host`` asks for ids on the CPU. The cache is None once a CUDA graph has taken over.
        """
        _, unknown, not_streamed = self._merge_settings(
            **{key: value for key, value in settings.items() if key not in NO_SETTINGS}
        )
        if unknown:
            raise ValueError(f"unknown generation settings {unknown}: pass those of GenerationConfig")
        if not_streamed:
            raise ValueError(f"{', '.join(not_streamed)} cannot be streamed: use chat or generate, or leave it out")
        if "eos_token_id" in settings and not _as_list(settings["eos_token_id"]):
            settings["eos_token_id"] = None  # which is what `generate` takes an empty list for
        attention_mask, num_past = self._token_mask(attention_mask), _num_cached(settings)
        if num_past and settings.get("position_ids") is None:  # `generate` takes input_ids for the whole sequence
            settings["position_ids"] = self._prompt_positions(input_ids, attention_mask, num_past)
        return self.generate(
            input_ids,
            attention_mask=attention_mask,
            custom_generate=ChatGLMGenerationMixin._stream,
            on_host=on_host,
            **settings,
        )

    def _stream(
        self, input_ids, logits_processor, stopping_criteria, generation_config, on_host=False, **model_kwargs
    ):
        """Yield (ids so far, cache) after each new token; `generate` calls it with all it has prepared."""
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            raise ValueError(f"{mode.value.replace('_', ' ')} cannot be streamed: use chat or generate")
        num_past = _num_cached(model_kwargs)
        num_new = generation_config.max_new_tokens or generation_config.max_length - num_past - input_ids.shape[1]
        num_new = min(num_new, _room(generation_config, stopping_criteria) - input_ids.shape[1])
        if num_new <= 0:
            raise ValueError(
                f"the conversation has {num_past + input_ids.shape[1]} tokens and max_length is "
                f"{generation_config.max_length}, which leaves nothing to generate: raise max_length"
            )
        sampler = self._make_sampler(num_new, input_ids, logits_processor, stopping_criteria, generation_config)
        yield from self._steps(sampler, num_new, on_host, **model_kwargs)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """Greedy search and sampling of `generate`, with the tokens after the first from a DecodeGraph.

        The name and the arguments are transformers', which keeps them private: 5.17 to 5.23 were tried.
        """
        prepared = (input_ids, logits_processor, stopping_criteria, generation_config)
        reason = _why_ordinary(generation_config, synced_gpus, model_kwargs)
        if input_ids.device != self.device:
            reason = reason or f"input_ids on {input_ids.device}, the model on {self.device}"
        if reason:
            self._say_slow(reason)
            return super()._sample(*prepared, synced_gpus, streamer, **model_kwargs)
        num_new = max(1, _room(generation_config, stopping_criteria) - input_ids.shape[1])  # one, as in transformers
        sampler = self._make_sampler(num_new, *prepared)
        is_dict, num_ids = generation_config.return_dict_in_generate, input_ids.shape[1]
        for ids, _ in self._steps(sampler, num_new, streamer is not None, keep_cache=is_dict, **model_kwargs):
            num_ids = ids.shape[1]
            if streamer is not None:
                streamer.put(ids[:, -1])
        if streamer is not None:
            streamer.end()
        sequences = sampler.all_ids[:, :num_ids].clone()  # not a view of the buffer, which is max_length wide
        if not is_dict:
            return sequences
        num_steps = num_ids - input_ids.shape[1]  # the graph may be a step ahead
        scores, logits = (
            None if kept is None else tuple(kept[:num_steps]) for kept in (sampler.scores, sampler.raw_logits)
        )
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=scores, logits=logits, past_key_values=sampler.cache
        )

    @staticmethod
    def _make_sampler(num_new: int, input_ids, processors, criteria, config) -> TokenSampler:
        processors = LogitsProcessorList(processors)
        is_checked = any(isinstance(item, InvalidScoreLogitsProcessor) for item in processors)
        if config.do_sample and not is_checked and not config.remove_invalid_values:
            processors.insert(0, InvalidScoreLogitsProcessor())  # a draw from NaN would be noise
        return TokenSampler(input_ids, num_new, processors, criteria, config)

    @torch.no_grad()
    def _steps(
        self,
        sampler: TokenSampler,
        num_new: int,
        on_host: bool,
        keep_cache: bool = False,
        use_cuda_graph: bool = True,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        prompt_position_ids=None,
        **kwargs,
    ):
        """Yield (ids so far, cache) after each of up to num_new tokens.

        Args:
            sampler: Holds the prompt.
            num_new: The most tokens to add.
            on_host: Yield CPU tensors.
            keep_cache: Leave the cache to the sampler also where a graph has taken over.
            use_cuda_graph: Whether it may.
            past_key_values: The cache, filled with what comes before the prompt.
            attention_mask: (B, S), 1 = keep, or None.
            position_ids: Of the prompt.
            prompt_position_ids: The same, where `generate` computes those of each step (ChatGLM-6B).
            **kwargs: What else `generate` prepares for forward passes; this loop does not need it.
        """
        step_ids, position_ids = sampler.ids, position_ids if prompt_position_ids is None else prompt_position_ids
        cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        sampler.cache, num_past = cache, int(cache.get_seq_length())
        # a cache of the caller's must be filled; transformers marks it
        use_cuda_graph = use_cuda_graph and not num_past and type(cache) is DynamicCache
        use_cuda_graph = use_cuda_graph and not getattr(cache, "_is_user_defined", False)
        if position_ids is None:
            position_ids = self._prompt_positions(step_ids, attention_mask, num_past)
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
            sampler.picked()
            sampler.check_on_host(sampler.num_ids)
            yield sampler.ids.cpu() if on_host else sampler.ids, cache
            if not num_left or sampler.finished.all():
                return
            # Behind the first token the graph takes over, or is not asked again: what rules it out does not change.
            graph = self._decode_graph(cache, attention_mask, position_ids, num_left) if use_cuda_graph else None
            if graph:
                cache.layers.clear()  # the graph has copied them: free them, also where `generate` holds the cache
                cache = None
                steps = GraphSteps(graph, sampler)
                try:
                    for ids in steps.run(num_left, on_host):
                        yield ids, None
                    if keep_cache:
                        sampler.cache = steps.graph.cached(self.config, ids.shape[1] - 1)
                finally:
                    steps.graph.give_back(self)
                return
            use_cuda_graph = False
            position_ids = self._next_positions(position_ids)
            if attention_mask is not None:
                attention_mask = torch.cat((attention_mask, attention_mask.new_ones(len(step_ids), 1)), dim=1)

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
            self._say_slow(str(reason))
            return None

    def _say_slow(self, reason: str) -> None:
        """Say once why the decode path is not used: a warning on a GPU, where it is expected."""
        if reason not in REASONS_SAID:
            REASONS_SAID.add(reason)
            level = logging.WARNING if self.device.type == "cuda" else logging.INFO
            logger.log(level, "generating through the model's forward, which is slower: %s", reason)

    def prepare_inputs_for_generation(self, input_ids, use_cuda_graph=None, **kwargs):
        """Prepare a forward pass of `generate`; use_cuda_graph stands here so that `generate` takes it."""
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    @staticmethod
    def _token_mask(attention_mask):
        """Reduce a published 4-D mask (True = blocked) to (B, S), 1 = keep: its last query sees all but padding."""
        if attention_mask is None or attention_mask.dim() == 2:
            return attention_mask
        return (~attention_mask[:, 0, -1].bool()).long()


def _as_list(value) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _room(config, criteria) -> int:
    """Return the most tokens of a sequence: a MaxLengthCriteria of the caller's stands above max_length."""
    given = [item.max_length for item in criteria if type(item) is MaxLengthCriteria]
    return min(given, default=config.max_length)


def _num_cached(model_kwargs: dict) -> int:
    """Return how many tokens the given cache holds."""
    cache = model_kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _why_ordinary(config, synced_gpus: bool, model_kwargs: dict) -> str | None:
    """Say why a call of `generate` is left to transformers' own loop; None: it is not."""
    wanted = {
        "use_cache=False": not model_kwargs.get("use_cache", True),
        "a given cache": _num_cached(model_kwargs) > 0,
        "cache_implementation": config.cache_implementation is not None,
        "another kind of cache": type(model_kwargs.get("past_key_values")) not in (type(None), DynamicCache),
        "inputs_embeds": model_kwargs.get("inputs_embeds") is not None,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        "synced_gpus": synced_gpus,
        "an assistant model": config.is_assistant,
    }
    reasons = [name for name, is_wanted in wanted.items() if is_wanted]
    return ", ".join(reasons) or None
