"""`diwa classifier`: train success classifiers on recorded episodes, or print how good they are."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, field
from pathlib import Path

from diwa_core import __version__
from diwa_core.config import from_dict, load_yaml
from diwa_core.errors import DataError

logger = logging.getLogger(__name__)
VALIDATION_WINDOWS = 200  # of each skill to calibrate on, and as many to measure on
GOAL = 0.97  # precision and recall
KINDS = [(latents, unit) for latents in ("filtered", "imagined") for unit in ("frames", "episodes")]


@dataclass(frozen=True)
class Overrides:
    """What a configuration file may change."""

    classifier: dict = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands train and report."""
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, calibrate and measure a classifier for each skill")
    train.add_argument("--world-model", required=True, help="checkpoint")
    train.add_argument("--more-models", nargs="*", default=[], help="world models with the same codes; each imagines its share of windows")
    train.add_argument("--play", nargs="+", required=True, help="play stores to learn from")
    train.add_argument("--encoded", help="embeddings.safetensors of the world model's run folder: spares encoding the play once more")
    train.add_argument("--demos", nargs="*", default=[], help="play stores of demonstrations to learn from as well")
    train.add_argument("--validation", nargs="+", required=True, help="held-out play stores: a half of each calibrates, the other measures")
    train.add_argument("--rollouts", nargs="*", default=[], help="stores of `diwa evaluate --record`: measured on, never learned from")
    train.add_argument("--out", required=True, help="folder; each skill becomes OUT/<skill>")
    train.add_argument("--skills", nargs="*", help="default: all; trained together they learn from each other's windows")
    train.add_argument(
        "--labels",
        choices=("auto", "scene", "marks"),
        default="auto",
        help="what tells success: the simulated scene, or an operator's marks (default: the scene where a store has one, else marks)",
    )
    train.add_argument("--windows", type=int, default=600, help="windows of play chosen for each skill")
    train.add_argument("--config", help="YAML with a 'classifier' mapping that overrides ClassifierConfig")
    train.add_argument("--seed", type=int, default=1)
    train.add_argument("--device", default="cpu")
    train.add_argument("--threads", type=int, default=1)
    report = commands.add_parser("report", help="print precision and recall of each skill, as measured when it was trained")
    report.add_argument("classifiers", help="folder with a checkpoint per skill")


def run(args: argparse.Namespace) -> int:
    """Dispatch."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    return {"train": train, "report": report}[args.command](args)


def train(args: argparse.Namespace) -> int:
    """A checkpoint per skill, its figures in its card."""
    import torch

    from diwa_core.cli.progress import stage_progress
    from diwa_core.contract import PROPRIO_SIZE
    from diwa_core.data.store import PlayStore
    from diwa_core.reward.classifier import ClassifierConfig
    from diwa_core.reward.quality import calibrate, measure_quality
    from diwa_core.reward.store import save_classifier
    from diwa_core.reward.train import check_successes, train_classifier
    from diwa_core.reward.windows import Windows, collect_rollouts, collect_windows, read_encoded
    from diwa_core.sim.skills import SKILLS, check_skill
    from diwa_core.world_model.filter import load_world_model

    torch.set_num_threads(args.threads)
    skills = [check_skill(name) for name in args.skills or SKILLS]
    overrides = load_yaml(Overrides, args.config).classifier if args.config else {}
    loaded = [load_world_model(path, device=args.device) for path in (args.world_model, *args.more_models)]
    models, world = [model for model, _ in loaded], loaded[0][1]
    stores = {name: [PlayStore.open(path) for path in getattr(args, name)] for name in ("play", "demos", "validation", "rollouts")}
    for store in (store for group in stores.values() for store in group):
        difference = world.contract.difference(store.contract)
        if difference:
            raise DataError(f"{store.path}: {difference}. Use play and a world model of one contract.")
    lineage = {
        **{name: [store.content_hash for store in group] for name, group in stores.items() if name != "rollouts"},
        "world_models": [checkpoint.identity for _, checkpoint in loaded],
        "labels": args.labels,
        "windows": args.windows,
        "seed": args.seed,
        "code_version": __version__,
    }
    with stage_progress() as progress:
        encoded = read_encoded(Path(args.encoded), stores["play"]) if args.encoded else None
        windows = collect_windows(models, stores["play"], skills, args.windows, args.seed, encoded=encoded, labels=args.labels)[0]
        progress("windows", 0.6)
        if stores["demos"]:
            demos = collect_windows(models, stores["demos"], skills, args.windows // 4, args.seed, labels=args.labels)
            windows = Windows.join([windows, *demos])
        halves = collect_windows(models, stores["validation"], skills, VALIDATION_WINDOWS, args.seed, parts=2, labels=args.labels)
        calibration, held_out = halves
        rollouts = collect_rollouts(models, stores["rollouts"], skills, args.labels) if stores["rollouts"] else None
        progress("windows", 1.0)
        check_successes(windows, skills, "--play")
        check_successes(calibration, skills, "the first half of --validation")
        check_successes(held_out, skills, "the second half of --validation")
        sizes = {"inputs": windows.start.shape[-1], "arm_inputs": PROPRIO_SIZE if models[0].config.latent == "residual" else 0}
        config = from_dict(ClassifierConfig, sizes | overrides, f"{args.config}: classifier")
        for skill in skills:
            classifier = train_classifier(windows, skill, config, args.seed, lambda done, skill=skill: progress(skill, done))
            calibrate(classifier, calibration.episodes_of(skill), skill)
            card = {"threshold": classifier.threshold.item(), "filtered_threshold": classifier.filtered_threshold.item()}
            card |= measure_quality(classifier, held_out.episodes_of(skill), skill)
            tried = rollouts.episodes_of(skill) if rollouts else ()
            if len(tried):
                card["rollouts"] = measure_quality(classifier, tried, skill)
            path = Path(args.out) / skill
            identity = save_classifier(path, classifier.cpu(), world.contract, skill, world.identity, lineage, card)
            logger.info("%s: threshold in dreams %.2f -> %s, identity %s", skill, card["threshold"], path, identity[:16])
    print(format_report(Path(args.out)))
    return 0


def report(args: argparse.Namespace) -> int:
    """The table of a folder of classifiers."""
    print(format_report(Path(args.classifiers)))
    return 0


def format_report(folder: Path) -> str:
    """Precision / recall of frames and of episodes per skill, from the cards; raises DataError without classifiers."""
    from diwa_core.reward.store import load_classifier
    from diwa_core.sim.skills import SKILLS

    cards = {skill: load_classifier(folder / skill)[1].card for skill in SKILLS if (folder / skill).exists()}
    if not cards:
        raise DataError(f"{folder}: expected classifiers in folders named after skills ({', '.join(SKILLS)}), found none.")
    heads = [f"{latents} {unit}" for latents, unit in KINDS]
    lines = [
        f"Precision / recall on held-out data, at the thresholds of filtered / of imagined frames. Goal {GOAL} / {GOAL} for episodes.",
        "",
        _format_row("held-out play", "thresholds", "events", heads, "calibration error"),
        *(_report_row(skill, card, card) for skill, card in cards.items()),
    ]
    tried = {skill: card for skill, card in cards.items() if "rollouts" in card}
    if tried:
        lines += ["", _format_row("policy rollouts", "thresholds", "events", heads, "calibration error")]
        lines += [_report_row(skill, card, card["rollouts"]) for skill, card in tried.items()]
    return "\n".join(lines)


def _report_row(skill: str, card: dict, figures: dict) -> str:
    thresholds = f"{card.get('filtered_threshold', card['threshold']):.2f} / {card['threshold']:.2f}"
    parts = [figures[latents][unit] for latents, unit in KINDS]
    pairs = [" / ".join("-" if part[name] is None else f"{part[name]:.2f}" for name in ("precision", "recall")) for part in parts]
    return _format_row(skill, thresholds, str(figures["events"]), pairs, f"{parts[-1]['reliability']['expected_error']:.3f}")


def _format_row(name: str, thresholds: str, events: str, figures: list[str], error: str) -> str:
    return f"{name:18s} {thresholds:>11s} {events:>6s} " + " ".join(f"{cell:>17s}" for cell in figures) + f" {error:>17s}"
