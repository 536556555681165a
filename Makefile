# Two environments at most, both made here: .venv for demo and tests, .venv-floor by hand.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Under transformers 4 CLIPSeg has its vision tower elsewhere and BERT other masks.
CORE_TESTS = tests/test_zoo.py tests/rewriting/test_sweep.py tests/handover/test_backend.py \
	-k "(every_family_reads and not clipseg and not bert) or plain_references or equals_the_plain"
ENV = $(VENV)/.installed
DOCS = $(VENV)/.installed-docs

# A thread a worker: two would only wait for each other. What shares captures stays on one worker,
# in the order that tests/conftest.py gives it.
PYTEST = OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	$(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo test test-all test-mutants test-doors test-floor test-floor-doors test-zoo lint types docs format clean

demo: $(VENV)/.installed-demo
	$(BIN)/tomepass demo

test: $(ENV)
	$(PYTEST)

# Full products, generated code of whole models, long searches: before what was found is called done.
test-all: $(ENV)
	HYPOTHESIS_PROFILE=deep $(PYTEST) -m "not doors"

# Small named faults, each of which the tests above must see: tests/mutants.py.
test-mutants: $(ENV)
	$(BIN)/python tests/mutants.py

# What compiles, installs or starts something: AOTInductor and its C++ program, Ray, quantisation,
# torch_tensorrt's converter registry (of its wheel alone: no TensorRT, no CUDA), recipes of docs.
test-doors:
	$(PYTHON) -m venv .venv-doors
	.venv-doors/bin/pip install -q -c constraints.txt -e ".[dev,onnx,openvino,quantization,ray]"
	.venv-doors/bin/pip install -q --no-deps torch_tensorrt==2.13.0
	.venv-doors/bin/pytest -m doors

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(ENV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(ENV)
	$(BIN)/mypy

docs: $(DOCS)
	$(BIN)/mkdocs build --strict

# The lowest torch and transformers of the ranges: run by hand before a release.
test-floor:
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install -q -c constraints-floor.txt -e ".[dev]"
	.venv-floor/bin/pytest -n 2 --dist loadgroup --no-loadscope-reorder

# The lowest versions of the doors' runtimes, with the newest torch they were run with.
test-floor-doors:
	$(PYTHON) -m venv .venv-floor-doors
	.venv-floor-doors/bin/pip install -q -c constraints-floor-doors.txt \
		-e ".[dev,onnx,openvino,quantization,ray]"
	.venv-floor-doors/bin/pytest -m "doors or not doors" tests/formats/test_formats.py \
		tests/formats/test_quantization.py tests/formats/test_ray_batch.py

# timm and torchvision with the newest versions (they need a CUDA build of torch to import), and
# the families of the first releases under transformers 4, which names its modules otherwise.
test-zoo:
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/pip install -q -c constraints-zoo.txt -e ".[dev]" timm torchvision
	.venv-zoo/bin/pytest tests/external
	$(PYTHON) -m venv .venv-transformers-4
	.venv-transformers-4/bin/pip install -q -r constraints-transformers-4.txt
	.venv-transformers-4/bin/pip install -q --no-deps -e .
	.venv-transformers-4/bin/pytest $(CORE_TESTS)

clean:
	rm -rf .venv .venv-doors .venv-floor .venv-floor-doors .venv-zoo .venv-transformers-4 site build dist

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(BIN)/pip pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(ENV): $(BIN)/pip pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,onnx,openvino]"
	touch $@

$(DOCS): $(ENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@
