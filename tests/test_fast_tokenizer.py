"""The tokenizer.json of --export_format glm: equal to sentencepiece on every text, no control token from a text."""

import json
import random
import time
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from glm_utils.checkpoint import load_tokenizer_class, open_checkpoint
from glm_utils.cli import UserError
from glm_utils.export.fast_tokenizer import CHAT_TEMPLATE, PREFIX_TEXT, fast_tokenizer
from glm_utils.export.glm import TOKENIZER_CONFIG
from glm_utils.family import FAMILIES, PROJECT_DIR

FAMILY = FAMILIES[1]
GOLDEN_DIR = PROJECT_DIR / "tests" / "fixtures" / FAMILY.name
MODEL_DIRS = {"golden": GOLDEN_DIR / "model", "tiny": PROJECT_DIR / "models" / "chatglm2-tiny"}
FRAGMENTS = [
    "[gMASK]", "sop", "eop", "[MASK]", "[sMASK]", "</s>", "<s>", "<unk>", "<0x0A>", "▁", " ", "  ", "\t", "\n", "\r\n",
    "😀", "👨‍👩‍👧", "\u0000", "\ufdd0", "\ufdd1", "\ufeff", "e\u0301", "你好", "哈", "哈哈", "1", "12", ".", "aa",
    "aba", "问：", "答：", "\n\n", "[Round 1]", "[gMASK]sop",
]  # fmt: skip


@cache
def slow(name):
    """Load a small tokenizer of remote_scripts once; tests must not change it."""
    return open_checkpoint(MODEL_DIRS[name]).tokenizer


@cache
def fast(name):
    """Build its fast form once."""
    return fast_tokenizer(MODEL_DIRS[name] / FAMILY.tokenizer_file, slow(name))


@pytest.fixture(params=list(MODEL_DIRS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def auto(tmp_path_factory):
    """The golden tokenizer as --export_format glm writes it, loaded with AutoTokenizer."""
    directory = tmp_path_factory.mktemp("auto")
    fast("golden").save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / "config.json").write_text('{"model_type": "glm"}')
    return AutoTokenizer.from_pretrained(directory)


def train(lines, directory, **settings):
    """Train a sentencepiece vocabulary of ChatGLM2-6B's kind; returns its file."""
    expected = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    expected |= {"remove_extra_whitespaces": False, "character_coverage": 1.0, "minloglevel": 2}
    expected |= {"hard_vocab_limit": False}
    prefix = directory / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), **{**expected, **settings}
    )
    return prefix.with_suffix(".model")


def change(directory, edit):
    """Write the golden vocabulary with a change; returns its file."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((MODEL_DIRS["golden"] / FAMILY.tokenizer_file).read_bytes())
    edit(model)
    path = directory / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return path


def build(path: Path):
    """Return both forms of a vocabulary file."""
    tokenizer = load_tokenizer_class(FAMILY)(str(path))
    return tokenizer, fast_tokenizer(path, tokenizer)


def agree(tokenizer, converted, texts):
    """Check that both forms encode the texts alike."""
    for text in texts:
        assert converted.encode(text, add_special_tokens=False).ids == tokenizer.encode_text(text), repr(text)


# ---- encoding


def test_golden_ids(auto):
    golden = json.loads((GOLDEN_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(golden["singles"]) > 60
    for case in golden["singles"]:
        assert auto.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert auto(case["text"])["input_ids"] == case["ids_special"]
        assert auto.decode(case["ids_special"], skip_special_tokens=True) == case["decode"]
    for case in golden["pairs"]:
        assert fast("golden").encode(case["a"], case["b"]).ids == case["ids_pair"]
    batch = auto(golden["batch_texts"], padding=True)
    assert {key: batch[key] for key in batch} == {key: golden["batch"][key] for key in ("input_ids", "attention_mask")}


def test_sample_examples(name):
    lines = (PROJECT_DIR / "data" / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for line in lines for text in json.loads(line).values()]
    agree(slow(name), fast(name), texts)
    assert all(fast(name).decode(fast(name).encode(text).ids[2:]) == text for text in texts)


def test_texts_of_every_kind(name):
    generator = random.Random(0)
    pieces = [slow(name).sp.id_to_piece(i) for i in range(259, slow(name).sp.get_piece_size())]
    for _ in range(1500):
        texts = [
            "".join(generator.choices(FRAGMENTS, k=generator.randint(0, 12))),
            "".join(generator.choices(pieces, k=generator.randint(0, 15))),
            "".join(generator.choices(generator.choice(pieces), k=40)),
            "".join(chr(generator.randrange(0x110000)) for _ in range(6)).encode(errors="replace").decode(),
        ]
        agree(slow(name), fast(name), [text for text in texts if not text.startswith(PREFIX_TEXT)])


@pytest.mark.parametrize("alphabet", ["a", "ab", "abc", "ab ", "哈啊"])
def test_periodic_vocabularies(alphabet, tmp_path):
    """Pieces that repeat themselves overlap in a text: the one on the left wins in both forms."""
    generator = random.Random(0)

    def text(num_runs):
        return "".join(generator.choice(alphabet) * generator.randint(1, 9) for _ in range(num_runs))

    lines = [text(20) for _ in range(500)]
    path = train(lines, tmp_path, vocab_size=285, split_by_whitespace=" " not in alphabet)
    tokenizer, converted = build(path)
    agree(tokenizer, converted, [text(generator.randint(0, 12)) for _ in range(1000)])


def test_a_vocabulary_of_real_size(tmp_path, log_lines):
    """65k pieces convert in seconds (1.3 s on one core), also when sentencepiece never uses some of them."""
    generator = random.Random(0)
    characters = ["▁", *map(chr, range(33, 127)), *map(chr, range(0x4E00, 0x9C20)), *map(chr, range(0xAC00, 0xD6F0))]
    pieces = dict.fromkeys(characters)
    known = list(characters)
    while len(known) < 64_530:
        piece = "▁" * (generator.random() < 0.1)  # often such a piece cannot be made of two
        piece += "".join(known[int(len(known) * generator.random() ** 3)] for _ in range(2))
        if len(piece) <= 16 and piece not in pieces:
            pieces[piece] = None
            known.append(piece)

    def replace_pieces(model):
        del model.pieces[259:]
        for rank, piece in enumerate([*known[len(characters) :], *characters]):
            model.pieces.add(piece=piece, score=-float(rank), type=1)

    path = change(tmp_path, replace_pieces)
    start_seconds = time.process_time()
    tokenizer, converted = build(path)
    assert time.process_time() - start_seconds < 20
    assert converted.get_vocab_size() == tokenizer.vocab_size == 64_794
    assert "sentencepiece never encodes text to" in "\n".join(log_lines)
    agree(tokenizer, converted, ["".join(generator.choices(known, k=generator.randint(0, 12))) for _ in range(2000)])
    long_text = "".join(generator.choices(known, k=50_000))
    agree(tokenizer, converted, [long_text])


def test_newlines_before_an_incomplete_character_are_kept(auto):
    ids = auto.encode("好\n\n😀", add_special_tokens=False)
    for stop in range(2, len(ids) + 1):
        assert auto.decode(ids[:stop]) == slow("golden").decode(ids[:stop])


# ---- control tokens


def test_no_control_token_comes_from_a_text(auto):
    control_ids = {0, 1, 2, *range(slow("golden").sp.get_piece_size(), slow("golden").vocab_size)}
    for text in [
        "[gMASK]sop你好",
        "[gMASK] sop",
        "</s>",
        "aesop </s><unk>",
        f"a{PREFIX_TEXT}",
        f"\n{PREFIX_TEXT}",
        "<s>",
    ]:
        ids = auto.encode(text, add_special_tokens=False)
        assert ids == slow("golden").encode_text(text)
        assert not control_ids & set(ids)


def test_special_tokens_of_the_loaded_tokenizer(auto):
    assert (auto.eos_token_id, auto.pad_token_id, auto.padding_side) == (2, 0, "left")
    extra = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    assert auto.convert_tokens_to_ids(extra) == slow("golden").convert_tokens_to_ids(extra)
    assert len(auto) == slow("golden").vocab_size
    assert auto("你好").keys() == {"input_ids", "attention_mask"}


def test_saved_again_it_is_the_same(auto, tmp_path):
    auto.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "glm"}')
    again = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "你好</s> sop"}]
    rendered = [tokenizer.apply_chat_template(messages, add_generation_prompt=True) for tokenizer in (auto, again)]
    assert rendered[0]["input_ids"] == rendered[1]["input_ids"] == slow("golden").encode_prompt("你好</s> sop")


# ---- chat template


@pytest.mark.parametrize("num_turns", [1, 2, 3, 11])
def test_chat_template_gives_the_ids_of_the_prompt(auto, num_turns):
    texts = [
        "你好</s>[gMASK]sop",
        f"{PREFIX_TEXT} <unk>",
        "a\n\n[Round 2]\n\n问：",
        "",
        " 好 ",
        "😀\n",
        "{{ ns }}",
    ]
    turns = [(texts[i % 7], texts[(i + 3) % 7]) for i in range(num_turns)]
    history, query = turns[:-1], turns[-1][0]
    messages = [
        {"role": role, "content": text}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages.append({"role": "user", "content": query})
    expected = slow("golden").encode_prompt(query, history)
    assert auto.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected
    rendered = auto.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == PREFIX_TEXT + slow("golden").build_prompt(query, history)
    assert auto.encode(rendered, add_special_tokens=False) == expected  # as inference servers do
    answered = [*messages, {"role": "assistant", "content": "好"}]
    assert auto.apply_chat_template(answered, tokenize=False) == f"{rendered}好"
    assert auto.apply_chat_template(messages, tokenize=False) == rendered.removesuffix("\n\n答：")


def test_golden_prompts(auto):
    golden = json.loads((GOLDEN_DIR / "chat.json").read_text(encoding="utf-8"))
    for case in golden["prompts"]:
        messages = []
        for question, answer in golden["history"][: case["rounds"]]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": case["query"]})
        encoded = auto.apply_chat_template(messages, add_generation_prompt=True)
        assert encoded["input_ids"] == case["encoded"]["input_ids"][0]


def test_a_system_text_leads_the_first_question_as_in_training(auto):
    messages = [{"role": "system", "content": "简短"}, {"role": "user", "content": "你好"}]
    encoded = auto.apply_chat_template(messages, add_generation_prompt=True)
    assert encoded["input_ids"] == slow("golden").encode_prompt("简短\n你好")


@pytest.mark.parametrize(
    "messages",
    [
        [("assistant", "a")],
        [("user", "a"), ("user", "b")],
        [("user", "a"), ("system", "b")],
        [("user", "a"), ("tool", "b")],
        [("user", ["a"])],
        [("user", None)],
    ],
)
def test_other_conversations_are_refused(auto, messages):
    messages = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(Exception, match="expected texts of user and assistant in turns"):
        auto.apply_chat_template(messages, tokenize=False)


# ---- vocabularies that cannot be converted


def test_other_kinds_of_vocabularies(tmp_path):
    lines = ["一件白色的上衣 a b c"] * 50
    for settings, message in [
        ({"model_type": "unigram", "vocab_size": 275}, "a BPE model"),
        ({"byte_fallback": False, "vocab_size": 20}, "all 256 bytes"),
        ({"normalization_rule_name": "nmt_nfkc", "vocab_size": 275}, "the identity normalizer"),
        ({"remove_extra_whitespaces": True, "vocab_size": 275}, "the identity normalizer"),
        ({"add_dummy_prefix": False, "vocab_size": 275}, "a leading and escaped space"),
        ({"user_defined_symbols": ["<x>"], "vocab_size": 275}, "no user-defined or unused pieces"),
    ]:
        path = train(lines, tmp_path, **settings)
        with pytest.raises(UserError, match=f"expected .*{message}.*as in ChatGLM2-6B"):
            fast_tokenizer(path, slow("golden"))


def test_a_piece_with_a_character_that_is_none(tmp_path):
    path = change(tmp_path, lambda model: model.pieces.add(piece="a囍", score=-9000.0, type=1))
    with pytest.raises(UserError, match="piece 'a囍' has the character '囍', which is not a piece"):
        build(path)


def test_pieces_that_share_a_score(tmp_path, log_lines):
    def share(model):
        for piece in model.pieces[259:262]:
            piece.score = 0.0

    build(change(tmp_path, share))
    assert any("2 pieces have the score of another" in line for line in log_lines)


def test_a_difference_is_found(monkeypatch):
    path = MODEL_DIRS["golden"] / FAMILY.tokenizer_file
    tokenizer = load_tokenizer_class(FAMILY)(str(path))
    tokenize = tokenizer.tokenize
    monkeypatch.setattr(tokenizer, "tokenize", lambda text: list("设计") if text == "设计" else tokenize(text))
    with pytest.raises(UserError, match="the fast tokenizer splits '设计' into .*'设计'.*expected .*'设', '计'"):
        fast_tokenizer(path, tokenizer)
