# Set-up and checks. Two commands do everything: `make run` and `make test`.
#
#   PYTHON=python3.12   the interpreter that .venv is made from
#   TORCH=keep          use the PyTorch of the active environment;  TORCH=cpu: install one again
#   CPU_INDEX=URL       where the CPU build of PyTorch is, when the configured package index lacks it

PYTHON ?=
TORCH ?=
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PROBE_SECONDS ?= 2

# "python" comes first for TORCH=keep: in an active environment it is that environment's own.
PYTHONS = $(or $(PYTHON),$(if $(filter keep,$(TORCH)),python python3,python3.11 python3.12 python3.13 python3))

# A name on PATH may be a stub that fails, so each candidate is run.
define install
@for python in $(PYTHONS); do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		exec "$$python" scripts/install.py $(1) --python "$(PYTHON)" --torch "$(TORCH)" \
			--cpu-index "$(CPU_INDEX)" --probe-seconds "$(PROBE_SECONDS)"; \
	fi; \
done; \
echo "python: 3.11 or newer is needed; found none among: $(PYTHONS); install python3.11 and python3.11-venv" >&2; exit 2
endef

.PHONY: help install install-dev run test lint slow clean

help:
	@echo "make run     set up .venv, then nemotron-h run laptop"
	@echo "make test    set up .venv with the development tools, then every check but the slow ones"
	@echo "make lint    the checks without the tests"
	@echo "make slow    the slow tests"
	@echo "make clean   remove .venv and the caches"

install:
	$(call install)

install-dev:
	$(call install,--dev)

run: install
	.venv/bin/nemotron-h run laptop

# Two processes: most tests take one core. A thread that waits for work leaves its core to the other one's.
test: lint
	OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n 2 --dist loadfile

lint: install-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

slow: install-dev
	.venv/bin/python -m pytest -m slow

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist
