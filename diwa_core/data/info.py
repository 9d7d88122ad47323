"""What is in a play store, as one self-contained HTML page: episodes, actions, marks, thumbnails, and what the import left out."""

from __future__ import annotations

import base64
from collections import Counter
from html import escape
from pathlib import Path

import cv2
import numpy as np

from diwa_core.data.bag_import import read_ledger
from diwa_core.data.store import FAILURE, SUCCESS, UNMARKED, PlayStore
from diwa_core.evaluate.page import build_page, make_table
from diwa_core.sim.skills import SKILLS

ACTIONS = ("dx", "dy", "dz", "d roll", "d pitch", "d yaw", "gripper")
BINS, WIDTH, HEIGHT = 41, 220, 60
MAX_ROWS = 200  # episodes in the table; of longer stores they are chosen evenly
THUMBNAILS = 24
MARK_NAMES = {SUCCESS: "success", FAILURE: "failure", UNMARKED: "–"}


def describe_store(store: PlayStore) -> str:
    """One line: frames, duration, episodes, marks."""
    marks = Counter(store.marks)
    marked = ", ".join(f"{marks[mark]} {MARK_NAMES[mark]}" for mark in (SUCCESS, FAILURE) if marks[mark]) or "no marks"
    rate_hz = store.contract.rate_hz
    length = f"{len(store)} frames ({len(store) / rate_hz / 60:.1f} min at {rate_hz:g} Hz)"
    return f"{store.path}: {length} in {len(store.episodes)} episodes, {marked}"


def write_report(store: PlayStore, out: str | Path) -> None:
    """Write the page to `out`. Raises DataError when the store cannot be read."""
    sections = [f'<p class="headline">{escape(describe_store(store))}</p>', _describe(store)]
    if len(store):
        sections += [
            _duration_section(store),
            _action_section(store),
            _skill_section(store),
            _thumbnail_section(store),
            _episode_section(store),
        ]
    ledger = read_ledger(store.path)
    if ledger:
        sections.append(_import_section(ledger))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(build_page(f"Play store {store.path.name}", sections))


def _describe(store: PlayStore) -> str:
    contract = store.contract
    entries = {
        "contract": f"{contract.name}, version {contract.version}, {contract.identity}",
        "cameras": ", ".join(f"{stream.name} {stream.height} x {stream.width}" for stream in contract.images),
        "fields": ", ".join(store.fields),
        "made with": ", ".join(f"{key} {value}" for key, value in store.settings.items()) or "–",
        "content": store.content_hash,
    }
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries.items()) + "</dl>"


def _duration_section(store: PlayStore) -> str:
    seconds = np.array([end - start for start, end in store.episodes]) / store.contract.rate_hz
    counts, edges = np.histogram(seconds, bins=min(30, max(5, len(seconds))))
    low, middle, high = np.percentile(seconds, [0, 50, 100])
    chart = _draw_histogram(counts, f"{edges[0]:.1f} s", f"{edges[-1]:.1f} s", "episodes by duration")
    return f"<h2>Durations</h2><p>shortest {low:.1f} s, median {middle:.1f} s, longest {high:.1f} s</p>{chart}"


def _action_section(store: PlayStore) -> str:
    actions = store.load(("actions",))["actions"]
    cells = []
    for index, name in enumerate(ACTIONS):
        counts, _ = np.histogram(np.clip(actions[:, index], -1, 1), BINS, (-1, 1))
        values = f"mean {actions[:, index].mean():+.3f}, spread {actions[:, index].std():.3f}"
        outside = (np.abs(actions[:, index]) > 1).mean()
        values += f", {100 * outside:.1f} % outside [-1, 1]" if outside else ""
        cells.append([f"<b>{name}</b>", _draw_histogram(counts, "-1", "+1", f"action {name}"), escape(values)])
    rest = (np.abs(actions[:, :6]).max(1) < 1e-3).mean()
    return f"<h2>Actions</h2><p>{100 * rest:.1f} % of the frames are at rest</p>" + make_table(["", "share of frames", ""], cells)


def _skill_section(store: PlayStore) -> str:
    if "skill" not in store.fields:
        return ""
    skill = store.load(("skill",))["skill"]
    last = [skill[end - 1] for _, end in store.episodes]
    rows = []
    for number, name in enumerate(SKILLS):
        marks = Counter(mark for mark, label in zip(store.marks, last, strict=True) if label == number)
        rows.append([escape(name), f"{int((skill == number).sum())}", str(sum(marks.values())), str(marks[SUCCESS]), str(marks[FAILURE])])
    return "<h2>Skills</h2>" + make_table(["skill", "frames", "episodes that end in it", "marked success", "marked failure"], rows)


def _thumbnail_section(store: PlayStore) -> str:
    """First, middle and last picture of episodes."""
    figures = []
    for number in _choose(len(store.episodes), THUMBNAILS):
        start, end = store.episodes[number]
        rows = []
        for view in ("rgb_static", "rgb_gripper"):
            rows.append(np.concatenate([store.read(view, n, n + 1)[0] for n in (start, (start + end - 1) // 2, end - 1)], 1))
        picture = cv2.imencode(".png", np.concatenate(rows)[:, :, ::-1])[1].tobytes()
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        text = f"episode {number}: first, middle and last frame"
        caption = f"{number} <span class='quiet'>{MARK_NAMES.get(store.marks[number], '?')}</span>"
        image = f'<img src="{source}" alt="{text}" width="192" height="128">'
        figures.append(f'<figure style="margin:0">{image}<figcaption>{caption}</figcaption></figure>')
    return (
        "<h2>Episodes in pictures</h2><p class='quiet'>first, middle and last frame of both cameras</p>"
        f'<div style="display:flex;flex-wrap:wrap;gap:.75rem">{"".join(figures)}</div>'
    )


def _episode_section(store: PlayStore) -> str:
    marks, rate_hz, rows = store.marks, store.contract.rate_hz, []
    for number in _choose(len(store.episodes), MAX_ROWS):
        start, end = store.episodes[number]
        low = store.read("robot_obs", start, end)
        path_m = float(np.linalg.norm(np.diff(low[:, :3], axis=0), axis=1).sum())
        finite = "yes" if np.isfinite(low).all() else '<span class="no">no</span>'
        rows.append(
            [
                str(number),
                str(end - start),
                f"{(end - start) / rate_hz:.1f} s",
                f"{path_m:.2f} m",
                finite,
                MARK_NAMES.get(marks[number], "?"),
            ]
        )
    shown = "" if len(rows) == len(store.episodes) else f"<p class='quiet'>{len(rows)} of {len(store.episodes)}, chosen evenly</p>"
    return "<h2>Episodes</h2>" + shown + make_table(["episode", "frames", "duration", "path of the hand", "finite", "mark"], rows)


def _import_section(ledger: list[dict]) -> str:
    rows, notes = [], []
    for entry in ledger:
        frames = max(1, entry["frames"])
        rate = f"{(entry['frames'] - 1) / entry['duration_s']:.2f} Hz" if entry["duration_s"] else "–"
        bad = [take for take in entry["takes"] if take["bad"]]
        cells = [entry["bag"], f"{entry['duration_s']:.1f} s", rate, str(entry["frames"]), str(entry["kept"])]
        cells += [
            f"{100 * entry['idle'] / frames:.1f} %",
            str(entry["lost"]),
            str(entry["incomplete"]),
            str(entry["episodes"]),
            str(len(bad)),
        ]
        rows.append([escape(cell) for cell in cells])
        texts = [*entry["notes"], *(f"a take of {take['frames']} frames was left out: {take['bad']}" for take in bad)]
        texts += [f"{topic}: {refused['count']} messages refused: {refused['reason']}" for topic, refused in entry["refused"].items()]
        notes += [f"<p><b>{escape(entry['bag'])}</b>: {escape(text)}</p>" for text in texts]
    head = ["bag", "duration", "rate", "frames", "kept", "idle", "lost", "incomplete", "episodes", "bad takes"]
    return "<h2>Bags</h2>" + make_table(head, rows) + "".join(notes)


def _draw_histogram(counts: np.ndarray, left: str, right: str, title: str) -> str:
    """Bars as high as their share of the largest one."""
    step, top = WIDTH / len(counts), max(1, int(counts.max()))
    bars = "".join(
        f'<rect class="fill" x="{index * step:.1f}" y="{HEIGHT - height:.1f}" width="{step - 0.6:.1f}" height="{height:.1f}"/>'
        for index, height in enumerate(HEIGHT * counts / top)
        if height
    )
    size = f'viewBox="0 0 {WIDTH} {HEIGHT + 14}" width="{WIDTH}" height="{HEIGHT + 14}"'
    labels = f'<text x="0" y="{HEIGHT + 12}" font-size="10">{escape(left)}</text>'
    labels += f'<text x="{WIDTH}" y="{HEIGHT + 12}" font-size="10" text-anchor="end">{escape(right)}</text>'
    return f'<svg {size} role="img"><title>{escape(title)}</title>{bars}{labels}</svg>'


def _choose(count: int, most: int) -> list[int]:
    """Up to `most` of `count` numbers, evenly."""
    return sorted({int(number) for number in np.linspace(0, count - 1, min(count, most)).round()})
