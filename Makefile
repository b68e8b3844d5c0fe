# Everything runs in .venv, made on demand from nothing but python3 and a network to a package index.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
BIN := .venv/bin
RUNS := runs
RESULTS := docs/results/quadratic

OLDEST := .venv-oldest/bin/python

.PHONY: help demo test test-integrations test-oldest check docs mutants sanitize package reproduce reproduce-mnist reproduce-mnist-mlp reproduce-mnist-modulated reproduce-cifar reproduce-neural-art bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 20

.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard learned_optim/backends/native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs,test]"
	touch $@

demo: .venv/ready ## train a digit classifier with Adam and with LearnedOptimizer; table and demo.png
	$(BIN)/python -m examples.digits --plot demo.png

test: .venv/ready ## run the tests
	$(BIN)/python -m pytest -n 2

test-integrations: .venv/ready ## install Lightning, transformers, accelerate and a factory; run what needs them, and the site in Chromium if it is there
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,integrations]"
	$(BIN)/python -m pytest -n 2 tests/integrations

test-oldest: ## run the tests with the oldest Python, torch and others that pyproject.toml allows
	$(PYTHON_OLDEST) -m venv --clear .venv-oldest
	$(OLDEST) -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[art]" "pytest>=8" "pytest-xdist>=3.5"
	$(OLDEST) -m pytest -n 2 -W default::DeprecationWarning

check: .venv/ready ## lint, format, types and the documentation's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build

docs: .venv/ready ## show the documentation on http://127.0.0.1:8000
	$(BIN)/mkdocs serve

mutants: .venv/ready ## break each promise on purpose and see that a test notices
	$(BIN)/python -m tests.mutants

sanitize: .venv/ready ## test the CPU kernels, built with the address and undefined-behaviour sanitizers
	$(BIN)/python -m tests.sanitize

package: .venv/ready ## build sdist and wheel, install them where nothing else is, run what they promise
	$(BIN)/python -m tests.distribution

reproduce: .venv/ready ## meta-train the quadratic weights with three seeds, judge them, draw the figures
	for seed in 0 1 2; do \
	  $(BIN)/python -m meta_train train learned_optim/weights/quadratic.toml --out $(RUNS)/quadratic-$$seed --seed $$seed || exit 1; \
	done
	$(BIN)/python -m meta_train publish $(RUNS)/quadratic-0 --name quadratic --to $(RUNS)
	$(BIN)/python -m meta_train publish $(RUNS)/quadratic-1 --name quadratic-1 --to $(RUNS)
	$(BIN)/python -m meta_train publish $(RUNS)/quadratic-2 --name quadratic-2 --to $(RUNS)
	$(BIN)/python -m meta_train evaluate $(RUNS)/quadratic.safetensors $(RUNS)/quadratic-1.safetensors \
	  $(RUNS)/quadratic-2.safetensors --out $(RUNS)/results
	$(BIN)/python -m meta_train figures $(RUNS)/results --runs $(RUNS)/quadratic-0 $(RUNS)/quadratic-1 $(RUNS)/quadratic-2

DIGITS := mnist-mlp mnist-modulated
NETS := 40x1 20x2 relu
SIZES := 5x1 10x1 80x1 5x2 10x2 40x2 80x2
# Of three seeds the first is the one with the best validation, which is bundled.
reproduce-mnist-mlp: SEEDS := 0 1 2
reproduce-mnist-modulated: SEEDS := 1 0 2

reproduce-mnist: $(DIGITS:%=reproduce-%) ## the same for nets on MNIST, two rules, from the Hub or from DATA=DIR

$(DIGITS:%=reproduce-%): reproduce-%: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[judge]"
	for seed in $(SEEDS); do \
	  $(BIN)/python -m meta_train train learned_optim/weights/$*.toml $(DATA:%=--data %) --out $(RUNS)/$*-$$seed --seed $$seed && \
	  $(BIN)/python -m meta_train publish $(RUNS)/$*-$$seed --name $*-$$seed --to $(RUNS) || exit 1; \
	done
	$(BIN)/python -m meta_train publish $(RUNS)/$*-$(firstword $(SEEDS)) --name $* --to $(RUNS)
	$(BIN)/python -m meta_train evaluate $(RUNS)/$*.safetensors $(patsubst %,$(RUNS)/$*-%.safetensors,$(wordlist 2,3,$(SEEDS))) \
	  default --task mnist $(DATA:%=--data %) --cache $(RUNS)/judging --workers 2 --out $(RUNS)/results-$*
	for net in $(NETS) $(SIZES:%=sizes/%); do \
	  $(BIN)/python -m meta_train evaluate $(RUNS)/$*.safetensors default --task mnist-$${net##*/} $(DATA:%=--data %) \
	    --cache $(RUNS)/judging --workers 2 --out $(RUNS)/results-$*/$$net || exit 1; \
	done
	$(BIN)/python -m meta_train figures $(RUNS)/results-$* --runs $(SEEDS:%=$(RUNS)/$*-%)

PHOTOS := $(RUNS)/cifar
# The first has the best validation, and is bundled.
PHOTO_SEEDS := 2 0 1

reproduce-cifar: .venv/ready ## the same for convolutional nets on CIFAR-10, from the Hub or from DATA=DIR
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[judge]"
	for seed in $(PHOTO_SEEDS); do \
	  $(BIN)/python -m meta_train train learned_optim/weights/cifar.toml $(DATA:%=--data %) --out $(PHOTOS)-$$seed --seed $$seed || exit 1; \
	done
	$(BIN)/python -m meta_train train learned_optim/weights/cifar-sub.toml $(DATA:%=--data %) --out $(PHOTOS)-sub
	$(BIN)/python -m meta_train publish $(PHOTOS)-$(firstword $(PHOTO_SEEDS)) --name cifar --to $(RUNS)
	for run in $(wordlist 2,3,$(PHOTO_SEEDS)) sub; do \
	  $(BIN)/python -m meta_train publish $(PHOTOS)-$$run --name cifar-$$run --to $(RUNS) || exit 1; \
	done
	$(BIN)/python -m meta_train evaluate $(PHOTOS)-conv.safetensors+$(PHOTOS)-dense.safetensors \
	  $(foreach seed,$(wordlist 2,3,$(PHOTO_SEEDS)),$(PHOTOS)-$(seed)-conv.safetensors+$(PHOTOS)-$(seed)-dense.safetensors) \
	  $(PHOTOS)-sub-conv.safetensors+$(PHOTOS)-sub-dense.safetensors default --task cifar $(DATA:%=--data %) \
	  --cache $(RUNS)/judging --workers 2 --out $(RUNS)/results-cifar
	for few in 5 2; do \
	  $(BIN)/python -m meta_train evaluate $(PHOTOS)-conv.safetensors+$(PHOTOS)-dense.safetensors \
	    $(PHOTOS)-sub-conv.safetensors+$(PHOTOS)-sub-dense.safetensors default --task cifar-$$few $(DATA:%=--data %) \
	    --cache $(RUNS)/judging --workers 2 --out $(RUNS)/results-cifar/$$few-classes || exit 1; \
	done
	$(BIN)/python -m meta_train figures $(RUNS)/results-cifar --runs $(PHOTO_SEEDS:%=$(PHOTOS)-%)

ART := $(RUNS)/art

reproduce-neural-art: .venv/ready ## the same for pictures; DATA=DIR holds neural_art/
	@test -n "$(DATA)" || { echo "say where the data are: make $@ DATA=DIR (meta_train/tasks/neural_art.py)"; exit 2; }
	for seed in 0 1 2; do \
	  $(BIN)/python -m meta_train train learned_optim/weights/neural-art.toml --data $(DATA) --out $(ART)-$$seed --seed $$seed || exit 1; \
	done
	$(BIN)/python -m meta_train publish $(ART)-1 --name neural-art --to $(RUNS)
	$(BIN)/python -m meta_train publish $(ART)-0 --name neural-art-0 --to $(RUNS)
	$(BIN)/python -m meta_train publish $(ART)-2 --name neural-art-2 --to $(RUNS)
	for part in "" style double; do \
	  $(BIN)/python -m meta_train evaluate $(RUNS)/neural-art.safetensors $(RUNS)/neural-art-0.safetensors \
	    $(RUNS)/neural-art-2.safetensors default --task neural-art$${part:+-$$part} --data $(DATA) \
	    --out $(RUNS)/results-art/$$part || exit 1; \
	done
	$(BIN)/python -m meta_train figures $(RUNS)/results-art --runs $(ART)-1 $(ART)-0 $(ART)-2

bench: .venv/ready ## time an optimizer step and a meta-training step; run it on a quiet machine
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.small_tensors
	$(BIN)/python -m benchmarks.training_step
	$(BIN)/python -m benchmarks.meta_training
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.recorder

clean: ## remove what the other targets made
	rm -rf .venv .venv-oldest build dist site *.egg-info learned_optim/backends/native/_native*.so demo.png
