# make demo       train, sample and evaluate on handwritten digits; a few minutes on two cores, nothing is downloaded
# make demo-text  the same by caption, on emoji that EMOJI holds; says how to get them
# make demo-colour  classes of emoji in colour, from the same set
# make test       the quick tests           make test-slow   the long ones (trainings, kills, sanitizers)
# make gpu        ten minutes on a GPU: correctness, times, models, into benchmarks/results/gpu.json and gpu.md
# make lint       style and types           make docs        the documentation site, into build/site
# make wheels     an sdist and a manylinux wheel, into dist
# make install    the environment in .venv that all of these use

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo
EMOJI ?= data/emoji

# Threads that spin while they wait slow each other down many times over where processes share cores.
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo demo-text demo-colour have-emoji gpu test test-slow lint docs wheels lock clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard gspn_dit/ops/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,playground,text]'
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

# What it says to do needs the environment, so that is made first.
have-emoji: install
	@test -d $(EMOJI) || { echo "$(EMOJI) is missing; get it, with npm, by: mkdir -p packages && (cd packages && npm pack" \
		"@iconify-json/noto @iconify-json/twemoji @iconify-json/openmoji @iconify-json/fluent-emoji-flat" \
		"@iconify-json/fluent-emoji @iconify-json/emojione emojibase-data) &&" \
		"$(BIN)/python -m gspn_dit.prepare.emoji --packages packages --out $(EMOJI) --size 32"; exit 2; }

demo-text: have-emoji
	$(BIN)/python train.py --config configs/demo_text.yaml --data.path $(EMOJI) --resume auto
	$(BIN)/python -m benchmarks.demo_text --run runs/demo_text --data $(EMOJI) --out runs/demo_text/grid.png

demo-colour: have-emoji
	test -d $(EMOJI)_classes || $(BIN)/python -m gspn_dit.prepare.emoji_classes --data $(EMOJI) --out $(EMOJI)_classes
	$(BIN)/python train.py --config configs/demo_colour.yaml --data.path $(EMOJI)_classes --resume auto
	$(BIN)/python sample.py --checkpoint runs/demo_colour --per-class 8 --guidance-scale 2.5 \
		--out runs/demo_colour/grid.png

# No environment of its own: the machine's Python has a PyTorch for its GPU.
gpu:
	$(PYTHON) -m benchmarks.gpu --out benchmarks/results/gpu.json

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "not slow and not gpu"

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "slow and not gpu"

docs: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The wheel is built from the sdist, and gets the oldest manylinux tag that its compiled kernels allow.
wheels: install
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist

# uv.lock with the versions of constraints.txt, for `uv sync`.
lock:
	uv lock $(foreach pin,$(shell sed -nE 's/^([^#;]+); .*/\1/p' constraints.txt),-P "$(pin); python_version >= '3.11'")

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
