"""inference_test.py: the arithmetic on a clock that is moved by hand, what is counted, every refusal, real runs."""

import errno
import gc
import json
import math
import os
import weakref

import pytest
import torch
from rich.cells import cell_len
from torch import nn

import inference_test as stage
from benchmarks import bench_inference as bench
from benchmarks.harness.checkpoints import write_random_adapter
from glm_utils import load_model, report_file
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.family import PROJECT_DIR
from glm_utils.inference import memory as inference_memory
from glm_utils.inference import request, timer
from glm_utils.inference.measure import Workload, measure_model, stream_generate, time_run
from glm_utils.inference.memory import (
    bytes_read_per_step,
    copy_bandwidth,
    peak_memory,
    reset_peak_memory,
    weight_bytes,
)
from glm_utils.inference.report import TABLE_ROWS, models_table, summarize
from glm_utils.inference.request import prompt_ids, resolve_sources
from glm_utils.load_model import ModelSource, load_adapter, load_base_model
from tests.conftest import write_quantized

CPU = torch.device("cpu")
AUTO_DTYPE = "fp16" if torch.cuda.is_available() else "fp32"  # of the small models, which are stored in fp16
NUM_PROMPT, BATCH = 6, 3


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved: seconds are clock.now."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(timer.time, "perf_counter", lambda: Clock.now)
    return Clock


class TimedModel(nn.Module):
    """A model whose tokens take known times: 2 s for the first run's first token, then 0.5 s, later tokens 0.25 s."""

    def __init__(self, clock, step_seconds=0.25):
        super().__init__()
        self.clock, self.step_seconds, self.num_runs = clock, step_seconds, 0
        self.embedding, self.output_layer = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.settings = {}

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.output_layer

    def stream_generate(self, ids, max_new_tokens, **settings):
        self.settings = settings
        self.num_runs += 1
        for step in range(max_new_tokens):
            self.clock.now += self.step_seconds if step else 2.0 if self.num_runs == 1 else 0.5
            ids = torch.cat((ids, ids[:, :1]), dim=1)
            yield ids


def workload(new_tokens=5, loop_number=4, max_time=None):
    return Workload(torch.ones(BATCH, NUM_PROMPT, dtype=torch.long), new_tokens, loop_number, max_time)


@pytest.fixture
def int4_dir(model_dir, tmp_path):
    """The golden model in int4."""
    return write_quantized(model_dir, tmp_path / "int4")


@pytest.fixture
def adapter_dir(model_dir, tmp_path):
    """A random adapter for the golden model."""
    write_random_adapter(model_dir, tmp_path / "adapter", ["query_key_value"])
    return tmp_path / "adapter"


@pytest.fixture
def measure(capsys):
    """Run the stage; returns the table's lines, split in cells, and the JSON object of the last line."""

    def run(**flags):
        stage.inference_test(**{"loop_number": 2, "new_tokens": 4, **flags})
        *table, blank, last = capsys.readouterr().out.splitlines()
        assert blank == ""
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
        return cells, json.loads(last)

    return run


# ---- times


def test_figures_of_a_model_with_known_times(clock):
    """2 s cold; then 0.5 s to the first token and four gaps of 0.25 s: the cold run and the warm-up do not count."""
    model = TimedModel(clock)
    figures = measure_model(lambda: model, stream_generate, workload(), bandwidth=1e4)
    assert model.num_runs == 1 + 1 + 4
    assert figures["cold_first_token_seconds"] == pytest.approx(2.0)
    assert figures["cold_run_seconds"] == pytest.approx(3.0)
    assert figures["ttft_seconds"] == pytest.approx(0.5)
    assert figures["tpot_p50_seconds"] == figures["tpot_p95_seconds"] == pytest.approx(0.25)
    assert figures["prefill_tokens_per_second"] == pytest.approx(BATCH * NUM_PROMPT / 0.5)
    assert figures["decode_tokens_per_second"] == pytest.approx(4.0)
    assert figures["decode_tokens_per_second_total"] == pytest.approx(12.0)
    assert figures["tokens_per_second"] == pytest.approx(BATCH * 5 / 1.5)
    assert figures["decode_spread"] == pytest.approx(0.0)
    assert (figures["num_runs"], figures["num_new_tokens"]) == (4, 5)
    assert (figures["num_prompt_tokens"], figures["batch_size"]) == (6, 3)
    read = 40 * 4 + BATCH * 4 * 4  # output layer, and three rows of the embedding, fp32
    assert figures["weight_bytes"] == 2 * 40 * 4
    assert figures["bytes_read_per_step"] == read
    assert figures["bound_tokens_per_second"] == pytest.approx(1e4 / read)
    assert figures["bandwidth_share"] == pytest.approx(4.0 * read / 1e4)
    assert figures["peak_rss_bytes"] > 0


def test_load_time_is_measured(clock):
    def load():
        clock.now += 7.0
        return TimedModel(clock)

    assert measure_model(load, stream_generate, workload(), 1.0)["load_seconds"] == pytest.approx(7.0)


@pytest.mark.parametrize(("max_time", "num_runs"), [(None, 4), (10.0, 4), (3.1, 3), (3.0, 2), (0.0, 1)])
def test_no_run_starts_after_max_time(clock, max_time, num_runs):
    figures = measure_model(lambda: TimedModel(clock), stream_generate, workload(max_time=max_time), 1.0)
    assert figures["num_runs"] == num_runs  # of 1.5 s each


def test_medians_percentiles_and_spread():
    runs = [[0.4, 0.5, 0.6], [0.2, 0.4, 0.6], [0.3, 0.7, 0.8]]
    figures = summarize(runs, num_prompt_tokens=12, batch_size=2)
    assert figures["ttft_seconds"] == pytest.approx(0.3)
    assert figures["prefill_tokens_per_second"] == pytest.approx(2 * 12 / 0.3)
    assert figures["tpot_p50_seconds"] == pytest.approx(0.1)  # of 0.1 0.1 0.1 0.2 0.2 0.4
    assert figures["tpot_p95_seconds"] == pytest.approx(0.4)
    assert figures["decode_tokens_per_second"] == pytest.approx(5.0)  # of 10, 5, 4
    assert figures["decode_spread"] == pytest.approx((10 - 4) / 5)
    assert figures["tokens_per_second"] == pytest.approx(2 * 3 / 0.6)
    assert [run["total_seconds"] for run in figures["runs"]] == [0.6, 0.6, 0.8]


@pytest.mark.parametrize("num_generated", [4, 6])
def test_another_number_of_tokens_is_an_error(num_generated):
    def generate(mark):
        for _ in range(num_generated):
            mark()
        return num_generated

    with pytest.raises(RuntimeError, match=f"{num_generated} tokens .* instead of 5"):
        time_run(generate, timer.CpuClock(), 5)


def test_end_token_does_not_stop(golden_model, tokenizer):
    """Every id is an end token: the model alone stops after one, the measured run goes on."""
    golden_model.generation_config.eos_token_id = list(range(golden_model.config.vocab_size))
    ids = torch.tensor([tokenizer.encode_prompt("你好")])
    assert len(list(golden_model.stream_generate(ids, max_new_tokens=9, do_sample=False))) == 1
    generate = stream_generate(golden_model, Workload(ids, new_tokens=9, loop_number=1))
    assert len(time_run(generate, timer.CpuClock(), 9)) == 9


def test_fast_path_is_switched_off_only_when_asked(clock):
    model = TimedModel(clock)
    stream_generate(model, workload())(lambda: None)
    assert "use_cuda_graph" not in model.settings
    stream_generate(model, workload(), fast_path=False)(lambda: None)
    assert model.settings["use_cuda_graph"] is False


# ---- bytes


def test_every_weight_is_counted(golden_model):
    """All of the layers, norms and output layer, two rows of the embedding; the state dict says how much that is."""
    embedding = golden_model.get_input_embeddings().weight
    total = sum(tensor.nbytes for tensor in golden_model.state_dict().values())
    assert weight_bytes(golden_model) == total
    assert bytes_read_per_step(golden_model, 2) == total - embedding.nbytes + 2 * embedding[0].nbytes
    golden_model.get_output_embeddings().weight = embedding
    assert weight_bytes(golden_model) == total - embedding.nbytes
    assert bytes_read_per_step(golden_model, 2) == total - embedding.nbytes + 2 * embedding[0].nbytes


@pytest.mark.parametrize("form", ["fp32", "fp16", "int4", "nf4", "nf4 + adapter"])
def test_estimate_equals_what_is_loaded(form, model_dir, int4_dir, adapter_dir):
    paths = (
        ([str(int4_dir if form == "int4" else model_dir)], []) if "adapter" not in form else ([], [str(adapter_dir)])
    )
    dtype = form if form.startswith("fp") else "fp32"
    (source,) = resolve_sources(*paths, form.startswith("nf4"), dtype, CPU)
    assert source.weight_format == form.removesuffix(" + adapter")
    weights, cache = source.estimate_bytes(batch_size=3, num_tokens=10)
    loaded = weight_bytes(source.load())
    tables = 3 * 4 * 512  # bitsandbytes keeps code tables with each weight, and blocks are rounded up
    assert (
        loaded == pytest.approx(weights, rel=0.02, abs=0)
        if form.startswith("nf4")
        else abs(loaded - weights) <= tables
    )
    config = source.load().config
    channels = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert cache == 3 * 10 * 2 * channels * source.dtype.itemsize


def test_copy_bandwidth_counts_reading_and_writing(clock, monkeypatch):
    """The fastest copy counts; it takes 0.1 s."""
    seconds = iter([0.4, 0.1, *[0.2] * (inference_memory.NUM_COPIES - 2)])

    class SlowClock(timer.CpuClock):
        def mark(self):
            clock.now += next(seconds)
            super().mark()

    monkeypatch.setattr(inference_memory, "make_clock", lambda device: SlowClock())
    assert copy_bandwidth(CPU, free=8000) == pytest.approx(2 * 1000 / 0.1)


def test_peak_memory_starts_anew():
    reset_peak_memory(CPU)  # of the tests before
    block = torch.ones(64 << 20, dtype=torch.uint8)
    high = peak_memory(CPU)["peak_rss_bytes"]
    del block
    reset_peak_memory(CPU)
    assert peak_memory(CPU)["peak_rss_bytes"] <= high - (32 << 20)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(CPU)["peak_rss_bytes"] >= high - (32 << 20)
    del block


# ---- the prompt


@pytest.mark.parametrize("num_tokens", [3, 4, 17, 200])
def test_prompt_of_a_given_length(tokenizer, num_tokens):
    text = "类型#裙*颜色#白色<sop>[gMASK]"
    given, ids = prompt_ids(tokenizer, text, None), prompt_ids(tokenizer, text, num_tokens)
    assert given == tokenizer.encode_prompt(text)
    assert len(ids) == num_tokens
    special = tokenizer.build_inputs_with_special_tokens([])
    body = [token for token in given if token not in special]
    repeated = (body * num_tokens)[: num_tokens - len(special)]
    assert ids == tokenizer.build_inputs_with_special_tokens(repeated)


@pytest.mark.parametrize(("text", "num_tokens"), [("你好", 2), ("你好", -1)])
def test_prompt_without_room_is_refused(tokenizer, text, num_tokens):
    with pytest.raises(UserError, match="--prompt_tokens"):
        prompt_ids(tokenizer, text, num_tokens)


# ---- complete runs


def test_table_and_json_agree(measure, model_dir, int4_dir, adapter_dir, tmp_path):
    """A base, a quantized model and an adapter in one run; every cell is the JSON's number."""
    path = tmp_path / "out.json"
    cells, result = measure(
        model_path=[str(model_dir), str(int4_dir)], lora_path=str(adapter_dir), dtype="fp32", output_json=str(path)
    )
    models = result["models"]
    assert [figures["label"] for figures in models] == ["model", "int4", "model + adapter"] == cells[0][1:]
    assert [figures["weight_format"] for figures in models] == ["fp32", "int4", "fp32"] == cells[-1][1:]
    assert [line[0] for line in cells[2:4]] == ["token_number/s", "gpu memory use (peak reserved, GB)"]
    shown = [*TABLE_ROWS[:2], *(entry for entry in TABLE_ROWS[2:] if any(entry[1] in figures for figures in models))]
    assert len(cells) == len(shown) + 3
    for (text, key, factor, decimals), line in zip(shown, cells[2:-1], strict=True):
        expected = [f"{figures[key] * factor:,.{decimals}f}" if key in figures else "-" for figures in models]
        assert line == [text, *expected]
    for figures in models:
        assert (figures["num_runs"], figures["num_new_tokens"]) == (2, 4)
        assert figures["num_prompt_tokens"] == len(
            open_checkpoint(model_dir).tokenizer.encode_prompt(stage.INSTRUCTION)
        )
        assert figures["ttft_seconds"] > 0
        assert "peak_allocated_bytes" in figures or "peak_rss_bytes" in figures
        share = figures["decode_tokens_per_second"] * figures["bytes_read_per_step"] / result["copy_bytes_per_second"]
        assert figures["bandwidth_share"] == pytest.approx(share)
    assert models[2]["weight_bytes"] > models[0]["weight_bytes"] > models[1]["weight_bytes"]
    assert {"torch", "device"} <= result["versions"].keys()
    assert json.loads(path.read_text("utf-8")) == result


@pytest.mark.parametrize("name", ["chatglm-tiny", "chatglm2-tiny"])
def test_nf4_with_adapter(measure, name, tmp_path):
    write_random_adapter(PROJECT_DIR / "models" / name, tmp_path / "adapter", ["query_key_value", "dense"])
    _, result = measure(lora_path=str(tmp_path / "adapter"), load_in_4bit=True, batch_size=2, prompt_tokens=11)
    (figures,) = result["models"]
    assert (figures["label"], figures["weight_format"]) == (f"{name} + adapter", "nf4")
    assert (figures["batch_size"], figures["num_prompt_tokens"]) == (2, 11)
    assert figures["decode_tokens_per_second_total"] == pytest.approx(2 * figures["decode_tokens_per_second"])


def test_adapter_is_part_of_what_is_measured(model_dir, adapter_dir):
    """The measured model generates what the PeftModel does, not what the base does."""
    (source,) = resolve_sources([], [str(adapter_dir)], False, "fp32", CPU)
    ids = torch.tensor([open_checkpoint(model_dir).tokenizer.encode_prompt("你好")])
    base = load_base_model(open_checkpoint(model_dir))
    with torch.no_grad():
        plain, measured = base(ids).logits, source.load()(ids).logits
        expected = load_adapter(base, adapter_dir)(input_ids=ids).logits
    assert torch.equal(measured, expected)
    assert not torch.allclose(measured, plain, atol=1e-4)


def test_models_of_one_name_are_told_apart(model_dir, family_name):
    """Two directories of one name show their paths."""
    other = str(model_dir / ".." / "model")
    labels = [source.label for source in resolve_sources([str(model_dir), other], [], False, "auto", CPU)]
    assert labels == [str(model_dir), other]


@pytest.mark.parametrize(
    "kind, message",
    [
        (torch.OutOfMemoryError, "CUDA out of memory."),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        (MemoryError, ""),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_ends_its_figures_only(measure, model_dir, int4_dir, monkeypatch, kind, message):
    """The second model runs out after loading; the first and the third are measured."""
    load, loaded = ModelSource.load, []

    def failing_load(source):
        model = load(source)
        loaded.append(weakref.ref(model))
        if len(loaded) == 2:
            model.stream_generate = raising(kind, message)
        return model

    monkeypatch.setattr(ModelSource, "load", failing_load)
    cells, result = measure(model_path=[str(model_dir), str(int4_dir), str(model_dir)])
    gc.collect()
    assert [model() for model in loaded] == [None] * 3  # nothing keeps a model once it is measured
    assert cells[2][2] == "out of memory"
    assert [cell == "-" for cell in next(line for line in cells if line[0] == "TTFT (ms)")[1:]] == [False, True, False]
    first, second, third = result["models"]
    assert second["error"] == "out of memory"
    assert first["num_runs"] == third["num_runs"] == 2
    assert "error" not in first.keys() | third.keys()


def raising(kind, message):
    def generate(*args, **kwargs):
        raise kind(message)

    return generate


def test_other_errors_are_not_called_out_of_memory(clock):
    model = TimedModel(clock)
    model.stream_generate = raising(RuntimeError, "shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        measure_model(lambda: model, stream_generate, workload(), 1.0)


def test_table_shows_why_a_model_has_no_figures():
    table = models_table([{"label": "a|b", "error": "out of memory"}, {"label": "c", "tokens_per_second": 1234.5}])
    lines = table.splitlines()
    assert lines[0].split() == ["|", "|", "a\\|b", "|", "c", "|"]
    assert lines[2] == "| token_number/s                     | out of memory | 1,234.50 |"


def test_table_is_aligned_and_has_no_line_without_a_figure():
    """The original's two lines are always there; of the others those that a model has a figure for."""
    table = models_table([{"label": "base", "ttft_seconds": 0.002}, {"label": "merged", "weight_format": "int4"}])
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "token_number/s",
        "gpu memory use (peak reserved, GB)",
        "TTFT (ms)",
        "weights of the layers",
    ]
    assert lines[1].endswith("| ---: | -----: |")


def test_table_takes_labels_as_they_are():
    """Brackets are no markup of rich, and a Chinese character is two cells wide."""
    lines = models_table([{"label": "[red]模型[/] :smile:", "tokens_per_second": 1.0}]).splitlines()
    assert lines[0].endswith(" | [red]模型[/] :smile: |")
    assert len({cell_len(line) for line in lines}) == 1


# ---- refusals


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(ModelSource, "load", lambda source: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("name", ["", "none/x.json"])
def test_a_result_file_that_cannot_be_written_is_refused_before_loading(model_dir, no_loading, tmp_path, name):
    with pytest.raises(UserError, match=r"--output_json .*: .*Give a file in a directory that can be written to"):
        stage.inference_test(model_path=str(model_dir), output_json=str(tmp_path / name))


def test_what_was_measured_is_shown_though_its_file_cannot_be_written(model_dir, tmp_path, monkeypatch, capsys):
    def fail(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report_file, "write_json", fail)
    with pytest.raises(UserError, match="the disk is full. Free some space, or choose another --output_json"):
        stage.inference_test(
            model_path=str(model_dir), loop_number=1, new_tokens=2, output_json=str(tmp_path / "x.json")
        )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["models"][0]["num_new_tokens"] == 2
    assert list(tmp_path.iterdir()) == []


def test_model_that_does_not_fit_is_refused_before_loading(model_dir, no_loading, monkeypatch):
    (source,) = resolve_sources([str(model_dir)], [], False, "fp32", CPU)
    weights, cache = source.estimate_bytes(2, 60)
    monkeypatch.setattr(load_model, "free_bytes", lambda device: weights + cache - 1)
    with pytest.raises(UserError, match=r"needs at least .* GB .* free"):
        stage.inference_test(model_path=str(model_dir), dtype="fp32", batch_size=2, prompt_tokens=30, new_tokens=30)


def write_empty_weights(path, shapes):
    """Write a safetensors file of fp16 zeros that takes no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def test_estimate_at_6b_size(family, fixture_dir, model_dir, tmp_path, no_loading, monkeypatch):
    """The message names the fp16 weights of the published model; only its config and headers are read for that."""
    published = json.loads((fixture_dir / "state_dict_6b.json").read_text())
    for name in ("tokenizer_config.json", family.tokenizer_file):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    golden = json.loads((model_dir / "config.json").read_text())
    ids = {key: value for key, value in golden.items() if key.endswith("_token_id")}  # of the small vocabulary
    (tmp_path / "config.json").write_text(json.dumps({**published["config"], **ids}))
    write_empty_weights(tmp_path / "model.safetensors", published["shapes"])
    monkeypatch.setattr(load_model, "free_bytes", lambda device: 10**10)
    with pytest.raises(
        UserError, match=f"{2 * published['n_params'] / 1e9:.2f} of weights as fp16.* 10.00 GB are free"
    ):
        stage.inference_test(model_path=str(tmp_path), dtype="fp16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 0}, "--batch_size 0: expected 1 or more"),
        ({"batch_size": -2}, "--batch_size -2"),
        ({"new_tokens": 1}, "--new_tokens 1: expected 2 or more"),
        ({"loop_number": 0}, "--loop_number 0"),
        ({"max_time": -1.0}, "--max_time -1.0"),
        ({"prompt_tokens": 10**6}, "1000000 prompt tokens and 128 new tokens exceed its context of"),
        ({"new_tokens": 10**6}, "1000000 new tokens exceed its context of"),
        ({"instruction_text": "长" * 9000}, "exceed its context of"),
        ({"prompt_tokens": 1}, "--prompt_tokens 1"),
        ({"instruction_text": "", "model_path": None}, "nothing to test"),
        ({"model_path": []}, "nothing to test"),
    ],
)
def test_bad_arguments_are_refused(model_dir, no_loading, flags, message):
    with pytest.raises(UserError, match=message):
        stage.inference_test(**{"model_path": str(model_dir), **flags})


def test_bad_directories_are_refused(model_dir, int4_dir, tmp_path, no_loading):
    """The last of several models is checked before the first is loaded."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="config.json is missing: not a model directory"):
        stage.inference_test(model_path=[str(model_dir), str(tmp_path / "empty")])
    with pytest.raises(UserError, match="no such directory"):
        stage.inference_test(model_path=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no such directory"):
        stage.inference_test(lora_path=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="quantized already"):
        stage.inference_test(model_path=str(int4_dir), load_in_4bit=True)


def test_unknown_dtype_of_a_checkpoint(model_dir):
    path = model_dir / "config.json"
    with pytest.raises(UserError, match="'float8'.*--dtype"):
        request.auto_dtype({"torch_dtype": "float8"}, path, torch.device("cuda"))
    assert request.auto_dtype({"dtype": "bfloat16"}, path, torch.device("cuda")) is torch.bfloat16
    assert request.auto_dtype({"torch_dtype": "float16"}, path, CPU) is torch.float32


def test_command_line(model_dir, capsys, monkeypatch):
    """Several models joined by commas; the last line of stdout is the object."""
    paths = f"{PROJECT_DIR / 'models/chatglm-tiny'},{PROJECT_DIR / 'models/chatglm2-tiny'}"
    run_cli(stage.inference_test, ["--model_path", paths, "--loop_number=1", "--new_tokens=2", "--prompt_tokens", "9"])
    models = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    found = [(figures["label"], figures["num_prompt_tokens"]) for figures in models]
    assert found == [("chatglm-tiny", 9), ("chatglm2-tiny", 9)]
    with pytest.raises(SystemExit):
        run_cli(stage.inference_test, ["--model_path", paths, "--batch_size", "0"])


# ---- the benchmark


def test_cases_of_the_benchmark():
    assert {case.weights for case in bench.CASES} == {"base", *bench.WEIGHTS}
    assert bench.choose_cases(bench.CASES, None) == list(bench.CASES)
    assert [case.name for case in bench.choose_cases(bench.CASES, "QLoRA int4, fp16")] == ["fp16", "QLoRA int4"]
    with pytest.raises(UserError, match="no case 'int5'"):
        bench.choose_cases(bench.CASES, "int5")


@pytest.mark.slow
def test_benchmark_measures_base_and_merged_models(tmp_path, capsys):
    """The real command's steps, each script in a process of its own, on a small model."""
    path, flags = tmp_path / "result.json", {"scale": "tiny", "new_tokens": 3, "loop_number": 1}
    bench.bench_inference(work_dir=str(tmp_path / "w"), families="chatglm-6b", output_json=str(path), **flags)
    result = json.loads(path.read_text("utf-8"))
    assert [figures["label"] for figures in result["models"]] == [f"chatglm-tiny {case.name}" for case in bench.CASES]
    assert [figures["weight_format"] for figures in result["models"]] == [AUTO_DTYPE, "int4", AUTO_DTYPE, "int4"]
    assert all(figures["num_prompt_tokens"] == bench.PROMPT_TOKENS for figures in result["models"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert not (tmp_path / "w").exists()
    assert str(tmp_path) not in path.read_text("utf-8")


def test_benchmark_goes_on_after_a_failed_case(tmp_path, monkeypatch):
    def run(script, *flags):
        flags = dict(zip(flags[::2], flags[1::2], strict=True))
        if "--output_path" in flags:
            flags["--output_path"].mkdir()
        elif flags["--model_path"].name != "base":
            raise UserError("exit code 1")
        return 'text\n{"models": [{"label": "x", "tokens_per_second": 1.0}], "copy_bytes_per_second": 2.0}\n'

    monkeypatch.setattr(bench, "run_python", run)
    path, flags = tmp_path / "result.json", {"scale": "tiny", "cases": "fp16,QLoRA fp16,QLoRA int4"}
    with pytest.raises(UserError, match="failed: chatglm2-tiny QLoRA fp16, chatglm2-tiny QLoRA int4"):
        bench.bench_inference(work_dir=str(tmp_path / "w"), families="chatglm2-6b", output_json=str(path), **flags)
    first, *failed = json.loads(path.read_text("utf-8"))["models"]
    assert first == {"label": "chatglm2-tiny fp16", "tokens_per_second": 1.0, "copy_bytes_per_second": 2.0}
    assert [figures["error"] for figures in failed] == ["failed", "failed"]


@pytest.mark.gpu
def test_on_a_gpu(measure, model_dir):
    """Times of events and memory figures are there and possible."""
    _, result = measure(model_path=str(model_dir), new_tokens=8)
    (figures,) = result["models"]
    sizes = [figures[f"{key}_bytes"] for key in ("weight", "peak_allocated", "peak_reserved", "driver")]
    assert sizes == sorted(sizes)
    for run in figures["runs"]:
        assert 0 < run["ttft_seconds"] < run["total_seconds"]


@pytest.mark.gpu
def test_gpu_clock_waits_for_the_gpu():
    """A matmul of known size takes as long by events as between synchronizations."""
    matrix, clock = torch.randn(8192, 8192, device="cuda"), timer.CudaClock()
    matrix @ matrix
    clock.start()
    start = timer.time.perf_counter()
    for _ in range(5):
        matrix @ matrix
        clock.mark()
    seconds = clock.seconds()
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(timer.time.perf_counter() - start, rel=0.2)
