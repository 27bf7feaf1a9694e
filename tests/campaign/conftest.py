"""Fixtures of the campaigns; the process that runs them collects what each found into one result file."""

import datetime
import json
import os
import platform
import time
from collections import Counter

import psutil
import pytest

from glm_utils.run_record import git_commit, versions
from tests.campaign.harness import KINDS, Tally, seed
from tests.campaign.processes import start_server
from tests.conftest import PROJECT_DIR

RESULT_PATH = PROJECT_DIR / "saved_files" / "campaign.json"
results: dict[str, dict] = {}


def pytest_configure(config):
    """Draw a seed before the workers start, so that all of them inherit it."""
    if "CAMPAIGN_SEED" not in os.environ and config.getoption("-m") == "campaign":
        os.environ["CAMPAIGN_SEED"] = str(int(time.time()) % 1_000_000)


def pytest_report_header(config):
    """Print the seed."""
    return f"campaign seed {seed()}, scale {os.environ.get('CAMPAIGN_SCALE', '1')}"


def pytest_runtest_logreport(report):
    """Add what a test found; a test that ended otherwise is a fault of its own."""
    if report.when != "call" and not report.failed:
        return
    record = dict(report.user_properties).get("campaign")
    name = record["campaign"] if record else report.nodeid
    total = results.setdefault(
        name, {"cases": 0, **dict.fromkeys(KINDS, 0), "seconds": 0.0, "notes": Counter(), "faults": []}
    )
    total["seconds"] += report.duration
    found = dict.fromkeys(KINDS, 0)
    if record and report.when == "call":
        total["cases"] += record["cases"]
        total["notes"].update(record["notes"])
        found = record["counts"]
        total["faults"] += [[report.nodeid, kind, what] for kind, what in record["faults"]]
    for kind, number in found.items():
        total[kind] += number
    if report.failed and not sum(found.values()):
        total["other"] += 1
        total["faults"].append([report.nodeid, "other", str(report.longrepr)[-2000:]])


def pytest_sessionfinish(session):
    """Write the results, in the process that collects them."""
    if not results or hasattr(session.config, "workerinput"):
        return
    memory = psutil.virtual_memory().total / 2**30
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    for total in results.values():
        total["seconds"] = round(total["seconds"], 1)
    record = {
        "seed": seed(),
        "scale": float(os.environ.get("CAMPAIGN_SCALE", "1")),
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "machine": machine,
        "versions": {name: version for name, version in versions().items() if name != "device"},
        "campaigns": dict(sorted(results.items())),
    }
    RESULT_PATH.parent.mkdir(exist_ok=True)
    RESULT_PATH.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", "utf-8")


def pytest_terminal_summary(terminalreporter):
    """Say what was tried, with the seed that repeats it."""
    for name, total in sorted(results.items()):
        faults = ", ".join(f"{kind} {total[kind]}" for kind in KINDS)
        terminalreporter.write_line(f"{name}: {total['cases']} cases, {faults}")
    if results:
        terminalreporter.write_line(f"seed {seed()}; results in {RESULT_PATH.relative_to(PROJECT_DIR)}")


@pytest.fixture
def tally(request):
    """What a test tried and found; the marker names its campaign."""
    record = {}
    request.node.user_properties.append(("campaign", record))
    return Tally(request.node.get_closest_marker("campaign").args[0], record)


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
    """A directory for results that all workers use."""
    base = tmp_path_factory.getbasetemp()
    return base.parent / "shared" if os.environ.get("PYTEST_XDIST_WORKER") else base / "shared"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The process that commands are forked from."""
    start_server(tmp_path_factory.mktemp("modules"))
