"""Text in a GGUF file: vocabulary, chat templates, sampling defaults; and an Ollama Modelfile.

Both templates write the two prefix tokens and then what `build_prompt` of the tokenizer writes. The model was not
trained with a system message; it is put in front of the next question. In a chat, engines parse control tokens
everywhere in the text, also in what the user typed. So the tokens `sop` and `eop` are named <sop> and <eop> here: a
token named `sop` would split every "philosopher".
"""

from __future__ import annotations  # the package gguf may be absent

from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from transformers import PreTrainedTokenizer

from glm_utils.cli import UserError
from glm_utils.export.template_text import go_with_text, jinja_with_text
from glm_utils.model_files.model_json import shown

try:
    import gguf
except ImportError:
    gguf = None  # type: ignore[assignment]  # mypy takes an optional module for one that is always there

TEMPERATURE, TOP_P, TOP_K, MAX_LENGTH = 0.8, 0.8, 50, 8192  # the published defaults of chat, max_length in tokens
SAMPLERS = "temperature;top_k;top_p"  # the published order
CONTROL_NAMES = {"sop": "<sop>", "eop": "<eop>"}
PADDING_SCORE = -1000.0  # of tokens that are not sentencepiece's: text is never split into them

# The prefix is written in two expressions: llama.cpp takes a template that contains "[gMASK]<sop>" for ChatGLM4's.
JINJA_TEMPLATE = (
    "{{ '[gMASK]' }}{{ '<sop>' }}{% set state = namespace(round=0, system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set state.system = state.system + message['content'] + '\\n' %}"
    "{% elif message['role'] == 'user' %}{% set state.round = state.round + 1 %}"
    "{% if state.round > 1 %}{{ '\\n\\n' }}{% endif %}"
    "{{ '[Round ' ~ state.round ~ ']\\n\\n问：' ~ state.system ~ message['content'] ~ '\\n\\n答：' }}"
    "{% set state.system = '' %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)

# Go templates cannot add: the round is the length of a string that grows by one character per question.
GO_TEMPLATE = (
    '[gMASK]<sop>{{ $rounds := "" }}{{ $system := "" }}'
    "{{ range .Messages }}"
    '{{ if eq .Role "system" }}{{ $system = printf "%s%s\\n" $system .Content }}'
    '{{ else if eq .Role "user" }}{{ if $rounds }}\n\n{{ end }}{{ $rounds = printf "%s." $rounds }}'
    '[Round {{ len $rounds }}]\n\n问：{{ $system }}{{ .Content }}\n\n答：{{ $system = "" }}'
    "{{ else }}{{ .Content }}{{ end }}"
    "{{ end }}"
)


def read_vocabulary(path: Path) -> sentencepiece_model_pb2.ModelProto:
    """Parse a sentencepiece file."""
    return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())


def check_vocabulary(path: Path) -> None:
    """Check that llama.cpp splits text as sentencepiece does with this vocabulary.

    Raises:
        UserError: The vocabulary has a setting that llama.cpp ignores.
    """
    model = read_vocabulary(path)
    normalizer = model.normalizer_spec
    settings = {
        "model_type": (model.trainer_spec.model_type, sentencepiece_model_pb2.TrainerSpec.BPE),
        "precompiled_charsmap": (bool(normalizer.precompiled_charsmap), False),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, True),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
    }
    for name, (found, expected) in settings.items():
        if found != expected:
            raise UserError(
                f"{path}: {name} is {found}, expected {expected} as in ChatGLM2-6B. llama.cpp would not split "
                "text as in training. Use --export_format chatglm"
            )


def check_prompt_text(tokenizer: PreTrainedTokenizer) -> None:
    """Check that llama.cpp reads the text before every question as text.

    Raises:
        UserError: It holds the name of a control token, which is text in training and a token in llama.cpp.
    """
    sp, num_pieces = tokenizer.sp, tokenizer.sp.get_piece_size()
    control = [sp.id_to_piece(index) for index in range(num_pieces) if sp.is_control(index) or sp.is_unknown(index)]
    control += tokenizer.convert_ids_to_tokens(range(num_pieces, tokenizer.vocab_size))
    for name in (CONTROL_NAMES.get(token, token) for token in control):
        if name in tokenizer.prompt_text:
            raise UserError(
                f"prompt_text {shown(tokenizer.prompt_text)} holds {name}, a control token for llama.cpp; in training "
                "it was text. Use --export_format chatglm or glm"
            )


def add_vocabulary(writer: gguf.GGUFWriter, path: Path, tokenizer: PreTrainedTokenizer, num_rows: int) -> None:
    """Write one token for each row of the embedding: sentencepiece's, then the control tokens, then padding.

    Args:
        writer: The GGUF file.
        path: The sentencepiece file.
        tokenizer: The tokenizer of remote_scripts, loaded from the same file.
        num_rows: Number of rows of the embedding.
    """
    pieces = read_vocabulary(path).pieces
    control = [tokenizer.convert_ids_to_tokens(i) for i in range(len(pieces), tokenizer.vocab_size)]
    tokens = [piece.piece for piece in pieces] + [CONTROL_NAMES.get(token, token) for token in control]
    # GGUF numbers the piece types as sentencepiece does
    types = [piece.type for piece in pieces] + [gguf.TokenType.CONTROL] * len(control)
    num_padding = num_rows - len(tokens)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), num_rows)]
    writer.add_tokenizer_model("llama")  # llama.cpp's name for sentencepiece BPE
    writer.add_tokenizer_pre("chatglm-spm")
    writer.add_token_list(tokens)
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * num_padding)
    writer.add_token_scores([piece.score for piece in pieces] + [PADDING_SCORE] * (len(control) + num_padding))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(jinja_with_text(JINJA_TEMPLATE, tokenizer.prompt_text))


def add_sampling(writer: gguf.GGUFWriter) -> None:
    """Write the sampling defaults that llama.cpp's programs read from the file."""
    writer.add_sampling_sequence(SAMPLERS)
    writer.add_sampling_temp(TEMPERATURE)
    writer.add_sampling_top_k(TOP_K)
    writer.add_sampling_top_p(TOP_P)


def modelfile(weights_name: str, max_length: int, prompt_text: str = "") -> str:
    """Return the text of an Ollama Modelfile.

    Source: Ollama's Modelfile reference. Its sampler applies top_k, top_p, temperature, whatever the order here.

    Args:
        weights_name: Name of the GGUF file in the same directory.
        max_length: Longest sequence of the model, in tokens.
        prompt_text: What stands before every question.
    """
    return f'''FROM ./{weights_name}
TEMPLATE """{go_with_text(GO_TEMPLATE, prompt_text)}"""
PARAMETER stop "</s>"
PARAMETER stop "[Round "
PARAMETER temperature {TEMPERATURE}
PARAMETER top_p {TOP_P}
PARAMETER top_k {TOP_K}
PARAMETER min_p 0
PARAMETER repeat_penalty 1
PARAMETER num_ctx {min(MAX_LENGTH, max_length)}
'''
