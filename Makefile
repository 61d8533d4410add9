# Two commands do all the set-up: `make demo` and `make test`. Set PYTHON to choose the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CIRCUIT_TRACER := .venv-circuit-tracer
SPARSIFY := .venv-sparsify
BARE := .venv-dist

.PHONY: demo test test-matrix test-long test-accessibility test-dashboard test-saebench test-circuit-tracer lint docs dist benchmark benchmark-peers clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools --constraint constraints.txt
	# torch by itself first: a range would take the newest build, with gigabytes of CUDA.
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# A process a core, each of one thread.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist worksteal

# Runs killed some hundred times and started again, with a table of how it went: a quarter of an hour or more.
test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long tests/reliability

# On every Python, and on the oldest and newest of what pyproject allows: gigabytes, and an hour or more. SESSIONS chooses some.
test-matrix: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[matrix]'
	$(BIN)/nox $(if $(SESSIONS),--session $(SESSIONS))

# What axe-core finds on reports, features pages and the documentation, in a Chromium: both have to be there, axe-core from npm.
test-accessibility: docs
	test -f node_modules/axe-core/axe.min.js || npm install --no-save --no-package-lock --silent axe-core
	$(BIN)/python -m pytest -rs -m "not long" tests/test_features.py tests/test_report.py tests/test_docs.py -k barrier

# SAEDashboard itself, in an environment that is made for it once: some minutes and 2 GB.
test-dashboard: $(INSTALLED)
	SAE_LENS_E2E_DASHBOARD_PYTHON=make $(BIN)/python -m pytest -m slow tests/test_dashboard.py

# SAEBench itself, likewise.
test-saebench: $(INSTALLED)
	SAE_LENS_E2E_SAEBENCH_PYTHON=make $(BIN)/python -m pytest -m slow tests/test_saebench.py

# circuit-tracer itself, in an environment that is made for it once: some minutes and 2 GB.
test-circuit-tracer: $(INSTALLED) $(CIRCUIT_TRACER)/.installed
	SAE_LENS_E2E_CIRCUIT_TRACER_PYTHON=$(CIRCUIT_TRACER)/bin/python $(BIN)/python -m pytest -m slow tests/test_circuit_tracer.py

$(CIRCUIT_TRACER)/.installed: tests/circuit_tracer_requirements.txt constraints.txt
	test -x $(CIRCUIT_TRACER)/bin/python || $(PYTHON) -m venv $(CIRCUIT_TRACER)
	$(CIRCUIT_TRACER)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(CIRCUIT_TRACER)/bin/python -m pip install --quiet --requirement tests/circuit_tracer_requirements.txt
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The documentation, in site/: a broken link, a name of the reference that is not there, or a code block that does not run, fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -n auto --dist worksteal -m docs tests/test_docs.py

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

# Wheel and sdist, in dist/, and the wheel as somebody would install it: alone, without our exact versions. Some minutes and 2 GB.
dist: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[release]'
	rm -rf build dist $(BARE)
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(BARE)
	$(BARE)/bin/python -m pip install --quiet --upgrade pip
	$(BARE)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BARE)/bin/python -m pip install --quiet dist/*.whl
	SAE_LENS_E2E_DIST=dist SAE_LENS_E2E_BARE=$(BARE) $(BIN)/python -m pytest -rs -m slow tests/test_dist.py

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/linear_kl.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/sweep.py

# Beside sparsify, in an environment that is made for it once, and Apollo's library, where APOLLO=... is its source tree.
benchmark-peers: $(INSTALLED) $(SPARSIFY)/.installed
	$(BIN)/python benchmarks/peers.py $(if $(APOLLO),--apollo $(APOLLO))

$(SPARSIFY)/.installed: benchmarks/sparsify_requirements.txt constraints.txt
	test -x $(SPARSIFY)/bin/python || $(PYTHON) -m venv $(SPARSIFY)
	$(SPARSIFY)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(SPARSIFY)/bin/python -m pip install --quiet --constraint constraints.txt --requirement benchmarks/sparsify_requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(CIRCUIT_TRACER) $(SPARSIFY) $(BARE) build dist site *.egg-info
