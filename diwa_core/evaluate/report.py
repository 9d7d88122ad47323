"""One self-contained HTML page about a demo or an evaluation: success, latency, what the camera saw beside what the model predicted."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import cv2
import numpy as np

from diwa_core.errors import DataError
from diwa_core.evaluate.page import BAR_WIDTH, build_page, draw_line, draw_rectangle, make_bar, make_table, rate_bar, show_gain, show_rate
from diwa_core.evaluate.statistics import Estimate, compare_paired, pool_mean, success_rate, summarise

WEBP_QUALITY = 88
MAX_LISTED_EPISODES = 12


@dataclass
class SkillResult:
    """Episodes of one skill.

    outcomes, steps: of the fine-tuned policy where there is a base beside it, else of the only one; base_outcomes: the base policy on the
    same starts; reference, base_reference: rates of their model cards.
    """

    skill: str
    outcomes: list[bool]
    steps: list[int]
    base_outcomes: list[bool] | None = None
    reference: Estimate | None = None
    base_reference: Estimate | None = None


@dataclass
class ImageStrip:
    """Frames of one episode. camera, predicted: uint8 [N, H, W, 3]; labels: one per frame; caption: how the prediction was made."""

    title: str
    caption: str
    camera: np.ndarray
    predicted: np.ndarray
    labels: list[str]


@dataclass
class CheckpointEntry:
    """A checkpoint that took part."""

    name: str
    kind: str
    identity: str


@dataclass
class DemoResult:
    """Everything the page shows. latencies_ms: stage -> measurements; machine: name -> value; notes: sentences, shown as they are."""

    title: str
    command: str
    seed: int
    started: str
    duration_s: float
    skills: list[SkillResult]
    latencies_ms: dict[str, list[float]] = field(default_factory=dict)
    tick_ms: float = 1000 / 30
    strips: list[ImageStrip] = field(default_factory=list)
    checkpoints: list[CheckpointEntry] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_report(path: str | Path, result: DemoResult) -> Path:
    """Write the page and return its path. Raises DataError as `build_report` does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(build_report(result), encoding="utf-8")
    return path


def build_report(result: DemoResult) -> str:
    """The page as one string: no scripts, no outside files. Raises DataError where outcomes or frames do not fit together."""
    sections = [
        _headline(result),
        _success_section(result.skills),
        _latency_section(result.latencies_ms, result.tick_ms),
        _strip_section(result.strips),
        _provenance_section(result),
    ]
    return build_page(result.title, sections)


def _headline(result: DemoResult) -> str:
    run = [skill for skill in result.skills if skill.outcomes]
    successes, episodes = sum(sum(skill.outcomes) for skill in run), sum(len(skill.outcomes) for skill in run)
    when = f"{escape(result.started)}, {result.duration_s:.0f} s, seed {result.seed}"
    notes = "".join(f"<p>{escape(note)}</p>" for note in result.notes)
    headline = f"<b>{successes} of {episodes}</b> episodes succeeded."
    pairs = [(sum(skill.base_outcomes), sum(skill.outcomes), len(skill.outcomes)) for skill in run if skill.base_outcomes is not None]
    if pairs:
        base, tuned, count = (sum(column) for column in zip(*pairs, strict=True))
        headline = f"<b>{tuned} of {count}</b> episodes succeeded after fine-tuning, <b>{base} of {count}</b> from the same starts before."
    return f'<p class="headline">{headline}</p><p class="quiet">{when}</p>{notes}'


def _success_section(skills: list[SkillResult]) -> str:
    compared = any(skill.base_outcomes is not None for skill in skills)
    cards = {"model card": "reference", "base's card": "base_reference"}
    referenced = [column for column, name in cards.items() if any(getattr(skill, name) is not None for skill in skills)]
    columns = ["rate", *(["base", "gain"] if compared else []), *referenced]
    rows: list[list[str]] = []
    measured: list[dict[str, Estimate]] = []
    for skill in skills:
        if not skill.outcomes:
            rows.append([escape(skill.skill), "not run", *[""] * (len(columns) + 1)])
            continue
        measured.append(_estimates(skill))
        count = f"{sum(skill.outcomes)}/{len(skill.outcomes)}"
        name = f"<b>{escape(skill.skill)}</b>"
        name += ' <span class="quiet">base only</span>' if compared and skill.base_outcomes is None else ""
        rows.append([name, count, *_estimate_cells(measured[-1], columns), _episodes(skill)])
    complete = [name for name in columns if measured and all(name in row for row in measured)]
    mean = {name: pool_mean({str(i): row[name] for i, row in enumerate(measured)}) for name in complete}
    mixed = compared and "gain" not in complete  # a mean over fine-tuned policies and bases says nothing
    total = [] if mixed else [["<b>mean of skills</b>", "", *_estimate_cells(mean, columns), ""]]
    table = make_table(["skill", "success", *columns, "steps"], rows, total)
    paired = ", Tango for the gain on the same starts" if compared else ""
    legend = f"In per cent with 95 % intervals: Wilson for a rate{paired}, MOVER for the mean (skills weigh the same). "
    legend += "Rate: the fine-tuned policy; the grey bar is its base. " if compared else ""
    legend += "Steps: policy steps until success; × failed."
    return f'<h2>Success</h2>{table}<p class="quiet">{legend}</p>'


def _estimates(skill: SkillResult) -> dict[str, Estimate]:
    """What is known of a skill, by the name of its column."""
    found = {"rate": success_rate(sum(skill.outcomes), len(skill.outcomes))}
    if skill.base_outcomes is not None:
        if len(skill.base_outcomes) != len(skill.outcomes):
            found_count, expected = len(skill.base_outcomes), len(skill.outcomes)
            raise DataError(f"{skill.skill}: expected base outcomes on the same {expected} starts, found {found_count}.")
        found["base"] = success_rate(sum(skill.base_outcomes), len(skill.base_outcomes))
        found["gain"] = compare_paired(skill.base_outcomes, skill.outcomes).difference
    cards = {"model card": skill.reference, "base's card": skill.base_reference}
    return found | {name: rate for name, rate in cards.items() if rate is not None}


def _estimate_cells(estimates: dict[str, Estimate], columns: list[str]) -> list[str]:
    if "rate" not in estimates:
        return [""] * len(columns)
    cells = {name: show_rate(estimate) for name, estimate in estimates.items()}
    cells["rate"] = rate_bar(estimates["rate"], estimates.get("base"))
    if "gain" in estimates:
        cells["gain"] = show_gain(estimates["gain"])
    return [cells.get(name, "") for name in columns]


def _episodes(skill: SkillResult) -> str:
    """Each episode's steps where there are few of them, else the median of the successes."""
    if len(skill.steps) != len(skill.outcomes):
        raise DataError(f"{skill.skill}: expected steps of {len(skill.outcomes)} episodes, found {len(skill.steps)}.")
    pairs = list(zip(skill.outcomes, skill.steps, strict=True))
    if len(pairs) <= MAX_LISTED_EPISODES:
        return " ".join(f'<span class="yes">{steps}</span>' if success else '<span class="no">×</span>' for success, steps in pairs)
    wins = [steps for success, steps in pairs if success]
    return f"median {np.median(wins):.0f}" if wins else "none"


def _latency_section(latencies_ms: dict[str, list[float]], tick_ms: float) -> str:
    if not latencies_ms:
        return '<h2>Latency</h2><p class="quiet">Not measured in this run.</p>'
    measured = {stage: summarise(values) for stage, values in latencies_ms.items()}
    scale = BAR_WIDTH / max(tick_ms * 1.05, max(row.p99 for row in measured.values()))
    rows = []
    for stage, row in measured.items():
        shapes = (
            draw_rectangle("track", 3, 16, BAR_WIDTH)
            + draw_rectangle("light", 3, 16, row.p99 * scale)
            + draw_rectangle("fill", 3, 16, row.p50 * scale)
        )
        bar = make_bar(22, f"p50 {row.p50:.1f} ms, p99 {row.p99:.1f} ms", shapes + draw_line("tick", f"M{tick_ms * scale:.1f} 0v22"))
        rows.append(
            [f"<b>{escape(stage)}</b>", *(f"{value:.1f}" for value in (row.p50, row.p95, row.p99, row.largest)), bar, f"{row.count:,}"]
        )
    legend = f"Milliseconds. Dark: p50, light: p99, line: one control tick ({tick_ms:.1f} ms)."
    return f'<h2>Latency</h2>{make_table(["stage", "p50", "p95", "p99", "max", "", "samples"], rows)}<p class="quiet">{legend}</p>'


def _strip_section(strips: list[ImageStrip]) -> str:
    if not strips:
        return '<h2>Camera and world model</h2><p class="quiet">No frames were recorded in this run.</p>'
    intro = (
        "Top: what the camera saw. Middle: what the world model predicted. Bottom: the difference, darker where larger (amplified twice)."
    )
    return f'<h2>Camera and world model</h2><p class="quiet">{intro}</p>' + "".join(_figure(strip) for strip in strips)


def _figure(strip: ImageStrip) -> str:
    image = base64.b64encode(_encode_strip(strip)).decode()
    labels = "".join(f"<span>{escape(label)}</span>" for label in strip.labels)
    caption = f'<figcaption><b>{escape(strip.title)}</b> <span class="quiet">{escape(strip.caption)}</span></figcaption>'
    picture = f'<img alt="camera, prediction and error: {escape(strip.title)}" src="data:image/webp;base64,{image}">'
    return f'<figure>{caption}<div class="scroll"><div class="strip">{picture}<div class="labels">{labels}</div></div></div></figure>'


def _encode_strip(strip: ImageStrip) -> bytes:
    """Camera above prediction above error, frames from left to right, as WebP."""
    camera, predicted = np.asarray(strip.camera), np.asarray(strip.predicted)
    for name, frames in (("camera", camera), ("predicted", predicted)):
        if frames.dtype != np.uint8 or frames.shape != camera.shape or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
            raise DataError(
                f"strip '{strip.title}', {name}: expected uint8 [N, H, W, 3] of one shape, found {frames.dtype} {frames.shape}."
            )
    if len(strip.labels) != len(camera):
        raise DataError(f"strip '{strip.title}': expected {len(camera)} labels, found {len(strip.labels)}.")
    error = np.abs(camera.astype(np.int16) - predicted).mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    shown = (255 - 2 * error).clip(0, 255).astype(np.uint8)
    rows = [np.concatenate([*frames], axis=1) for frames in (camera, predicted, shown)]
    picture = cv2.cvtColor(np.concatenate(rows), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])[1].tobytes()


def _provenance_section(result: DemoResult) -> str:
    checkpoints = [
        [f"<b>{escape(entry.name)}</b>", escape(entry.kind), f'<code title="{escape(entry.identity)}">{escape(entry.identity[:16])}</code>']
        for entry in result.checkpoints
    ]
    machine = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in result.machine.items())
    listed = make_table(["checkpoint", "kind", "identity"], checkpoints) if checkpoints else ""
    return (
        f"<h2>How to repeat it</h2><pre>{escape(result.command)}</pre>{listed}"
        f"<dl><dt>seed</dt><dd>{result.seed}</dd><dt>started</dt><dd>{escape(result.started)}</dd>{machine}</dl>"
    )
