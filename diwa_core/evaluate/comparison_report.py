"""One self-contained HTML page about a comparison: base beside fine-tuned, each training seed, imagined beside real success."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from diwa_core.evaluate.comparison import Comparison, SeedResult, SkillComparison
from diwa_core.evaluate.page import build_page, make_table, rate_bar, show_gain, show_rate
from diwa_core.evaluate.statistics import compare_paired, success_rate


def write_comparison_report(path: str | Path, comparison: Comparison, command: str, more: Sequence[str] = ()) -> Path:
    """Write the page and return its path. command: what was typed to make it; more: sections that follow the table, HTML."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(build_comparison_report(comparison, command, more), encoding="utf-8")
    return path


def build_comparison_report(comparison: Comparison, command: str, more: Sequence[str] = ()) -> str:
    """The page as one string."""
    sections = [
        _headline(comparison),
        _skill_section(comparison),
        *more,
        _seed_section(comparison.skills),
        _imagined_section(comparison.skills),
        _provenance_section(comparison, command),
    ]
    return build_page("Base and fine-tuned policies on the same starts", sections)


def show_steps(steps: int | None) -> str:
    """Environment steps, or that nobody stated them."""
    return "not stated" if steps is None else f"{steps:,}"


def list_doubts(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the table, one sentence each."""
    strangers = [f"{row.skill} (seed {seed.training_seed})" for row in comparison.skills for seed in row.seeds if seed.descends is False]
    unstated = [row.skill for row in comparison.skills if row.environment_steps is None]
    doubts = [f"Not fine-tuned from the base beside it: {', '.join(strangers)}."] if strangers else []
    return doubts + (
        [f"Environment steps of the fine-tuning are not stated by the checkpoints of {', '.join(unstated)}."] if unstated else []
    )


def _headline(comparison: Comparison) -> str:
    base, tuned, gain = comparison.base, comparison.finetuned, comparison.gain
    seeds = len(comparison.skills[0].seeds)
    how = (
        f"{len(comparison.skills)} skills, {seeds} training seed{'s' if seeds > 1 else ''}, {comparison.starts} starts of the "
        f"{comparison.split} split each, at most {comparison.max_steps} steps, noise seed {comparison.noise_seed}, run by the "
        f"{comparison.runner}; success judged by the simulator's oracle."
    )
    doubts = "".join(f"<p>{escape(doubt)}</p>" for doubt in list_doubts(comparison))
    return (
        f'<p class="headline"><b>{100 * base.value:.1f} % → {100 * tuned.value:.1f} %</b> mean success, {show_gain(gain)} points.</p>'
        f'<p class="quiet">{escape(how)}</p>{doubts}'
    )


def _skill_section(comparison: Comparison) -> str:
    rows = [
        [
            f"<b>{escape(row.skill)}</b>",
            rate_bar(row.finetuned, row.base),
            show_rate(row.base),
            show_gain(row.gain),
            show_steps(row.environment_steps),
        ]
        for row in comparison.skills
    ]
    total = [
        [
            "<b>mean of skills</b>",
            rate_bar(comparison.finetuned, comparison.base),
            show_rate(comparison.base),
            show_gain(comparison.gain),
            "",
        ]
    ]
    legend = (
        "In per cent with 95 % intervals. Both policies of a pair get the same starts and the same noise. Rates: Wilson; gain: Tango for "
        "paired outcomes; training seeds share their starts, so both are taken at the effective number of episodes (Rao and Scott). "
        "They are about other starts, for these training seeds; the spread over seeds is below. Mean: MOVER, skills weigh the same. "
        "The grey bar is the base. Environment steps: what the fine-tuning spent on the robot or simulator, as its checkpoint states; "
        "the most of any seed."
    )
    head = ["skill", "fine-tuned", "base", "gain", "environment steps"]
    return f'<h2>Success</h2>{make_table(head, rows, total)}<p class="quiet">{legend}</p>'


def _seed_section(skills: list[SkillComparison]) -> str:
    rows = [_seed_row(row.skill, seed) for row in skills for seed in row.seeds]
    head = ["skill", "training seed", "fine-tuned", "base", "gain", "won / lost starts", "p"]
    legend = "Each pair by itself: Wilson and Tango intervals, exact McNemar p-value of no difference."
    return f'<h2>Training seeds</h2>{make_table(head, rows)}<p class="quiet">{legend}</p>'


def _seed_row(skill: str, seed: SeedResult) -> list[str]:
    base, tuned = (success_rate(sum(side.success), len(side.success)) for side in (seed.base, seed.finetuned))
    paired = compare_paired(seed.base.success, seed.finetuned.success)
    return [
        f"<b>{escape(skill)}</b>",
        "" if seed.training_seed is None else str(seed.training_seed),
        show_rate(tuned),
        show_rate(base),
        show_gain(paired.difference),
        f"{paired.gained} / {paired.lost}",
        f"{paired.p_value:.2g}",
    ]


def _imagined_section(skills: list[SkillComparison]) -> str:
    stated = [row for row in skills if row.imagined("after") is not None]
    if not stated:
        return '<h2>Imagined and real</h2><p class="quiet">No checkpoint states its success in imagination.</p>'
    rows = [
        [
            f"<b>{escape(row.skill)}</b>",
            *(_percent(value) for value in (row.imagined("before"), row.base.value, row.imagined_error("before"))),
            *(_percent(value) for value in (row.imagined("after"), row.finetuned.value, row.imagined_error("after"))),
            escape(row.start_bank),
        ]
        for row in stated
    ]
    head = ["skill", "base imagined", "real", "|difference|", "fine-tuned imagined", "real", "|difference|", "imagined from"]
    legend = (
        "In per cent, means over training seeds; |difference|: mean over seeds of |imagined − real|. "
        "Imagined success as the checkpoint states it."
    )
    return f'<h2>Imagined and real</h2>{make_table(head, rows)}<p class="quiet">{legend}</p>'


def _percent(value: float | None) -> str:
    return "not stated" if value is None else f"{100 * value:.0f}"


def _provenance_section(comparison: Comparison, command: str) -> str:
    rows = [
        [
            f"<b>{escape(row.skill)}</b>",
            name,
            f"<code>{escape(side.policy)}</code>",
            f'<code title="{escape(side.identity)}">{escape(side.identity[:16])}</code>',
        ]
        for row in comparison.skills
        for seed in row.seeds
        for name, side in (("base", seed.base), ("fine-tuned", seed.finetuned))
    ]
    return (
        f"<h2>How to repeat it</h2><pre>{escape(command)}</pre>"
        f"<dl><dt>world model</dt><dd><code>{escape(comparison.world_model[:16])}</code></dd></dl>"
        + make_table(["skill", "policy", "checkpoint", "identity"], rows)
    )
