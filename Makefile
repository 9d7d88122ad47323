# make demo | loop | test | benchmark | lint | clean. Each target sets up .venv first; a finished set-up is recognised in a moment.
# Variables: PYTHON=python3.11 (interpreter to make .venv with), ARGS="..." (passed on).
SHELL := bash
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo loop test benchmark lint clean checkpoints

help:
	@sed -n '1,2s/^# //p' Makefile

setup:
	@bash scripts/setup.sh

demo: setup
	@$(BIN)/diwa demo $(ARGS)

loop: setup
	@$(BIN)/diwa loop $(ARGS)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

benchmark: setup
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done

lint: setup
	@$(BIN)/ruff check $(ARGS) .

# The shipped checkpoints, from nothing: the pipeline, of which training seed 1 is shipped. Stopped, the same command goes on.
CHECKPOINTS := checkpoints
PIPELINE := runs/pipeline
checkpoints: setup
	$(BIN)/diwa pipeline --out $(PIPELINE) $(ARGS)
	rm -rf $(addprefix $(CHECKPOINTS)/,world_model policies finetuned classifiers) && mkdir -p $(CHECKPOINTS)
	cp -r $(addprefix $(PIPELINE)/,world_model seed1/policies seed1/finetuned seed1/classifiers report/README.md) $(CHECKPOINTS)

clean:
	rm -rf .venv .build ros2_ws/build ros2_ws/install ros2_ws/log
