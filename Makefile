# One word per habit; continuous integration uses the same words. Each works alone on a machine with Python and pip.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BENCHMARKS := $(filter-out benchmarks/_% benchmarks/peer_quality.py benchmarks/zoo_page.py,$(wildcard benchmarks/*.py))
DEVICE := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.DEFAULT_GOAL := help
.PHONY: help setup demo test full check fix bench docs clean

help:  ## list the words
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: $(READY)  ## make .venv and install raycascade with the tested versions

# venv fails where Python comes without ensurepip (Debian); the pip that is there then installs into the environment.
$(READY): pyproject.toml constraints.txt
	@echo "Installing raycascade ($(DEVICE)) into .venv; the first time takes a few minutes ..."
	@rm -f $(READY)
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip .venv \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(DEVICE),dev]"
	@touch $(READY)
	@echo "Ready: $$($(BIN)/python --version), raycascade in $(BIN)/raycascade"

demo: $(READY)  ## the whole system on simulated data, then one served request
	$(BIN)/raycascade demo

test: $(READY)  ## the tests but the slow ones: those without Ray on all cores, then those that start it, on two clusters
	$(BIN)/pytest -n auto --dist worksteal tests/unit tests/contract
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" tests/flow tests/serve

full: $(READY)  ## every test, also the slow ones: killed drivers and workers, several workers, reference configs
	$(BIN)/pytest -n auto --dist worksteal tests/unit tests/contract
	$(BIN)/pytest -n 2 --dist loadfile tests/flow tests/serve

check: $(READY)  ## lint, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

fix: $(READY)  ## mend what the linter can mend
	$(BIN)/ruff check --fix

bench: $(READY)  ## run every benchmark that needs no data; each prints a ratio and its command
	@failed=; for script in $(BENCHMARKS); do \
		echo "== $$script"; $(BIN)/python "$$script" || failed="$$failed $$script"; done; \
		test -z "$$failed" || { echo "A bar was missed, or the benchmark failed:$$failed"; exit 1; }

docs: $(READY)  ## check that README and docs say what the code says
	$(BIN)/pytest tests/unit/test_readme.py tests/unit/test_docs.py

clean:  ## remove .venv and caches (bundles and shards under outputs/ stay)
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache platform/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
