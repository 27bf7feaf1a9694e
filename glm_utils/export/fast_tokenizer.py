"""Convert ChatGLM2-6B's sentencepiece vocabulary to a tokenizer.json that gives the same ids for every text.

Text never encodes to control tokens: none is an added token of the file, and `split_special_tokens` makes the loader
encode its special tokens (`</s>`, ...) as text. Only a text that begins with PREFIX_TEXT starts with the ids of
[gMASK] sop; the chat template writes it, and it ends with a Unicode noncharacter.

Source: sentencepiece's bpe_model.cc (of all adjacent pairs that form a piece, it merges the one with the highest
score, the leftmost of equals) and the tokenizers library's BPE (the pair with the lowest rank, the leftmost first).
"""

from pathlib import Path

from loguru import logger
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer

from glm_utils.cli import UserError
from glm_utils.export.template_text import jinja_with_text

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
SPACE = "▁"
PREFIX = ("[gMASK]", "sop")
PREFIX_TEXT = "[gMASK]sop\ufdd0"
CHAT_TEMPLATE = """\
{{- '[gMASK]sop\\ufdd0' -}}
{%- set ns = namespace(system='', round=0, next='user') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- set ns.system = message['content'] -%}
    {%- elif message['role'] != ns.next or message['content'] is not string -%}
        {{- raise_exception('expected texts of user and assistant in turns, at most one system text in front') -}}
    {%- elif ns.next == 'user' -%}
        {%- set ns.round = ns.round + 1 -%}
        {%- set ns.next = 'assistant' -%}
        {{- '\\n\\n' if ns.round > 1 else '' -}}
        {{- '[Round ' ~ ns.round ~ ']\\n\\n问：' -}}
        {{- ns.system ~ '\\n' if ns.system and ns.round == 1 else '' -}}
        {{- message['content'] -}}
    {%- else -%}
        {%- set ns.next = 'user' -%}
        {{- '\\n\\n答：' ~ message['content'] -}}
    {%- endif -%}
{%- endfor -%}
{{- '\\n\\n答：' if add_generation_prompt else '' -}}
"""


def chat_template(prompt_text: str) -> str:
    """Return the Jinja template that writes what the tokenizer's `build_prompt` writes.

    Args:
        prompt_text: What stands before every question.
    """
    return jinja_with_text(CHAT_TEMPLATE, prompt_text)


def fast_tokenizer(vocab_path: Path, tokenizer: PreTrainedTokenizer) -> Tokenizer:
    """Build a tokenizer of the tokenizers library that encodes as ChatGLM2-6B's tokenizer does.

    Args:
        vocab_path: The sentencepiece file.
        tokenizer: The tokenizer of remote_scripts, loaded from the same file.

    Raises:
        UserError: The tokenizers library cannot express the vocabulary, or a piece is encoded differently.
    """
    model = read_model(vocab_path)
    vocab = {tokenizer.convert_ids_to_tokens(i): i for i in range(tokenizer.vocab_size)}
    merges = derive_merges(
        {piece.piece: piece.score for piece in model.pieces if piece.type == Piece.NORMAL}, vocab_path
    )
    # ignore_merges lets the pre-tokenizer's two words [gMASK] and sop be tokens; all other words begin with ▁
    bpe = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", ignore_merges=True)
    fast = Tokenizer(bpe)
    gmask, sop = PREFIX
    fast.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend(SPACE),
            normalizers.Replace(" ", SPACE),
            normalizers.Replace(Regex(rf"\A{SPACE}\[gMASK\]sop\x{{FDD0}}"), gmask + sop + SPACE),
        ]
    )
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\A\[gMASK\](?=sop{SPACE})"), "isolated"),
            pre_tokenizers.Split(Regex(rf"\Asop(?={SPACE})"), "isolated"),
        ]
    )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{gmask} {sop} $A",
        pair=f"{gmask} {sop} $A $B:0 </s>:0",
        special_tokens=[(token, vocab[token]) for token in (*PREFIX, "</s>")],
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            # Else ByteFallback turns it into U+FFFD together with an incomplete character after it
            decoders.Replace("<0x0A>", "\n"),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    check_pieces(fast, tokenizer)
    return fast


def read_model(vocab_path: Path) -> sentencepiece_model_pb2.ModelProto:
    """Parse a sentencepiece file and check that the tokenizers library can express its settings.

    Raises:
        UserError: It cannot; the message names the settings.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(vocab_path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    types = {piece.type for piece in model.pieces}
    expected = {
        "a BPE model": trainer.model_type == sentencepiece_model_pb2.TrainerSpec.BPE,
        "all 256 bytes as pieces": sum(piece.type == Piece.BYTE for piece in model.pieces) == 256,
        "the identity normalizer": not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces,
        "a leading and escaped space": normalizer.add_dummy_prefix and normalizer.escape_whitespaces,
        "no space after a word": not trainer.treat_whitespace_as_suffix,
        "no user-defined or unused pieces": types <= {Piece.NORMAL, Piece.UNKNOWN, Piece.CONTROL, Piece.BYTE},
    }
    if missing := [words for words, holds in expected.items() if not holds]:
        raise UserError(
            f"{vocab_path}: expected {', '.join(missing)}, as in ChatGLM2-6B; a fast tokenizer would encode "
            "differently. Give the base its published tokenizer.model, or use --export_format chatglm"
        )
    return model


def derive_merges(scores: dict[str, float], vocab_path: Path) -> list[tuple[str, str]]:
    """Return every pair of pieces that form a piece, by descending score; `vocab_path` is for messages.

    Raises:
        UserError: A character of a piece is not a piece. sentencepiece merges it, the tokenizers library cannot.
    """
    merges = []
    long_pieces = [piece for piece in scores if len(piece) > 1]
    for piece in sorted(long_pieces, key=lambda piece: -scores[piece]):
        if unknown := [character for character in piece if character not in scores]:
            raise UserError(
                f"{vocab_path}: piece {piece!r} has the character {unknown[0]!r}, which is not a piece itself. Use "
                "--export_format chatglm"
            )
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [pair for pair in splits if pair[0] in scores and pair[1] in scores]
    num_ties = len(long_pieces) - len({scores[piece] for piece in long_pieces})
    if num_ties:
        logger.warning(
            f"{vocab_path}: {num_ties} pieces have the score of another piece; where two of them overlap in a text, "
            "the fast tokenizer may choose the other one"
        )
    return merges


def check_pieces(fast: Tokenizer, tokenizer: PreTrainedTokenizer) -> None:
    """Check that every piece, alone and among all others, is encoded as by the tokenizer of remote_scripts.

    Raises:
        UserError: A text is encoded differently.
    """
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in range(tokenizer.vocab_size)]
    unreachable = []
    words = [*pieces, *(piece.removeprefix(SPACE) for piece in pieces)]
    for text in dict.fromkeys([*words, "".join(pieces), " ".join(pieces)]):
        found, expected = fast.encode(text, add_special_tokens=False).tokens, tokenizer.tokenize(text)
        if found == [SPACE + text] != expected:
            unreachable.append(text)
        elif found != expected:
            raise UserError(f"the fast tokenizer splits {text[:80]!r} into {found[:20]}, expected {expected[:20]}")
    if unreachable:
        logger.warning(
            f"sentencepiece never encodes text to {len(unreachable)} pieces of this vocabulary. The fast tokenizer "
            f"encodes a text that is exactly such a piece to it: {', '.join(map(repr, unreachable[:5]))}"
        )
