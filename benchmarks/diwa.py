"""The paper's table beside ours: success of base and fine-tuned policies, gain, and the environment steps online DPPO needs for as much.

The paper's figures: Chandra, Nematollahi et al., "DiWA: Diffusion Policy Adaptation with World Models", CoRL 2025, arXiv 2508.03645 (CALVIN
environment D; DPPO on the world model's encoder). Ours are read: from the comparison.json of `diwa evaluate --pair`, and from the
metrics.jsonl of `diwa dppo` runs (--run-dir FOLDER/<skill>; several per skill in folders of their own).
`python benchmarks/diwa.py [--comparison reports/diwa/comparison.json] [--dppo FOLDER] [--refits refit1/report/comparison.json]`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from diwa_core.errors import DataError
from diwa_core.evaluate.comparison import Comparison, SkillComparison
from diwa_core.evaluate.statistics import Estimate
from diwa_core.sim.skills import SKILLS

NOT_RUN = "not run"


class PaperRow(NamedTuple):
    """Success in per cent (DiWA: mean and deviation over seeds) and thousands of environment steps DPPO needs to match DiWA."""

    base: float
    diwa: float
    deviation: float
    dppo_thousand_steps: int


PAPER = {
    "open_drawer": PaperRow(57.8, 74.4, 1.9, 118),
    "close_drawer": PaperRow(59.1, 92.0, 2.0, 346),
    "move_slider_left": PaperRow(62.2, 83.3, 1.8, 271),
    "move_slider_right": PaperRow(62.6, 82.8, 3.5, 250),
    "turn_on_lightbulb": PaperRow(60.6, 91.9, 1.8, 303),
    "turn_off_lightbulb": PaperRow(35.6, 77.0, 2.0, 327),
    "turn_on_led": PaperRow(48.4, 86.2, 3.5, 495),
    "turn_off_led": PaperRow(55.3, 82.3, 6.5, 277),
}


class OnlineRun(NamedTuple):
    """Evaluations of one DPPO run: (environment steps spent, success on validation starts), in order; match: the rate it stopped at."""

    path: Path
    evaluations: list[tuple[int, float]]
    match: float | None = None


def read_online_runs(folder: Path) -> dict[str, list[OnlineRun]]:
    """Skill -> its runs: every metrics.jsonl below `folder` with one skill's name among its folders. Raises DataError on a damaged one."""
    if not folder.is_dir():
        raise DataError(f"--dppo: expected a folder with runs of `diwa dppo`, found none at {folder}.")
    runs: dict[str, list[OnlineRun]] = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        skills = [part for part in path.relative_to(folder.parent).parts if part in SKILLS]
        if skills:
            runs.setdefault(skills[-1], []).append(OnlineRun(path, *read_evaluations(path)))
    return runs


def read_evaluations(path: Path) -> tuple[list[tuple[int, float]], float | None]:
    """The rows of a metrics file that were evaluated, and the rate the run matched (None: it stopped for another reason)."""
    evaluations, match = [], None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            if "validation" in row:
                evaluations.append((int(row["env_steps"]), float(row["validation"]["value"])))
                match = float(row["matched"]["rate"]) if "matched" in row else None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number}: expected a row of `diwa dppo`, found {line[:80]!r} ({error}).") from error
    return evaluations, match


def steps_to_match(run: OnlineRun, rate: float) -> str:
    """Environment steps at the first evaluation that reached `rate`, or how far the run came."""
    reached = [steps for steps, success in run.evaluations if success >= rate]
    if reached:
        return f"{reached[0]:,}"
    if not run.evaluations:
        return "never evaluated"
    best = max(success for _, success in run.evaluations)
    stopped = "" if run.match is None else f", stopped at --match {run.match:.2f}"
    return f"> {run.evaluations[-1][0]:,} (best {100 * best:.0f} %{stopped})"


def make_table(comparison: Comparison | None, online: dict[str, list[OnlineRun]]) -> list[str]:
    """Markdown lines."""
    paper_head, our_head = "paper: base % | DiWA % | gain", "ours: base % | DiWA % | gain | environment steps"
    lines = [f"| skill | {paper_head} | DPPO steps to match | {our_head} | DPPO steps to match |", "|---" * 10 + "|"]
    for skill, paper in PAPER.items():
        ours = comparison.find(skill) if comparison else None
        lines.append("| " + " | ".join([skill, *paper_cells(paper), *our_cells(ours, online.get(skill, []))]) + " |")
    base, diwa = (sum(getattr(row, name) for row in PAPER.values()) / len(PAPER) for name in ("base", "diwa"))
    total = sum(row.dppo_thousand_steps for row in PAPER.values())
    means = [show(comparison.base), show(comparison.finetuned), show(comparison.gain, "+")] if comparison else [NOT_RUN] * 3
    lines.append(f"| mean | {base:.1f} | {diwa:.1f} | {diwa - base:+.1f} | sum {total:,} k | " + " | ".join(means) + " | | |")
    return lines


def paper_cells(row: PaperRow) -> list[str]:
    """The paper's columns."""
    return [f"{row.base:.1f}", f"{row.diwa:.1f} ± {row.deviation:.1f}", f"{row.diwa - row.base:+.1f}", f"{row.dppo_thousand_steps} k"]


def our_cells(ours: SkillComparison | None, runs: list[OnlineRun]) -> list[str]:
    """Our columns."""
    if ours is None:
        return [NOT_RUN] * 5
    matched = [steps_to_match(run, ours.finetuned.value) for run in runs]
    return [show(ours.base), show(ours.finetuned), show(ours.gain, "+"), show_steps(ours), ", ".join(matched) or NOT_RUN]


def show(estimate: Estimate, sign: str = "") -> str:
    """Per cent with the interval."""
    return f"{100 * estimate.value:{sign}.1f} [{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]"


def make_refit_table(comparison: Comparison, refits: list[tuple[Path, Comparison]]) -> list[str]:
    """Markdown lines: fine-tuned without environment steps beside each refit and what it cost. Raises DataError on other starts."""
    for path, refit in refits:
        if (refit.split, refit.starts, refit.noise_seed) != (comparison.split, comparison.starts, comparison.noise_seed):
            raise DataError(
                f"{path}: expected the {comparison.starts} {comparison.split} starts of --comparison, found others. Run it again."
            )
    heads = ["skill", "offline: DiWA %", *(f"{path.parent.parent.name}: DiWA % | environment steps" for path, _ in refits)]
    lines = [f"| {' | '.join(heads)} |", "|---" * (2 + 2 * len(refits)) + "|"]
    for row in comparison.skills:
        cells = [row.skill, show(row.finetuned)]
        for found in (refit.find(row.skill) for _, refit in refits):
            cells += [NOT_RUN] * 2 if found is None else [show(found.finetuned), show_steps(found)]
        lines.append(f"| {' | '.join(cells)} |")
    means = [cell for _, refit in refits for cell in (show(refit.finetuned), "")]
    return [*lines, f"| {' | '.join(['mean', show(comparison.finetuned), *means])} |"]


def show_steps(row: SkillComparison) -> str:
    """Environment steps that the fine-tuning spent."""
    return "not stated" if row.environment_steps is None else f"{row.environment_steps:,}"


def list_sources(path: Path, comparison: Comparison | None, folder: Path | None, online: dict[str, list[OnlineRun]]) -> list[str]:
    """Where each of our figures comes from."""
    if comparison is None:
        return [f"Ours: not run, there is no {path}. Make it: diwa evaluate --world-model W --pair BASE FINETUNED --out {path.parent}"]
    missing = [skill for skill in PAPER if comparison.find(skill) is None]
    seeds = sorted({str(seed.training_seed) for row in comparison.skills for seed in row.seeds})
    lines = [
        f"Ours: {path}, world model {comparison.world_model[:16]}, training seeds {', '.join(seeds)}, {comparison.starts} starts of the "
        f"{comparison.split} split per skill and seed, the same for both sides, noise seed {comparison.noise_seed}, at most "
        f"{comparison.max_steps} steps; 95 % intervals over starts; environment steps as the checkpoints' lineage states.",
        *([f"The means are over {len(comparison.skills)} skills only: not run are {', '.join(missing)}."] if missing else []),
    ]
    runs = [run for skill in PAPER for run in online.get(skill, [])]
    if folder is None or not runs:
        where = "no folder was given" if folder is None else f"{folder} holds no run of a skill"
        return [*lines, f"DPPO: not run ({where}; --dppo FOLDER with the run folders of `diwa dppo`)."]
    note = (
        "the first evaluation on validation starts that reaches our fine-tuned rate on evaluation starts: the luckiest one counts, for DPPO"
    )
    return [*lines, f"DPPO: {note}. From {', '.join(str(run.path) for run in runs)}."]


def main(arguments: list[str] | None = None) -> None:
    """Print the table and its sources."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparison", type=Path, default=Path("reports/diwa/comparison.json"))
    parser.add_argument("--dppo", type=Path, help="folder with the run folders of `diwa dppo`")
    parser.add_argument("--refits", type=Path, nargs="*", default=[], help="comparison.json of refits (refit<n>/report)")
    args = parser.parse_args(arguments)
    comparison = Comparison.read(args.comparison) if args.comparison.exists() else None
    online = read_online_runs(args.dppo) if args.dppo else {}
    lines = make_table(comparison, online)
    lines += [
        "",
        "Paper: arXiv 2508.03645; DPPO steps there are those of DPPO on the world model's encoder, about 30 starts per skill and seed.",
    ]
    lines += list_sources(args.comparison, comparison, args.dppo, online)
    if comparison and args.refits:
        lines += ["", *make_refit_table(comparison, [(path, Comparison.read(path)) for path in args.refits])]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
