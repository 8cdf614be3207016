# The shortcuts. `make train` and `make test` are all that a newcomer needs; both call `make setup` first.
# SETUP_PYTHON chooses the interpreter (3.11 or newer); TRAIN holds further arguments for `make train`,
# for example TRAIN='train.steps=50'.

SETUP_PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TRAIN ?=

.PHONY: setup train test check drill

setup: $(STAMP)

$(STAMP): requirements.txt requirements-torch.txt pyproject.toml
	@test -n "$(SETUP_PYTHON)" || { echo "Trimtab needs Python 3.11 or newer; install it, or name one: make setup SETUP_PYTHON=/path/to/python3.12"; exit 2; }
	@echo "setup: making $(VENV) with $(SETUP_PYTHON) and installing pinned dependencies (a few minutes the first time)"
	@test -x $(PYTHON) || $(SETUP_PYTHON) -m venv $(VENV)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-torch.txt
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(STAMP)
	@echo "setup: done"

train: setup
	@$(VENV)/bin/trimtab submit debug $(TRAIN)

check: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

# Two files at a time, the short ones last, but for what kills processes, watches clocks or starts Ray: that runs by itself.
test: check
	@$(PYTHON) -m pytest -n 2 tests/unit tests/kernels
	@$(PYTHON) -m pytest -n 2 --dist loadfile --durations=25 -m "not ray and not drill" tests/end_to_end tests/ranks
	@$(PYTHON) -m pytest -m ray tests/end_to_end
	@$(PYTHON) -m pytest --durations=10 tests/faults tests/ray

drill: setup
	@$(PYTHON) -m pytest tests/faults tests/ray -m "slow or not slow"
	@$(PYTHON) -m pytest tests/end_to_end/test_config_starts.py tests/end_to_end/test_docs_commands.py -m drill
