"""Shared fixtures: offline, one thread, and the golden models of both families."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
from loguru import logger
from safetensors.torch import save_file

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when triton is imported

PROJECT_DIR = Path(__file__).resolve().parent.parent
from glm_utils.checkpoint import load_classes, open_checkpoint
from glm_utils.family import FAMILIES, detect_family
from glm_utils.load_model import load_base_model
from glm_utils.logs import setup_logging

FIXTURES_DIR = PROJECT_DIR / "tests" / "fixtures"
FAMILY_BY_NAME = {family.name: family for family in FAMILIES}

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    """Skip tests marked gpu where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=list(FAMILY_BY_NAME))
def family_name(request):
    """Name of each family in turn."""
    return request.param


@pytest.fixture
def family(family_name):
    """Record of each family in turn."""
    return FAMILY_BY_NAME[family_name]


@pytest.fixture
def fixture_dir(family_name):
    """Directory of a family's golden files."""
    return FIXTURES_DIR / family_name


@pytest.fixture
def model_dir(fixture_dir):
    """Checkpoint directory of a family's golden model, in the published layout."""
    return fixture_dir / "model"


@pytest.fixture
def model_classes(family):
    """Config, model and tokenizer class of a family."""
    return load_classes(family)


@pytest.fixture
def sibling(model_classes):
    """Return a module that a family's model imported, e.g. attention_chatglm."""
    return lambda name: sys.modules[model_classes.model.__module__.replace("modeling_chatglm", name)]


@pytest.fixture
def tokenizer(model_dir):
    """Tokenizer of a family's golden model."""
    return open_checkpoint(model_dir).tokenizer


@pytest.fixture
def golden_model(model_dir):
    """A family's golden model in fp32, loaded afresh for every test."""
    return load_base_model(open_checkpoint(model_dir)).eval()


def write_quantized(model_dir, target, bits=4):
    """Write a model with int4 or int8 weights, and its tokenizer, to another directory."""
    load_base_model(open_checkpoint(model_dir)).quantize(bits).save_pretrained(target)
    open_checkpoint(model_dir).tokenizer.save_pretrained(target)
    return target


def change_config(base_dir, **changes):
    """Change config.json of a base, and write random weights that fit it."""
    path = base_dir / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(config))
    classes = load_classes(detect_family(config, path))
    state = classes.model(classes.config.from_dict(config)).state_dict()
    save_file(state, base_dir / "model.safetensors", {"format": "pt"})


@pytest.fixture
def log_lines():
    """Messages that a command's log wrote during the test, as "LEVEL message"."""
    lines = []
    setup_logging()
    handler = logger.add(lambda text: lines.append(text.rstrip("\n")), format="{level} {message}", level="INFO")
    yield lines
    with contextlib.suppress(ValueError):  # run_cli sets logging up afresh
        logger.remove(handler)


@pytest.fixture
def write(tmp_path):
    """Write a file of the test: text as it is, anything else as JSON."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), "utf-8")
        return path

    return write_file
