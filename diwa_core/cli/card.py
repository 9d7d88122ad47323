"""`diwa card`: the model card of a folder of checkpoints as Markdown, every figure read from their manifests."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diwa_core.checkpoint import Checkpoint
    from diwa_core.evaluate.comparison import Comparison
    from diwa_core.evaluate.statistics import Estimate

PARTS = (("policies", "policy"), ("finetuned", "policy"), ("classifiers", "classifier"))  # folder -> kind of the checkpoints in it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "checkpoints", help="folder with world_model/, policies/<skill>/ and, if there are any, finetuned/ and classifiers/"
    )
    parser.add_argument("--world-model", help="default: world_model/ in that folder")
    parser.add_argument("--report", help="report.json of `diwa world-model report` for the open-loop figures")
    parser.add_argument("--comparison", help="comparison.json of `diwa evaluate --pair` for base beside fine-tuned")
    parser.add_argument("--out", help="file to write; default: print")


def run(args: argparse.Namespace) -> int:
    """Read all checkpoints (hashes are verified) and write the card."""
    files = (Path(path) if path else None for path in (args.report, args.comparison, args.world_model))
    text = make_card(Path(args.checkpoints), *files)
    if args.out:
        Path(args.out).write_text(text)
    else:
        print(text)
    return 0


def make_card(folder: Path, report: Path | None = None, comparison: Path | None = None, world_model: Path | None = None) -> str:
    """Markdown: the world model and its open-loop figures, base beside fine-tuned, and one row per policy and classifier."""
    from diwa_core.checkpoint import load_checkpoint
    from diwa_core.evaluate.comparison import Comparison

    world = load_checkpoint(world_model or folder / "world_model", "world_model")
    policies, finetuned, classifiers = (read_folder(folder / name, kind) for name, kind in PARTS)
    lineage = world.lineage
    lines = [
        "# Model card",
        "",
        "This page is made by `diwa card`; what each part was made from is in its manifest.",
        "Simulated play table only: nothing here has seen a real robot.",
        "",
        f"**World model** `{world.identity[:16]}`, size {world.config['name']}: {lineage['frames']} frames of generated play "
        f"(hash {', '.join(lineage['play'])}), seed {lineage['training']['seed']}, {lineage['training']['steps']} updates, "
        f"{lineage['seconds'] / 60:.0f} minutes for the recurrent part on {lineage['device']}.",
        "",
    ]
    if report:
        lines += open_loop_table(json.loads(report.read_text()), world.identity)
    if comparison:
        lines += comparison_table(Comparison.read(comparison), {c.identity for c in (*policies.values(), *finetuned.values())})
    lines += ["**Base policies**", "", *policy_table(policies, world.identity)]
    if finetuned:
        lines += ["", "**Fine-tuned policies**", "", *finetuned_table(finetuned, policies, world.identity)]
    if classifiers:
        lines += ["", "**Success classifiers**, the reward of the fine-tuning", "", *classifier_table(classifiers, world.identity)]
    return "\n".join(lines) + "\n"


def read_folder(folder: Path, kind: str) -> dict[str, Checkpoint]:
    """Checkpoints by name of their folder, in order; none where the folder is missing."""
    from diwa_core.checkpoint import load_checkpoint

    return {path.name: load_checkpoint(path, kind) for path in sorted(folder.iterdir()) if path.is_dir()} if folder.is_dir() else {}


def comparison_table(comparison: Comparison, shown: set[str]) -> list[str]:
    """Base beside fine-tuned in the simulator, and imagined beside real. shown: identities of the checkpoints of this card."""
    from diwa_core.evaluate.comparison_report import list_doubts, show_steps

    seeds = [str(seed.training_seed) for seed in comparison.skills[0].seeds]
    measured = {side.identity for row in comparison.skills for seed in row.seeds for side in (seed.base, seed.finetuned)}
    banks = ", ".join(sorted({row.start_bank for row in comparison.skills}))
    lines = [
        f"**Base beside fine-tuned**, {comparison.starts} starts of the {comparison.split} split per skill and training seed "
        f"({', '.join(seeds)}), the same starts and noise for both, judged by the simulator's oracle; success in per cent with 95 % "
        "intervals over starts. Imagined: success in imagination as the checkpoints state it; error: mean over seeds of "
        f"|imagined − real|, base and fine-tuned. Imagined from: {banks}.",
        "",
        "| skill | base | fine-tuned | gain | environment steps | imagined, base → fine-tuned | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in comparison.skills:
        imagined, error = ([percent(value(when)) for when in ("before", "after")] for value in (row.imagined, row.imagined_error))
        rates = f"{interval(row.base)} | {interval(row.finetuned)} | {interval(row.gain, '+')}"
        lines.append(f"| {row.skill} | {rates} | {show_steps(row.environment_steps)} | {' → '.join(imagined)} | {', '.join(error)} |")
    lines.append(f"| mean | {interval(comparison.base)} | {interval(comparison.finetuned)} | {interval(comparison.gain, '+')} | | | |")
    doubts = list_doubts(comparison)
    if not shown <= measured:
        doubts.append(f"{len(shown - measured)} of the {len(shown)} policies below are not among those that were compared!")
    return [*lines, "", *([" ".join(doubts), ""] if doubts else [])]


def policy_table(policies: dict[str, Checkpoint], world_model: str) -> list[str]:
    """Success of each policy, as its evaluation wrote it into the manifest."""
    rows = ["| skill | identity | demonstrations | success, held-out starts (95 % Wilson) | episodes, seed |", "|---|---|---|---|---|"]
    for name, policy in policies.items():
        demonstrations = f"{policy.lineage['episodes']}, seed {policy.lineage['seed']}"
        rows.append(f"| {name} | {identify(policy, world_model)} | {demonstrations} | {measured_success(policy)} |")
    return rows


def finetuned_table(finetuned: dict[str, Checkpoint], policies: dict[str, Checkpoint], world_model: str) -> list[str]:
    """What each fine-tuned policy came from, what was imagined of it, and its success."""
    rows = ["| skill | identity | from base | imagined, base → fine-tuned | success, held-out starts (95 % Wilson) | episodes, seed |"]
    rows.append("|---" * 6 + "|")
    for name, policy in finetuned.items():
        origin, base = str(policy.lineage.get("base")), policies.get(name)
        other = "" if base is not None and base.identity == origin else " (not the one above!)"
        imagined = " → ".join(percent(policy.card.get(f"imagined_{when}")) for when in ("before", "after"))
        rows.append(f"| {name} | {identify(policy, world_model)} | `{origin[:12]}`{other} | {imagined} | {measured_success(policy)} |")
    return rows


def classifier_table(classifiers: dict[str, Checkpoint], world_model: str) -> list[str]:
    """Precision / recall of each classifier on held-out data, as its training wrote them into the manifest."""
    kinds = [(latents, unit) for latents in ("filtered", "imagined") for unit in ("frames", "episodes")]
    heads = " | ".join(f"{latents} {unit}" for latents, unit in kinds)
    rows = ["Precision / recall at the threshold, on filtered and on imagined latents; events: real successes that it was measured on.", ""]
    rows += [f"| skill | identity | threshold | held-out | {heads} | events |", "|---" * 9 + "|"]
    for name, classifier in classifiers.items():
        begin = f"| {name} | {identify(classifier, world_model)} | {classifier.tensors['threshold'].item():.2f} |"
        measured = {"play": classifier.card, "rollouts": classifier.card.get("rollouts")}
        for data, figures in ((data, figures) for data, figures in measured.items() if figures is not None):
            cells = [precision_recall(figures.get(latents, {}).get(unit, {})) for latents, unit in kinds]
            rows.append(f"{begin} {data} | {' | '.join(cells)} | {figures.get('events', '-')} |")
    return rows


def precision_recall(figures: dict) -> str:
    """Both, a dash for one that is not stated or not defined."""
    return " / ".join("-" if (value := figures.get(name)) is None else f"{value:.2f}" for name in ("precision", "recall"))


def identify(checkpoint: Checkpoint, world_model: str) -> str:
    """Short identity, with a warning when it belongs to another world model than the card's."""
    other = "" if checkpoint.lineage["world_model"] == world_model else " (another world model!)"
    return f"`{checkpoint.identity[:12]}`{other}"


def measured_success(policy: Checkpoint) -> str:
    """Two cells: the rate with its interval; episodes and seed."""
    figures = policy.card.get("success_evaluation")
    if not figures:
        return "not measured | -"
    bounds = f"[{100 * figures['low']:.0f}, {100 * figures['high']:.0f}]"
    return f"{100 * figures['success']:.0f} % {bounds} | {figures['episodes']}, {figures['seed']}"


def interval(estimate: Estimate, sign: str = "") -> str:
    """Per cent with the interval."""
    return f"{100 * estimate.value:{sign}.0f} [{100 * estimate.low:{sign}.0f}, {100 * estimate.high:{sign}.0f}]"


def percent(value: float | None) -> str:
    """Per cent, or that nobody stated it."""
    return "not stated" if value is None else f"{100 * value:.0f}"


def open_loop_table(figures: dict, world_model: str) -> list[str]:
    """Open-loop errors on held-out play, and the replay test."""
    known = "" if figures["identity"] == world_model else " (of another checkpoint!)"
    lines = [
        f"Open loop on held-out play, {figures['windows']} windows, seed {figures['seed']}{known}; joints: error where they moved, "
        "no-change guess in brackets; lights: share of flips predicted.",
        "",
        "| steps | TCP cm | slider cm | drawer cm | switch cm | bulb | LED |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["open_loop"]:
        moved = row["moved_cm"]
        joints = [f"{moved[j][0]:.1f} ({moved[j][1]:.1f})" if j in moved else "-" for j in ("slider", "drawer", "switch")]
        flips = [f"{100 * row['flips'][light][0]:.0f} %" for light in ("bulb", "led")]
        lines.append(f"| {row['horizon']} | {row['tcp_cm']:.2f} | " + " | ".join(joints + flips) + " |")
    if "replay" in figures:
        lines += ["", "Replay of real episodes, actions open loop:", ""]
        lines += ["| skill | episodes (successes) | dream success given success / failure | AUC |", "|---|---|---|---|"]
        for r in figures["replay"]:
            dreamt = f"{r['dream_given_success']:.2f} / {r['dream_given_failure']:.2f}"
            lines.append(f"| {r['skill']} | {r['episodes']} ({r['successes']}) | {dreamt} | {r['auc']:.2f} |")
    return [*lines, ""]
