"""The comparison of number formats, and the random checkpoints of other sizes that it trains."""

import json

import pytest

from benchmarks import bench_compute_dtype as bench
from benchmarks.harness.published import published_model, resized_model
from benchmarks.random_checkpoint import random_checkpoint
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError

SMALL_CONFIG = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 96,
    "padded_vocab_size": 2112,
}


def test_shapes_of_the_model_class_are_the_published_ones(family_name):
    assert resized_model(family_name, {}) == published_model(family_name)


def test_the_1b_configuration_has_that_many_weights():
    resized = resized_model("chatglm2-6b", bench.RANDOM_CONFIG)
    assert 1.05e9 < resized["n_params"] < 1.15e9
    assert resized["shapes"]["transformer.output_layer.weight"] == [65024, 2048]
    with pytest.raises(UserError, match="layers is not a key of chatglm2-6b. Did you mean num_layers?"):
        resized_model("chatglm2-6b", {"layers": 2})


def test_differences_are_relative_to_fp32():
    found = bench.relative_differences({"fp32": {0: 4.0, 5: 2.0}, "bf16": {0: 4.0, 5: 1.5}})
    assert found == {"bf16": {0: 0.0, 5: -0.25}}


@pytest.mark.slow
def test_the_benchmark_trains_a_random_model(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench, "RANDOM_CONFIG", SMALL_CONFIG)
    monkeypatch.setattr(bench, "RUNS", {run: bench.RUNS[run] for run in list(bench.RUNS)[:-1]})  # the rest is as fp32
    paths = {"train_data_path": "data/dev.jsonl", "eval_data_path": "data/dev.jsonl"}
    bench.bench_compute_dtype(
        size="1b", **paths, steps=4, learning_rate=1e-2, work_dir=str(tmp_path), results_dir=str(tmp_path / "results")
    )
    (path,) = (tmp_path / "results").iterdir()
    found = json.loads(path.read_text("utf-8"))
    losses = {run: result["eval_loss"] for run, result in found["runs"].items()}
    assert list(losses) == list(bench.RUNS)
    for run, by_step in losses.items():
        assert list(by_step) == ["0", "1", "2", "3", "4"]
        assert by_step["4"] < by_step["0"] - 0.1
        assert run == "fp32" or by_step != losses["fp32"]  # the flag reaches the model
        assert run == "fp32" or abs(found["relative_difference"][run]["4"]) < 0.01
    assert f"| bf16 | {losses['bf16']['0']:.4f} | " in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "results"]  # the checkpoint is deleted


def test_a_resized_checkpoint_has_its_configuration(tmp_path):
    random_checkpoint(output_path=str(tmp_path / "base"), config_overrides=json.dumps(SMALL_CONFIG))
    config = open_checkpoint(tmp_path / "base").model_config
    assert {key: getattr(config, key) for key in SMALL_CONFIG} == SMALL_CONFIG
