# make demo | test | benchmark | lint | clean. Each target sets up .venv first; a finished set-up is recognised in a moment.
# Variables: PYTHON=python3.11 (interpreter to make .venv with), ARGS="..." (passed on).
SHELL := bash
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test benchmark lint clean checkpoints

help:
	@sed -n '1,2s/^# //p' Makefile

setup:
	@bash scripts/setup.sh

demo: setup
	@$(BIN)/diwa demo $(ARGS)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

benchmark: setup
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done

lint: setup
	@$(BIN)/ruff check $(ARGS) .

# The shipped checkpoints, from nothing: about two hours on two cores. Finished steps are kept; remove their folder to repeat them.
CHECKPOINTS := checkpoints
checkpoints: setup data/play data/play_validation data/demos
	$(BIN)/diwa world-model train --play data/play --run-dir runs/world_model --out $(CHECKPOINTS)/world_model
	$(BIN)/diwa policy --world-model $(CHECKPOINTS)/world_model --demos data/demos --out $(CHECKPOINTS)/policies
	$(BIN)/diwa evaluate --world-model $(CHECKPOINTS)/world_model --policies $(CHECKPOINTS)/policies --episodes 100 --write-card
	$(BIN)/diwa evaluate --world-model $(CHECKPOINTS)/world_model --policies $(CHECKPOINTS)/policies --episodes 50 --split validation --record runs/rollouts
	$(BIN)/diwa world-model report --checkpoint $(CHECKPOINTS)/world_model --play data/play --validation data/play_validation \
		--rollouts runs/rollouts --out reports/world_model
	$(BIN)/diwa card $(CHECKPOINTS) --report reports/world_model/report.json --out $(CHECKPOINTS)/README.md

data/play: | setup
	$(BIN)/python -m diwa_core.sim.play --frames 120000 --seed 1 --out $@
data/play_validation: | setup
	$(BIN)/python -m diwa_core.sim.play --frames 12000 --seed 2 --out $@
data/demos: | setup
	$(BIN)/python -m diwa_core.sim.demos --per-skill 40 --seed 3 --out $@

clean:
	rm -rf .venv .build ros2_ws/build ros2_ws/install ros2_ws/log
