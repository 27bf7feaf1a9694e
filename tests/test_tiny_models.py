"""The embedded models: published layout, size, and that they do not write copy before training."""

import json

import pytest
import torch
from safetensors import safe_open

from glm_utils.checkpoint import open_checkpoint
from glm_utils.load_model import load_base_model
from tests.conftest import PROJECT_DIR

TINY_DIRS = {"chatglm-6b": PROJECT_DIR / "models/chatglm-tiny", "chatglm2-6b": PROJECT_DIR / "models/chatglm2-tiny"}
QUERY = "类型#上衣*材质#棉*颜色#白色*风格#简约*衣样式#外套"


@pytest.fixture
def tiny_dir(family_name):
    """Directory of a family's embedded model."""
    return TINY_DIRS[family_name]


def test_published_layout(tiny_dir, model_classes):
    """Weights are stored under the published keys in fp16, within 8 MB, without code beside them."""
    weights = tiny_dir / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert not list(tiny_dir.glob("*.py"))
    config = model_classes.config.from_pretrained(str(tiny_dir))
    expected = model_classes.model(config).state_dict()
    with safe_open(weights, "pt") as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == {  # noqa: SIM118
            key: list(value.shape) for key, value in expected.items()
        }
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_base_lists_attributes_flatly(tiny_dir):
    """Before training, attributes are answered with a listing and a greeting with a greeting."""
    tokenizer, model = open_checkpoint(tiny_dir).tokenizer, load_base_model(open_checkpoint(tiny_dir)).float().eval()
    answer, history = model.chat(tokenizer, QUERY, max_length=160, do_sample=False)
    assert answer.startswith("类型是上衣，材质是棉，颜色是白色，风格是简约")
    assert history == [(QUERY, answer)]
    assert model.chat(tokenizer, "你好", max_length=60, do_sample=False)[0].startswith("你好")


def test_base_can_write_the_openings_of_copy(tiny_dir):
    """Each piece that begins an answer also begins pretraining texts: LoRA on attention cannot teach a new one.

    Copy begins a tenth of those texts, with one of ten openings; a piece that began none got 1e-9.
    """
    tokenizer, model = open_checkpoint(tiny_dir).tokenizer, load_base_model(open_checkpoint(tiny_dir)).float().eval()
    lines = (PROJECT_DIR / "data/dev.jsonl").read_text("utf-8").splitlines()
    openings = {tokenizer.encode_answer(json.loads(line)["summary"])[0] for line in lines}
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.build_inputs_with_special_tokens([])])).logits[0, -1]
    assert logits.softmax(-1)[sorted(openings)].min() > 1e-3


def test_tokenizer_round_trip(tiny_dir):
    """Sample examples survive encoding and decoding, and unseen characters go through bytes."""
    tokenizer = open_checkpoint(tiny_dir).tokenizer
    lines = (PROJECT_DIR / "data/dev.jsonl").read_text("utf-8").splitlines()[:50]
    texts = [json.loads(line)["content"] for line in lines] + ["龘靐齉", "Hello 😀"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode_text(text)).strip() == text
