# make demo       train, sample and evaluate on handwritten digits; a few minutes on two cores, nothing is downloaded
# make test       the quick tests           make test-slow   the long ones (trainings, kills, sanitizers)
# make lint       style and types           make install     the environment in .venv that all of these use

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo

# Threads that spin while they wait slow each other down many times over where processes share cores.
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test test-slow lint clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard gspn_dit/ops/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,text]'
	touch $@

# Matrices this small are computed faster by one thread than by several.
demo: export OMP_NUM_THREADS ?= 1
demo: install
	$(BIN)/python train.py --config configs/demo.yaml --resume auto
	mkdir -p $(DEMO)/report
	$(BIN)/python sample.py --checkpoint $(DEMO) --classes 0-9 --per-class 100 --order interleaved \
		--guidance-scale 1.2 --steps 50 --save-npz $(DEMO)/samples.npz
	$(BIN)/python -m fid --samples $(DEMO)/samples.npz --reference digits --features digits \
		--out $(DEMO)/report --overwrite

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "not slow and not gpu"

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "slow and not gpu"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
