# Every target sets up .venv by itself; `make demo` is the main job.
PYTHON ?= python3
BIN := .venv/bin

# `docs` is a folder too.
.PHONY: demo test test-all docs docs-check lint type bench ptx torture matrix portability audit kernels timm-tests clean

demo: .venv/train.stamp
	$(BIN)/python train/digits.py --out runs/digits --resume

# One thread a worker: the tensors of the tests are too small to share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Without the tests marked long: every module and every kernel, in minutes.
test: .venv/dev.stamp
	$(PYTEST)

test-all: .venv/dev.stamp
	$(PYTEST) --all

# The site, in build/site/index.html. Nothing is loaded from elsewhere, and a warning is an error.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The blocks of all pages, and the notebooks. But for four pages that take minutes it is in test-all.
docs-check: .venv/dev.stamp
	CODED_RESNEXT_DOCS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest --all -s -v tests/test_docs.py tests/test_tutorial.py \
		tests/models/test_tools.py

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: .venv/dev.stamp
	$(BIN)/mypy -p coded_resnext

bench: .venv/dev.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Every kernel as compiled for two GPUs, run on the CPU; docs/kernels.md says what that shows.
ptx: .venv/dev.stamp
	for arch in sm80 sm90; do \
		PYTHONPATH=tests $(PYTEST) --dist load -p ptx.plugin --arch $$arch \
			tests/ptx/compiled_*.py tests/kernels/loss tests/kernels/recompute tests/kernels/residual || exit 1; \
	done

# Kills, signals, tampered files and random calls; docs/reliability.md has the table of a run.
torture: .venv/dev.stamp
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m torture

# Every supported torch with its Triton, one environment of 5 GB after the other: hours.
matrix: .venv/dev.stamp
	$(BIN)/python tests/version_matrix.py --out benchmarks/results/version_matrix.json

# The tests of arithmetic under imitated processors: seven rows, each as long as `make test`.
portability: .venv/dev.stamp
	$(BIN)/python tests/portability.py --out benchmarks/results/portability.json

# Known weaknesses of what is installed. What the advisory service does not know is an error.
audit: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet --upgrade pip pip-audit
	$(BIN)/python -m pip_audit --local --skip-editable --strict

# Compute capabilities, with spaces between them.
ARCHS ?= 80 90 100

kernels: .venv/dev.stamp
	$(BIN)/coded-resnext build-kernels $(addprefix --arch ,$(ARCHS))

# timm's tests of models are in its source distribution alone; ours call them when they are here.
timm-tests: .venv/dev.stamp
	$(BIN)/python -m pip download --quiet --no-deps --no-binary timm --dest build/timm \
		timm==$$($(BIN)/python -c "import timm; print(timm.__version__)")

clean:
	rm -rf .venv build dist *.egg-info

.venv/pip.stamp:
	$(PYTHON) -m venv .venv
	touch $@

.venv/train.stamp: .venv/pip.stamp setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[train,report]'
	touch $@

.venv/docs.stamp: .venv/pip.stamp setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

.venv/dev.stamp: .venv/pip.stamp setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
