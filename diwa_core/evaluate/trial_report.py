"""One self-contained HTML page about an evaluation in simulation and on the robot. Building it opens the key."""

from __future__ import annotations

import base64
import os
from collections import Counter
from html import escape
from pathlib import Path

from diwa_core.errors import DataError
from diwa_core.evaluate.page import build_page, make_table, rate_bar, show_gain, show_rate
from diwa_core.evaluate.statistics import Estimate, summarise
from diwa_core.evaluate.trial_analysis import JUDGES, RankCorrelation, TrialAnalysis
from diwa_core.evaluate.trial_journal import BY_ORACLE, CALVIN, ROBOT, SIMULATION, TrialRow
from diwa_core.evaluate.trials import Candidate, TrialFolder

PLACES = {SIMULATION: "simulation", CALVIN: "CALVIN environment", ROBOT: "robot"}
JUDGE_NAMES = dict(zip(JUDGES, ("oracle", "operator's mark", "classifier"), strict=True))


def write_trial_report(folder: TrialFolder, command: str) -> Path:
    """Write report.html into the folder and return its path. command: what was typed. Raises DataError, also when nothing was tried yet."""
    path = folder.path / "report.html"
    analysis = TrialAnalysis(folder)
    page = build_trial_report(analysis, command)
    analysis.note_opening()
    temporary = path.with_name(".report.html.new")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}. Free space; the trials are kept.") from error
    return path


def build_trial_report(analysis: TrialAnalysis, command: str) -> str:
    """The page as one string. Raises DataError when no trial is finished."""
    if not analysis.backends:
        raise DataError(f"{analysis.folder.path}: expected finished trials, found none. Run some first.")
    sections = [
        _headline(analysis),
        *(_success_section(analysis, backend) for backend in analysis.backends),
        _gap_section(analysis),
        _rank_section(analysis),
        _judge_section(analysis),
        _latency_section(analysis),
        _counts_section(analysis),
        _strip_section(analysis),
        _trial_section(analysis),
        _provenance_section(analysis, command),
    ]
    return build_page("Policies in simulation and on the robot", sections)


# -- success ---------------------------------------------------------------------------------------------------------------------------


def _headline(analysis: TrialAnalysis) -> str:
    parts = []
    for backend in analysis.backends:
        rates = [f"{escape(candidate.name)} {_percent(_mean_rate(analysis, backend, candidate))}" for candidate in analysis.candidates]
        parts.append(f"<b>{PLACES[backend]}</b>: {', '.join(rates)}")
    return f'<p class="headline">Mean success. {"; ".join(parts)}.</p>' + "".join(f"<p>{escape(note)}</p>" for note in list_notes(analysis))


def list_notes(analysis: TrialAnalysis) -> list[str]:
    """What a reader must know before believing the page, one sentence each."""
    plan, robot_rows = analysis.plan, list(analysis.rows[ROBOT].values())
    notes = [
        f"{len(plan.skills)} skills, {plan.starts} starts of the {plan.split} split each, {len(analysis.candidates)} candidates on the "
        f"same starts with the same noise, at most {plan.max_steps} steps; order drawn with seed {analysis.key.seed}."
    ]
    lacking = {PLACES[backend]: count for backend, count in analysis.missing.items() if count}
    notes += [f"Not finished: {place} lacks {count} of {len(plan.trials)} trials." for place, count in lacking.items()]
    robots = sorted({row.robot for row in robot_rows})
    if "fake-fr3" in robots:
        notes.append("The robot is the fake FR3: another simulation behind the robot's real protocol, a stand-in and no robot.")
    if any(row.marked_by == BY_ORACLE for row in robot_rows):
        notes.append("Its oracle set the operator's marks: nobody watched these trials.")
    early = [count for count in analysis.openings if count < len(robot_rows)]
    notes += [f"The key was opened after {min(early)} trials on the robot: later ones were not blind."] if early else []
    held = sum(bool(row.watchdog) for row in robot_rows)
    notes += [f"In {held} of {len(robot_rows)} trials on the robot the watchdog held the arm at least once."] if held else []
    discarded = {backend: analysis.journal.discarded(backend) for backend in analysis.backends}
    notes += [f"{count} trials on the {PLACES[backend]} were discarded and repeated." for backend, count in discarded.items() if count]
    return notes


def _mean_rate(analysis: TrialAnalysis, backend: str, candidate: Candidate) -> Estimate | None:
    return analysis.mean({skill: analysis.rate(backend, candidate, skill) for skill in analysis.plan.skills})


def _success_section(analysis: TrialAnalysis, backend: str) -> str:
    first, *others = analysis.candidates
    head = ["skill", *(candidate.name for candidate in analysis.candidates), *(f"{other.name} − {first.name}" for other in others)]
    head += ["won / lost", "p"] if len(others) == 1 else []
    rows = []
    for skill in analysis.plan.skills:
        rates = [analysis.rate(backend, candidate, skill) for candidate in analysis.candidates]
        pairs = [analysis.difference(backend, other, skill) for other in others]
        cells = [f"<b>{escape(skill)}</b>", *("" if rate is None else rate_bar(rate, None) for rate in rates)]
        cells += ["" if pair is None else show_gain(pair.difference) for pair in pairs]
        if len(others) == 1:
            cells += ["", ""] if pairs[0] is None else [f"{pairs[0].gained} / {pairs[0].lost}", f"{pairs[0].p_value:.2g}"]
        rows.append(cells)
    means = [_mean_rate(analysis, backend, candidate) for candidate in analysis.candidates]
    gains = [_mean_difference(analysis, backend, other) for other in others]
    total = ["<b>mean of skills</b>", *("" if mean is None else rate_bar(mean, None) for mean in means)]
    total += ["" if gain is None else show_gain(gain) for gain in gains] + (["", ""] if len(others) == 1 else [])
    by = {ROBOT: "the operator's mark"}.get(backend, "the oracle")
    legend = (
        f"In per cent with 95 % intervals; success by {by}. Rates: Wilson; differences on the same starts: Tango, exact McNemar p; "
        "mean: MOVER, skills weigh the same."
    )
    robots = ", ".join(sorted({row.robot for row in analysis.rows[backend].values()} - {""}))
    title = f"Success: {PLACES[backend]}" + (f" ({escape(robots)})" if robots else "")
    return f'<h2>{title}</h2>{make_table(head, rows, [total])}<p class="quiet">{legend}</p>'


def _mean_difference(analysis: TrialAnalysis, backend: str, candidate: Candidate) -> Estimate | None:
    pairs = {skill: analysis.difference(backend, candidate, skill) for skill in analysis.plan.skills}
    return analysis.mean({skill: pair and pair.difference for skill, pair in pairs.items()})


def _gap_section(analysis: TrialAnalysis) -> str:
    title = "<h2>Sim-to-real gap</h2>"
    simulated = [backend for backend in analysis.backends if backend != ROBOT]
    if ROBOT not in analysis.backends or not simulated:
        return f'{title}<p class="quiet">Needs trials in simulation and on the robot.</p>'
    columns = [(candidate, backend) for backend in simulated for candidate in analysis.candidates]
    gaps = {
        (skill, number): analysis.gap(candidate, skill, backend)
        for skill in analysis.plan.skills
        for number, (candidate, backend) in enumerate(columns)
    }
    rows = [
        [f"<b>{escape(skill)}</b>", *(_show_pair(gaps[skill, number]) for number in range(len(columns)))] for skill in analysis.plan.skills
    ]
    means = [
        analysis.mean({skill: gaps[skill, number] and gaps[skill, number].difference for skill in analysis.plan.skills})
        for number in range(len(columns))
    ]
    total = ["<b>mean of skills</b>", *("" if mean is None else show_gain(mean) for mean in means)]
    head = ["skill", *(f"{candidate.name}: robot − {PLACES[backend]}" for candidate, backend in columns)]
    legend = "Points with 95 % intervals (Tango; mean: MOVER), trial by trial: same policy, start and noise."
    return f'{title}{make_table(head, rows, [total])}<p class="quiet">{legend}</p>'


def _show_pair(pair) -> str:
    return "" if pair is None else show_gain(pair.difference)


def _percent(rate: Estimate | None) -> str:
    return "not finished" if rate is None else f"{100 * rate.value:.0f} % ({100 * rate.low:.0f}–{100 * rate.high:.0f})"


# -- what predicts, who judges -----------------------------------------------------------------------------------------------------------


def _rank_section(analysis: TrialAnalysis) -> str:
    lines = []
    for predictor in (SIMULATION, CALVIN, "imagination"):
        if predictor in (*analysis.backends, "imagination") and ROBOT in analysis.backends:
            lines.append(f"<p>{escape(describe_ranks(predictor, analysis.rank(predictor)))}</p>")
    body = "".join(lines) or "<p>Needs trials on the robot.</p>"
    legend = (
        "Kendall's tau-b over all policies (skill and candidate), with Fieller's interval; the pairs are those of one skill, which is what "
        "choosing a checkpoint is about, with an exact sign test. Imagination: as the checkpoints state it."
    )
    return f'<h2>Does the order carry over?</h2>{body}<p class="quiet">{legend}</p>'


def describe_ranks(predictor: str, ranks: RankCorrelation | None) -> str:
    """The rank-correlation line."""
    name = PLACES.get(predictor, predictor)
    if ranks is None:
        return f"Order in {name} → order on the robot: fewer than two policies are known in both."
    if ranks.tau is None:
        strength = "tau not defined, since one side puts all policies level"
    else:
        interval = f" [{ranks.tau.low:.2f}, {ranks.tau.high:.2f}]" if ranks.has_interval else " (too few for an interval)"
        strength = f"tau {ranks.tau.value:.2f}{interval}, p = {ranks.p_value:.2g}"
    pairs = f"{ranks.same} of {ranks.same + ranks.other + ranks.tied} pairs of one skill in the same order, {ranks.other} in the other, "
    pairs += f"{ranks.tied} level" + ("" if ranks.pair_p is None else f", p = {ranks.pair_p:.2g}")
    return f"Order in {name} → order on the robot: {strength}, n = {ranks.policies} policies; {pairs}."


def _judge_section(analysis: TrialAnalysis) -> str:
    rows = []
    for backend in analysis.backends:
        for found in analysis.agreements(backend):
            kappa = "not defined" if found.kappa is None else f"{found.kappa:.2f}"
            names = f"{JUDGE_NAMES[found.first]} and {JUDGE_NAMES[found.second]}"
            counts = [found.both, found.neither, found.only_first, found.only_second]
            rows.append([PLACES[backend], f"<b>{names}</b>", show_rate(found.rate), kappa, *map(str, counts), str(found.trials)])
    if not rows:
        return '<h2>Judges</h2><p class="quiet">No trial has two judges.</p>'
    head = ["where", "judges", "agree", "kappa", "both yes", "both no", "only first", "only second", "trials"]
    legend = "Share of trials on which two judges agree, in per cent with the Wilson interval, and Cohen's kappa."
    return f'<h2>Judges</h2>{make_table(head, rows)}<p class="quiet">{legend}</p>'


# -- time and limits ---------------------------------------------------------------------------------------------------------------------


def _latency_section(analysis: TrialAnalysis) -> str:
    budget_ms = 1e3 / analysis.plan.rate_hz
    rows = []
    for backend in analysis.backends:
        stages: dict[str, list[float]] = {}
        for row in analysis.rows[backend].values():
            for stage, values in row.latency_ms.items():
                stages.setdefault(stage, []).extend(values)
        for stage, values in stages.items():
            if values:
                found = summarise(values)
                over = 100 * sum(value > budget_ms for value in values) / len(values)
                figures = (found.p50, found.p95, found.p99, found.largest)
                rows.append(
                    [PLACES[backend], f"<b>{escape(stage)}</b>", *(f"{v:.1f}" for v in figures), f"{over:.1f} %", f"{found.count:,}"]
                )
    if not rows:
        return '<h2>Latency</h2><p class="quiet">Not measured: these trials ran without the graph.</p>'
    head = ["where", "stage", "p50", "p95", "p99", "max", "over budget", "samples"]
    legend = f"Milliseconds since the camera frame. The budget is one control tick, {budget_ms:.1f} ms."
    return f'<h2>Latency</h2>{make_table(head, rows)}<p class="quiet">{legend}</p>'


def _counts_section(analysis: TrialAnalysis) -> str:
    rows = []
    for backend in analysis.backends:
        for candidate in analysis.candidates:
            mine = list(analysis.rows_of(backend, candidate).values())
            rows.append([PLACES[backend], f"<b>{escape(candidate.name)}</b>", str(len(mine)), *_count_cells(mine)])
    head = ["where", "candidate", "trials", "commands clamped", "cut, by limit", "chunks dropped", "watchdog"]
    legend = "Sums over trials, as the controller counts them; watchdog: how often it fell into a state that holds the arm."
    return f'<h2>Clamps and watchdog</h2>{make_table(head, rows)}<p class="quiet">{legend}</p>'


def _count_cells(rows: list[TrialRow]) -> list[str]:
    def show(name: str) -> str:
        total = sum((Counter(getattr(row, name)) for row in rows), Counter())
        return escape(", ".join(f"{key} {count}" for key, count in sorted(total.items()) if count) or "0")

    return [f"{sum(row.clamped for row in rows):,}", *map(show, ("limits", "dropped", "watchdog"))]


# -- pictures and sources ----------------------------------------------------------------------------------------------------------------


def _strip_section(analysis: TrialAnalysis) -> str:
    figures = []
    for skill in analysis.plan.skills:
        index = _shown_start(analysis, skill)
        for backend in analysis.backends:
            for candidate in analysis.candidates:
                row = analysis.rows_of(backend, candidate, skill).get((skill, index))
                if row is not None and row.strip:
                    figures.append(
                        _figure(analysis.folder.path / row.strip, f"{skill}, start {index}", f"{PLACES[backend]}, {candidate.name}", row)
                    )
    if not figures:
        return '<h2>Video strips</h2><p class="quiet">No pictures were kept.</p>'
    intro = (
        "The static camera from the first to the last frame, on one start of each skill; where the candidates differ, one that shows it."
    )
    return f'<h2>Video strips</h2><p class="quiet">{intro}</p>{"".join(figures)}'


def _shown_start(analysis: TrialAnalysis, skill: str) -> int:
    """A start on which candidates differ, on the robot if possible; else the first."""
    for backend in reversed(analysis.backends):
        for index in range(analysis.plan.starts):
            rows = [analysis.rows_of(backend, candidate, skill).get((skill, index)) for candidate in analysis.candidates]
            if None not in rows and len({row.success for row in rows}) > 1:
                return index
    return 0


def _figure(path: Path, title: str, who: str, row: TrialRow) -> str:
    how = f"trial {row.trial}: {'success' if row.success else 'failure'} after {row.steps} steps"
    caption = f'<figcaption><b>{escape(title)}</b> {escape(who)} <span class="quiet">{escape(how)}</span></figcaption>'
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return f'<figure>{caption}<p class="quiet">its pictures are gone</p></figure>'
    picture = f'<img alt="{escape(title)}, {escape(who)}" src="data:image/webp;base64,{data}">'
    return f'<figure>{caption}<div class="scroll"><div class="strip">{picture}</div></div></figure>'


def _trial_section(analysis: TrialAnalysis) -> str:
    rows = []
    for backend in analysis.backends:
        for number, row in sorted(analysis.rows[backend].items()):
            trial = analysis.trials[number]
            off = ", ".join(f"{name} {value:g}" for name, value in row.start_error.items() if value)
            rows.append(
                [
                    PLACES[backend],
                    str(number),
                    f"{escape(trial.skill)} {trial.index}",
                    escape(analysis.key.candidate(trial).name),
                    '<span class="yes">yes</span>' if row.success else '<span class="no">×</span>',
                    "" if row.classifier is None else f"{row.classifier:.2f}",
                    str(row.steps),
                    escape(off),
                    _link_bag(row.bag, analysis.folder.path),
                    escape(row.began),
                ]
            )
    head = ["where", "trial", "skill, start", "candidate", "success", "classifier", "steps", "start off by", "bag", "began"]
    return f"<h2>All trials</h2>{make_table(head, rows)}"


def _link_bag(bag: str, folder: Path) -> str:
    if not bag:
        return ""
    return f'<a href="{escape(os.path.relpath(bag, folder))}">{escape(Path(bag).name)}</a>'


def _provenance_section(analysis: TrialAnalysis, command: str) -> str:
    plan = analysis.plan
    rows = [
        [
            f"<b>{escape(candidate.name)}</b>",
            escape(skill),
            f"<code>{escape(str(Path(candidate.folder) / skill))}</code>",
            f'<code title="{escape(identity)}">{escape(identity[:16])}</code>',
        ]
        for candidate in analysis.candidates
        for skill, identity in candidate.identities.items()
    ]
    facts = {
        "plan": plan.identity,
        "contract": plan.contract,
        "world model": plan.world_model[:16],
        "seed of the order": str(analysis.key.seed),
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>" for name, value in facts.items())
    return f"<h2>How to repeat it</h2><pre>{escape(command)}</pre><dl>{listed}</dl>" + make_table(
        ["candidate", "skill", "checkpoint", "identity"], rows
    )
