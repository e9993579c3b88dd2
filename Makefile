# Every target makes .venv and installs what it needs on first use. `make run` and `make test` are all a newcomer needs.
# Asking the interpreter, not the shell: a shim may be there without its Python.
WHERE := -c "import sys; print(sys.executable)" 2>/dev/null
PYTHON ?= $(shell python3.11 $(WHERE) || python3.12 $(WHERE) || python3.13 $(WHERE) || echo python3)
# On Linux x86-64 this may bring CUDA (about 3 GB); the README says how to point pip at a CPU build.
TORCH ?= torch==2.13.0
# JetPack 6 has Python 3.10: what runs on a board is tested there too, without torch, where there is one.
PYTHON310 ?= $(shell python3.10 $(WHERE) || ls $(HOME)/.pyenv/versions/3.10.*/bin/python 2>/dev/null | tail -n 1)

# Real processes with deadlines and bounds on measured times, which stay as tight as they must be: a moment in which the
# machine was busy can break one.
IN_REAL_TIME = $(BIN)/python -m pytest -q tests/integration tests/faults -m "not provisioning"
BUSY := in real time a busy machine breaks bounds: what failed is run once more

BIN := .venv/bin
READY := .venv/.ready
READY310 := .venv310/.ready
READY_ANSIBLE := .venv/.ready-ansible
RACK := $(BIN)/testbed rack
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run test check test-browser test-310 provisioning bench demo-model clean

run: $(READY)  ## eight node processes, a real MoE, top-k against WLR
	$(BIN)/testbed run configs/local.toml

test: check test-310  ## everything that must hold
	$(BIN)/python -m pytest -q -n auto tests/unit tests/numerics
	$(IN_REAL_TIME) || { echo "$(BUSY)"; $(IN_REAL_TIME) --last-failed; }

test-browser: $(READY)  ## reports and traces, looked at in the system's Chromium
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	$(BIN)/python -m pytest -q tests/integration/test_report_in_browser.py tests/integration/test_trace_in_perfetto.py

check: $(READY)  ## style, types, who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

provisioning: $(READY)  ## virtual boards from bare to a run and back, as root: some minutes, and one more the first time
	$(RACK) down --name probe && $(RACK) up --nodes 1 --name probe && $(RACK) down --name probe
	@$(MAKE) --no-print-directory $(READY_ANSIBLE)
	$(BIN)/python -m pytest -q tests/unit/test_ansible_playbooks.py
	$(BIN)/python -m pytest -v --durations=0 --durations-min=1 -m provisioning tests/integration

bench: $(READY)  ## speed, as ratios within one run
	$(BIN)/python benchmarks/codec.py
	$(BIN)/python benchmarks/policies.py
	$(BIN)/python benchmarks/allocation.py
	$(BIN)/python benchmarks/simulate.py
	$(BIN)/python benchmarks/estimator.py
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/fleet_start.py
	$(BIN)/python benchmarks/layer_round.py

demo-model: $(READY)  ## train the demo model anew (hours)
	$(BIN)/python -m testbed.demo.train --out demo-model

clean:
	rm -rf .venv .venv310

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'the base station needs Python 3.11 or later: make PYTHON=...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bs,serve,eval,dev]"
	$(BIN)/python -c "import bs_node.blocks, bs_node.learning, testbed.policies.joint, testbed.wire.quantization"  # compiles their loops, once
	touch $@

$(READY_ANSIBLE): pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[provisioning]" || \
		{ echo "make provisioning: Ansible is missing: $(BIN)/pip install --constraint constraints.txt -e '.[provisioning]'"; exit 1; }
	touch $@

ifeq ($(PYTHON310),)
test-310:
	@echo "skipped: no Python 3.10 here; set PYTHON310 to test what a JetPack 6 board runs"
else
test-310: $(READY310)
	.venv310/bin/python -m pytest -q -n auto tests/unit -m "not torch"

$(READY310): pyproject.toml constraints.txt
	$(PYTHON310) -m venv .venv310
	.venv310/bin/python -m pip install --quiet --constraint constraints.txt --editable . hypothesis msgpack pytest pytest-timeout pytest-xdist scipy
	touch $@
endif
