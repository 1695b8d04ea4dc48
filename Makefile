# Two commands matter: `make run` and `make test`. Both set up everything they need.
PYTHON ?= python3.11
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin

.PHONY: run test test-fast test-interop lint format proto bench peers setup clean

run: $(VENV)/.runtime
	$(BIN)/kwaainet-bridge demo

test: setup peers
	$(BIN)/python -m pytest tests

test-fast: setup
	$(BIN)/python -m pytest tests -m "not slow and not interop" -q

test-interop: setup peers
	$(BIN)/python -m pytest tests -m interop

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup
	cd proto && for f in kwaainet_bridge/wire/pb/*.proto; do \
	  ../$(BIN)/python -m grpc_tools.protoc -I . --python_out=../src --pyi_out=../src $$f || exit 1; done

bench: setup peers
	$(BIN)/python -m bench.side_by_side

setup: $(VENV)/.dev
peers: $(PEERS)/.ready

$(VENV)/.runtime: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV) runtime

$(VENV)/.dev: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV) dev

$(PEERS)/.ready: tests/interop/requirements.txt scripts/peers.sh
	PYTHON=$(PYTHON) scripts/peers.sh $(PEERS)

clean:
	rm -rf $(VENV) $(PEERS) build dist src/*.egg-info
