# make demo: train on the embedded default and see the answer change (a few minutes on two CPU cores)
# make test: the whole test suite      make lint: ruff
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
JOBS ?= 2

.PHONY: demo test lint clean

demo: $(STAMP)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tools/demo.sh

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -q

lint: $(STAMP)
	$(VENV)/bin/ruff check .

# torch comes first and alone: pip then takes the CPU build where an index offers one
$(STAMP): requirements.txt requirements-dev.txt constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q torch==2.13.0
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt -r requirements-dev.txt -c constraints.txt
	touch $(STAMP)

clean:
	rm -rf saved_files .pytest_cache .ruff_cache
