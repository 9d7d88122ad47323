"""One self-contained HTML page about a demo or an evaluation: success, latency, what the camera saw beside what the model predicted."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import cv2
import numpy as np

from diwa_core.errors import DataError
from diwa_core.evaluate.report_style import STYLE
from diwa_core.evaluate.statistics import Estimate, compare_paired, pool_mean, success_rate, summarise

WEBP_QUALITY = 88
MAX_LISTED_EPISODES = 12
BAR_WIDTH = 200  # in the units of the pictures; on the page the style sheet decides


@dataclass
class SkillResult:
    """Episodes of one skill. base_outcomes: the base policy on the same starts, where it ran; reference: rate of the model card."""

    skill: str
    outcomes: list[bool]
    steps: list[int]
    base_outcomes: list[bool] | None = None
    reference: Estimate | None = None


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
        _success_section(result.skills),
        _latency_section(result.latencies_ms, result.tick_ms),
        _strip_section(result.strips),
        _provenance_section(result),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(result.title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(result.title)}</h1>\n{_headline(result)}\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _headline(result: DemoResult) -> str:
    run = [skill for skill in result.skills if skill.outcomes]
    successes, episodes = sum(sum(skill.outcomes) for skill in run), sum(len(skill.outcomes) for skill in run)
    when = f"{escape(result.started)}, {result.duration_s:.0f} s, seed {result.seed}"
    notes = "".join(f"<p>{escape(note)}</p>" for note in result.notes)
    return f'<p class="headline"><b>{successes} of {episodes}</b> episodes succeeded.</p><p class="quiet">{when}</p>{notes}'


def _success_section(skills: list[SkillResult]) -> str:
    compared = any(skill.base_outcomes is not None for skill in skills)
    referenced = any(skill.reference is not None for skill in skills)
    columns = ["rate", *(["base", "gain"] if compared else []), *(["model card"] if referenced else [])]
    rows: list[list[str]] = []
    measured: list[dict[str, Estimate]] = []
    for skill in skills:
        if not skill.outcomes:
            rows.append([escape(skill.skill), "not run", *[""] * (len(columns) + 1)])
            continue
        measured.append(_estimates(skill))
        count = f"{sum(skill.outcomes)}/{len(skill.outcomes)}"
        rows.append([f"<b>{escape(skill.skill)}</b>", count, *_estimate_cells(measured[-1], columns), _episodes(skill)])
    complete = [name for name in columns if measured and all(name in row for row in measured)]
    mean = {name: pool_mean({str(i): row[name] for i, row in enumerate(measured)}) for name in complete}
    total = [["<b>mean of skills</b>", "", *_estimate_cells(mean, columns), ""]]
    table = _table(["skill", "success", *columns, "steps"], rows, total)
    paired = ", Tango for the gain on the same starts" if compared else ""
    legend = f"In per cent with 95 % intervals: Wilson for a rate{paired}, MOVER for the mean (skills weigh the same). "
    legend += ("The grey bar is the base policy. " if compared else "") + "Steps: policy steps until success; × failed."
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
    if skill.reference is not None:
        found["model card"] = skill.reference
    return found


def _estimate_cells(estimates: dict[str, Estimate], columns: list[str]) -> list[str]:
    if "rate" not in estimates:
        return [""] * len(columns)
    cells = {name: _rate(estimate) for name, estimate in estimates.items()}
    cells["rate"] = _interval_cell(estimates["rate"], estimates.get("base"))
    if "gain" in estimates:
        gain = estimates["gain"]
        cells["gain"] = _figure_with_interval(f"{100 * gain.value:+.0f}", f"{100 * gain.low:+.0f} to {100 * gain.high:+.0f}")
    return [cells.get(name, "") for name in columns]


def _rate(estimate: Estimate) -> str:
    return _figure_with_interval(f"{100 * estimate.value:.0f} %", f"{100 * estimate.low:.0f}–{100 * estimate.high:.0f}")


def _figure_with_interval(figure: str, interval: str) -> str:
    return f'{figure} <span class="quiet">{interval}</span>'


def _interval_cell(rate: Estimate, base: Estimate | None) -> str:
    """A bar with the interval as a band; the base policy, where there is one, as a thinner bar below."""
    bars = _interval_bar(rate, 3, 16, "rate") + ("" if base is None else _interval_bar(base, 21, 7, "base"))
    return f'<div class="cell">{_bar(22 if base is None else 30, str(rate), bars)}<span>{_rate(rate)}</span></div>'


def _interval_bar(rate: Estimate, top: int, height: int, style: str) -> str:
    low, high, middle = BAR_WIDTH * rate.low, BAR_WIDTH * rate.high, top + height / 2
    whisker = f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6"
    return _rectangle("track", top, height, BAR_WIDTH) + _rectangle(style, top, height, BAR_WIDTH * rate.value) + _line("whisker", whisker)


def _bar(height: int, title: str, shapes: str) -> str:
    """An inline picture as wide as the style sheet says: bars may be squeezed, line widths stay."""
    view = f'viewBox="0 0 {BAR_WIDTH} {height}" height="{height}" preserveAspectRatio="none"'
    return f'<svg class="bar" {view} role="img"><title>{escape(title)}</title>{shapes}</svg>'


def _rectangle(style: str, top: int, height: int, width: float) -> str:
    return f'<rect class="{style}" x="0" y="{top}" width="{width:.1f}" height="{height}"/>'


def _line(style: str, path: str) -> str:
    return f'<path class="{style}" d="{path}" vector-effect="non-scaling-stroke"/>'


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
            _rectangle("track", 3, 16, BAR_WIDTH) + _rectangle("light", 3, 16, row.p99 * scale) + _rectangle("fill", 3, 16, row.p50 * scale)
        )
        bar = _bar(22, f"p50 {row.p50:.1f} ms, p99 {row.p99:.1f} ms", shapes + _line("tick", f"M{tick_ms * scale:.1f} 0v22"))
        rows.append(
            [f"<b>{escape(stage)}</b>", *(f"{value:.1f}" for value in (row.p50, row.p95, row.p99, row.largest)), bar, f"{row.count:,}"]
        )
    legend = f"Milliseconds. Dark: p50, light: p99, line: one control tick ({tick_ms:.1f} ms)."
    return f'<h2>Latency</h2>{_table(["stage", "p50", "p95", "p99", "max", "", "samples"], rows)}<p class="quiet">{legend}</p>'


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
    listed = _table(["checkpoint", "kind", "identity"], checkpoints) if checkpoints else ""
    return (
        f"<h2>How to repeat it</h2><pre>{escape(result.command)}</pre>{listed}"
        f"<dl><dt>seed</dt><dd>{result.seed}</dd><dt>started</dt><dd>{escape(result.started)}</dd>{machine}</dl>"
    )


def _table(head: list[str], rows: list[list[str]], total: list[list[str]] | None = None) -> str:
    """Cells are HTML already."""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)

    def body(lines: list[list[str]]) -> str:
        return "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)

    foot = f"<tfoot>{body(total)}</tfoot>" if total else ""
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body(rows)}</tbody>{foot}</table></div>'
