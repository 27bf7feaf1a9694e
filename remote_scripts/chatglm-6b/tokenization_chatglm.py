"""ChatGLMTokenizer of ChatGLM-6B: a sentencepiece vocabulary (`ice_text.model`) with symbols for white space.

Text -> ids: newline, tab and runs of spaces become the symbols `<n>`, `<|tab|>`, `<|blank_k|>`; the rest is
sentencepiece. The model's special tokens FOLLOW the prompt: X + [gMASK] <sop>.

Two ways in. `tokenizer(text)` keeps the published treatment, in which some control strings typed in a text act as
control tokens. `encode_text`, `encode_prompt` and `encode_answer` keep everything that a user types as text; training
and chat use these.

Shapes: B batch, S tokens of a sequence.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import sentencepiece
import torch
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.utils import PaddingStrategy

VOCAB_NAME = "ice_text.model"
MAX_BLANK = 80  # longest run of spaces with a symbol of its own
SPACE_SYMBOLS = {"<n>": "\n", "<|tab|>": "\t", **{f"<|blank_{k}|>": " " * k for k in range(2, MAX_BLANK + 1)}}
NAMED_TOKENS = {"bos_token": "<sop>", "eos_token": "<eop>", "unk_token": "<unk>", "pad_token": "<pad>",
                "mask_token": "[MASK]", "gmask_token": "[gMASK]", "end_token": "</s>"}  # fmt: skip
# Every character that the normalizer folds to ">", the only end a space symbol can have.
SYMBOL_ENDS = re.compile("[>\N{SMALL GREATER-THAN SIGN}\N{FULLWIDTH GREATER-THAN SIGN}]")


# region shared by both families: reading the vocabulary and the settings
def load_sentencepiece(path: str | None, name: str, where: str) -> tuple[bytes, sentencepiece.SentencePieceProcessor]:
    """Load a sentencepiece file.

    Args:
        path: the file, None if there is none.
        name: the file name that the checkpoint should hold.
        where: directory or hub id, for the message.

    Returns:
        The file's bytes and the processor.

    Raises:
        ValueError: the file is missing, empty, a git-lfs pointer or not a sentencepiece model.
    """
    remedy = f"copy {name} from a complete download of the base checkpoint"
    if path is None or not Path(path).is_file():
        raise ValueError(f"The tokenizer needs {name}, which is not in {path or where or 'the directory'}: {remedy}.")
    data = Path(path).read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the vocabulary: run `git lfs pull`, or {remedy}.")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data or b"empty")
    except RuntimeError as error:
        raise ValueError(f"{path} ({len(data)} bytes) is not a sentencepiece model: {remedy}.") from error
    return data, processor


def join_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates by U+FFFD: sentencepiece takes UTF-8 only."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def check_prompt_text(prompt_text: str) -> str:
    """Return the text that goes before every question, unless it is none.

    Raises:
        ValueError: it is not a text.
    """
    if not isinstance(prompt_text, str):
        raise ValueError(f"prompt_text is {prompt_text!r}, expected a text, as training wrote it.")
    return prompt_text


# endregion


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Tokenizer of ChatGLM-6B."""

    vocab_files_names = {"vocab_file": VOCAB_NAME}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    def __init__(
        self, vocab_file=None, num_image_tokens=0, do_lower_case=False, remove_space=False, prompt_text="", **kwargs
    ):
        """Load the vocabulary. The arguments are the fields of tokenizer_config.json.

        Args:
            vocab_file: path of `ice_text.model`.
            num_image_tokens: ids kept free below the vocabulary; all other ids shift up by it. The released
                checkpoints have 0.
            do_lower_case: must be False, no released checkpoint uses it.
            remove_space: must be False, likewise.
            prompt_text: what training put before every question; `encode_prompt` does so too. Published
                checkpoints have none.
            **kwargs: bos_token and the other names of NAMED_TOKENS; the rest goes to PreTrainedTokenizer.

        Raises:
            ValueError: the vocabulary cannot be read or is another model's, or an unsupported flag is set.
        """
        if do_lower_case or remove_space:
            raise ValueError("do_lower_case and remove_space must be false in tokenizer_config.json for ChatGLM-6B.")
        self._vocab_bytes, self.sp = load_sentencepiece(vocab_file, VOCAB_NAME, kwargs.get("name_or_path", ""))
        self.num_image_tokens = num_image_tokens
        self.prompt_text = check_prompt_text(prompt_text)
        self._pieces = [f"<image_{i}>" for i in range(num_image_tokens)]
        self._pieces += [self.sp.id_to_piece(i) for i in range(self.sp.get_piece_size())]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        kwargs.update(kwargs.pop("model_specific_special_tokens", None) or {})
        named = {name: str(kwargs.pop(name, None) or token) for name, token in NAMED_TOKENS.items()}
        if missing := [token for token in named.values() if token not in self._ids]:
            raise ValueError(f"{vocab_file} has no {' '.join(missing)}: it is not the vocabulary of ChatGLM-6B.")
        # These two have a name, but are not special tokens of the host: raw text may hold their strings.
        unsplit = {name: named.pop(name) for name in ("end_token", "gmask_token")}
        # The host splits raw text at the others and strips the white space around them, as published.
        saved = kwargs.pop("added_tokens_decoder", None) or {}
        self._added_tokens_decoder = {i: token for i, token in saved.items() if i >= len(self._pieces)}
        for token in named.values():
            self._added_tokens_decoder[self._ids[token]] = AddedToken(token, lstrip=True, rstrip=True, special=True)
        kwargs.pop("auto_map", None)  # of the directory read from; saving writes its own
        kwargs.setdefault("clean_up_tokenization_spaces", True)
        flags = {"do_lower_case": False, "remove_space": False, "num_image_tokens": num_image_tokens}
        flags["prompt_text"] = prompt_text
        super().__init__(**named, **flags, **kwargs)
        self.end_token, self.gmask_token = unsplit["end_token"], unsplit["gmask_token"]
        self.end_token_id, self.gmask_token_id = self._ids[self.end_token], self._ids[self.gmask_token]
        self.init_kwargs.update(unsplit)  # so that they are saved

    @property
    def vocab_size(self) -> int:
        """Number of ids without tokens that a user added."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id."""
        return {**self._ids, **self._added_tokens_encoder}

    # Text to ids

    def sp_encode(self, text: str, linebreak=True, whitespaces=True, add_dummy_prefix=True) -> list[int]:
        """Encode a text without looking for the host's special strings; space symbols typed in it take effect.

        Args:
            text: any text.
            linebreak: whether newlines become symbols, else they are spaces.
            whitespaces: whether tabs and runs of spaces become symbols.
            add_dummy_prefix: whether the text starts with sentencepiece's `▁`.
        """
        text = join_surrogates(text)
        if linebreak:
            text = text.replace("\n", "<n>")
        if whitespaces:
            text = text.replace("\t", "<|tab|>")
            text = re.sub(f" {{2,{MAX_BLANK}}}", lambda run: f"<|blank_{len(run[0])}|>", text)
        # A symbol in front takes the dummy prefix, and both are dropped.
        ids = self.sp.encode(text) if add_dummy_prefix else self.sp.encode("<n>" + text)[2:]
        return [i + self.num_image_tokens for i in ids]

    def _tokenize(self, text, **kwargs):
        return [self._pieces[i] for i in self.sp_encode(text)]

    def encode_text(self, text: str) -> list[int]:
        """Encode a text so that control strings typed in it stay text; add no special tokens.

        A symbol such as `<n>` is split before its end and the parts are encoded one by one. Special strings such as
        `<eop>` are not symbols of sentencepiece, which spells them out by itself.
        """
        parts, start, after_mark = [], 0, 0
        for mark in SYMBOL_ENDS.finditer(text):
            pieces = self.sp.encode(join_surrogates(text[after_mark : mark.end()]), out_type=str)
            if not SPACE_SYMBOLS.keys().isdisjoint(pieces):
                parts.append(text[start : mark.start()])
                start = mark.start()
            after_mark = mark.end()
        parts.append(text[start:])
        return [i for n, part in enumerate(parts) for i in self.sp_encode(part, add_dummy_prefix=n == 0)]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        """Return X [gMASK] <sop>, or A [gMASK] <sop> B <eop>."""
        ids = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False) -> list[int]:
        """Return 1 for special tokens and 0 for text, one entry per id of the built sequence."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        special = {*self.all_special_ids, self.gmask_token_id, self.end_token_id}
        return [int(i in special) for i in token_ids_0]

    # Prompts

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """Write a conversation as the model was trained to read it; without a history that is the query alone.

        `prompt_text` leads every question, those of the history too: a turn keeps its tokens when it becomes history.

        Args:
            query: the question to be answered.
            history: earlier questions and answers, oldest first.
        """
        turns = [(self.prompt_text + ask, answer) for ask, answer in [*(history or []), (query, "")]]
        if not history:
            return turns[0][0]
        return "\n".join(f"[Round {n}]\n问：{ask}\n答：{answer}" for n, (ask, answer) in enumerate(turns))

    def encode_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> list[int]:
        """Return the ids of `build_prompt(query, history)` with special tokens, ready for the model."""
        return self.build_inputs_with_special_tokens(self.encode_text(self.build_prompt(query, history)))

    def encode_answer(self, answer: str) -> list[int]:
        """Return the ids of an answer with its end token."""
        return [*self.encode_text(answer), self.eos_token_id]

    # Ids to text

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self._ids[self.unk_token])

    def _convert_id_to_token(self, index):
        # The embedding has more rows than the vocabulary has pieces: an id without a piece is not text.
        return self._pieces[index] if 0 <= index < len(self._pieces) else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to text; only space symbols that are one token turn into white space, spelled-out ones stay."""
        tokens = [SPACE_SYMBOLS.get(token, token) for token in tokens if token]
        return self.sp.decode(tokens) if tokens else ""

    def _decode(self, token_ids, *args, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        ids = [i for i in ids if i >= self.num_image_tokens and i != self.pad_token_id]
        return super()._decode(ids, *args, **kwargs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the vocabulary file, byte for byte as it was read; return its path."""
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{VOCAB_NAME}"
        path.write_bytes(self._vocab_bytes)
        return (str(path),)

    # Padding

    def pad(self, encoded_inputs, *args, **kwargs) -> BatchEncoding:
        """Pad encodings on the left; attention_mask and position_ids are built anew from the ids.

        Args:
            encoded_inputs: one encoding, a list of them, or a dictionary of lists. Of an attention_mask only the
                number of pads on the left is read. Other entries, such as labels, are returned as they are.
            *args: see transformers.
            **kwargs: see transformers.

        Returns:
            input_ids [B, S], attention_mask [B, 1, S, S] (True = blocked), position_ids [B, 2, S].
        """
        if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs and isinstance(encoded_inputs[0], Mapping):
            encoded_inputs = {key: [encoding[key] for encoding in encoded_inputs] for key in encoded_inputs[0]}
        inputs = {key: value for key, value in encoded_inputs.items() if key not in ("attention_mask", "position_ids")}
        mask, ids = encoded_inputs.get("attention_mask"), inputs.get("input_ids", ())
        if mask is not None and len(ids) > 0:
            single = isinstance(ids[0], int) or getattr(ids[0], "ndim", 1) == 0
            inputs["num_pads"] = count_pads(mask) if single else [count_pads(one) for one in mask]
        return super().pad(inputs, *args, **kwargs)

    def _pad(self, encoded_inputs, max_length=None, padding_strategy=PaddingStrategy.DO_NOT_PAD,
             pad_to_multiple_of=None, padding_side=None, return_attention_mask=None):  # fmt: skip
        if (padding_side or self.padding_side) != "left":
            raise ValueError("ChatGLM-6B sequences are padded on the left only: set padding_side to 'left'.")
        ids = encoded_inputs["input_ids"]
        num_pads = encoded_inputs.pop("num_pads", 0)
        known_length = max_length is not None or padding_strategy == PaddingStrategy.LONGEST or num_pads > 0
        encoded_inputs = super()._pad(
            encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, "left", return_attention_mask=False
        )
        if known_length:
            num_pads += len(encoded_inputs["input_ids"]) - len(ids)
            mask, positions = self._mask_and_positions(encoded_inputs["input_ids"], num_pads)
            encoded_inputs["position_ids"] = positions.numpy()
            if return_attention_mask is not False:
                encoded_inputs["attention_mask"] = mask.numpy()
        return encoded_inputs

    def _mask_and_positions(self, ids: list[int], num_pads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Build a sequence's mask [1, S, S] (True = blocked) and positions [2, S].

        Source: the published tokenizer's rule: [MASK] goes before [gMASK], positions count from the first real token.
        """
        real = list(ids[num_pads:])
        context = real.index(self.bos_token_id) if self.bos_token_id in real else len(real)
        positions = torch.zeros(2, len(ids), dtype=torch.long)
        positions[0, num_pads:] = torch.arange(len(real))
        blank = self.mask_token_id if self.mask_token_id in real else self.gmask_token_id
        if blank in real:
            positions[0, num_pads + context :] = real.index(blank)
        positions[1, num_pads + context :] = torch.arange(1, len(real) - context + 1)
        blocked = torch.ones(1, len(ids), len(ids), dtype=torch.bool).triu(1)  # causal
        blocked[:, :, : num_pads + context] = False  # the prompt is visible to all
        blocked[:, :num_pads], blocked[:, :, :num_pads] = True, True
        return blocked, positions


def count_pads(mask) -> int:
    """Count the pads on the left of a sequence by its mask: [S] with 1 = keep, or [1, S, S] with True = blocked."""
    mask = torch.as_tensor(mask).bool()
    pad = ~mask if mask.ndim == 1 else mask[0].all(-1)  # a real token sees at least itself
    num_pads = int(pad.long().cumprod(0).sum())
    if pad[num_pads:].any():
        raise ValueError(
            "ChatGLM-6B sequences are padded on the left only, and this attention_mask hides other tokens."
        )
    return num_pads
