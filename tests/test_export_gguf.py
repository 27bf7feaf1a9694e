"""--export_format gguf: the file against the merged weights, the vocabulary, both chat templates, and llama.cpp.

Tests of llama.cpp need llama-cpp-python, the test of the Modelfile's template needs Go; both are skipped without.
"""

import json
import shutil
import subprocess

import gguf
import jinja2
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2

import merge_lora_and_quantize as stage
from glm_utils import files
from glm_utils.checkpoint import load_classes, open_checkpoint
from glm_utils.cli import UserError
from glm_utils.export import gguf_file, gguf_tokenizer
from glm_utils.family import PROJECT_DIR
from glm_utils.load_model import load_adapter, load_base_model
from tests.conftest import FAMILY_BY_NAME, FIXTURES_DIR, change_config

TINY_DIR = PROJECT_DIR / "models" / "chatglm2-tiny"
GOLDEN_DIR = FIXTURES_DIR / "chatglm2-6b" / "model"
LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
GGUF_NAMES = {
    "embedding.word_embeddings": "token_embd",
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "encoder.final_layernorm": "output_norm",
    "output_layer": "output",
}
CONVERSATIONS = [
    ("类型#裙*颜色#白色", []),
    ("philosopher\n gossip  sop", [("你好", "你好👋！"), ("", "  leading and trailing  ")]),
    ("三", [(f"问{n}", f"答{n}\n") for n in range(11)]),
]


def make_adapter(base_dir, directory):
    """Write an adapter of all Linear modules with random weights, small enough that the model still speaks."""
    model = load_base_model(open_checkpoint(base_dir))
    model.name_or_path = str(base_dir)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=1, target_modules=LINEARS, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_adapter(tmp_path_factory):
    return make_adapter(TINY_DIR, tmp_path_factory.mktemp("adapter") / "tiny")


@pytest.fixture
def export(tmp_path):
    """Run the stage; returns the output directory."""

    def run(adapter_dir, name="out", **flags):
        flags = {"qbits": 0, "device": "cpu", "export_format": "gguf", **flags}
        stage.merge_lora_and_quantize(lora_path=str(adapter_dir), output_path=str(tmp_path / name), **flags)
        return tmp_path / name

    return run


@pytest.fixture
def base_dir(tmp_path):
    """A copy of the golden model, free to be broken."""
    target = tmp_path / "base"
    target.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN_DIR / name, target / name)
    return target


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def gguf_name(key):
    """Translate a state-dict key, independently of the package's table."""
    path, _, kind = key.removeprefix("transformer.").rpartition(".")
    layer = path.removeprefix("encoder.layers.").partition(".")
    if path.startswith("encoder.layers."):
        return f"blk.{layer[0]}.{GGUF_NAMES[layer[2]]}.{kind}"
    return f"{GGUF_NAMES[path]}.{kind}"


def metadata(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# ---- the file


def test_files_and_records(tiny_adapter, export, log_lines):
    out = export(tiny_adapter, qbits=4)
    assert {path.name for path in out.iterdir()} == {"model.gguf", "Modelfile", "README.md", "run_config.json"}
    assert "read back: all 31 tensors of model.gguf are as written, bit for bit" in "\n".join(log_lines)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "llama-cli -m model.gguf" in card
    assert "library_name: gguf" in card
    assert "from_pretrained" not in card
    assert json.loads((out / "run_config.json").read_text())["arguments"]["export_format"] == "gguf"
    lines = (out / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert "PARAMETER temperature 0.8" in lines
    assert "PARAMETER num_ctx 2048" in lines  # the tiny model's seq_length, below the published 8192


def test_weights_are_the_merged_weights(tiny_adapter, export):
    merged = load_file(export(tiny_adapter, "chatglm", export_format="chatglm") / "model.safetensors")
    merged = {gguf_name(key): tensor for key, tensor in merged.items() if not key.endswith("inv_freq")}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(export(tiny_adapter) / "model.gguf").tensors}
    assert set(found) == set(merged)
    for name, tensor in merged.items():
        expected_type = "F16" if tensor.dim() == 2 else "F32"
        assert (found[name].tensor_type.name, found[name].data.shape) == (expected_type, tuple(tensor.shape))
        assert np.array_equal(found[name].data.astype(np.float16), tensor.numpy())


@pytest.mark.parametrize(("qbits", "type_name", "steps"), [(8, "Q8_0", 127), (4, "Q4_0", 8)])
def test_quantized_weights_are_within_a_step(tiny_adapter, export, qbits, type_name, steps):
    fp16 = {tensor.name: tensor for tensor in gguf.GGUFReader(export(tiny_adapter, "fp16") / "model.gguf").tensors}
    reader = gguf.GGUFReader(export(tiny_adapter, qbits=qbits) / "model.gguf")
    num_quantized = 0
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and tensor.data.ndim == 2:
            assert tensor.tensor_type.name == type_name
            blocks = fp16[tensor.name].data.astype(np.float32).reshape(-1, 32)
            dequantized = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
            step = np.abs(blocks).max(axis=1, keepdims=True) / steps
            # Half a step, a full one at Q4_0's open end (codes -8 to 7), and the step's rounding to fp16
            bound = step * (1.0 if qbits == 4 else 0.5) + step * steps * 2**-11 + 2**-24
            assert (np.abs(dequantized - blocks) <= bound).all()
            num_quantized += 1
        else:
            assert tensor.tensor_type == fp16[tensor.name].tensor_type
            assert np.array_equal(tensor.data, fp16[tensor.name].data)
    assert num_quantized == 16


@pytest.mark.parametrize("qbits", [0, 8, 4])
def test_metadata(tiny_adapter, export, qbits):
    found = metadata(export(tiny_adapter, qbits=qbits) / "model.gguf")
    config = json.loads((TINY_DIR / "config.json").read_text())
    expected = {
        "general.architecture": "chatglm",
        "general.file_type": {0: 1, 8: 7, 4: 2}[qbits],
        "chatglm.context_length": config["seq_length"],
        "chatglm.embedding_length": config["hidden_size"],
        "chatglm.feed_forward_length": config["ffn_hidden_size"],
        "chatglm.block_count": config["num_layers"],
        "chatglm.attention.head_count": config["num_attention_heads"],
        "chatglm.attention.head_count_kv": config["multi_query_group_num"],
        "chatglm.attention.key_length": config["kv_channels"],
        "chatglm.attention.value_length": config["kv_channels"],
        "chatglm.attention.layer_norm_rms_epsilon": pytest.approx(config["layernorm_epsilon"]),
        "chatglm.rope.dimension_count": config["kv_channels"] // 2,
        "chatglm.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "chatglm-spm",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": gguf_tokenizer.JINJA_TEMPLATE,
    }
    assert {key: found[key] for key in expected} == expected


def test_vocabulary(tiny_adapter, export):
    found = metadata(export(tiny_adapter) / "model.gguf")
    tokens, scores, types = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    tokenizer = open_checkpoint(TINY_DIR).tokenizer
    num_pieces, num_rows = tokenizer.sp.get_piece_size(), 2048
    assert len(tokens) == len(scores) == len(types) == len(set(tokens)) == num_rows
    for index in range(num_pieces):
        assert tokens[index] == tokenizer.sp.id_to_piece(index)
        assert scores[index] == tokenizer.sp.get_score(index)
    assert tokens[num_pieces : num_pieces + 5] == ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
    assert tokens[num_pieces + 5 :] == [f"[PAD{index}]" for index in range(num_pieces + 5, num_rows)]
    kinds = [gguf.TokenType(value).name for value in types]
    assert kinds[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert kinds[259:261] == ["NORMAL", "NORMAL"]
    assert set(kinds[num_pieces : num_pieces + 5]) == {"CONTROL"}
    assert set(kinds[num_pieces + 5 :]) == {"UNUSED"}


# ---- chat templates


def render_jinja(messages):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers and llama.cpp do
    return environment.from_string(gguf_tokenizer.JINJA_TEMPLATE).render(messages=messages, add_generation_prompt=True)


def as_messages(query, history):
    turns = [*history, (query, None)]
    roles = ("user", "assistant")
    return [{"role": roles[n], "content": turn[n]} for turn in turns for n in (0, 1)][:-1]


@pytest.mark.parametrize(("query", "history"), CONVERSATIONS)
def test_jinja_template_writes_the_prompt(query, history):
    prompt = open_checkpoint(TINY_DIR).tokenizer.build_prompt(query, history)
    assert render_jinja(as_messages(query, history)) == "[gMASK]<sop>" + prompt
    system = {"role": "system", "content": "说中文"}
    first = history[0][0] if history else query
    expected = prompt.replace(f"问：{first}", f"问：说中文\n{first}", 1)
    assert render_jinja([system, *as_messages(query, history)]) == "[gMASK]<sop>" + expected


GO_PROGRAM = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var input struct {
		Template string
		Messages []Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	t := template.Must(template.New("").Parse(input.Template))
	if err := t.Execute(os.Stdout, input); err != nil {
		panic(err)
	}
}
"""


@pytest.mark.slow
def test_modelfile_template_writes_the_prompt(tmp_path):
    """Ollama's templates are Go's text/template over .Messages."""
    if not shutil.which("go"):
        pytest.skip("no go command")
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    program = tmp_path / "render"
    subprocess.run(["go", "build", "-o", program, "main.go"], cwd=tmp_path, check=True, capture_output=True)
    text = gguf_tokenizer.modelfile("model.gguf", 2048)
    template = text[text.index('"""') + 3 : text.rindex('"""')]
    tokenizer = open_checkpoint(TINY_DIR).tokenizer
    for query, history in CONVERSATIONS:
        for system in ([], [{"role": "system", "content": "说中文"}]):
            messages = [*system, *as_messages(query, history)]
            request = json.dumps({"Template": template, "Messages": messages})
            rendered = subprocess.run([program], input=request.encode(), check=True, capture_output=True).stdout
            assert rendered.decode() == render_jinja(messages)
            assert system or rendered.decode() == "[gMASK]<sop>" + tokenizer.build_prompt(query, history)


# ---- bad input


@pytest.mark.parametrize("family_name", ["chatglm-6b"])
def test_chatglm_6b_is_refused(tmp_path, model_dir, export):
    adapter_dir = make_adapter(model_dir, tmp_path / "adapter")
    with pytest.raises(UserError, match="llama.cpp has no architecture for ChatGLM-6B.*Use --export_format chatglm"):
        export(adapter_dir)


def test_what_the_format_does_not_hold_is_refused(tmp_path, base_dir, export):
    adapter_dir = make_adapter(base_dir, tmp_path / "adapter")
    with pytest.raises(
        UserError, match="dense_4h_to_h.weight has 176 columns, not a multiple of the 32.*Use --qbits 0"
    ):
        export(adapter_dir, qbits=4)
    for changes, message in (
        ({"kv_channels": 32}, "hidden_size is 64, not 4 heads of 32 channels"),
        ({"add_bias_linear": True}, "add_bias_linear is set"),
    ):
        change_config(base_dir, **changes)
        shutil.rmtree(adapter_dir)
        make_adapter(base_dir, adapter_dir)
        with pytest.raises(UserError, match=f"{message}.*Use --export_format chatglm"):
            export(adapter_dir)
    change_config(base_dir, kv_channels=16, add_bias_linear=False)
    shutil.rmtree(adapter_dir)
    make_adapter(base_dir, adapter_dir)
    (base_dir / "tokenizer.model").write_bytes(b"no vocabulary")
    with pytest.raises(UserError, match="tokenizer.model.*is not a sentencepiece model"):
        export(adapter_dir)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(
    ("spec", "name", "value"),
    [
        ("trainer_spec", "model_type", sentencepiece_model_pb2.TrainerSpec.UNIGRAM),
        ("normalizer_spec", "remove_extra_whitespaces", True),
        ("normalizer_spec", "add_dummy_prefix", False),
        ("normalizer_spec", "precompiled_charsmap", b"1"),
    ],
)
def test_vocabulary_that_llama_cpp_splits_differently(base_dir, spec, name, value):
    path = base_dir / "tokenizer.model"
    gguf_tokenizer.check_vocabulary(path)
    model = gguf_tokenizer.read_vocabulary(path)
    setattr(getattr(model, spec), name, value)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=f"{name} is .*llama.cpp would not split text as in training"):
        gguf_tokenizer.check_vocabulary(path)


def test_package_that_is_missing(tiny_adapter, export, monkeypatch):
    monkeypatch.setattr(gguf_file, "gguf", None)
    with pytest.raises(UserError, match="gguf is not installed. Run pip install gguf"):
        export(tiny_adapter)


def test_disk_that_is_too_small(tiny_adapter, export, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=6_000_000))
    with pytest.raises(UserError, match="0.01 GB free, 0.03 GB needed"):
        export(tiny_adapter)


@pytest.mark.parametrize("place", ["data", "name"])
def test_a_file_that_differs_is_refused(tiny_adapter, export, monkeypatch, tmp_path, place):
    write = gguf_file.write

    def write_and_break(job, directory):
        reference = write(job, directory)
        path = directory / "model.gguf"
        data = bytearray(path.read_bytes())
        at = len(data) - 5 if place == "data" else data.index(b"blk.2.attn_qkv.bias")
        data[at] ^= 1
        path.write_bytes(data)
        return reference

    monkeypatch.setattr(gguf_file, "write", write_and_break)
    with pytest.raises(UserError, match="the written file differs"):
        export(tiny_adapter)
    assert not list(tmp_path.iterdir())


# ---- llama.cpp


@pytest.fixture
def llama():
    """Open a GGUF file in llama.cpp, for this test."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="no llama-cpp-python")
    opened = []

    def load(path, **settings):
        settings = {"n_ctx": 512, "n_threads": 1, "logits_all": True, "verbose": False, **settings}
        opened.append(llama_cpp.Llama(str(path), **settings))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


def logits_of(model, ids):
    model.reset()
    model.eval(ids)
    return model.scores[: len(ids)].copy()


def greedy(model, ids, num_new):
    """Return up to num_new greedy tokens, the end token included."""
    new_ids = [int(logits_of(model, ids)[-1].argmax())]
    while len(new_ids) < num_new and new_ids[-1] != 2:
        model.eval(new_ids[-1:])
        new_ids.append(int(model.scores[model.n_tokens - 1].argmax()))
    return new_ids


@pytest.mark.slow
def test_llama_cpp_generates_the_same_tokens(tiny_adapter, export, llama):
    theirs = llama(export(tiny_adapter) / "model.gguf")
    ours = load_adapter(load_base_model(open_checkpoint(TINY_DIR)), tiny_adapter).merge_and_unload().eval()
    tokenizer = open_checkpoint(TINY_DIR).tokenizer
    examples = [json.loads(line) for line in (PROJECT_DIR / "data" / "dev.jsonl").read_text("utf-8").splitlines()]
    prompts = [tokenizer.encode_prompt(example["content"]) for example in examples[:20]]
    assert len(prompts) == 20
    for ids in prompts:
        output = ours.generate(input_ids=torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :]
        assert greedy(theirs, ids, 64) == output.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_channels": 32, "num_attention_heads": 2, "multi_query_group_num": 1, "padded_vocab_size": 2053},
        {"multi_query_attention": False, "multi_query_group_num": 1, "num_layers": 1},
        {"add_qkv_bias": False, "layernorm_epsilon": 1e-3, "num_attention_heads": 8, "kv_channels": 8},
    ],
    ids=["golden", "wide heads", "no groups", "no bias"],
)
def test_llama_cpp_computes_the_same_logits(tmp_path, base_dir, export, llama, changes):
    """Random weights of several shapes, 300 tokens: the positions reach far beyond one turn of the rotary angles."""
    edit(base_dir / "config.json", **changes)
    classes = load_classes(FAMILY_BY_NAME["chatglm2-6b"])
    torch.manual_seed(1)
    ours = classes.model(classes.config.from_pretrained(base_dir)).eval()
    for parameter in ours.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.data.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
        parameter.data = parameter.data.half().float()
    ours.save_pretrained(tmp_path / "saved")
    shutil.copyfile(tmp_path / "saved" / "model.safetensors", base_dir / "model.safetensors")
    adapter_dir = make_adapter(base_dir, tmp_path / "adapter")
    ours = load_adapter(load_base_model(open_checkpoint(base_dir)), adapter_dir).merge_and_unload().eval()
    ids = torch.randint(3, 2000, (300,)).tolist()
    with torch.no_grad():
        expected = ours(input_ids=torch.tensor([ids])).logits[0].numpy()
    found = logits_of(llama(export(adapter_dir) / "model.gguf"), ids)
    assert np.abs(found - expected).max() <= 2**-8 * np.abs(expected).max()  # llama.cpp rounds activations to fp16


@pytest.mark.slow
def test_llama_cpp_splits_text_as_the_tokenizer_does(tiny_adapter, export, llama, tmp_path):
    adapter_dir = make_adapter(GOLDEN_DIR, tmp_path / "golden adapter")
    golden = json.loads((FIXTURES_DIR / "chatglm2-6b" / "tokenizer.json").read_text("utf-8"))
    examples = [json.loads(line) for line in (PROJECT_DIR / "data" / "dev.jsonl").read_text("utf-8").splitlines()]
    texts = [entry["text"] for entry in golden["singles"]] + [example["summary"] for example in examples]
    texts += ["philosopher sop eop", "[gMASK]sop</s><unk><0x0A>", "\u3000全角 ▁▁ 😀\t\r\n", "a" * 2000]
    for name, base, adapter in (("tiny", TINY_DIR, tiny_adapter), ("golden", GOLDEN_DIR, adapter_dir)):
        model = llama(export(adapter, name) / "model.gguf")
        tokenizer = open_checkpoint(base).tokenizer
        for text in texts:
            ids = model.tokenize(text.encode("utf-8", "replace"), add_bos=True, special=False)
            assert ids == tokenizer.encode_text(text), text
        for query, history in CONVERSATIONS:
            prompt = render_jinja(as_messages(query, history))
            ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
            assert ids == tokenizer.encode_prompt(query, history)


@pytest.mark.slow
def test_llama_cpp_chats_with_the_stored_template(tiny_adapter, export, llama):
    model = llama(export(tiny_adapter) / "model.gguf")
    ours = load_adapter(load_base_model(open_checkpoint(TINY_DIR)), tiny_adapter).merge_and_unload().eval()
    query, history = "类型#裙*颜色#白色", [("你好", "你好！")]
    expected, _ = ours.chat(open_checkpoint(TINY_DIR).tokenizer, query, history, do_sample=False, max_length=200)
    answer = model.create_chat_completion(as_messages(query, history), temperature=0, max_tokens=100)
    assert answer["choices"][0]["message"]["content"].strip() == expected
