"""Tokenizers of both families against golden vectors; text that a user types stays text; saving and reloading."""

import copy
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
V1, V2 = "chatglm-6b", "chatglm2-6b"
VOCABULARY = {V1: "ice_text.model", V2: "tokenizer.model"}
both = pytest.mark.parametrize("family", [V1, V2])

# What a user may type, including forms that v1's normaliser folds into `<n>`.
CONTROL_TEXTS = [
    "<n>", "<|tab|>", "<|blank_4|>", "<|blank_80|>", "＜ｎ＞", "﹤n﹥", "＜|ｔａｂ|＞", "<\x01n>", "<n\x1c>",
    "\x02<n>", "<<n>", "<n>>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "sop", "eop", "<pad>", "<unk>", "<s>",
    "</s>", "<ENC>", "<0x0A>", "<image_3>",
]  # fmt: skip
FRAGMENTS = [*"你好衣aZ9 。，!?<>|é😀　", "\n", "\t", "\r", "  ", "    ", "hello", "<|", "|>", "2|>", "n>", "<|blank_"]


@cache
def tokenizer_class(family: str):
    """Import a family's tokenizer as AutoTokenizer does."""
    return get_class_from_dynamic_module("tokenization_chatglm.ChatGLMTokenizer", ROOT / "remote_scripts" / family)


@cache
def shared_tokenizer(family: str):
    """Load a family's small tokenizer once; tests must not change it."""
    return tokenizer_class(family).from_pretrained(FIXTURES / family / "model")


@cache
def golden(family: str, name: str = "tokenizer"):
    """Read a golden JSON file."""
    return json.loads((FIXTURES / family / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def tokenizer(family):
    """Return the family's tokenizer."""
    return shared_tokenizer(family)


def plain(encoding) -> dict:
    """Turn an encoding into nested lists, masks into 0 and 1 as the golden files have them."""
    return {key: (np.asarray(value) * 1).tolist() for key, value in encoding.items()}


def random_text(rng: random.Random, controls: float) -> str:
    """Draw up to 14 fragments, a share of them control strings."""
    return "".join(
        rng.choice(CONTROL_TEXTS if rng.random() < controls else FRAGMENTS) for _ in range(rng.randint(0, 14))
    )


# Golden vectors


@both
def test_golden_texts(tokenizer, family):
    for case in golden(family)["singles"]:
        text = case["text"]
        assert tokenizer.tokenize(text) == case["tokens"], text
        assert tokenizer.encode(text, add_special_tokens=False) == case["ids"], text
        assert tokenizer(text)["input_ids"] == case["ids_special"], text
        assert tokenizer.decode(case["ids"]) == case["decode"], text
        assert tokenizer.decode(case["ids_special"]) == case["decode_special"], text
        assert tokenizer.decode(case["ids_special"], skip_special_tokens=True) == case["decode_special_skip"], text
        assert tokenizer.decode(case["ids"], clean_up_tokenization_spaces=False) == case["decode_noclean"], text


@both
def test_golden_ids(tokenizer, family):
    cases = golden(family)["decode_ids"]
    for case in cases:
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["skip"]
    assert tokenizer.batch_decode([case["ids"] for case in cases]) == [case["text"] for case in cases]
    for token, index in golden(family)["token_to_id"].items():
        assert tokenizer.convert_tokens_to_ids(token) == index
        assert tokenizer.convert_ids_to_tokens(index) == token
    assert tokenizer.decode(cases[0]["ids"][0]) == tokenizer.decode(cases[0]["ids"][:1])
    assert tokenizer.decode(torch.tensor(cases[0]["ids"])) == cases[0]["text"]


@both
def test_golden_attributes(tokenizer, family):
    expected = dict(golden(family)["attrs"])
    assert len(tokenizer) == expected.pop("len")
    if family == V2:
        assert tokenizer.get_prefix_tokens() == expected.pop("prefix")
        assert tokenizer.get_command("<bos>") == expected.pop("bos_cmd")
        assert tokenizer.bos_token_id == expected.pop("bos_token_id")
    for name in ("pad", "eos", "bos", "mask", "gmask", "end", "unk"):
        if name in expected:
            assert getattr(tokenizer, f"{name}_token_id") == expected.pop(name), name
    assert {name: getattr(tokenizer, name) for name in expected} == expected
    assert len(tokenizer.get_vocab()) == tokenizer.vocab_size


@both
def test_golden_pairs(tokenizer, family):
    for case in golden(family)["pairs"]:
        first, second = (tokenizer.encode(case[key], add_special_tokens=False) for key in "ab")
        assert tokenizer.build_inputs_with_special_tokens(first, second) == case["ids_pair"]
        assert tokenizer.build_inputs_with_special_tokens(first) == case["ids_single"]
        assert case["call_pair"] in (None, tokenizer(case["a"], case["b"])["input_ids"])


@both
def test_golden_calls(tokenizer, family):
    data = golden(family)
    texts, pairs = data["batch_texts"], [tuple(pair) for pair in data["batch_pair_texts"]]
    calls = {
        "call_single": tokenizer(texts[0]),
        "call_list_unpadded": tokenizer(texts[:1]),
        "batch": tokenizer(texts, padding=True),
        "batch_pair": tokenizer(pairs, padding=True),
        "batch_maxlen": tokenizer(texts, padding="max_length", max_length=48),
        "batch_multiple_of_8": tokenizer(texts, padding=True, pad_to_multiple_of=8),
        "truncated_max_length_10": tokenizer(texts[0], truncation=True, max_length=10),
    }
    for name, encoding in calls.items():
        assert plain(encoding) == data[name], name
    assert sorted(calls["call_single"]) == data["call_single_unpadded_keys"]
    assert sorted(calls["call_list_unpadded"]) == data["call_list_unpadded_keys"]
    assert sorted(calls["batch"]) == data["call_list_padded_keys"]


@both
@pytest.mark.parametrize("kind", ["pt", "np"])
def test_tensors(tokenizer, family, kind):
    batch = tokenizer(golden(family)["batch_texts"], padding=True, return_tensors=kind)
    expected = {torch.Tensor} if kind == "pt" else {np.ndarray}
    assert {type(value) for value in batch.values()} == expected
    assert plain(batch) == golden(family)["batch"]
    one = tokenizer("你好", return_tensors=kind)
    assert one["input_ids"].shape[0] == 1


@both
def test_golden_prompts(tokenizer, family):
    chat = golden(family, "chat")
    for case in chat["prompts"]:
        history = [tuple(turn) for turn in chat["history"][: case["rounds"]]]
        assert tokenizer.build_prompt(case["query"], history) == case["prompt"]
        assert tokenizer.build_prompt(case["query"], chat["history"][: case["rounds"]]) == case["prompt"]
        assert [tokenizer.encode_prompt(case["query"], history)] == case["encoded"]["input_ids"]
        assert plain(tokenizer([case["prompt"]])) == case["encoded"]
        if case["rounds"] and "build_stream_inputs" in case:  # a later turn on a kept cache: no special tokens, no `▁`
            turn = "\n\n[Round " + case["prompt"].rpartition("\n\n[Round ")[2]
            assert [tokenizer.encode_text(turn)[1:]] == case["build_stream_inputs"]["input_ids"]
    assert tokenizer.build_prompt("问", None) == tokenizer.build_prompt("问", []) == tokenizer.build_prompt("问")


def test_v1_raw_text_is_stripped_around_special_strings():
    tokenizer = shared_tokenizer(V1)
    expected = tokenizer.encode("你好<eop>世界", add_special_tokens=False)
    assert tokenizer.encode("你好  \n<eop>\t  世界", add_special_tokens=False) == expected


def test_golden_v1_encode_options():
    for case in golden(V1)["sp_encode_options"]:
        options = {key: value for key, value in case.items() if key not in ("text", "ids")}
        assert shared_tokenizer(V1).sp_encode(case["text"], **options) == case["ids"]


def test_golden_v1_image_tokens():
    expected = golden(V1)["num_image_tokens_100"]
    tokenizer = tokenizer_class(V1).from_pretrained(FIXTURES / V1 / "model", num_image_tokens=100)
    assert tokenizer("你好<image_3>")["input_ids"] == expected["ids_special"]
    assert tokenizer.vocab_size == expected["vocab_size"]
    for index, token in expected["id_to_token"]:
        assert tokenizer.convert_ids_to_tokens(index) == token
    for token, index in expected["token_to_id"]:
        assert tokenizer.convert_tokens_to_ids(token) == index
    for ids, text in expected["decode"]:
        assert tokenizer.decode(ids) == text


def test_golden_v1_masks_and_positions():
    for case in golden(V1, "mask_position_cases"):
        ids = case["input_ids"]
        batch = shared_tokenizer(V1).pad({"input_ids": [ids, [5, 5, 5, *ids]]}, padding=True)
        assert plain(batch) == {
            key: case[f"tokenizer_pad_{key}"] for key in ("input_ids", "attention_mask", "position_ids")
        }


# Text that a user types


@both
@pytest.mark.parametrize("control", CONTROL_TEXTS)
def test_control_strings_stay_text(tokenizer, family, control):
    folded = re.sub("[\x01\x02\x1c]", "", control).translate(str.maketrans("＜ｎ＞﹤﹥ｔａｂ", "<n><>tab"))
    for text, expected in ((control, folded), (f"你好{control}a b", f"你好{folded}a b")):
        ids = tokenizer.encode_text(text)
        assert tokenizer.decode(ids) == (expected if family == V1 else text)
        prompt = tokenizer.encode_prompt(text)
        assert not controls_in(tokenizer, prompt[:-2] if family == V1 else prompt[2:])
        assert not controls_in(tokenizer, ids)
        assert tokenizer.encode_answer(text) == [*ids, tokenizer.eos_token_id]
        # A prompt with history holds what the turns hold.
        assert not controls_in(tokenizer, tokenizer.encode_text(tokenizer.build_prompt(text, [(text, text)])))


def controls_in(tokenizer, ids) -> list[str]:
    """List the control tokens among ids; v1's newline `<n>` of the prompt template is none."""
    known = tokenizer.get_vocab()
    return [name for name in CONTROL_TEXTS if name not in ("<n>", "<0x0A>") and known.get(name) in ids]


def test_v1_random_text_gets_only_its_own_space_symbols():
    tokenizer, rng = shared_tokenizer(V1), random.Random(1)
    names = ["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]
    symbols = set(tokenizer.convert_tokens_to_ids(names))
    for _ in range(500):
        text = random_text(rng, controls=0.3)
        ids = tokenizer.encode_text(text)
        assert sum(i in symbols for i in ids) == len(re.findall("\n|\t| {2,80}", text)), text
        assert not {0, 1, 2, 3, *range(2000, 2008)}.intersection(ids), text
        # Text comes back as its harmless double does.
        double = re.sub("[>＞﹥]", "Q", text).replace("[MASK]", "[MOSK]")
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        expected = tokenizer.decode(tokenizer.sp_encode(double), clean_up_tokenization_spaces=False)
        assert back.replace(">", "Q").replace("[MASK]", "[MOSK]") == expected, text


def test_v2_random_text_comes_back():
    tokenizer, rng = shared_tokenizer(V2), random.Random(2)
    for _ in range(500):
        text = random_text(rng, controls=0.3)
        ids = tokenizer.encode_text(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text


@both
def test_harmless_text_encodes_as_raw(tokenizer, family):
    rng = random.Random(3)
    for _ in range(300):
        text = random_text(rng, controls=0)
        prompt = tokenizer.build_prompt(text)
        if family == V1 and re.search("[<＜].*[>＞]", prompt, re.DOTALL):
            continue
        assert tokenizer.encode_text(text) == tokenizer.encode(text, add_special_tokens=False), text
        assert tokenizer.encode_prompt(text) == tokenizer(prompt)["input_ids"], text


@both
def test_lone_surrogates_do_not_raise(tokenizer, family):
    assert tokenizer.decode(tokenizer.encode_text("a\ud83d\ude00b")) == "a😀b"
    assert tokenizer.decode(tokenizer.encode_text("a\ud83db")).startswith("a")
    assert tokenizer("a\ud83db")["input_ids"]


@both
def test_many_control_strings_are_quick(tokenizer, family):
    assert not controls_in(tokenizer, tokenizer.encode_text("<n><|tab|>" * 2000 + "x" * 20000 + "<n>"))


# Ids to text


@both
def test_ids_without_a_piece_decode_to_nothing(tokenizer, family):
    """The published code raises on the ids by which the model's vocabulary exceeds the tokenizer's."""
    ids = tokenizer.encode_text("你好")
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 50, -1]
    assert tokenizer.decode([*ids, *beyond]) == tokenizer.decode([*beyond, *ids]) == "你好"
    assert tokenizer.decode(beyond[0]) == tokenizer.decode([]) == ""


@both
def test_random_ids_decode_as_sentencepiece(tokenizer, family):
    rng = random.Random(4)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 12))]
        dropped = {3} if family == V1 else {0, 1, 2, *range(2048, 2053)}
        text = tokenizer.sp.decode([i for i in ids if i not in dropped])
        if family == V1:
            text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
            text = re.sub(r"<\|blank_(\d+)\|>", lambda match: " " * int(match[1]), text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@both
def test_special_tokens_mask(tokenizer, family):
    encoding = tokenizer("你好", "世界", return_special_tokens_mask=True)
    mask = encoding["special_tokens_mask"]
    assert len(mask) == len(encoding["input_ids"])
    assert sum(mask) == 3
    assert tokenizer.get_special_tokens_mask(encoding["input_ids"], already_has_special_tokens=True) == mask


# Padding


@both
def test_pad_takes_encodings_and_leaves_labels_alone(tokenizer, family):
    texts = golden(family)["batch_texts"]
    rows = [{**tokenizer(text), "labels": [7, 8, 9]} for text in texts]
    batch = tokenizer.pad(rows, padding=True, return_tensors="pt")
    assert batch.pop("labels").tolist() == [[7, 8, 9]] * 3
    assert plain(batch) == golden(family)["batch"]
    assert all(row["input_ids"] == tokenizer(text)["input_ids"] for row, text in zip(rows, texts, strict=True))


@both
def test_pad_again_keeps_pads_hidden(tokenizer, family):
    texts = golden(family)["batch_texts"]
    batch = tokenizer(texts, padding=True)
    expected = golden(family)["batch_maxlen"]
    for given in (batch, tokenizer(texts, padding=True, return_tensors="pt")):
        assert plain(tokenizer.pad(given, padding="max_length", max_length=48)) == expected
    rows = [{key: value[row] for key, value in batch.items()} for row in range(3)]
    assert plain(tokenizer.pad(rows, padding="max_length", max_length=48)) == expected
    one = plain(tokenizer.pad(rows[0], padding="max_length", max_length=48))
    assert one == {key: value[0] for key, value in expected.items()}


@both
def test_right_padding(tokenizer, family):
    if family == V1:
        with pytest.raises(ValueError, match="left"):
            tokenizer(["你好", "你"], padding=True, padding_side="right")
        with pytest.raises(ValueError, match="left"):
            tokenizer.pad({"input_ids": [[5, 6]], "attention_mask": [[1, 0]]})
    else:
        batch = tokenizer(["你好你好吗", "你"], padding=True, padding_side="right")
        short = tokenizer("你")
        for key, value in short.items():
            assert batch[key][1] == value + [0] * (len(batch["input_ids"][0]) - len(value))


# Saving and loading


@both
def test_copies_behave_alike(tokenizer, family):
    text = "你好 <eop>\t世界<n>  a"
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other(text).data == tokenizer(text).data
        assert other.decode(other(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def directory(family: str, path: Path, config: dict | None) -> Path:
    """Make a directory with a vocabulary and, if given, a tokenizer_config.json."""
    shutil.copy(FIXTURES / family / "model" / VOCABULARY[family], path)
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@both
def test_loads_the_published_form(family, tokenizer, tmp_path):
    config = golden(family, "model/tokenizer_config")
    config["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    loaded = tokenizer_class(family).from_pretrained(directory(family, tmp_path, config))
    texts = [case["text"] for case in golden(family)["singles"]]
    assert loaded(texts, padding=True)["input_ids"] == tokenizer(texts, padding=True)["input_ids"]
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "tokenizer_config.json").read_text(encoding="utf-8"))


@both
def test_loads_without_a_config(family, tokenizer, tmp_path):
    loaded = tokenizer_class(family).from_pretrained(directory(family, tmp_path, None))
    assert loaded("你好 <eop>").data == tokenizer("你好 <eop>").data
    assert loaded.decode(loaded("It 's")["input_ids"]) == tokenizer.decode(tokenizer("It 's")["input_ids"])


@both
def test_saved_special_tokens_of_other_versions_change_nothing(family, tokenizer, tmp_path):
    added = {"content": "</s>", "lstrip": False, "rstrip": False, "single_word": False, "special": True}
    config = {**golden(family, "model/tokenizer_config"), "added_tokens_decoder": {"2": added}}
    loaded = tokenizer_class(family).from_pretrained(directory(family, tmp_path, config))
    assert loaded("你</s>  <eop> 好").data == tokenizer("你</s>  <eop> 好").data


@both
def test_added_tokens(family, tmp_path):
    tokenizer = tokenizer_class(family).from_pretrained(FIXTURES / family / "model")
    assert tokenizer.add_tokens(["<<new>>"]) == 1
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, tokenizer_class(family).from_pretrained(tmp_path)):
        ids = each.encode("你好<<new>>a", add_special_tokens=False)
        assert each.vocab_size in ids
        assert len(each) == each.vocab_size + 1
        assert each.decode(ids).replace(" ", "") == "你好<<new>>a"


@both
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not in"),
        (b"", r"\(0 bytes\) is not a sentencepiece model"),
        (b"\0" * 100, r"\(100 bytes\) is not a sentencepiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        ("truncated", "is not a sentencepiece model"),
        ("other", "is not the vocabulary of"),
    ],
)
def test_bad_vocabulary_is_named(family, tmp_path, content, message):
    path = directory(family, tmp_path, {}) / VOCABULARY[family]
    other = FIXTURES / (V1 if family == V2 else V2) / "model" / VOCABULARY[V1 if family == V2 else V2]
    data = {"truncated": path.read_bytes()[:5001], "other": other.read_bytes(), None: b""}.get(content, content)
    path.write_bytes(data)
    if content is None:
        path.unlink()
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_class(family).from_pretrained(tmp_path)
    assert VOCABULARY[family] in str(error.value)


@both
def test_unsupported_flags_are_refused(family, tmp_path):
    config = {**golden(family, "model/tokenizer_config"), "do_lower_case": True}
    with pytest.raises(ValueError, match="do_lower_case"):
        tokenizer_class(family).from_pretrained(directory(family, tmp_path, config))


RELOAD = """
import json, sys
from transformers import AutoTokenizer
texts = json.loads(sys.stdin.read())
out = {}
for path in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    batch = tokenizer(texts, padding=True)["input_ids"]
    spelled = [tokenizer.encode_text(text) for text in texts]
    out[path] = [batch, spelled, tokenizer.batch_decode(batch), len(tokenizer), tokenizer.all_special_tokens]
print(json.dumps(out))
"""


def test_save_and_reload_in_a_fresh_process(tmp_path):
    texts = [*golden(V1)["batch_texts"], "你好 <eop> </s><n>世界"]
    expected = {}
    for family in (V1, V2):
        tokenizer = tokenizer_class(family).from_pretrained(FIXTURES / family / "model")
        path = tmp_path / family
        tokenizer._auto_class = "AutoTokenizer"  # on the instance: the class is shared with other tests
        tokenizer.save_pretrained(path)
        (path / "config.json").write_text('{"model_type": "chatglm"}', encoding="utf-8")
        names = {"config.json", "tokenizer_config.json", "tokenization_chatglm.py", VOCABULARY[family]}
        assert {file.name for file in path.iterdir()} == names
        original = FIXTURES / family / "model" / VOCABULARY[family]
        assert (path / VOCABULARY[family]).read_bytes() == original.read_bytes()
        batch = tokenizer(texts, padding=True)["input_ids"]
        spelled = [tokenizer.encode_text(text) for text in texts]
        decoded = tokenizer.batch_decode(batch)
        expected[str(path)] = [batch, spelled, decoded, len(tokenizer), tokenizer.all_special_tokens]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, "-c", RELOAD, *expected],
        input=json.dumps(texts), capture_output=True, text=True, encoding="utf-8", env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected
