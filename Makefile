# Needs Python 3.11 or later and make, nothing else. Variables: PYTHON, TORCH_INDEX (see scripts/install_torch.sh).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test docs install fmt lint type contract check

demo: $(READY)  ## the whole job on real digits
	$(BIN)/shallowdeep demo --out runs/demo --resume

test: $(READY)  ## the whole suite; a test that kills its process ends it (xdist would wait for ever)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 -q

docs: $(READY)  ## the pages under docs/results that are made from results/; images where SHALLOWDEEP_DATA holds CIFAR-10
	$(BIN)/shallowdeep study paper --table
	$(BIN)/shallowdeep report $(addprefix results/cifar10-resnet56/,joint ic_only distil plain) --out docs/results/cifar10-resnet56.html

install: $(READY)

$(READY): pyproject.toml constraints.txt scripts/install_torch.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "shallowdeep needs Python 3.11 or later; $(PYTHON) is older. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sh scripts/install_torch.sh $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY)
	$(BIN)/pyright

contract: $(READY)
	$(BIN)/lint-imports

check: lint type contract
