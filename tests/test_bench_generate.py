"""The benchmark of generate.py at the size of the small models."""

import json

import pytest

from benchmarks import bench_generate as bench
from glm_utils.cli import UserError
from glm_utils.data import read_examples
from glm_utils.family import PROJECT_DIR

SMALL = {"scale": "tiny", "num_prompts": 5, "num_chats": 2, "batch_size": 2, "new_tokens": 4, "loop_number": 1}


@pytest.fixture
def data_path(write):
    """Six examples with short answers."""
    examples = read_examples(PROJECT_DIR / "data" / "dev.jsonl")[:6]
    lines = [json.dumps({"content": one.query, "summary": one.answer[: 5 + n]}) for n, one in enumerate(examples)]
    return write("short.jsonl", "\n".join(lines))


def test_figures(data_path, tmp_path, capsys):
    """Both families, greedy and sampled; each answer has the length of the one in the data."""
    path = tmp_path / "result.json"
    bench.bench_generate(data_path=str(data_path), output_json=str(path), **SMALL)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(path.read_text("utf-8")) == result
    found = result["measurements"]
    assert [one["label"] for one in found] == [
        f"{name} {sampling}" for name in ("chatglm2-tiny", "chatglm-tiny") for sampling in ("greedy", "sampled")
    ]
    examples = read_examples(data_path)[:5]
    for one in found:
        directory = PROJECT_DIR / "models" / one["label"].split()[0]
        tokenizer = bench.open_checkpoint(directory).tokenizer
        assert one["num_new_tokens"] == sum(len(tokenizer.encode_answer(example.answer)) for example in examples)
        assert one["tokens_per_second"] == pytest.approx(one["num_new_tokens"] / one["seconds"])
        assert one["share_of_full_batch"] > 0
        assert one["times_chat"] > 0
    assert {"versions", "commit"} <= result.keys()


def test_refusals(data_path):
    for name in ("num_prompts", "batch_size", "loop_number"):
        with pytest.raises(UserError, match=f"--{name} 0"):
            bench.bench_generate(data_path=str(data_path), **{**SMALL, name: 0})
