"""ChatGLMTokenizer of ChatGLM2-6B: a sentencepiece vocabulary (`tokenizer.model`) and five tokens behind it.

The model's special tokens PRECEDE the prompt: [gMASK] sop + X; the answer ends with `</s>`. No control string is
recognized in a text, whether it is encoded with `tokenizer(text)` or with `encode_text`.
"""

from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer
from transformers.utils import PaddingStrategy

VOCAB_NAME = "tokenizer.model"
EXTRA_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")  # ids follow the sentencepiece vocabulary


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
    """Tokenizer of ChatGLM2-6B."""

    vocab_files_names = {"vocab_file": VOCAB_NAME}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    def __init__(self, vocab_file=None, do_lower_case=False, remove_space=False, prompt_text="", **kwargs):
        """Load the vocabulary. The arguments are the fields of tokenizer_config.json.

        Args:
            vocab_file: path of `tokenizer.model`.
            do_lower_case: must be False, no released checkpoint uses it.
            remove_space: must be False, likewise.
            prompt_text: what training put before every question; `encode_prompt` does so too. Published
                checkpoints have none.
            **kwargs: passed to PreTrainedTokenizer.

        Raises:
            ValueError: the vocabulary cannot be read or is another model's, or an unsupported flag is set.
        """
        if do_lower_case or remove_space:
            raise ValueError("do_lower_case and remove_space must be false in tokenizer_config.json for ChatGLM2-6B.")
        self._vocab_bytes, self.sp = load_sentencepiece(vocab_file, VOCAB_NAME, kwargs.get("name_or_path", ""))
        self.prompt_text = check_prompt_text(prompt_text)
        self._pieces = [self.sp.id_to_piece(i) for i in range(self.sp.get_piece_size())]
        if "[gMASK]" in self._pieces:
            raise ValueError(f"{vocab_file} has a piece [gMASK]: it is not the vocabulary of ChatGLM2-6B.")
        self._pieces += EXTRA_TOKENS
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        self._commands = {"<bos>": self.sp.bos_id(), "<eos>": self.sp.eos_id(), "<pad>": self.sp.unk_id()}
        self._commands.update({token: self._ids[token] for token in EXTRA_TOKENS})
        # Saved by other versions, an entry for `</s>` would make the host split raw text at it.
        saved = kwargs.pop("added_tokens_decoder", None) or {}
        self._added_tokens_decoder = {i: token for i, token in saved.items() if i >= len(self._pieces)}
        kwargs.pop("auto_map", None)  # of the directory read from; saving writes its own
        for name, token in {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}.items():
            kwargs[name] = kwargs.get(name) or token
        super().__init__(do_lower_case=False, remove_space=False, prompt_text=prompt_text, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of ids without tokens that a user added."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id."""
        return {**self._ids, **self._added_tokens_encoder}

    @property
    def all_special_tokens(self) -> list[str]:
        """Return the tokens that the host may find in raw text: none but those that a user added."""
        return [str(token) for token in self._extra_special_tokens]

    def get_command(self, token: str) -> int:
        """Return the id of a control token: <bos>, <eos>, <pad> or one of EXTRA_TOKENS."""
        return self._commands[token]

    def get_prefix_tokens(self) -> list[int]:
        """Return the ids of [gMASK] sop, with which every input starts."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    # Text to ids

    def _tokenize(self, text, **kwargs):
        return [self._pieces[i] for i in self.encode_text(text)]

    def encode_text(self, text: str) -> list[int]:
        """Encode a text; control strings typed in it stay text.

        Args:
            text: any text.

        Returns:
            Ids without special tokens.
        """
        return self.sp.encode(join_surrogates(text))

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        """Return [gMASK] sop X, or [gMASK] sop A B </s>."""
        ids = [*self.get_prefix_tokens(), *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.get_command("<eos>")]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False) -> list[int]:
        """Return 1 for special tokens and 0 for text, one entry per id of the built sequence."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(i in self._commands.values()) for i in token_ids_0]

    # Prompts

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """Write a conversation as the model was trained to read it.

        `prompt_text` leads every question, those of the history too: a turn keeps its tokens when it becomes history.

        Args:
            query: the question to be answered.
            history: earlier questions and answers, oldest first.

        Returns:
            The prompt; the template is used without a history too.
        """
        turns = [(self.prompt_text + ask, answer) for ask, answer in [*(history or []), (query, "")]]
        return "\n\n".join(f"[Round {n}]\n\n问：{ask}\n\n答：{answer}" for n, (ask, answer) in enumerate(turns, 1))

    def encode_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> list[int]:
        """Return the ids of `build_prompt(query, history)` with special tokens, ready for the model."""
        return self.build_inputs_with_special_tokens(self.encode_text(self.build_prompt(query, history)))

    def encode_answer(self, answer: str) -> list[int]:
        """Return the ids of an answer with its end token."""
        return [*self.encode_text(answer), self.get_command("<eos>")]

    # Ids to text

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self.sp.unk_id())

    def _convert_id_to_token(self, index):
        # The embedding has more rows than the vocabulary has pieces: an id without a piece is not text.
        return self._pieces[index] if 0 <= index < len(self._pieces) else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to text."""
        tokens = [token for token in tokens if token]
        return self.sp.decode(tokens) if tokens else ""

    def _decode(self, token_ids, *args, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return super()._decode([i for i in ids if i not in self._commands.values()], *args, **kwargs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the vocabulary file, byte for byte as it was read; return its path."""
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{VOCAB_NAME}"
        path.write_bytes(self._vocab_bytes)
        return (str(path),)

    # Padding

    def _pad(self, encoded_inputs, max_length=None, padding_strategy=PaddingStrategy.DO_NOT_PAD,
             pad_to_multiple_of=None, padding_side=None, return_attention_mask=None):  # fmt: skip
        side = padding_side or self.padding_side
        length = len(encoded_inputs["input_ids"])
        positions = list(encoded_inputs.get("position_ids", range(length)))
        encoded_inputs = super()._pad(
            encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, side, return_attention_mask
        )
        pads = [0] * (len(encoded_inputs["input_ids"]) - length)
        encoded_inputs["position_ids"] = pads + positions if side == "left" else positions + pads
        return encoded_inputs
