"""`diwa pipeline`: from play to fine-tuned policies and their report; what is up to date is skipped, what was cut off goes on."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from diwa_core.errors import ConfigError

RECIPE = Path(__file__).parents[2] / "config" / "pipeline.yaml"
EXIT_FAILED, EXIT_UNFINISHED, EXIT_INTERRUPTED = 1, 3, 130
_LINE_EVERY_S = 60.0  # between two lines of progress where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--out", default="runs/pipeline", help="root folder of everything the pipeline makes (default: %(default)s)")
    parser.add_argument("--recipe", default=str(RECIPE), help="YAML with the options of the stages (default: config/pipeline.yaml)")
    parser.add_argument("--size", default="small", help="size of the world model: small, paper or lowdim (default: %(default)s)")
    parser.add_argument("--skills", nargs="+", help="default: all eight")
    parser.add_argument("--seeds", nargs="+", type=int, help="training seeds (default: those of the recipe)")
    parser.add_argument("--device", help="cpu or cuda, for the stages that can use a GPU (default: what each command takes)")
    parser.add_argument("--workers", type=int, help="processes at a time (default: one per core)")
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", help="run these alone: 'finetune', 'finetune/seed1' or 'finetune/seed1/open_drawer'"
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this one")
    parser.add_argument("--max-minutes", type=float, help="stop in good order after so long (exit code 3); the same command goes on")
    parser.add_argument("--changed-code", action="store_true", help="run stages again whose code has changed since they finished")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run and why, and every command")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when all is up to date, 1 after a failed stage, 3 when the time was up, 130 after Ctrl-C."""
    from diwa_core.pipeline.recipe import Builder, load_recipe
    from diwa_core.pipeline.runner import plan
    from diwa_core.pipeline.stage import Action, Pipeline
    from diwa_core.sim.skills import SKILLS, check_skill

    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    if workers < 1:
        raise ConfigError(f"--workers: expected at least 1, found {workers}.")
    recipe = load_recipe(args.recipe, args.size)
    skills = tuple(check_skill(skill) for skill in args.skills or SKILLS)
    builder = Builder(recipe, args.size, skills, tuple(args.seeds or recipe.training_seeds), workers, args.device)
    pipeline = Pipeline(args.out, builder.stages(), args.changed_code)
    selected = select(pipeline.stages, args.only, args.until)
    decisions = plan(pipeline, selected)
    for stage, decision in decisions:
        if decision.action is not Action.SKIP:
            check_command(stage.words(pipeline.root), args.recipe)
    if args.dry_run:
        for stage, decision in decisions:
            print(f"{stage.name}: {decision}\n    {stage.show(pipeline.root)}")
        return 0
    return work(pipeline, selected, workers, args.max_minutes)


def work(pipeline, selected: list, workers: int, max_minutes: float | None) -> int:
    """Run, with progress on the terminal or a line each minute."""
    from rich.console import Console

    from diwa_core.pipeline.runner import Runner, StageFailed, show_seconds

    console = Console(soft_wrap=True, highlight=False, markup=False)
    began = time.monotonic()
    limit_s = 60 * max_minutes if max_minutes is not None else float("inf")
    told = [began]
    with console.status("") as status, noted_signals() as signals:

        def show_status(text: str) -> None:
            status.update(text)
            if not console.is_terminal and time.monotonic() - told[0] > _LINE_EVERY_S:
                told[0] = time.monotonic()
                console.print(f"    {text}")

        runner = Runner(
            pipeline,
            workers,
            console.print,
            should_stop=lambda: bool(signals) or time.monotonic() - began > limit_s,
            hurry=lambda: len(signals) > 1,
            show_status=show_status,
        )
        try:
            finished = runner.run(selected)
        except StageFailed as failure:
            console.print(f"diwa pipeline: {failure}\nFinished stages are kept: once it is mended, the same `diwa pipeline` goes on.")
            return EXIT_FAILED
    if finished:
        console.print(f"up to date: {len(selected)} stages in {pipeline.root}, {show_seconds(time.monotonic() - began)}")
        return 0
    console.print("stopped; the same `diwa pipeline` goes on")
    return EXIT_INTERRUPTED if signals else EXIT_UNFINISHED


def select(stages: list, only: list[str] | None, until: str | None) -> list:
    """Stages by name or by the beginning of it; raises ConfigError on a name that fits none."""
    groups = ", ".join(dict.fromkeys(stage.name.split("/")[0] for stage in stages))

    def fits(stage, name: str) -> bool:
        return f"{stage.name}/".startswith(f"{name.rstrip('/')}/")

    for name in [*(only or ()), *([until] if until else ())]:
        if not any(fits(stage, name) for stage in stages):
            raise ConfigError(f"expected a stage or a kind of stages ({groups}), found '{name}'.")
    if until:
        last = max(i for i, stage in enumerate(stages) if fits(stage, until))
        stages = stages[: last + 1]
    return [stage for stage in stages if not only or any(fits(stage, name) for name in only)]


def check_command(words: list[str], recipe: str) -> None:
    """Raise ConfigError when a `diwa` command has options its verb does not know, before hours of other stages have passed."""
    from diwa_core.cli.main import build_parser

    if words[0] != "diwa":
        return
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            build_parser(words[1]).parse_args(words[1:])
    except SystemExit:
        reason = complaint.getvalue().strip().splitlines()[-1]
        raise ConfigError(f"{recipe}: `{' '.join(words[:3])}` does not take these options: {reason}") from None


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Signals that ask to stop, as they come, instead of their effect."""
    signals: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda received, frame: signals.append(received)) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
