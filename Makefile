# make demo         train the two included tiny models and see the answer change (six minutes on two CPU cores)
# make test         the test suite with the pinned versions; make test TESTS=tests/test_cli.py: one file
# make test-slow    the campaigns of tests/campaign from a random seed, hours on two cores: kills, small disks, damaged and
#                   hostile files; JOBS=16 for more processes, CAMPAIGN_SEED=5 repeats one, CAMPAIGN_SCALE=0.01 is a taste;
#                   results in saved_files/campaign.json, python -m tools.campaign_table writes them into docs/robustness.md
# make self-test MODEL=THUDM/chatglm2-6b   check a model with its published weights, report in saved_files/self_test
# make lint         ruff check, ruff format --check, the copies in remote_scripts, mypy
# make types        mypy alone
# make test-oldest  the test suite with the oldest supported transformers and peft (.venv-oldest)
# make test-newest  the test suite with the newest versions that pyproject.toml allows, no pins (.venv-newest)
# make lock         write requirements-linux-cuda.lock anew from pyproject.toml and constraints.txt
# make audit        compare the versions in requirements-linux-cuda.lock with the published vulnerabilities (network)
# make clean        remove what runs and checks leave; the virtual environments stay
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
JOBS ?= 2
TESTS ?=
MODEL ?= models/chatglm2-tiny
LOCK := requirements-linux-cuda.lock
PIP_INSTALL := -m pip install --disable-pip-version-check -q
PYTEST := -m pytest -n $(JOBS) --dist loadfile -q $(TESTS)

.PHONY: demo self-test test test-slow test-oldest test-newest lint types lock audit clean

demo: $(STAMP)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tools/demo.sh

self-test: $(STAMP)
	$(VENV)/bin/python -m tools.self_test --model_path $(MODEL)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST)

# a random seed unless CAMPAIGN_SEED is set: tests/campaign/conftest.py prints it and records it
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -q -m campaign \
		$(or $(TESTS),tests/campaign)

test-oldest: $(VENV)-oldest/.installed
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python $(PYTEST)

test-newest: $(VENV)-newest/.installed
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python $(PYTEST)

lint: $(STAMP) types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python tools/check_copies.py

types: $(STAMP)
	$(VENV)/bin/mypy glm_utils $(wildcard *.py)

# torch comes first and alone: pip then takes the CPU build where an index offers one
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) torch==2.13.0
	$(VENV)/bin/python $(PIP_INSTALL) -e ".[dev]" -c constraints.txt
	touch $(STAMP)

# a package that constraints-oldest.txt names does not take its version from constraints.txt
$(VENV)-oldest/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	awk -F== 'FNR == NR { oldest[$$1]; print; next } !($$1 in oldest)' constraints-oldest.txt constraints.txt \
		> $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python $(PIP_INSTALL) torch==2.13.0
	$(VENV)-oldest/bin/python $(PIP_INSTALL) -e ".[dev]" -c $(VENV)-oldest/constraints.txt
	touch $@

$(VENV)-newest/.installed: pyproject.toml
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python $(PIP_INSTALL) torch==2.13.0
	$(VENV)-newest/bin/python $(PIP_INSTALL) --upgrade -e ".[dev]"
	touch $@

# PyPI alone, whatever indexes the machine is set to: its torch for Linux is the CUDA build
lock: $(VENV)-audit/.installed
	UV_NO_CONFIG=1 UV_CUSTOM_COMPILE_COMMAND="make lock" $(VENV)-audit/bin/uv pip compile pyproject.toml \
		--extra eval --extra gguf --extra xlsx -c constraints.txt --default-index https://pypi.org/simple \
		--generate-hashes --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 --upgrade -q \
		-o $(LOCK)

audit: $(VENV)-audit/.installed
	$(VENV)-audit/bin/pip-audit --strict --disable-pip -r $(LOCK)

$(VENV)-audit/.installed: pyproject.toml constraints.txt
	test -x $(VENV)-audit/bin/python || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python $(PIP_INSTALL) pip-audit uv -c constraints.txt
	touch $@

clean:
	rm -rf saved_files .pytest_cache .ruff_cache .mypy_cache *.egg-info
