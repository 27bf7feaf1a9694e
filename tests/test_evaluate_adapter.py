"""evaluate_adapter.py: figures equal to the libraries', intervals, attributes, the probe, pages that are harmless."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import product

import numpy as np
import peft
import pytest
import torch

import evaluate_adapter as stage
import merge_lora_and_quantize as merge_stage
from glm_utils import visible_text
from glm_utils.checkpoint import open_checkpoint
from glm_utils.cli import UserError, run_cli
from glm_utils.data import read_examples
from glm_utils.evaluation import attributes, bootstrap, job, losses, metrics, two_models, verdict
from glm_utils.evaluation import write as writing
from glm_utils.evaluation.bootstrap import Difference
from glm_utils.evaluation.figures import FIGURES, GROUPS, Comparison
from glm_utils.evaluation.probe import KINDS, SUBJECTS_OF_2023, read_probe, thin_out
from glm_utils.limits import EncodingLimits
from glm_utils.load_model import load_base_model
from glm_utils.run_record import sha256
from tests.conftest import PROJECT_DIR

TINY_NAMES = {"chatglm-6b": "chatglm-tiny", "chatglm2-6b": "chatglm2-tiny"}
DANGEROUS = "<script>alert(1)</script> \x1b[31m\x9b2J \u202eabc =cmd|'/c calc'!A0 ![x](http://x.y/z) \ud800 | `a`"
REFERENCES = ["这款白色的连衣裙很有气质。", "简约的设计，穿着舒适。", "a red dress with 2 pockets", "经典百搭的外套！"]
ANSWERS = ["白色的连衣裙，气质优雅。", "", "a dress", "外套外套外套外套"]


@pytest.fixture
def tiny_dir(family_name):
    """The tiny trained model of a family."""
    return PROJECT_DIR / "models" / TINY_NAMES[family_name]


def make_adapter(base_dir, adapter_dir, scale=0.05):
    """Write an adapter that changes what a model says."""
    model = load_base_model(open_checkpoint(base_dir))
    model.name_or_path = str(base_dir)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"], init_lora_weights=False)
    peft_model = peft.get_peft_model(model, config)
    for name, weight in peft_model.named_parameters():
        if "lora_" in name:
            weight.data.mul_(scale)
    peft_model.save_pretrained(adapter_dir)
    return adapter_dir


@pytest.fixture(scope="module")
def report_dir(tmp_path_factory):
    """A report about an adapter of a tiny model, with texts that try to do something."""
    folder = tmp_path_factory.mktemp("evaluation")
    lines = (PROJECT_DIR / "data/dev.jsonl").read_text("utf-8").splitlines()[:6]
    rows = [json.loads(line) for line in lines]
    readable = DANGEROUS.replace("\ud800", "")  # half a character is refused when data is read
    rows[0]["content"] += f"*风格#{readable}"
    rows[1]["summary"] += readable
    (folder / "data.json").write_text(json.dumps(rows), "utf-8")
    stage.evaluate_adapter(
        lora_path=str(make_adapter(PROJECT_DIR / "models/chatglm2-tiny", folder / "adapter")),
        data_path=str(folder / "data.json"),
        output_dir=str(folder / "report"),
        max_new_tokens=12,
        probe=12,
        device="cpu",
    )
    return folder / "report"


# ---- metrics


def test_overlap_is_what_the_libraries_say():
    """Each definition is written out here again, with the libraries called directly."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    scores = metrics.score_overlap(ANSWERS, REFERENCES)
    for index, (answer, reference) in enumerate(zip(ANSWERS, REFERENCES, strict=True)):
        expected = dict.fromkeys(("bleu-4", "rouge-1", "rouge-2", "rouge-l"), 0.0)
        if answer:
            [found] = Rouge().get_scores(" ".join(jieba.cut(answer)), " ".join(jieba.cut(reference)))
            expected = {kind: 100 * found[kind]["f"] for kind in found}
            expected["bleu-4"] = 100 * sentence_bleu(
                [list(reference)], list(answer), smoothing_function=SmoothingFunction().method3
            )
        for key, value in expected.items():
            assert scores[key][index].tolist() == pytest.approx([value, 1], abs=1e-9), key


def test_sacrebleu_of_sums_is_corpus_bleu():
    import sacrebleu

    rows = metrics.score_sacrebleu(ANSWERS, REFERENCES)
    expected = sacrebleu.corpus_bleu(ANSWERS, [REFERENCES], tokenize="zh").score
    assert float(metrics.corpus_bleu(rows.sum(axis=0))) == pytest.approx(expected, abs=1e-9)


def test_units_are_characters_marks_and_words():
    assert metrics.units("白色T恤 v2，good!") == ["白", "色", "T", "恤", "v2", "，", "good", "!"]


def test_distinct_without_each_answer():
    texts = ["白色白色", "白裙", "红裙，好"]
    scored = metrics.score_distinct(texts, 1)
    assert scored.value == pytest.approx(100 * 6 / 10)
    for index, found in enumerate(scored.left_out):
        others = texts[:index] + texts[index + 1 :]
        assert found == pytest.approx(metrics.score_distinct(others, 1).value)


def test_distinct_of_nothing():
    scored = metrics.score_distinct(["", ""], 2)
    assert (scored.value, scored.left_out.tolist()) == (0, [0, 0])


def test_longest_repeat_equals_a_search():
    def search(parts):
        found = [0]
        for start, length in product(range(len(parts)), range(1, len(parts))):
            later = range(start + length, len(parts) - length + 1)
            found += [length for other in later if parts[start : start + length] == parts[other : other + length]]
        return max(found)

    random = np.random.default_rng(0)
    for size in range(25):
        parts = [str(part) for part in random.integers(3, size=size)]
        assert metrics.longest_repeat(parts) == search(parts)


def test_repetition_and_broken_text():
    assert metrics.score_repetition(["一二三四五六", "好好好好好好好", ""])[:, 0].tolist() == [0, 75, 0]
    broken = metrics.score_broken_text(["<UNK>x", "\ufffd", "good", "good"], [[5], [5], [0, 5], [5]], 0)
    assert broken[:, 0].tolist() == [100, 100, 100, 0]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(metrics, "PACKAGES", ("jieba", "no_such_package"))
    with pytest.raises(UserError, match=r'no_such_package: not installed.*pip install -e "\.\[eval\]"'):
        metrics.check_packages()


# ---- intervals


def test_interval_of_a_mean_is_that_of_its_standard_error():
    random = np.random.default_rng(1)
    before, after = random.normal(size=400), random.normal(loc=0.3, size=400)
    rows = [metrics.with_weights(values) for values in (before, after)]
    found = bootstrap.compare_sums(*rows, metrics.ratio, seed=0)
    change = after - before
    error = change.std() / 20
    assert found.change == pytest.approx(change.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert found == bootstrap.compare_sums(*rows, metrics.ratio, seed=0)
    jackknife = bootstrap.compare_left_out(
        *(bootstrap.LeftOut(values.mean(), (values.sum() - values) / 399) for values in (before, after))
    )
    assert (jackknife.high - jackknife.low) / 2 == pytest.approx(1.96 * error, rel=0.01)


def test_one_example_has_no_interval():
    rows = metrics.with_weights([1.0])
    found = bootstrap.compare_sums(rows, rows + 1, metrics.ratio, seed=0)
    assert np.isnan(found.low)
    assert found.sign == 0
    assert verdict.show_change("loss", found) == "+0.000"


# ---- attributes


def test_attributes_of_prompts():
    assert attributes.parse_attributes("类型#裙*颜色#白色") == [("类型", "裙"), ("颜色", "白色")]
    assert attributes.parse_attributes("今天天气怎么样？") == []
    assert attributes.parse_attributes("C# * C#") == []
    assert attributes.read_vocabulary(["你好", "再见", "颜色#白色"]) is None


def test_values_nobody_asked_for():
    queries = ["类型#裙*颜色#白色*裙型#背带裙", "类型#裤*颜色#黑色*风格#简约*图案#纯色", "颜色#纯色*裙领型#圆领"]
    vocabulary = attributes.read_vocabulary(queries)
    assert vocabulary.telling == {"白色", "黑色", "背带裙", "圆领"}  # 纯色 stands under two keys, 风格 tells nothing
    assert attributes.unasked_values(queries[0], "白色的背带裙，简约，圆领。", vocabulary) == ["圆领"]
    assert attributes.unasked_values(queries[2], "小圆领", vocabulary) == []
    rows = attributes.score_coverage(queries, ["白色的裙", "黑色", ""])
    assert rows.tolist() == [[200, 3], [100, 4], [0, 2]]


def test_advertising_copy_is_recognized():
    vocabulary = attributes.read_vocabulary(["颜色#白色*裙型#背带裙"])
    answers = ["这款背带裙采用修身的版型，时尚百搭。", "第一天爬山，第二天看日出。", "这款设计"]
    rows = attributes.score_advertising(["去黄山怎么玩？"] * 3, ["先看设计"] * 3, answers, vocabulary)
    assert rows[:, 0].tolist() == [100, 0, 0]


# ---- the probe


def test_probe_is_balanced_and_complete():
    questions = read_probe()
    assert len(questions) >= 150
    assert len({question.example.query for question in questions}) == len(questions)
    for kind in KINDS:
        languages = [question.language for question in questions if question.kind == kind]
        assert len(languages) >= 15
        assert set(languages) == {"zh", "en"}
    assert set(SUBJECTS_OF_2023) <= {question.example.query for question in questions}
    for question in questions:
        assert 1 <= len(question.example.answer) <= 600


def test_part_of_the_probe_has_all_kinds():
    questions = read_probe()
    assert {question.kind for question in thin_out(questions, 10)} == set(KINDS)
    assert thin_out(questions, 10_000) == questions


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "travel"}', r"probe.jsonl:2: no text under 'language'"),
        ('{"kind": "travels", "language": "zh", "instruction": "a", "output": "b"}', "Did you mean travel"),
        ('{"kind": ', "probe.jsonl:2: broken JSON"),
    ],
)
def test_broken_probe_is_named(write, line, message):
    path = write("probe.jsonl", "\n" + line)
    with pytest.raises(UserError, match=message):
        read_probe(path)


# ---- losses


def test_losses_of_examples_are_those_of_single_forwards(tiny_dir, family_name):
    """Batches with padding give what the model's own loss gives for each example alone."""
    checkpoint = open_checkpoint(tiny_dir)
    model = load_base_model(checkpoint).eval()
    examples = read_examples(PROJECT_DIR / "data/dev.jsonl")[:5]
    limits = EncodingLimits(512, 512)
    rows = losses.example_losses(model, checkpoint.tokenizer, examples, limits, None)
    for example, (total, num_tokens) in zip(examples, rows, strict=True):
        prompt = checkpoint.tokenizer.encode_prompt(example.query)
        answer = checkpoint.tokenizer.encode_answer(example.answer)
        with torch.no_grad():
            loss = model(
                input_ids=torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])
            ).loss
        assert num_tokens == len(answer)
        assert total / num_tokens == pytest.approx(loss.item(), rel=1e-5)


def test_batches_hold_all_examples():
    lengths = [5, 900, 7, 30, 30, 2]
    batches = list(losses.batches_of_similar_length(lengths, 64))
    assert sorted(sum(batches, [])) == list(range(6))
    assert batches[0] == [1]
    assert all(max(lengths[index] for index in batch) * len(batch) <= 64 for batch in batches[1:])


# ---- the verdict


def comparison_of(**changes):
    """A comparison with (change, low, high) by figure."""
    figures = {
        key.replace("_", "-"): Difference(0.0, change, low, high, 50) for key, (change, low, high) in changes.items()
    }
    return Comparison(figures, {})


class AdapterJob:
    """What write_verdict asks of a job."""

    is_adapter = True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rouge_l": (12.1, 9.8, 14.0), "probe_loss": (0.01, -0.02, 0.04)},
            "helped: ROUGE-L +12.1 [9.8, 14.0]; no sign of forgetting: probe loss +0.010 [-0.020, 0.040]",
        ),
        (
            {"rouge_l": (0.4, -1.0, 2.0), "loss": (-0.5, -0.6, -0.4)},
            "no effect shown: ROUGE-L +0.4 [-1.0, 2.0], loss -0.500 [-0.600, -0.400]",
        ),
        (
            {"coverage": (-5.0, -9.0, -1.0), "ended": (-50, -60, -40), "probe_loss": (0.3, 0.2, 0.4)},
            "made it worse: values used -5.0 [-9.0, -1.0]; look at the answers: ended by itself -50.0 [-60.0, "
            "-40.0]; signs of forgetting: probe loss +0.300 [0.200, 0.400]",
        ),
    ],
)
def test_verdict_says_what_the_intervals_say(changes, words):
    assert verdict.write_verdict(AdapterJob(), comparison_of(**changes)) == words


def test_numbers_have_no_negative_zero_and_stay_short():
    assert verdict.show_number("rouge-l", -0.01) == "0.0"
    assert verdict.show_number("rouge-l", -0.01, sign=True) == "+0.0"
    assert verdict.show_number("perplexity", 1234567.8) == "1.23e+06"


def test_every_figure_is_in_a_group_of_the_table():
    assert sorted(key for keys in GROUPS.values() for key in keys) == sorted(FIGURES)


# ---- texts that try to do something


def test_controls_are_named():
    shown = visible_text.visible(DANGEROUS)
    assert shown == visible_text.visible(shown)
    assert "\x1b" not in shown
    assert r"\x1b[31m" in shown
    assert r"\u202eabc" in shown
    assert visible_text.visible("一\n二\t三") == "一\n二\t三"


def test_json_lines_keep_their_values():
    line = visible_text.json_line({"text": DANGEROUS})
    assert json.loads(line) == {"text": DANGEROUS}
    assert not visible_text.UNSAFE.search(line)
    line.encode("utf-8")


def test_markdown_is_text():
    assert visible_text.markdown_text("a|b\n# c ![x](y)") == "a\\|b \\# c \\!\\[x\\]\\(y\\)"


# ---- the report


def test_report_has_all_files(report_dir):
    names = {path.name for path in report_dir.iterdir()}
    assert names == {
        "report.json",
        "report.md",
        "report.html",
        "generated_predictions.jsonl",
        "generated_predictions_before.jsonl",
        "probe_predictions.jsonl",
        "run_config.json",
        "scores.png",
        "example_losses.png",
        "probe_losses.png",
    }
    values = json.loads((report_dir / "report.json").read_text("utf-8"))
    assert set(values["figures"]) == set(FIGURES)
    assert values["stage"] == "evaluate_adapter"
    assert values["num_examples"] == 6
    assert values["num_probe_questions"] == 12


def test_figures_equal_an_independent_computation(report_dir):
    """The libraries, called directly on generated_predictions.jsonl, give report.json's numbers to 1e-6."""
    import jieba
    import sacrebleu
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    figures = json.loads((report_dir / "report.json").read_text("utf-8"))["figures"]
    for side, name in (("before", "generated_predictions_before.jsonl"), ("after", "generated_predictions.jsonl")):
        rows = [json.loads(line) for line in (report_dir / name).read_text("utf-8").split("\n")[:-1]]
        assert all(row["label"] == row["labels"] for row in rows)
        found = {"bleu-4": [], "rouge-1": [], "rouge-2": [], "rouge-l": []}
        for row in rows:
            predict, label = row["predict"], row["label"]
            scores = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), {"f": 0.0})
            if predict:
                [scores] = Rouge().get_scores(" ".join(jieba.cut(predict)), " ".join(jieba.cut(label)))
            for kind, value in scores.items():
                found[kind].append(100 * value["f"])
            bleu = sentence_bleu([list(label)], list(predict), smoothing_function=SmoothingFunction().method3)
            found["bleu-4"].append(100 * bleu)
        for key, scores in found.items():
            assert figures[key][side] == pytest.approx(np.mean(scores), abs=1e-6), key
        predictions, labels = [row["predict"] for row in rows], [row["label"] for row in rows]
        score = sacrebleu.corpus_bleu(predictions, [labels], tokenize="zh").score
        assert figures["sacrebleu"][side] == pytest.approx(score, abs=1e-6)


class Reader(HTMLParser):
    """Collect the tags, links and texts of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.text += data


def test_several_files_and_what_was_trained_on(report_dir, write, tmp_path, monkeypatch, log_lines):
    """All examples of all files are judged, and those that stand in the adapter's training data are named."""
    trained = write("trained.jsonl", '{"query": "裙", "response": "好"}\n{"query": "裤", "response": "好"}\n')
    write("a.jsonl", '{"query": "衣", "response": "好"}\n')
    write("b.csv", "question,answer\n裤,好\n")
    adapter_dir = shutil.copytree(report_dir.parent / "adapter", tmp_path / "adapter")
    record = {"arguments": {"train_data_path": str(trained)}, "identity": {"train_data_sha256": sha256(trained)}}
    write("adapter/run_config.json", record)
    given = {}

    def stop(sides, **values):
        given.update(values)
        raise UserError("stop")

    monkeypatch.setattr(job, "make_job", stop)
    with pytest.raises(UserError, match="stop"):
        stage.evaluate_adapter(
            lora_path=str(adapter_dir), data_path=f"{tmp_path}/a.jsonl,{tmp_path}/*.csv", device="cpu"
        )
    assert [one.query for one in given["examples"]] == ["衣", "裤"]
    assert given["arguments"]["data_path"] == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.csv"]
    (warning,) = [line for line in log_lines if "training examples too" in line]
    assert warning.startswith("WARNING 1 of 2 evaluation examples")
    assert f"{tmp_path}/b.csv:2 = {trained}:2" in warning


def test_page_needs_no_network_and_runs_nothing(report_dir):
    text = (report_dir / "report.html").read_text("utf-8")
    reader = Reader()
    reader.feed(text)
    assert not {"script", "link", "iframe", "object", "form"} & set(reader.tags)
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert "url(" not in text
    assert "<script>alert(1)</script>" in reader.text
    for name in ("report.html", "report.md", "generated_predictions.jsonl"):
        assert not visible_text.UNSAFE.search((report_dir / name).read_text("utf-8")), name
    assert "![x]" not in (report_dir / "report.md").read_text("utf-8")


def test_pages_begin_with_the_verdict(report_dir):
    line = json.loads((report_dir / "report.json").read_text("utf-8"))["verdict"]
    assert re.fullmatch(r"(helped|no effect shown|made it worse): ROUGE-L .*", line)
    assert (report_dir / "report.md").read_text("utf-8").split("\n")[2] == f"**{line}**"


def test_page_opens_in_a_browser(report_dir, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium")
    shot = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", f"--screenshot={shot}"]
    subprocess.run([chromium, *options, f"file://{report_dir / 'report.html'}"], check=True, capture_output=True)
    assert shot.stat().st_size > 10_000


# ---- the command


def test_two_models_without_references(tmp_path, write, capsys):
    """Prompts alone are judged too, and the report says what is left out."""
    data = write("prompts.jsonl", "\n".join(json.dumps({"instruction": f"衣服{number}"}) for number in range(3)))
    paths = [PROJECT_DIR / "models/chatglm2-tiny", PROJECT_DIR / "models/chatglm-tiny"]
    command = ["--model_path", ",".join(map(str, paths)), "--data_path", str(data), "--probe", "false"]
    options = ["--output_dir", str(tmp_path / "report"), "--max_new_tokens", "6", "--device", "cpu"]
    run_cli(stage.evaluate_adapter, command + options)
    values = json.loads((tmp_path / "report/report.json").read_text("utf-8"))
    assert set(values["figures"]) == set(GROUPS["The answers themselves"])
    assert "no reference answers" in values["notes"][0]
    assert any("different vocabularies" in note for note in values["notes"])
    assert values["verdict"].split(":")[0] in ("better", "worse", "no difference shown")
    assert "ended by itself" in capsys.readouterr().out
    assert not (tmp_path / "report/scores.png").exists()


def test_a_model_equals_itself(tiny_dir, tmp_path):
    """Losses and answers of the same model twice differ by nothing, so every interval is 0."""
    stage.evaluate_adapter(
        model_path=[str(tiny_dir)] * 2, output_dir=str(tmp_path / "report"), num_samples=3, max_new_tokens=8, probe=3
    )
    values = json.loads((tmp_path / "report/report.json").read_text("utf-8"))
    assert {found["change"] for found in values["figures"].values()} == {0}
    assert {found["high"] for found in values["figures"].values()} == {0}


def test_training_settings_are_those_of_the_adapter(tmp_path):
    adapter_dir = make_adapter(PROJECT_DIR / "models/chatglm2-tiny", tmp_path / "adapter")
    arguments = {"prompt_text": "写：", "max_input_length": 64, "max_output_length": 99}
    (adapter_dir / "run_config.json").write_text(json.dumps({"arguments": arguments}), "utf-8")
    sides = two_models.find_sides(None, str(adapter_dir), False, torch.device("cpu"))
    assert job.find_limits(sides) == EncodingLimits(64, 99)
    for given, expected in ((None, "写："), ("写：", "写："), ("", "")):
        before, after = two_models.with_prompt_text(sides, given)
        assert before.source is after.source
        assert after.source.checkpoint.tokenizer.prompt_text == expected
    with pytest.raises(UserError, match="--prompt_text '答：': the training put '写：' for .* before every question"):
        two_models.with_prompt_text(sides, "答：")


def test_an_adapter_equals_its_merged_model(tiny_dir, tmp_path):
    """--lora_path with --model_path compares the unmerged adapter with what it was merged to."""
    adapter_dir = make_adapter(tiny_dir, tmp_path / "adapter")
    merge_stage.merge_lora_and_quantize(lora_path=str(adapter_dir), output_path=str(tmp_path / "merged"), qbits=4)
    stage.evaluate_adapter(
        lora_path=str(adapter_dir),
        model_path=str(tmp_path / "merged"),
        output_dir=str(tmp_path / "report"),
        num_samples=3,
        max_new_tokens=6,
        probe=False,
        device="cpu",
    )
    values = json.loads((tmp_path / "report/report.json").read_text("utf-8"))
    assert (values["before"]["weights"], values["after"]["weights"]) == ("fp32", "int4")
    assert 0 < abs(values["figures"]["loss"]["change"]) < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected an adapter .* or two models joined by a comma"),
        ({"lora_path": "a", "model_path": ["b", "c"]}, "--lora_path a, --model_path b,c: expected an adapter"),
        ({"model_path": "models/chatglm2-tiny"}, "--lora_path None, --model_path models/chatglm2-tiny: expected"),
        ({"lora_path": "no/such/dir"}, "no such directory"),
        ({"lora_path": "models/chatglm2-tiny"}, "adapter_config.json"),
        ({"model_path": ["models/chatglm2-tiny"] * 2, "num_samples": 0}, "--num_samples 0: expected 1 or more"),
        ({"model_path": ["models/chatglm2-tiny"] * 2, "temperature": -1}, "--temperature -1"),
        ({"model_path": ["models/chatglm2-tiny"] * 2, "probe": -1}, "--probe -1: expected true, false or a number"),
        ({"model_path": ["models/chatglm2-tiny"] * 2, "output_dir": "models"}, "--output_dir models overlaps"),
        ({"model_path": ["models/chatglm2-tiny"] * 2, "output_dir": "docs"}, "docs: not empty"),
        ({"model_path": ["models/chatglm2-tiny"] * 2, "data_path": "no.jsonl"}, "no.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        stage.evaluate_adapter(**{"output_dir": "saved_files/no_such_evaluation", **arguments})
    assert "\n" not in str(error.value)


def test_misspelled_answer_column_is_named(write, tmp_path):
    data = write("data.jsonl", '{"instruction": "a", "ouput": "b"}')
    paths = [str(PROJECT_DIR / "models/chatglm2-tiny")] * 2
    with pytest.raises(UserError, match=r"'ouput' is not read\. Is 'output' meant\?"):
        stage.evaluate_adapter(model_path=paths, data_path=str(data), output_dir=str(tmp_path / "report"))


def test_adapter_without_its_base(tmp_path):
    adapter_dir = make_adapter(PROJECT_DIR / "models/chatglm2-tiny", tmp_path / "adapter")
    path = adapter_dir / "adapter_config.json"
    config = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": str(tmp_path / "gone")}
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match=r"the base model of .* cannot be opened"):
        stage.evaluate_adapter(lora_path=str(adapter_dir), output_dir=str(tmp_path / "report"))


def test_full_disk_loses_no_earlier_report(tmp_path, monkeypatch):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.html").write_text("earlier", "utf-8")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    class Report:
        job = type("Job", (), {"output_dir": tmp_path / "report"})

    monkeypatch.setattr(writing, "write_files", fail)
    with pytest.raises(UserError, match="the disk is full"):
        writing.write_evaluation(Report())
    assert (tmp_path / "report/report.html").read_text("utf-8") == "earlier"
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.html"]
