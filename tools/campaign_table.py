"""Write what the campaigns of `make test-slow` tried and found into docs/robustness.md and docs/robustness_zh.md.

    python -m tools.campaign_table [--results saved_files/campaign.json]

The results are kept as benchmarks/results/robustness.json, and the tables of both pages follow from that file alone.
"""

import argparse
import json
import re
from pathlib import Path

PROJECT_DIR = Path(__file__).resolve().parent.parent
RESULT_PATH = PROJECT_DIR / "saved_files" / "campaign.json"
KEPT_PATH = PROJECT_DIR / "benchmarks" / "results" / "robustness.json"
PAGES = {"en": PROJECT_DIR / "docs" / "robustness.md", "zh": PROJECT_DIR / "docs" / "robustness_zh.md"}
COLUMNS = ("traceback", "lost", "wrong bits", "other")
BLOCK = re.compile(r"(<!-- campaign -->\n).*?(<!-- end -->)", re.S)
CAMPAIGNS = {  # as the tests' markers name them, in the table's order
    "training killed": ("training killed and started again", "训练被杀死后重新启动"),
    "one of two ranks killed": ("one of two ranks under torchrun killed", "torchrun 双进程训练，杀死其中一个"),
    "merges and exports killed": ("merges, exports and answer files killed", "合并、导出、批量生成被杀死"),
    "small disks": ("disks that fill up", "磁盘写满"),
    "checkpoints damaged": ("damage to checkpoints", "检查点损坏"),
    "chat turns": ("turns of chats", "聊天轮次"),
    "properties": ("random shapes, ranks, targets and texts", "随机的形状、秩、目标模块与文本"),
    "data files fuzzed": ("fuzzed: training data", "模糊测试：训练数据"),
    "files of prompts fuzzed": ("fuzzed: files of prompts", "模糊测试：提示文件"),
    "TrainingArguments JSON fuzzed": ("fuzzed: TrainingArguments", "模糊测试：TrainingArguments"),
    "config.json fuzzed": ("fuzzed: config.json", "模糊测试：config.json"),
    "generation_config.json fuzzed": ("fuzzed: generation_config.json", "模糊测试：generation_config.json"),
    "index.json fuzzed": ("fuzzed: index of shards", "模糊测试：分片索引"),
    "safetensors fuzzed": ("fuzzed: safetensors", "模糊测试：safetensors"),
    "pytorch_model.bin fuzzed": ("fuzzed: pytorch_model.bin", "模糊测试：pytorch_model.bin"),
    "tokenizer_config.json fuzzed": ("fuzzed: tokenizer_config.json", "模糊测试：tokenizer_config.json"),
    "vocabulary fuzzed": ("fuzzed: vocabulary", "模糊测试：词表"),
    "adapter_config.json fuzzed": ("fuzzed: adapter_config.json", "模糊测试：adapter_config.json"),
    "adapter weights fuzzed": ("fuzzed: adapter weights", "模糊测试：适配器权重"),
    "run_config.json fuzzed": ("fuzzed: run_config.json", "模糊测试：run_config.json"),
}
NOTES = {  # what the cases were, as the tests note it
    "KILL": ("KILL", "KILL"),
    "TERM": ("TERM", "TERM"),
    "INT": ("INT", "INT"),
    "at save": ("during a save", "保存检查点时"),
    "at end": ("at the end", "训练结束时"),
    "at second signal": ("with a second signal", "连续两个信号"),
    "fresh interpreter": ("in a fresh Python", "全新 Python 进程"),
    "over an earlier output": ("over an earlier output", "覆盖已有输出"),
    "tmpfs": ("tmpfs", "tmpfs"),
    "filled meanwhile": ("filled while it writes", "写入期间被占满"),
    "limited file size": ("limit on the size of files", "限制文件大小"),
    "stopped": ("stopped", "中途停止"),
    "read": ("read", "成功读取"),
    "refused": ("refused in one line", "一行报错拒绝"),
}
TEXTS = {
    "head": (
        "| tried | cases | of these | tracebacks | lost | wrong bits | other faults |",
        "| 尝试的故障 | 次数 | 其中 | 回溯 | 丢失 | 结果有误 | 其他问题 |",
    ),
    "sum": ("all", "合计"),
    "run": (
        "Commit `{commit}`, seed {seed}, {date}, scale {scale:g}, {machine}, torch {torch}, transformers "
        "{transformers}; {hours:.1f} hours of all processes. [Results](../benchmarks/results/robustness.json)",
        "提交 `{commit}`，种子 {seed}，{date}，规模 {scale:g}，{machine}，torch {torch}，transformers {transformers}；"
        "所有进程合计 {hours:.1f} 小时。[结果文件](../benchmarks/results/robustness.json)",
    ),
}  # fmt: skip


def table(record: dict, language: str) -> str:
    """Return the table of a campaign's results and the line that says which run it was.

    Args:
        record: What tests/campaign/conftest.py wrote.
        language: en or zh.
    """
    which = list(PAGES).index(language)
    found = record["campaigns"]
    lines = [TEXTS["head"][which], "|" + "---|" * 7]
    for name in [*(name for name in CAMPAIGNS if name in found), *sorted(found.keys() - CAMPAIGNS.keys())]:
        title = CAMPAIGNS.get(name, (name, name))[which]
        notes = [
            f"{found[name]['notes'][note]:,} {NOTES[note][which]}" for note in NOTES if note in found[name]["notes"]
        ]
        lines.append(row(title, found[name], ", ".join(notes)))
    total = {key: sum(campaign[key] for campaign in found.values()) for key in ("cases", "seconds", *COLUMNS)}
    lines.append(row(TEXTS["sum"][which], total, ""))
    values = {**record, **record["versions"], "commit": str(record["commit"])[:12], "hours": total["seconds"] / 3600}
    return "\n".join([*lines, "", TEXTS["run"][which].format(**values), ""])


def row(title: str, campaign: dict, notes: str) -> str:
    """Return one row of the table."""
    cells = [title, f"{campaign['cases']:,}", notes, *(f"{campaign[key]:,}" for key in COLUMNS)]
    return "| " + " | ".join(cells) + " |"


def fill(page: str, record: dict, language: str) -> str:
    """Return a page with the table of a campaign between its markers.

    Raises:
        ValueError: The page has no markers.
    """
    filled, number = BLOCK.subn(lambda match: match[1] + table(record, language) + match[2], page)
    if number != 1:
        raise ValueError("expected one block from <!-- campaign --> to <!-- end -->")
    return filled


def main() -> None:
    """Keep the results and fill both pages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULT_PATH, help="what make test-slow wrote")
    text = parser.parse_args().results.read_text("utf-8")
    record = json.loads(text)
    KEPT_PATH.write_text(text, "utf-8")
    for language, path in PAGES.items():
        path.write_text(fill(path.read_text("utf-8"), record, language), "utf-8")
    print(table(record, "en"))


if __name__ == "__main__":
    main()
