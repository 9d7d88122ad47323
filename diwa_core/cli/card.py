"""`diwa card`: the model card of a folder of checkpoints as Markdown, every figure read from their manifests."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoints", help="folder with world_model/ and policies/<skill>/")
    parser.add_argument("--report", help="report.json of `diwa world-model report` for the open-loop figures")
    parser.add_argument("--out", help="file to write; default: print")


def run(args: argparse.Namespace) -> int:
    """Read all checkpoints (hashes are verified) and write the card."""
    text = make_card(Path(args.checkpoints), Path(args.report) if args.report else None)
    if args.out:
        Path(args.out).write_text(text)
    else:
        print(text)
    return 0


def make_card(folder: Path, report: Path | None = None) -> str:
    """Markdown: the world model, its open-loop figures, and one row per policy."""
    from diwa_core.checkpoint import load_checkpoint

    world = load_checkpoint(folder / "world_model", "world_model")
    lineage = world.lineage
    lines = [
        "# Model card",
        "",
        "Made by `make checkpoints`; this page by `diwa card`. Simulated play table only: nothing here has seen a real robot.",
        "",
        f"**World model** `{world.identity[:16]}`, size {world.config['name']}: {lineage['frames']} frames of generated play "
        f"(hash {', '.join(lineage['play'])}), seed {lineage['training']['seed']}, {lineage['training']['steps']} updates, "
        f"{lineage['seconds'] / 60:.0f} minutes for the recurrent part on {lineage['device']}.",
        "",
    ]
    if report:
        lines += open_loop_table(json.loads(report.read_text()), world.identity)
    return "\n".join(lines + policy_table(folder, world.identity)) + "\n"


def policy_table(folder: Path, world_model: str) -> list[str]:
    """Success of each policy, as its evaluation wrote it into the manifest."""
    from diwa_core.checkpoint import load_checkpoint

    rows = ["| skill | identity | demonstrations | success, held-out starts (95 % Wilson) | episodes, seed |", "|---|---|---|---|---|"]
    for path in sorted(p for p in (folder / "policies").iterdir() if p.is_dir()):
        policy = load_checkpoint(path, "policy")
        figures = policy.card.get("success_evaluation")
        measured = "not measured | -"
        if figures:
            interval = f"[{100 * figures['low']:.0f}, {100 * figures['high']:.0f}]"
            measured = f"{100 * figures['success']:.0f} % {interval} | {figures['episodes']}, {figures['seed']}"
        other = "" if policy.lineage["world_model"] == world_model else " (another world model!)"
        demonstrations = f"{policy.lineage['episodes']}, seed {policy.lineage['seed']}"
        rows.append(f"| {path.name} | `{policy.identity[:12]}`{other} | {demonstrations} | {measured} |")
    return rows


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
