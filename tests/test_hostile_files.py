"""Damaged and hostile files of a model: each is refused in one line, without code, hangs or large memory, or loads."""

import functools
import json
import os
import pickle
import shutil
import time
from datetime import timedelta

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import inference_test
from glm_utils import checkpoint as checkpoint_module
from glm_utils.checkpoint import load_classes, open_checkpoint
from glm_utils.cli import UserError
from glm_utils.device import DTYPES
from glm_utils.inference import memory
from glm_utils.inference.chat import ChatSession, chat_settings
from glm_utils.load_model import ModelSource, load_base_model
from glm_utils.merging.shards import CheckpointReader
from glm_utils.model_files.config_checks import RANGES, check_config, settings_of
from glm_utils.model_files.generation_checks import make_generation_config
from glm_utils.model_files.tensor_files import list_tensors
from tests.conftest import FAMILY_BY_NAME, FIXTURES_DIR
from tests.hostile_files import GENERATION, damaged_bytes, file_kinds

EXAMPLES = 100  # per kind of file and family
BASE_FILES = ("config.json", "tokenizer_config.json", "model.safetensors")
KINDS = ("config", "generation", "tokenizer", "special tokens", "added tokens", "index", "safetensors", "vocabulary")
fuzz = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=timedelta(seconds=20),
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.fixture(scope="module", autouse=True)
def classes_loaded_once():
    """transformers' loader compares all remote scripts with its copies at each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "load_classes", functools.cache(load_classes))
        yield


@pytest.fixture
def base_dir(model_dir, family, tmp_path):
    """A copy of the golden model that a test may damage."""
    return copy_model(model_dir, family, tmp_path / "base")


def copy_model(model_dir, family, target):
    target.mkdir()
    for name in (*BASE_FILES, family.tokenizer_file):
        shutil.copyfile(model_dir / name, target / name)
    return target


def edit(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))


def check_one_line(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 900


def refusal(directory):
    """Return the message with which every command refuses a directory."""
    with pytest.raises(UserError) as error_info:
        _ = open_checkpoint(directory).tokenizer
    check_one_line(error_info.value)
    return str(error_info.value)


def source(directory):
    return ModelSource("model", open_checkpoint(directory), None, False, torch.float32, torch.device("cpu"))


# ---- any damage to any file


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A model directory by family, shared by the examples of a kind, with the golden model loaded."""
    made = {}

    def get(family):
        if family.name not in made:
            model_dir = FIXTURES_DIR / family.name / "model"
            directory = copy_model(model_dir, family, tmp_path_factory.mktemp(family.name) / "base")
            made[family.name] = directory, source(directory).load(), open_checkpoint(directory).tokenizer
        return made[family.name]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_in_one_line_or_works(fuzzed, family, kind):
    directory, model, tokenizer = fuzzed(family)
    name, contents = file_kinds(FIXTURES_DIR / family.name / "model", family.tokenizer_file)[kind]
    original = (directory / name).read_bytes() if (directory / name).is_file() else None
    weights = directory / "model.safetensors"

    @fuzz
    @hypothesis.given(contents)
    def check(content):
        (directory / name).write_bytes(content)
        try:
            opened = open_checkpoint(directory)
            _ = opened.tokenizer
            opened.require_streamable()
            if kind == "generation":
                model.generation_config = make_generation_config(opened.generation_settings, directory)
                list(ChatSession(model, tokenizer, chat_settings(model, 40, None, None)).ask("a"))
        except UserError as error:
            check_one_line(error)

    try:
        if kind == "index":
            weights.rename(directory / "moved")
        check()
    finally:
        if kind == "index":
            (directory / "moved").rename(weights)
        (directory / name).unlink() if original is None else (directory / name).write_bytes(original)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_bin_file_is_refused_in_one_line_or_read(tmp_path, legacy):
    path = tmp_path / "pytorch_model.bin"
    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.int8)}
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)

    @fuzz
    @hypothesis.given(damaged_bytes(path.read_bytes()))
    def check(content):
        path.write_bytes(content or b"x")
        try:
            list_tensors(path)
        except UserError as error:
            check_one_line(error)

    check()


@fuzz
@hypothesis.given(st.data())
def test_whatever_a_pickle_holds_it_is_not_run(tmp_path_factory, data):
    """Every callable of a list that pickles may name, with any arguments."""
    path = tmp_path_factory.getbasetemp() / "evil.bin"
    trace = path.with_name("trace")
    function = data.draw(st.sampled_from([os.system, eval, exec, os.mkdir, open, print, getattr, shutil.copyfile]))
    arguments = data.draw(st.sampled_from([(f"touch {trace}",), (str(trace), "w"), (f"open('{trace}', 'w')",)]))

    class Evil:
        def __reduce__(self):
            return function, arguments

    if data.draw(st.booleans()):
        torch.save({"w": Evil()}, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    else:
        path.write_bytes(pickle.dumps({"w": Evil()}, protocol=data.draw(st.integers(2, 4))))
    with pytest.raises(UserError, match=r"evil.bin: (refused, because its pickle asks to run code|not a file of)"):
        list_tensors(path)
    assert not trace.exists()


# ---- config.json


WRONG_SETTINGS = [  # one for both families, or for the one that has the key
    ("num_layers", "4", "expected a whole number from 1 to 1,000"),
    ("num_layers", None, "expected a whole number"),
    ("num_layers", True, "expected a whole number"),
    ("hidden_size", [64], "expected a whole number"),
    ("num_attention_heads", 0, "expected a whole number from 1"),
    ("kv_channels", None, "expected a whole number"),
    ("multi_query_group_num", 0, "expected a whole number from 1"),
    ("padded_vocab_size", 2**33, "expected a whole number"),
    ("layernorm_epsilon", "1e-5", "expected a number from 0 to 1"),
    ("layernorm_epsilon", float("nan"), "expected a finite number"),
    ("layernorm_epsilon", 1e400, "expected a finite number"),
    ("seq_length", -1, "expected a whole number"),
    ("position_encoding_2d", 1, "expected true or false"),
    ("rmsnorm", False, "rmsnorm=False is not supported"),
    ("hidden_dropout", 0.1, "hidden_dropout=0.1 is not supported"),
    ("rope_ratio", 50, "rope_ratio=50 is not supported"),
    ("quantization_bit", 3, "quantization_bit must be 0, 4 or 8, found 3"),
    ("quantization_config", {"quant_method": "awq"}, "is not supported"),
    ("torch_dtype", "load", "expected one of float16, bfloat16, float32 or null"),
    ("bos_token_id", 7, "but the tokenizer's is"),
    ("eos_token_id", 10**6, "expected ids below the vocabulary's size"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG_SETTINGS)
def test_a_wrong_setting_is_refused_by_file_key_value_and_expectation(base_dir, family, key, value, expected):
    hints = settings_of(load_classes(family).config)
    if key not in hints and key not in ("quantization_config", "torch_dtype"):
        pytest.skip("another family's setting")
    if (family.name, key) == ("chatglm2-6b", "bos_token_id"):
        pytest.skip("its prompts have none")
    edit(base_dir / "config.json", **{key: value})
    message = refusal(base_dir)
    assert message.startswith(f"{base_dir / 'config.json'}: ")
    assert key in message
    assert expected in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_layers": 900}, "num_layers is 900, but the weight files hold 3 layers"),
        ({"num_layers": 100_000}, "num_layers is 100000, expected"),
        ({"hidden_size": 2**20}, "mismatched weights"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, but num_layers is 3"),
        ({"num_layers": 2}, "unexpected weights"),
    ],
)
def test_sizes_are_compared_with_the_files_before_memory_is_taken(base_dir, changes, expected):
    edit(base_dir / "config.json", **changes)
    started = time.monotonic()
    assert expected in refusal(base_dir)
    assert time.monotonic() - started < 1


def test_a_head_count_that_the_rotary_frequencies_contradict_is_refused(base_dir, family):
    if family.max_length_key != "max_sequence_length":
        pytest.skip("head_dim is a setting of its own")
    path = base_dir / "model.safetensors"
    frequencies = {f"transformer.layers.{n}.attention.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}
    save_file(load_file(path) | frequencies, path)
    open_checkpoint(base_dir)
    edit(base_dir / "config.json", num_attention_heads=2)
    assert "3 mismatched weights" in refusal(base_dir)


def test_integer_weights_need_a_config_that_says_so(base_dir):
    path = base_dir / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("mlp.dense_4h_to_h.weight"))
    save_file({**state, name: state[name].to(torch.int8)}, path)
    assert "of int8, its config.json implies" in refusal(base_dir)


def test_every_number_of_a_configuration_has_a_range(family):
    hints = settings_of(load_classes(family).config)
    numbers = {name for name, hint in hints.items() if hint is not bool and "int" in str(hint) or hint is float}
    assert numbers <= set(RANGES)


def test_keys_that_the_model_does_not_know_reach_no_object(base_dir, log_lines):
    """As attributes, each of these would hang, fail or change something in transformers."""
    unknown = {"num_labels": 10**9, "id2label": {"x": 1}, "return_dict": False, "__class__": 1, "to_dict": "x"}
    unknown |= {"_attn_implementation": "user/kernel", "attn_implementation": "user/kernel", "layer_types": 5}
    edit(base_dir / "config.json", **unknown)
    opened = open_checkpoint(base_dir)
    assert not unknown.keys() & opened.config.keys()
    load_base_model(opened)
    assert [line for line in log_lines if "ignored" in line and "'to_dict'" in line and "num_labels" not in line]


PUBLISHED = {  # with every key of the published files
    "chatglm-6b": {
        "_name_or_path": "THUDM/chatglm-6b", "architectures": ["ChatGLMModel"], "model_type": "chatglm",
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig",
                     "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "vocab_size": 130528, "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
        "inner_hidden_size": 16384, "layernorm_epsilon": 1e-5, "max_sequence_length": 2048,
        "position_encoding_2d": True, "bos_token_id": 130004, "eos_token_id": 130005, "mask_token_id": 130000,
        "gmask_token_id": 130001, "pad_token_id": 3, "use_cache": True, "torch_dtype": "float16",
        "transformers_version": "4.23.1",
    },
    "chatglm2-6b": {
        "_name_or_path": "THUDM/chatglm2-6b", "architectures": ["ChatGLMModel"], "model_type": "chatglm",
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
        "padded_vocab_size": 65024, "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
        "ffn_hidden_size": 13696, "kv_channels": 128, "multi_query_attention": True, "multi_query_group_num": 2,
        "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True,
        "layernorm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True, "fp32_residual_connection": False,
        "bias_dropout_fusion": True, "hidden_dropout": 0.0, "attention_dropout": 0.0, "seq_length": 32768,
        "original_rope": True, "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0, "use_cache": True,
        "torch_dtype": "float16", "transformers_version": "4.27.1", "quantization_bit": 0, "pre_seq_len": None,
        "prefix_projection": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"quantization_bit": 4}])
def test_published_configs_pass_with_every_value(family_name, family, tmp_path, log_lines, changes):
    published, config_class = {**PUBLISHED[family_name], **changes}, load_classes(family).config
    # as transformers 4 writes them, with its own settings and both names of those that have two
    saved = {
        **published,
        "vocab_size": published.get("padded_vocab_size", 130528),
        "_commit_hash": "0123",
        "prefix": None,
    }
    checked = check_config(saved, config_class, tmp_path / "config.json")
    assert (
        checked.items()
        >= {key: value for key, value in published.items() if key not in ("_name_or_path", "auto_map")}.items()
    )
    made = config_class.from_dict(checked)
    assert (made.hidden_size, made.num_hidden_layers, made.quantization_bit) == (
        4096,
        28,
        changes.get("quantization_bit", 0),
    )
    assert not log_lines


# ---- encodings


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "nul", "surrogate", "nested", "large"])
def test_encodings(base_dir, family, name, encoding):
    path = base_dir / name
    text = path.read_text() if path.is_file() else json.dumps(GENERATION)
    if encoding == "nul":
        path.write_bytes(b"\x00" * 100)
    elif encoding in ("surrogate", "nested"):
        broken = '"a": "\\ud800"' if encoding == "surrogate" else '"a": ' + "[" * 300 + "]" * 300
        path.write_text(text.rstrip().removesuffix("}") + f", {broken}}}")
    elif encoding == "large":
        path.write_text(text + " " * 17_000_000)
    else:
        path.write_text(text, encoding=encoding)
    if encoding == "utf-8-sig" and name != "tokenizer_config.json":  # transformers reads that one itself
        open_checkpoint(base_dir)
    else:
        assert refusal(base_dir).startswith(str(path))


# ---- generation_config.json


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number from 1e-06"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number from 1"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is ['</s>'], expected"),
        ({"suppress_tokens": [10**7]}, "suppress_tokens is [10000000], expected ids below"),
        ({"bad_words_ids": [5]}, "bad_words_ids is [5], expected a list"),
        ({"exponential_decay_length_penalty": 3}, "exponential_decay_length_penalty is 3, expected"),
        ({"compile_config": {"a": 1}}, "refused by transformers"),
    ],
)
def test_generation_settings_of_a_wrong_value_are_refused_by_every_command(base_dir, settings, expected):
    edit(base_dir / "generation_config.json", **settings)
    message = refusal(base_dir)
    assert message.startswith(f"{base_dir / 'generation_config.json'}: ")
    assert expected in message


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 2}, {"max_time": 1.5}, {"penalty_alpha": 0.6}],
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_settings_for_generate_alone_are_refused_where_answers_are_streamed(base_dir, settings, name):
    edit(base_dir / name, **settings)
    open_checkpoint(base_dir)  # as a merge does, whose result `generate` of transformers follows
    with pytest.raises(UserError, match=rf"generation_config.json or config.json asks for {next(iter(settings))}"):
        source(base_dir)


def test_real_generation_settings_are_followed(base_dir):
    edit(
        base_dir / "generation_config.json", max_new_tokens=3, repetition_penalty=2, do_sample=True, top_p=0.8, top_k=1
    )
    model, tokenizer = source(base_dir).load(), open_checkpoint(base_dir).tokenizer
    session = ChatSession(model, tokenizer, chat_settings(model, None, 0, None))
    list(session.ask("你好"))
    assert session.counts.num_tokens <= 3
    assert model.generation_config.repetition_penalty == 2
    edit(base_dir / "generation_config.json", max_new_tokens=10**9)  # a buffer of that size would not fit
    model.generation_config.max_new_tokens = open_checkpoint(base_dir).generation_settings["max_new_tokens"]
    session = ChatSession(model, tokenizer, chat_settings(model, None, 0, None))
    list(session.ask("b"))
    assert session.counts.num_prompt + session.counts.num_tokens <= session.settings.max_length


def test_a_conversation_survives_generation_settings_that_do_not_go_together(base_dir):
    edit(base_dir / "generation_config.json", bad_words_ids=[])
    model, tokenizer = source(base_dir).load(), open_checkpoint(base_dir).tokenizer
    session = ChatSession(model, tokenizer, chat_settings(model, 60, None, None))
    with pytest.raises(UserError, match="bad_words_ids"):
        list(session.ask("a"))


# ---- weights


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bin_file_that_asks_for_code_is_refused_by_loading_and_merging(base_dir, tmp_path, legacy):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    (base_dir / "model.safetensors").unlink()
    torch.save({"a": Evil()}, base_dir / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    message = refusal(base_dir)
    assert message.startswith(f"{base_dir / 'pytorch_model.bin'}: refused, because its pickle asks to run code")
    with pytest.raises(UserError, match="asks to run code"):
        CheckpointReader(base_dir)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(2)], "holds a list, expected tensors by name"),
        ({"a": 3}, "'a' is a int, expected a tensor under a name"),
        ({3: torch.ones(2)}, "3 is a Tensor, expected a tensor under a name"),
        ({"a": torch.ones(2).to_sparse()}, "expected a plain tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "expected a plain tensor"),
        ({"a": torch.ones(1).expand(1 << 40)}, "larger than its data"),
    ],
)
def test_bin_files_hold_plain_tensors(tmp_path, content, expected):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=expected):
        list_tensors(tmp_path / "pytorch_model.bin")


def entry(offsets=(0, 8), dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"a": entry(), "b": entry()}, "begins at byte 0 of the data, expected 8"),
        ({"a": entry((4, 12))}, "begins at byte 4"),
        ({"a": entry((-8, 0))}, "not lists of sizes"),
        ({"a": entry((8, 0))}, "has -8 bytes"),
        ({"a": entry(shape=(2**62, 2**62))}, "its shape and dtype make"),
        ({"a": entry(shape=(True, 2))}, "not lists of sizes"),
        ({"a": entry(dtype="F8_E4M3")}, "is of type 'F8_E4M3', expected one of F16, I8, F32, BF16"),
        ({"a": [1]}, "is not dtype, shape and data_offsets"),
        ({"__metadata__": {"format": 3}, "a": entry()}, "__metadata__"),
        ([], "its header is a list"),
        (f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', "a name occurs twice"),
        ("[" * 5000, "recursion"),
        ("\x00", "header: "),
    ],
)
def test_lying_headers_are_refused_before_torch_sees_them(tmp_path, header, expected):
    text = header if isinstance(header, str) else json.dumps(header)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
    with pytest.raises(UserError) as error_info:
        list_tensors(path)
    assert expected in str(error_info.value)
    assert "\n" not in str(error_info.value)


def test_inference_test_refuses_weights_that_are_nan(base_dir, monkeypatch):
    path = base_dir / "model.safetensors"
    state = load_file(path)
    save_file({name: tensor * float("nan") for name, tensor in state.items()}, path)
    monkeypatch.setattr(memory, "copy_bandwidth", lambda device, free: 1e9)  # takes seconds
    with pytest.raises(UserError, match="computes NaN or infinite logits"):
        inference_test.inference_test(model_path=str(base_dir), loop_number=1, new_tokens=2)


# ---- index and links


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "../other/model.safetensors", "a/model.safetensors", ".model.safetensors", "model.bin", "..", "",
     "a\x00.safetensors", 3, None, ["model.safetensors"], {"a": 1}],
)  # fmt: skip
def test_shards_are_files_beside_their_index(base_dir, shard):
    (base_dir / "model.safetensors").rename(base_dir / "shard.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "shard.safetensors"}}
    path = base_dir / "model.safetensors.index.json"
    edit(path, **index)
    open_checkpoint(base_dir)
    edit(path, weight_map={"a": "shard.safetensors", "b": shard})
    assert "expected the name of a .safetensors file in this directory" in refusal(base_dir)


@pytest.mark.parametrize("changes", [{"metadata": None}, {"metadata": [1]}, {"weight_map": []}, {"weight_map": {}}])
def test_indexes_are_whole(base_dir, changes):
    (base_dir / "model.safetensors").rename(base_dir / "shard.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "shard.safetensors"}}
    edit(base_dir / "model.safetensors.index.json", **index)
    edit(base_dir / "model.safetensors.index.json", **changes)
    assert next(iter(changes)) in refusal(base_dir)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja", "tokenizer_config.json"])
def test_links_out_of_the_directory_are_not_followed(base_dir, tmp_path, name):
    """An unpacked archive may hold them: a private file would go into what is merged and uploaded."""
    outside = tmp_path / "private"
    outside.write_bytes((base_dir / name).read_bytes() if (base_dir / name).is_file() else b"secret")
    (base_dir / name).unlink(missing_ok=True)
    (base_dir / name).symlink_to(outside)
    assert refusal(base_dir).startswith(f"{base_dir / name}: a link out of its directory")


def test_a_loop_of_links_is_refused(base_dir):
    (base_dir / "generation_config.json").symlink_to("generation_config.json")
    assert "a link that leads nowhere" in refusal(base_dir)


@pytest.mark.parametrize("shared", [False, True])
def test_snapshots_of_the_hub_consist_of_links(base_dir, tmp_path, shared):
    repository = tmp_path / "hub" / "models--THUDM--chatglm"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "hub" / "blobs" / "ab" if shared else repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(base_dir.iterdir())):
        blob = blobs / f"{number:064x}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert open_checkpoint(snapshot).tokenizer.encode_prompt("a")
    assert load_base_model(open_checkpoint(snapshot))


def test_links_within_the_directory_and_to_it_are_fine(base_dir, tmp_path):
    (base_dir / "weights.safetensors").write_bytes((base_dir / "model.safetensors").read_bytes())
    (base_dir / "model.safetensors").unlink()
    (base_dir / "model.safetensors").symlink_to("weights.safetensors")
    (tmp_path / "link").symlink_to(base_dir)
    open_checkpoint(tmp_path / "link")


def test_a_model_and_an_adapter_in_one_directory_are_refused(base_dir):
    """transformers would load the adapter onto the model; a merge would not."""
    edit(base_dir / "adapter_config.json", peft_type="LORA")
    assert "a model and a LoRA adapter in one place" in refusal(base_dir)


# ---- tokenizer


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("tokenizer_config.json", {"padding_side": 3}, "padding_side is 3, expected one of left, right or null"),
        ("tokenizer_config.json", {"do_lower_case": "no"}, "do_lower_case is 'no', expected true or false"),
        ("tokenizer_config.json", {"num_image_tokens": 2**31}, "num_image_tokens is 2147483648, expected"),
        ("tokenizer_config.json", {"num_image_tokens": 2**30}, "expected at most the vocabulary's"),
        ("tokenizer_config.json", {"pad_token": {"content": 3}}, "pad_token is {'content': 3}, expected a text"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}, "'x' is not the id of a token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"999999": {"content": "a"}}}, "config.json has room for"),
        ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, "init_inputs"),
        ("special_tokens_map.json", {"additional_special_tokens": [[1]]}, "additional_special_tokens is [1]"),
        ("added_tokens.json", {"a": "b"}, "'b' is not the id of a token"),
    ],
)
def test_tokenizer_settings_of_a_wrong_value_are_refused(base_dir, name, settings, expected):
    edit(base_dir / name, **settings)
    assert expected in refusal(base_dir)


def test_dtypes_of_configs_are_those_of_the_flags(base_dir):
    for dtype in DTYPES.values():
        edit(base_dir / "config.json", torch_dtype=str(dtype).removeprefix("torch."))
        open_checkpoint(base_dir)


def test_families_are_fuzzed():
    assert set(FAMILY_BY_NAME) == set(PUBLISHED)
