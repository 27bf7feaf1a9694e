"""The tables of docs/robustness.md follow from the kept results of make test-slow."""

import json
import re

import pytest

from tests.conftest import PROJECT_DIR
from tools import campaign_table

FOUND = {"cases": 1200, "traceback": 1, "lost": 0, "wrong bits": 2, "other": 3, "seconds": 5400.0, "faults": []}
RECORD = {
    "seed": 7,
    "scale": 0.5,
    "date": "2026-11-26",
    "commit": "0123456789abcdef0123",
    "machine": "Linux x86_64, 2 cores, 24 GiB",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "campaigns": {
        "training killed": {**FOUND, "notes": {"KILL": 400, "at save": 9, "glm_utils/files.py:1 OSError": 1}},
        "tests/campaign/test_fuzz.py::broken": {**FOUND, "notes": {}},
    },
}


def test_every_campaign_and_fault_has_its_place():
    lines = campaign_table.table(RECORD, "en").splitlines()
    assert lines[2] == "| training killed and started again | 1,200 | 400 KILL, 9 during a save | 1 | 0 | 2 | 3 |"
    assert lines[3] == "| tests/campaign/test_fuzz.py::broken | 1,200 |  | 1 | 0 | 2 | 3 |"
    assert lines[4] == "| all | 2,400 |  | 2 | 0 | 4 | 6 |"
    assert re.match(r"Commit `0123456789ab`, seed 7, 2026-11-26, scale 0.5, .*; 3.0 hours", lines[6])


def test_names_are_those_of_the_campaigns():
    """A campaign that is renamed does not lose its title."""
    texts = [path.read_text("utf-8") for path in (PROJECT_DIR / "tests" / "campaign").glob("*.py")]
    named = set(re.findall(r'mark\.campaign\("(.*?)"\)', "\n".join(texts)))
    fuzzed = re.findall(r'^    "(.*)": Subject\(', "\n".join(texts), re.M)
    assert named | {f"{name} fuzzed" for name in fuzzed} == set(campaign_table.CAMPAIGNS)


@pytest.mark.parametrize("language", list(campaign_table.PAGES))
def test_pages_show_the_kept_results(language):
    """The table is filled in anew without a change; before the first campaign a page says that there is none."""
    page = campaign_table.PAGES[language].read_text("utf-8")
    assert campaign_table.fill(page, RECORD, language).count("| 1,200 |") == 2
    if campaign_table.KEPT_PATH.exists():
        kept = json.loads(campaign_table.KEPT_PATH.read_text("utf-8"))
        assert campaign_table.fill(page, kept, language) == page


def test_a_page_without_the_block():
    with pytest.raises(ValueError, match="<!-- campaign -->"):
        campaign_table.fill("# Robustness\n", RECORD, "en")
