"""Turn ChatGLM2-6B's sentencepiece vocabulary into a tokenizer.json that encodes every text alike.

Control tokens are unreachable from text: none is an added token of the file, and the loader's own special tokens
(`</s>`, ...) are kept out of texts by `split_special_tokens`. Only a text that begins with PREFIX_TEXT, which the chat
template writes and which ends with a Unicode noncharacter, starts with the ids of [gMASK] sop.

Source: sentencepiece's bpe_model.cc (of all adjacent pairs that make a piece, the one with the highest score is
merged, the leftmost of equals) and the tokenizers library's BPE (the pair with the lowest rank, the leftmost first).
"""

from pathlib import Path

from loguru import logger
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer

from glm_utils.cli import UserError

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


def fast_tokenizer(vocab_path: Path, tokenizer: PreTrainedTokenizer) -> Tokenizer:
    """Build the fast form of a ChatGLM2-6B tokenizer.

    Args:
        vocab_path: Its sentencepiece file.
        tokenizer: The tokenizer of remote_scripts, read from the same file.

    Returns:
        A tokenizer with the same ids for every text; see the module's docstring for PREFIX_TEXT.

    Raises:
        UserError: A vocabulary whose encoding the tokenizers library cannot express, or a difference.
    """
    model = read_model(vocab_path)
    vocab = {tokenizer.convert_ids_to_tokens(i): i for i in range(tokenizer.vocab_size)}
    merges = derive_merges(
        {piece.piece: piece.score for piece in model.pieces if piece.type == Piece.NORMAL}, vocab_path
    )
    # ignore_merges gives the two words that the pre-tokenizer cuts off their ids; no other word lacks the leading ▁
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
            decoders.Replace("<0x0A>", "\n"),  # else an incomplete character behind it turns it into U+FFFD too
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    check_pieces(fast, tokenizer)
    return fast


def read_model(vocab_path: Path) -> sentencepiece_model_pb2.ModelProto:
    """Read a sentencepiece file and refuse settings that the tokenizers library cannot express.

    Args:
        vocab_path: The file.

    Raises:
        UserError: The setting.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(vocab_path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    types = {piece.type for piece in model.pieces}
    expected = {
        "a BPE model": trainer.model_type == sentencepiece_model_pb2.TrainerSpec.BPE,
        "all 256 bytes as pieces": sum(piece.type == Piece.BYTE for piece in model.pieces) == 256,
        "the identity normaliser": not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces,
        "a leading and escaped space": normalizer.add_dummy_prefix and normalizer.escape_whitespaces,
        "no space behind a word": not trainer.treat_whitespace_as_suffix,
        "no user-defined or unused pieces": types <= {Piece.NORMAL, Piece.UNKNOWN, Piece.CONTROL, Piece.BYTE},
    }
    if missing := [words for words, holds in expected.items() if not holds]:
        raise UserError(
            f"{vocab_path}: ChatGLM2-6B's vocabulary has {', '.join(missing)}, this one differs, and a fast tokenizer "
            "of it would encode otherwise. Give the base its published tokenizer.model, or use --export_format chatglm"
        )
    return model


def derive_merges(scores: dict[str, float], vocab_path: Path) -> list[tuple[str, str]]:
    """List every pair of pieces that makes a piece, the highest score first.

    Args:
        scores: Score by piece.
        vocab_path: Named in the error.

    Raises:
        UserError: A piece with a character that is no piece: sentencepiece merges it, the tokenizers library cannot.
    """
    merges = []
    long_pieces = [piece for piece in scores if len(piece) > 1]
    for piece in sorted(long_pieces, key=lambda piece: -scores[piece]):
        if lost := [character for character in piece if character not in scores]:
            raise UserError(f"{vocab_path}: piece {piece!r} has the character {lost[0]!r}, which is no piece itself")
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [pair for pair in splits if pair[0] in scores and pair[1] in scores]
    num_ties = len(long_pieces) - len({scores[piece] for piece in long_pieces})
    if num_ties:
        logger.warning(
            f"{vocab_path}: {num_ties} pieces share a score with another; where two such pieces overlap in a text, "
            "the fast tokenizer may choose the other one"
        )
    return merges


def check_pieces(fast: Tokenizer, tokenizer: PreTrainedTokenizer) -> None:
    """Check that every piece, alone and among all others, is encoded as sentencepiece does.

    Args:
        fast: The fast tokenizer.
        tokenizer: That of remote_scripts.

    Raises:
        UserError: A difference.
    """
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in range(tokenizer.vocab_size)]
    never_made = []
    words = [*pieces, *(piece.removeprefix(SPACE) for piece in pieces)]
    for text in dict.fromkeys([*words, "".join(pieces), " ".join(pieces)]):
        found, expected = fast.encode(text, add_special_tokens=False).tokens, tokenizer.tokenize(text)
        if found == [SPACE + text] != expected:
            never_made.append(text)
        elif found != expected:
            raise UserError(f"the fast tokenizer splits {text[:80]!r} into {found[:20]}, expected {expected[:20]}")
    if never_made:
        logger.warning(
            f"sentencepiece never makes {len(never_made)} pieces of this vocabulary. The fast tokenizer takes a text "
            f"that is just one of them for that piece: {', '.join(map(repr, never_made[:5]))}"
        )
