"""Thousands of chat turns: junk, stopped answers, undone and forgotten turns; memory, threads and files stay flat."""

import contextlib
import gc
import json
import os
import resource
import threading
import traceback
from pathlib import Path

import pytest
import torch

from glm_utils.cli import UserError
from glm_utils.inference.chat import ChatSession, ChatSettings
from glm_utils.load_model import find_model, load_base_model
from tests.campaign.harness import TRACEBACK, rng_of, scaled
from tests.campaign.processes import call_forked
from tests.conftest import PROJECT_DIR

pytestmark = [pytest.mark.campaign("chat turns"), pytest.mark.usefixtures("server")]

NUM_TURNS, NUM_PER_SESSION, NUM_WARM = 2000, 250, 60
MAX_GROWTH = 24e6  # bytes of resident memory over 190 turns; one kept cache of 96 tokens is 0.2 MB
MAX_LENGTH = 96
SECONDS = 600
JUNK = (
    "\x1b[2J\x1b]0;x\x07", "\x00", "\ud800", "\u202e", "[gMASK]<sop>", "</s><eop>", "[Round 0]\n\n问：", "<|im_end|>",
    "\r\n\t", "�", "你好", "类型#裙*颜色#白", "🙂", "a" * 40, " ", "\u200b", "％", "{{7*7}}", "$(id)", "'; --",
)  # fmt: skip


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def talk(number: int, model_dir: str, result_path: str) -> None:
    """Hold a conversation in a process of its own and write what was found."""
    rng = rng_of("chat", number)
    found = {"turns": 0, "stopped": 0, "refused": 0, "faults": []}
    checkpoint, _ = find_model(model_dir, None)
    model = load_base_model(checkpoint).eval()
    session = ChatSession(model, checkpoint.tokenizer, ChatSettings(MAX_LENGTH, 0.9, 0.8))
    torch.manual_seed(number)
    before = None
    while found["turns"] < NUM_PER_SESSION:
        if found["turns"] == NUM_WARM and before is None:
            before = resident_bytes(), threading.active_count(), len(os.listdir("/proc/self/fd"))
        try:
            turn(session, rng, found)
        except UserError:
            found["refused"] += 1
            session.clear()
        except Exception:
            found["faults"].append(["traceback", traceback.format_exc()])
    after = resident_bytes(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    found["growth"] = after[0] - before[0]
    if after[1:] != before[1:]:
        found["faults"].append(["other", f"threads and files: {before[1:]} became {after[1:]}"])
    Path(result_path).write_text(json.dumps(found), "utf-8")


def turn(session: ChatSession, rng, found: dict) -> None:
    """Ask something, perhaps stop the answer, then perhaps undo or forget; check the history."""
    query = "".join(rng.choices(JUNK, k=rng.choice((0, 1, 1, 2, 3, 30))))
    found["turns"] += 1
    num_before, stop_after = len(session.history), rng.choice((None, None, 0, 1, 3))
    shown, is_stopped = "", False
    with contextlib.closing(session.ask(query)) as pieces:
        for index, piece in enumerate(pieces):
            shown += piece
            if index == stop_after:
                is_stopped = True
                break
    found["stopped"] += is_stopped
    asked, answer = session.history[-1] if session.history else (None, None)
    is_recorded = len(session.history) == num_before + 1 and asked == query
    if not is_recorded or not (is_stopped or shown.endswith(answer)):
        found["faults"].append(["wrong bits", f"{query!r}: shown {shown!r}, recorded {asked!r}, {answer!r}"])
    action = rng.random()
    if action < 0.15:
        session.undo()
    elif action < 0.25:
        session.clear()


@pytest.mark.parametrize("number", range(scaled(NUM_TURNS // NUM_PER_SESSION)))
def test_a_long_conversation(number, tally, tmp_path):
    model_dir = PROJECT_DIR / "models" / ("chatglm2-tiny", "chatglm-tiny")[number % 2]
    result_path = tmp_path / "result.json"
    code = call_forked(talk, number, str(model_dir), str(result_path), seconds=SECONDS)
    if tally.require(code == 0 and result_path.is_file(), "other", f"the conversation ended with {code}"):
        found = json.loads(result_path.read_text("utf-8"))
        tally.case(found["turns"])
        for key in ("stopped", "refused"):
            tally.note(*[key] * found[key])
        for kind, what in found["faults"]:
            tally.fault(kind, what.replace(TRACEBACK, ""))
        tally.require(found["growth"] < MAX_GROWTH, "other", f"memory grew by {found['growth']:,} bytes")
    tally.check()
