"""What each lever of the world model is worth: the same play, one thing changed at a time, measured open loop on held-out play.

Every variant trains from nothing on shared, frozen image codes (but for the end-to-end one, which gets the seconds that codes and the full
model took together). One JSON line per finished row in --out; the same command goes on where it was stopped, also inside a row. Without
--play it prints the rows that are there.
`python benchmarks/ablations.py --play data/play --validation data/validation_scenes [--rollouts data/rollouts] [--steps 1500]`
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diwa_core.checkpoint import load_checkpoint
from diwa_core.cli.progress import stage_progress
from diwa_core.cli.world_model import load_overrides
from diwa_core.config import from_dict, to_dict
from diwa_core.data.store import PlayStore
from diwa_core.errors import ConfigError, DataError, DiwaError
from diwa_core.world_model.filter import load_world_model
from diwa_core.world_model.model import SIZES, WorldModel, WorldModelConfig
from diwa_core.world_model.open_loop import HORIZONS, measure_open_loop
from diwa_core.world_model.probe import train_probe
from diwa_core.world_model.report import PROBE_FRAMES, load_play, measure_replay
from diwa_core.world_model.train import PAPER_TRAINING, PlayData, TrainConfig, Trainer

logger = logging.getLogger("ablations")
FULL, END_TO_END = "full", "end-to-end"
OBSERVED = ("low_mean", "low_std", "command", "codes")  # parts of a model that shared codes decide


@dataclass(frozen=True)
class Variant:
    """One thing changed in the full model: values for WorldModelConfig and TrainConfig."""

    name: str
    model: dict[str, Any]
    training: dict[str, Any]

    def missing_switch(self) -> str | None:
        """The first of its switches that the code does not have."""
        for cls, values in ((WorldModelConfig, self.model), (TrainConfig, self.training)):
            known = {field.name for field in fields(cls)}
            for name in values:
                if name not in known:
                    return f"{cls.__name__} has no '{name}'"
        return None


def list_variants(model: WorldModelConfig, training: TrainConfig) -> list[Variant]:
    """All variants of a full model that has image codes. Some name switches that may not exist; they are skipped."""
    window = training.prefix[1] + training.horizons[-1]
    one_step = {"prefix": [window - 1, window - 1], "horizons": [1], "horizon_starts": [0.0]}
    paper = ("open_loop", "stream_length", "learning_rate", "final_learning_rate", "weight_decay", "clip_norm")
    end_to_end = {name: getattr(PAPER_TRAINING, name) for name in paper} | {"batch": 8}
    return [
        FULL_MODEL,
        Variant("one-step loss", {}, one_step),
        Variant("8-step loss", {}, {"horizons": [8], "horizon_starts": [0.0]}),
        Variant("categorical latent", {"latent": "categorical"}, {}),
        Variant("stochastic latent", {"stochastic": True}, {}),
        Variant("static view only", {"views": list(model.views[:1]), "code_sizes": list(model.code_sizes[:1])}, {}),
        Variant("equal weights", {"state_weight": 0.0, "proprio_weight": 1.0}, {}),
        Variant("no event windows", {}, {"event_share": 0.0}),
        Variant("no command model", {"command_model": False}, {}),
        Variant("inverse dynamics", {"inverse_dynamics": True}, {}),
        Variant("chunk steps", {"chunk_steps": 4}, {}),
        Variant("ensemble", {"ensemble": 3}, {}),
        Variant(END_TO_END, {"vision": "cnn", "latent": "categorical", "cnn_width": 16}, end_to_end),
    ]


FULL_MODEL = Variant(FULL, {}, {})


@dataclass(frozen=True)
class Study:
    """What all rows share. frames: of each play store; steps: of a training; base: what the full model has instead of `small`."""

    play: tuple[str, ...]
    validation: tuple[str, ...]
    rollouts: tuple[str, ...]
    frames: int
    steps: int
    windows: int
    run_dir: Path
    out: Path
    base: dict[str, dict]
    device: str = "cpu"
    given_codes: str | None = None  # a world model whose image codes all rows share, instead of codes of their own
    report: Callable[[str, float], None] = lambda stage, done: None

    def configs(self, variant: Variant, seed: int) -> tuple[WorldModelConfig, TrainConfig]:
        """Of one row. The horizons' share of the steps stays what it is."""
        model = from_dict(WorldModelConfig, to_dict(SIZES["small"]) | self.base.get("model", {}) | variant.model, "model")
        training = to_dict(TrainConfig()) | self.base.get("training", {}) | variant.training | {"steps": self.steps, "seed": seed}
        return model, from_dict(TrainConfig, training, "training")

    @cached_property
    def key(self) -> dict[str, Any]:
        """What a row must agree in to belong to this study; stores by what they were made with."""
        stores = {name: [describe(path) for path in getattr(self, name)] for name in ("play", "validation", "rollouts")}
        full = [to_dict(config) for config in self.configs(FULL_MODEL, 0)]
        stores |= {"codes": load_checkpoint(self.given_codes).identity} if self.given_codes else {}
        return json.loads(json.dumps({**stores, "frames": self.frames, "steps": self.steps, "windows": self.windows, "full": full}))

    def rows(self) -> list[dict[str, Any]]:
        """The finished rows of this study."""
        return [row for row in read_rows(self.out) if row["study"] == self.key]

    def row(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Train and measure one variant, or read what is there."""
        done = [row for row in self.rows() if (row["variant"], row["seed"]) == (variant.name, seed)]
        if done:
            return done[0]
        missing = variant.missing_switch()
        if missing is None and variant.name != FULL and self.configs(variant, seed) == self.configs(FULL_MODEL, seed):
            missing = "the full model is like that already"
        if missing:
            logger.info("%s: skipped, %s", variant.name, missing)
            return {"variant": variant.name, "seed": seed, "skipped": missing}
        row = {"variant": variant.name, "seed": seed, **self.measure(*self.train(variant, seed)), "study": self.key}
        append_row(self.out, row)
        return row

    # ---- training -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def codes(self) -> tuple[WorldModel, float]:
        """A model whose image codes all rows share, and the seconds their training took."""
        if self.given_codes:
            return load_world_model(self.given_codes, device=self.device)[0], float("nan")
        model_config, training = self.configs(FULL_MODEL, 1)
        note, began = self.run_dir / "codes" / "seconds.json", time.monotonic()
        torch.manual_seed(training.seed)
        model = WorldModel(model_config).to(self.device)
        Trainer(model, self.data(model_config), replace(training, steps=0), note.parent).run(self.report)
        if not note.exists():
            note.write_text(json.dumps(time.monotonic() - began))
        return model, json.loads(note.read_text())

    def data(self, config: WorldModelConfig) -> PlayData:
        """The play to learn from, as `config` sees it."""
        return PlayData([PlayStore.open(path) for path in self.play], config, self.frames)

    def train(self, variant: Variant, seed: int) -> tuple[WorldModel, TrainConfig, float]:
        """The variant's model, how it was trained, and the seconds its codes did not take."""
        model_config, training = self.configs(variant, seed)
        run_dir = self.run_dir / f"{variant.name.replace(' ', '_')}_seed{seed}"
        donor = share_codes(self.codes[0], model_config) if model_config.frozen_embedding else None
        if variant.name == END_TO_END:
            training = replace(training, steps=self.steps_in_time(model_config, training, run_dir, seed))
        torch.manual_seed(seed)
        model = WorldModel(model_config).to(self.device)
        trainer = Trainer(model, self.data(model_config), training, run_dir, donor)
        trainer.run(lambda stage, done: self.report(f"{variant.name} {seed}", done))
        return model.eval().requires_grad_(False), training, trainer.seconds

    def steps_in_time(self, config: WorldModelConfig, training: TrainConfig, run_dir: Path, seed: int) -> int:
        """Updates of a model without codes in the seconds that codes and the full model took; noted, so that a resumed row has as many."""
        note, trial = run_dir / "steps.json", run_dir / "trial"
        if not note.exists():
            if self.given_codes:
                raise ConfigError(f"{END_TO_END}: expected to know how long the codes took to train. Leave it out, or --codes.")
            budget = self.codes[1] + self.row(FULL_MODEL, seed)["seconds"]
            Trainer(WorldModel(config).to(self.device), self.data(config), replace(training, steps=4, log_every=1), trial).run()
            seconds = [json.loads(line)["seconds"] for line in (trial / "metrics.jsonl").read_text().splitlines()]
            per_step = (seconds[-1] - seconds[0]) / (len(seconds) - 1)  # the first one also warms up
            note.write_text(json.dumps(max(1, round(budget / per_step))))
        return json.loads(note.read_text())

    # ---- measuring ----------------------------------------------------------------------------------------------------------------

    def measure(self, model: WorldModel, training: TrainConfig, seconds: float) -> dict[str, Any]:
        """Open-loop figures on held-out play, and the replay test where there are rollouts."""
        probed = load_play(model, list(self.play), min(self.frames, PROBE_FRAMES))
        probe = train_probe(model, probed, probed.labels["scene_obs"])
        held_out = load_play(model, list(self.validation))
        figures = measure_open_loop(model, held_out, held_out.labels["scene_obs"], probe, self.windows)
        row = {"steps": training.steps, "seconds": round(seconds, 1), "parameters": sum(p.numel() for p in model.parameters())}
        row |= {"n": self.windows, "open_loop": [asdict(part) for part in figures]}
        if self.rollouts:
            row["replay"] = [asdict(result) for result in measure_replay(model, list(self.rollouts), probe)]
        return json.loads(json.dumps(row))


def describe(path: str) -> dict[str, Any]:
    """What a store was made with, and its length; its content would take minutes to hash."""
    store = PlayStore.open(path)
    return {**store.settings, "store_frames": len(store)}


def share_codes(source: WorldModel, config: WorldModelConfig) -> WorldModel:
    """A model of `config` that observes with the codes of `source`, of whose views it may have fewer."""
    model = WorldModel(config).to(source.device)
    own, given = model.state_dict(), source.state_dict()
    wanted = [name for name in own if name.split(".")[0] in OBSERVED]
    strange = [name for name in wanted if name not in given or given[name].shape != own[name].shape]
    if strange:
        raise ConfigError(f"shared codes: expected the sizes of codes of the full model, found another '{strange[0]}'.")
    model.load_state_dict(own | {name: given[name] for name in wanted})
    return model


# ---- rows on disk -------------------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the file; raises DataError on one that is no row."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True) if path.exists() else [], 1):
        if not line.endswith("\n"):
            continue  # cut off by a kill: that row runs again
        try:
            rows.append(json.loads(line))
            make_cells(rows[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number}: expected a row of the ablations, found {line[:80]!r} ({error}). Remove it.") from error
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One more line; what a kill cut off before it is taken away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    temporary = path.with_suffix(".new")
    temporary.write_text(whole + json.dumps(row) + "\n")
    temporary.replace(path)


def make_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: one line per row. Centimetres at each horizon; joints that moved and lights that flipped at the middle one."""
    middle = HORIZONS[1]
    steps = " / ".join(map(str, HORIZONS))
    heads = ["variant", "seed", "n", "updates", "seconds", f"TCP cm @{steps}", f"slider, drawer, switch cm @{middle}"]
    heads += [f"bulb, LED flips % (false) @{middle}", "replay AUC"]
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(make_cells(row))} |" for row in rows)]


def make_cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    if "skipped" in row:
        return [row["variant"], str(row["seed"]), f"skipped: {row['skipped']}", *[""] * 6]
    by_horizon = {part["horizon"]: part for part in row["open_loop"]}
    part = by_horizon[HORIZONS[1]]
    tcp = " / ".join("-" if np.isnan(by_horizon[h]["tcp_cm"]) else f"{by_horizon[h]['tcp_cm']:.2f}" for h in HORIZONS)
    moved = ", ".join(f"{part['moved_cm'][name][0]:.1f}" if name in part["moved_cm"] else "-" for name in ("slider", "drawer", "switch"))
    flips = ", ".join(f"{100 * part['flips'][name][0]:.0f} ({100 * part['flips'][name][1]:.1f})" for name in ("bulb", "led"))
    aucs = [result["auc"] for result in row.get("replay", ()) if not np.isnan(result["auc"])]
    auc = f"{np.mean(aucs):.2f} of {len(aucs)} skills" if aucs else "-"
    return [row["variant"], str(row["seed"]), str(row["n"]), str(row["steps"]), f"{row['seconds']:.0f}", tcp, moved, flips, auc]


def main(arguments: list[str] | None = None) -> int:
    """Bring the rows up to date and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--play", nargs="+", default=[], help="play stores to train and probe on")
    parser.add_argument("--validation", nargs="+", default=[], help="held-out play stores")
    parser.add_argument("--rollouts", nargs="*", default=[], help="stores of `diwa evaluate --record`, for the replay test")
    parser.add_argument("--frames", type=int, default=40_000, help="of each play store")
    parser.add_argument("--steps", type=int, default=1500, help="updates of a recurrent part")
    parser.add_argument("--windows", type=int, default=1000, help="held-out windows to measure on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--config", help="YAML with 'model' and 'training' mappings: what the full model has instead of 'small'")
    parser.add_argument("--codes", help="world model whose image codes all rows share (default: codes are trained first)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", type=Path, default=Path("reports/ablations.jsonl"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    if not args.play or not args.validation:
        rows = read_rows(args.out)
        print("\n".join(make_table(rows)) if rows else f"not run, there is no {args.out}: give --play and --validation")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    stores = [tuple(paths) for paths in (args.play, args.validation, args.rollouts)]
    with stage_progress() as progress:
        sizes = (args.frames, args.steps, args.windows)
        study = Study(*stores, *sizes, args.run_dir, args.out, load_overrides(args.config), args.device, args.codes, progress)
        variants = {variant.name: variant for variant in list_variants(*study.configs(FULL_MODEL, 1))}
        unknown = [name for name in args.variants or () if name not in variants]
        if unknown:
            raise ConfigError(f"--variants: expected some of {', '.join(variants)}, found '{unknown[0]}'.")
        rows = [study.row(variants[name], seed) for name in args.variants or variants for seed in args.seeds]
    print("\n".join(make_table(rows)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DiwaError as error:
        sys.exit(f"ablations: {error}")
