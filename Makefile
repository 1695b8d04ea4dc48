# Two commands matter: `make run` and `make test`. Both set up everything they need.
# PYTHON: the interpreter; left out, the first of python3.11, python3.12, python3.13. PEERS_PYTHON: that of the
# stock peers, which must be a Python 3.11.
PYTHON ?=
PEERS_PYTHON ?= python3.11
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
FUZZ_SECONDS ?= 60
FUZZ_JOBS ?= 1

.PHONY: run test test-fast test-interop lint format proto bench bench-net docs fuzz drift peers browser setup clean

run: $(VENV)/.runtime
	$(BIN)/kwaainet-bridge demo

# the laboratory mostly waits, so it runs beside the rest; what it printed comes last
LAB := build/netlab.log
test: setup peers
	@mkdir -p $(dir $(LAB))
	@$(BIN)/python -m pytest tests/netlab > $(LAB) 2>&1 & lab=$$!; \
	$(BIN)/python -m pytest tests --ignore=tests/netlab; rest=$$?; \
	wait $$lab; lab=$$?; cat $(LAB); exit $$((rest | lab))

test-fast: setup
	$(BIN)/python -m pytest tests -m "not slow and not interop" -q

test-interop: setup peers
	$(BIN)/python -m pytest tests -m interop

# what the tests of the dashboard need beside: a Chromium, from the system's packages
browser:
	scripts/browser.sh

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

# the pages as a site in build/site; the configuration's tables are made anew from the schema first
docs: setup
	$(BIN)/python scripts/config_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: setup peers
	$(BIN)/python -m bench.petals

bench-net: setup peers
	$(BIN)/python -m bench.net

drift: setup peers
	PEERS_PYTHON='$(PEERS_PYTHON)' $(BIN)/python scripts/drift.py $(DRIFT)

# FUZZ_SECONDS is for each target, FUZZ_JOBS how many run at a time; FUZZ="msgpack tensor" names some of them
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS) $(FUZZ)

setup: $(VENV)/.dev
peers: $(PEERS)/.ready

$(VENV)/.runtime: pyproject.toml constraints.txt scripts/setup.sh scripts/common.sh
	PYTHON='$(PYTHON)' scripts/setup.sh $(VENV) runtime

$(VENV)/.dev: pyproject.toml constraints.txt scripts/setup.sh scripts/common.sh
	PYTHON='$(PYTHON)' scripts/setup.sh $(VENV) dev

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/python -m pip install -q -c constraints.txt --group fuzz
	touch $@

# the compiler that it may need came with the project's own environment
$(PEERS)/.ready: tests/interop/requirements.txt tests/interop/releases.txt scripts/peers.sh scripts/common.sh | $(VENV)/.dev
	PEERS_PYTHON='$(PEERS_PYTHON)' scripts/peers.sh $(PEERS)

clean:
	rm -rf $(VENV) $(PEERS) .venv-drift .venv-drift-peers build dist src/*.egg-info
