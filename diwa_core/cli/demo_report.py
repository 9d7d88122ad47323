"""From the record of a demo to its HTML page."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diwa_core.checkpoint import Checkpoint, load_checkpoint
from diwa_core.cli.demo_view import describe_sides
from diwa_core.evaluate.report import CheckpointEntry, DemoResult, ImageStrip, SkillResult, write_report
from diwa_core.evaluate.statistics import Estimate
from diwa_core.evaluate.strips import open_loop_strips
from diwa_core.world_model.model import WorldModel

if TYPE_CHECKING:
    from diwa_ros.demo import DemoPlan, DemoRecord, SkillRecord


def make_report(path: Path, record: DemoRecord, plan: DemoPlan, command: str, model: WorldModel, world_model: Checkpoint) -> Path:
    """Write the page and return its path. Raises CheckpointError when a policy cannot be read."""
    found = [load_checkpoint(file, "policy") for file in sorted((plan.checkpoint / "policies").iterdir())]
    base = {policy.config["skill"]: policy for policy in found if policy.config["skill"] in record.skills}
    tuned = {name: load_checkpoint(plan.finetuned(name), "policy") for name, skill in record.skills.items() if skill.compared}
    result = DemoResult(
        title="DiWA demo: skills in simulation through the ROS 2 graph",
        command=command,
        seed=plan.seed,
        started=record.started,
        duration_s=record.ready_s + record.run_s,
        skills=[skill_row(skill, base[name], tuned.get(name)) for name, skill in record.skills.items()],
        latencies_ms={stage: values for stage, values in record.latencies_ms.items() if values},
        tick_ms=1e3 * world_model.contract.step_s,
        strips=[strip for skill in record.skills.values() for strip in skill_strips(skill, model)],
        checkpoints=[
            CheckpointEntry("world_model", world_model.kind, world_model.identity),
            *(CheckpointEntry(name, policy.kind, policy.identity) for name, policy in base.items()),
            *(CheckpointEntry(f"{name}, fine-tuned", policy.kind, policy.identity) for name, policy in tuned.items()),
        ],
        machine=describe_machine(),
        notes=make_notes(record, plan),
    )
    return write_report(path, result)


def skill_row(skill: SkillRecord, base: Checkpoint, tuned: Checkpoint | None) -> SkillResult:
    """Outcomes beside the rates of the model cards; of the fine-tuned policy beside its base where there is one."""
    before, shown = next(iter(skill.results.values())), skill.results[skill.shown]
    outcomes, steps = [r.success for r in shown], [r.steps for r in shown]
    if tuned is None:
        return SkillResult(skill.skill, outcomes, steps, reference=card_rate(base.card))
    return SkillResult(skill.skill, outcomes, steps, [r.success for r in before], card_rate(tuned.card), card_rate(base.card))


def card_rate(card: dict) -> Estimate | None:
    """The success rate that `diwa evaluate --write-card` left in a model card, or None."""
    stated = card.get("success_evaluation")
    return Estimate(stated["success"], stated["low"], stated["high"]) if stated else None


def skill_strips(skill: SkillRecord, model: WorldModel) -> list[ImageStrip]:
    """One strip per camera of the recorded episode; none where frames were missing, which `make_notes` says."""
    if skill.recording is None:
        return []
    result = skill.results[skill.shown][skill.recorded - 1]
    outcome = f"success after {result.steps} steps" if result.success else f"failed after {result.steps} steps"
    return open_loop_strips(model, skill.recording, f"{skill.skill}, {skill.shown} policy, episode {skill.recorded} ({outcome})")


def make_notes(record: DemoRecord, plan: DemoPlan) -> list[str]:
    """How it was run and how to read it."""
    mode = "in real time at 30 Hz" if plan.real_time else "in lock-step: the simulation waits for every command"
    unrecorded = [name for name, skill in record.skills.items() if skill.recording is None]
    return [
        f"The graph ran {mode}; {record.ticks} ticks in {record.run_s:.0f} s ({record.ticks / record.run_s:.0f} per second), "
        f"ready {record.ready_s:.0f} s after its start.",
        "Latencies are differences of the times at which messages were sent. Most commands come from the chunk at hand and need not wait; "
        "'executed' is known when the next tick begins, so it contains the simulation's own step.",
        *describe_comparison(record),
        f"With {plan.episodes} episodes of each skill the intervals are wide; `diwa evaluate` runs a hundred.",
        *([f"No strip of {', '.join(unrecorded)}: frames did not arrive here."] if unrecorded else []),
    ]


def describe_comparison(record: DemoRecord) -> list[str]:
    """How base and fine-tuned policies were compared, and where they were not."""
    alone = describe_sides(record)
    notes = [alone[0].upper() + alone[1:]] if alone else []
    if record.swap_ms:
        swaps = f"{len(record.swap_ms)} swaps, {np.median(record.swap_ms):.0f} ms each in the median"
        notes.append(
            f"Each fine-tuned policy was loaded into the running graph after its base ({swaps}) and got the same starts and noise."
        )
    return notes


def describe_machine() -> dict[str, str]:
    """What the figures depend on; the load tells whether something else was running."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{cpu or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory_gib:.0f} GiB",
        "load (1 minute)": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}",
        "ROS": f"{os.environ.get('ROS_DISTRO', 'jazzy (wheels)')}, domain {os.environ.get('ROS_DOMAIN_ID', '0')}",
    }
