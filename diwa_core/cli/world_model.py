"""`diwa world-model`: train one on play, measure one on held-out play, or calibrate the monitor of a running one."""

from __future__ import annotations

import argparse
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diwa_core import __version__
from diwa_core.config import from_dict, load_yaml, to_dict
from diwa_core.errors import ConfigError

if TYPE_CHECKING:
    from diwa_core.world_model.distributed import Ranks
    from diwa_core.world_model.model import WorldModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands train, report and monitor."""
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train on play stores; a killed run goes on where it stopped",
        epilog="Several GPUs or hosts: torchrun --nproc-per-node N -m diwa_core.cli.main world-model train ...; the batch is shared.",
    )
    train.add_argument("--play", nargs="+", required=True, help="play stores")
    train.add_argument("--size", default="small", help="small, paper or lowdim")
    train.add_argument("--run-dir", required=True, help="run folder (state, metrics, TensorBoard)")
    train.add_argument("--out", help="checkpoint to write (default: RUN_DIR/checkpoint)")
    train.add_argument("--config", help="YAML with 'model' and 'training' mappings that override the size's defaults")
    start = train.add_mutually_exclusive_group()
    start.add_argument("--init", help="checkpoint to go on from (a refit): its configuration, weights and image codes; --size is not asked")
    start.add_argument("--codes", help="checkpoint of a world model whose frozen image codes are used, instead of training new ones")
    train.add_argument("--steps", type=int)
    train.add_argument("--seed", type=int)
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--threads", type=int, default=1)
    report = commands.add_parser("report", help="open-loop errors, replay test and pictures on held-out play")
    report.add_argument("--checkpoint", required=True)
    report.add_argument("--play", nargs="+", required=True, help="play stores the model was trained on (for the probe)")
    report.add_argument("--validation", nargs="+", required=True, help="held-out play stores")
    report.add_argument("--rollouts", nargs="*", default=[], help="recorded evaluation episodes for the replay test")
    report.add_argument("--out", required=True, help="folder for report.json and pictures")
    report.add_argument("--windows", type=int, default=2000)
    report.add_argument("--seed", type=int, default=0)
    report.add_argument("--device", default="cpu")
    report.add_argument("--threads", type=int, default=1)
    monitor = commands.add_parser("monitor", help="watch the predictions of a running world model (docs/monitor.md)")
    calibrate = monitor.add_subparsers(dest="monitor", required=True).add_parser(
        "calibrate", help="measure what is usual, on held-out play"
    )
    calibrate.add_argument("--world-model", required=True, help="checkpoint")
    calibrate.add_argument("--validation", nargs="+", required=True, help="play stores the model was not trained on")
    calibrate.add_argument("--out", required=True, help="JSON file to write")
    calibrate.add_argument("--false-alarms", type=float, default=1.0, help="per hour of clean play, at most about so many")
    calibrate.add_argument("--debounce", type=int, default=3, help="frames in a row before an alarm")
    calibrate.add_argument("--max-frames", type=int, help="of each store only the first whole episodes up to so many frames")
    calibrate.add_argument("--device", default="cpu")
    calibrate.add_argument("--threads", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Dispatch."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    return {"train": train, "report": report, "monitor": calibrate_monitor}[args.command](args)


def train(args: argparse.Namespace) -> int:
    """Train, alone or as one of the processes that torchrun started, and write a checkpoint."""
    from diwa_core.world_model.distributed import join_ranks

    with join_ranks(args.device) as (ranks, device):
        if not ranks.main:
            logging.getLogger().setLevel(logging.WARNING)
        return _train(args, ranks, device)


def _train(args: argparse.Namespace, ranks: Ranks, device: str) -> int:
    from diwa_core.cli.progress import stage_progress, stop_between_updates
    from diwa_core.data.store import PlayStore
    from diwa_core.evaluate.recording import spent_steps
    from diwa_core.world_model.filter import load_world_model, save_world_model
    from diwa_core.world_model.model import SIZES, WorldModel
    from diwa_core.world_model.train import PAPER_TRAINING, PlayData, TrainConfig, Trainer

    if args.size not in SIZES:
        raise ConfigError(f"--size: expected one of {', '.join(SIZES)}, found '{args.size}'.")
    overrides = load_overrides(args.config)
    origin, initial = load_world_model(args.init, device=device) if args.init else (None, None)
    defaults = origin.config if origin else SIZES[args.size]
    model_config = from_dict(type(defaults), to_dict(defaults) | overrides.get("model", {}), "model")
    training = PAPER_TRAINING if defaults.name == "paper" else TrainConfig()
    training = from_dict(TrainConfig, to_dict(training) | overrides.get("training", {}), "training")
    chosen = {key: value for key, value in (("steps", args.steps), ("seed", args.seed)) if value is not None}
    training = replace(training, **chosen)
    torch.set_num_threads(args.threads)
    torch.manual_seed(training.seed)
    stores = [PlayStore.open(path) for path in args.play]
    seen = model_config  # of the play: pictures behind frozen codes are for the process that encodes them
    if model_config.frozen_embedding and not ranks.main:
        seen = replace(model_config, views=(), code_sizes=())
    data = PlayData(stores, seen)
    model = WorldModel(model_config).to(device)
    logging.getLogger(__name__).info("%s\n%d frames of play", model, len(data.low))
    codes_from, codes = load_world_model(args.codes, device=device) if args.codes else (None, None)
    if origin:
        copy_weights(origin, model)
        codes_from = origin if model_config.frozen_embedding else None
    trainer = Trainer(model, data, training, args.run_dir, codes_from, ranks)
    shown = stage_progress() if ranks.main else nullcontext(lambda stage, done: None)
    with shown as progress, stop_between_updates(progress, lambda: trainer.step and trainer.save()) as report:
        metrics = trainer.run(report)
    if not ranks.main:
        return 0
    lineage = {
        "play": [store.content_hash for store in stores],
        "training": to_dict(training),
        "code_version": __version__,
        "frames": len(data.low),
        "rollouts": (spent := spent_steps(stores, *(parent.lineage for parent in (initial, codes) if parent))),
        "environment_steps": sum(spent.values()),
        "seconds": round(trainer.seconds),
        "device": args.device,
        "processes": ranks.count,
        **({"codes": codes.identity} if codes else {}),
        **({"init": initial.identity} if initial else {}),
    }
    path = args.out or str(Path(args.run_dir) / "checkpoint")
    identity = save_world_model(path, model, stores[0].contract, lineage, {"last_metrics": metrics}, half=True)
    logging.getLogger(__name__).info("wrote %s, identity %s", path, identity[:16])
    return 0


def copy_weights(source: WorldModel, target: WorldModel) -> None:
    """Give `target` the weights of `source`; raises ConfigError when they do not fit."""
    try:
        target.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"--init: expected a model of the same shape; 'model' in --config may change losses only: {error}") from error


def load_overrides(path: str | None) -> dict:
    """The mappings 'model' and 'training' of a YAML file; {} without a file."""
    if path is None:
        return {}
    from diwa_core.world_model.train import Overrides

    return to_dict(load_yaml(Overrides, path))


def report(args: argparse.Namespace) -> int:
    """Measure a checkpoint; print the table, write report.json and pictures."""
    from diwa_core.world_model.report import write_report

    torch.set_num_threads(args.threads)
    print(write_report(args.checkpoint, args.play, args.validation, args.rollouts, args.out, args.windows, args.seed, args.device))
    return 0


def calibrate_monitor(args: argparse.Namespace) -> int:
    """Write the calibration of a world model's monitor, and print it."""
    from diwa_core.data.store import PlayStore
    from diwa_core.world_model.filter import load_world_model
    from diwa_core.world_model.monitor import calibrate
    from diwa_core.world_model.monitor_data import measure_play

    torch.set_num_threads(args.threads)
    model, checkpoint = load_world_model(args.world_model, device=args.device)
    stores = [PlayStore.open(path) for path in args.validation]
    trained_on = set(checkpoint.lineage.get("play", []))
    for path, store in zip(args.validation, stores, strict=True):
        if store.content_hash in trained_on:
            raise ConfigError(f"--validation: expected held-out play, found {path}, which this world model was trained on. Name another.")
    residuals = measure_play(model, stores, args.max_frames)
    hashes = tuple(store.content_hash for store in stores)
    rate_hz = stores[0].contract.rate_hz
    calibration, tails = calibrate(residuals, model, checkpoint.identity, rate_hz, args.false_alarms, args.debounce, hashes)
    calibration.save(args.out)
    print(f"{args.out}: world model {checkpoint.identity[:16]}, {60 * calibration.hours:.1f} minutes of play, {len(residuals)} episodes")
    for name, tail in tails.items():
        print(f"{name:16s} {tail.peaks} peaks, tail shape {tail.shape:.2f}; limits {calibration.limits_of(name)} deviations")
    return 0
