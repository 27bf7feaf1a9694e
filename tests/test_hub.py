"""Models from a hub: what is downloaded from Hugging Face and ModelScope, and every way in which that fails.

Both hubs are local fakes: a server that answers as Hugging Face does, and a package named modelscope.
"""

import hashlib
import http.server
import json
import sys
import threading

import huggingface_hub
import pytest

import chat_demo
import evaluate_adapter
import generate
import inference_test
import merge_lora_and_quantize
import train_qlora
from glm_utils.checkpoint import find_checkpoint_dir, open_checkpoint
from glm_utils.cli import UserError
from glm_utils.family import FAMILIES
from glm_utils.hub import id_on_hub
from glm_utils.load_model import find_model
from glm_utils.model_files.checkpoint_files import stored_tensors
from tests.conftest import FIXTURES_DIR
from tests.hostile_adapters import write_adapter

MODEL_DIR = FIXTURES_DIR / "chatglm2-6b/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("config.json", "tokenizer.model", "tokenizer_config.json", "model.safetensors")
CODE_NAMES = ("modeling_chatglm.py", "README.md", "pytorch_model.bin")  # never fetched


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers as Hugging Face's hub does, for one model.

    Attributes:
        model_id: The model that is there.
        is_cut: Whether the connection breaks in the middle of the weights.
    """

    model_id, is_cut = "THUDM/chatglm2-6b", False

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if not path.removeprefix("/api/models").startswith(f"/{self.model_id}"):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif path.startswith("/api/models") and "/tree/" in path:
            sizes = {name: len(read_file(name)) for name in (*NAMES, *CODE_NAMES)}
            entries = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/models"):
            files = [{"rfilename": name} for name in (*NAMES, *CODE_NAMES)]
            self.answer(200, json.dumps({"id": self.model_id, "sha": COMMIT, "siblings": files}).encode())
        else:
            name = path.rpartition("/")[2]
            assert name not in CODE_NAMES
            content = read_file(name)
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.answer(200, content, headers, len(content) // 2 if self.is_cut and name == NAMES[-1] else None)

    def answer(self, status, content, headers=None, num_sent=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:num_sent])


def read_file(name):
    return b"raise SystemExit" if name in CODE_NAMES else (MODEL_DIR / name).read_bytes()


@pytest.fixture
def hub_server(monkeypatch, tmp_path):
    """Stand in for Hugging Face, with an empty cache; returns the handler class, whose attributes are the test's."""
    handler = type("Handler", (HubHandler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield handler
    server.shutdown()
    server.server_close()


def use_endpoint(monkeypatch, url, tmp_path):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "hub"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before each of its retries


FAKE_MODELSCOPE = """
import fnmatch, json, os, pathlib, shutil

class Missing(Exception):
    class response:
        status_code = 404

def fault():
    if os.environ.get("FAKE_FAULT") == "404":
        raise Missing("[404] not found\\nRequest: GET")
    if os.environ.get("FAKE_FAULT"):
        raise ConnectionError(os.environ["FAKE_FAULT"] + "\\nsecond line")

def snapshot_download(model_id, allow_patterns=None, ignore_patterns=None, local_files_only=False):
    target = pathlib.Path(os.environ["FAKE_CACHE"]) / model_id.replace("/", "--")
    if local_files_only:
        return str(target)
    fault()
    target.mkdir(parents=True, exist_ok=True)
    for name in os.environ["FAKE_NAMES"].split(","):
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
        if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns or ()):
            shutil.copyfile(pathlib.Path(os.environ["FAKE_MODEL"]) / name, target / name)
    return str(target)
"""
FAKE_API = """
import os
from modelscope import fault

class HubApi:
    def get_model_files(self, model_id, recursive=False):
        fault()
        return [{"Path": name} for name in os.environ["FAKE_NAMES"].split(",")]
"""


@pytest.fixture
def modelscope(tmp_path, monkeypatch, write):
    """Install a package named modelscope that copies from a directory; returns a function that makes it fail."""
    write("fake/modelscope/__init__.py", FAKE_MODELSCOPE)
    write("fake/modelscope/hub/__init__.py", "")
    write("fake/modelscope/hub/api.py", FAKE_API)
    for name in (*NAMES, *CODE_NAMES):
        write(f"model/{name}", "")
        (tmp_path / "model" / name).write_bytes(read_file(name))
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("FAKE_NAMES", ",".join((*NAMES, *CODE_NAMES)))
    yield lambda fault: monkeypatch.setenv("FAKE_FAULT", fault)
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelscope"]:
        del sys.modules[name]


def refusal(name, hub="huggingface"):
    with pytest.raises(UserError) as error_info:
        open_checkpoint(name, hub)
    assert "\n" not in str(error_info.value)
    return str(error_info.value)


# ---- Hugging Face


def test_a_model_comes_from_hugging_face_without_its_code(hub_server):
    found = open_checkpoint("THUDM/chatglm2-6b")
    assert sorted(path.name for path in found.directory.iterdir()) == sorted(NAMES)
    assert found.name == "THUDM/chatglm2-6b"
    assert found.fingerprint == open_checkpoint(MODEL_DIR).fingerprint


def test_a_model_that_is_not_there_is_said(hub_server):
    assert refusal("THUDM/chatglm9-6b").startswith("THUDM/chatglm9-6b: no such model on Hugging Face")
    assert "Known: THUDM/chatglm-6b, THUDM/chatglm2-6b" in refusal("THUDM/chatglm9-6b")


def test_a_connection_that_breaks_is_said(hub_server):
    hub_server.is_cut = True
    message = refusal("THUDM/chatglm2-6b")
    assert message.startswith("THUDM/chatglm2-6b: could not be downloaded (")
    hub_server.is_cut = False
    assert open_checkpoint("THUDM/chatglm2-6b").fingerprint == open_checkpoint(MODEL_DIR).fingerprint


def test_a_hub_that_cannot_be_reached_names_the_mirror_and_modelscope(monkeypatch, tmp_path):
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path)
    message = refusal("THUDM/chatglm2-6b")
    assert "set HF_ENDPOINT=https://hf-mirror.com, a mirror, or give --hub modelscope" in message
    assert "copy the checkpoint here and give its directory" in message


# ---- ModelScope


@pytest.mark.parametrize("name", ["ZhipuAI/chatglm2-6b", "THUDM/chatglm2-6b"])
def test_a_model_comes_from_modelscope_without_its_code(modelscope, name, tmp_path):
    """The ids of Hugging Face serve too: an adapter may name its base so."""
    found = open_checkpoint(name, "modelscope")
    assert found.directory == tmp_path / "cache/ZhipuAI--chatglm2-6b"
    assert sorted(path.name for path in found.directory.iterdir()) == sorted(NAMES)
    assert found.name == name
    assert "modelscope" in sys.modules


def test_the_base_of_an_adapter_comes_from_modelscope(modelscope, tmp_path):
    """Although it was trained on that of Hugging Face; the fingerprint says whether they are the same."""
    module = "transformer.encoder.layers.0.self_attention.query_key_value"
    spec = stored_tensors(MODEL_DIR)[f"{module}.weight"]
    adapter_dir = write_adapter(tmp_path / "adapter", "THUDM/chatglm2-6b", {module: spec.shape})
    record = {"identity": {"base_fingerprint": open_checkpoint(MODEL_DIR).fingerprint}}
    (adapter_dir / "run_config.json").write_text(json.dumps(record), "utf-8")
    base, adapter = find_model(None, str(adapter_dir), "modelscope")
    assert base.directory == tmp_path / "cache/ZhipuAI--chatglm2-6b"
    assert adapter.pairs.keys() == {module}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "ZhipuAI/chatglm2-6b: no such model on ModelScope, or none that may be read without a login"),
        ("no route", "could not be downloaded (ConnectionError: no route). Without a network, copy the checkpoint"),
    ],
)
def test_a_download_from_modelscope_that_fails_is_said(modelscope, fault, message):
    modelscope(fault)
    found = refusal("THUDM/chatglm2-6b", "modelscope")
    assert message in found
    assert fault == "404" or "modelscope download --model ZhipuAI/chatglm2-6b --local_dir DIR" in found


def test_an_earlier_download_serves_without_a_network(modelscope):
    first = find_checkpoint_dir("ZhipuAI/chatglm2-6b", "modelscope")
    modelscope("no route")
    assert find_checkpoint_dir("ZhipuAI/chatglm2-6b", "modelscope") == first


def test_what_modelscope_gave_is_checked_as_any_model(modelscope, tmp_path):
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(tmp_path / "cache/ZhipuAI--chatglm2-6b/model.safetensors") in refusal(
        "ZhipuAI/chatglm2-6b", "modelscope"
    )


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        (train_qlora.train_qlora, {"model_name_or_path": "ZhipuAI/chatglm2-6b"}),
        (merge_lora_and_quantize.merge_lora_and_quantize, {"lora_path": "a", "output_path": "o"}),
        (inference_test.inference_test, {"model_path": "ZhipuAI/chatglm2-6b"}),
        (chat_demo.chat_demo, {"model_path": "ZhipuAI/chatglm2-6b"}),
        (generate.generate, {"model_path": "ZhipuAI/chatglm2-6b", "data_path": "d.csv", "output_path": "o.csv"}),
        (evaluate_adapter.evaluate_adapter, {"model_path": ["ZhipuAI/chatglm2-6b", "models/chatglm2-tiny"]}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_command_says_how_to_install_modelscope(stage, flags, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(
        UserError, match=r"--hub modelscope: the package modelscope is not installed. Run pip install "
    ):
        stage(**flags, hub="modelscope")


def test_the_published_ids_of_both_hubs_stand_for_each_other():
    for family in FAMILIES:
        (there,) = family.modelscope_ids
        for name in (*family.hub_ids, there):
            assert id_on_hub(name, "modelscope") == there
            assert id_on_hub(name, "huggingface") == (name if name in family.hub_ids else family.hub_ids[0])
    assert id_on_hub("someone/else", "modelscope") == "someone/else"
