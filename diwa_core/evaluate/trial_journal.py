"""Finished trials, one JSON line each: what was seen and counted, by the trial's number alone; who ran is not in here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diwa_core.config import from_dict, to_dict
from diwa_core.data.bag_format import DISCARD, OUTCOMES, SUCCESS
from diwa_core.errors import ConfigError, DataError
from diwa_core.evaluate.journal import LineFile
from diwa_core.evaluate.trials import TrialPlan

SIMULATION, CALVIN, ROBOT = "simulation", "calvin", "robot"
BACKENDS = (SIMULATION, CALVIN, ROBOT)
BY_ORACLE, BY_OPERATOR = "oracle", "operator"


@dataclass
class TrialRow:
    """One finished trial on one backend.

    robot: which one, empty in simulation; oracle: what the simulated scene says, None where nobody knows; mark, marked_by: the operator's
    judgement (success, failure, discard), or of an oracle that stood in for the operator; classifier: highest probability of success over
    the trial and whether it passed its threshold; latency_ms: stage -> one per frame; clamped, dropped, watchdog: counts of the controller,
    the last one of states it fell into; start_error: how far the start was off, units in the names; strip, bag: paths, empty without.
    """

    plan: str
    backend: str
    trial: int
    robot: str = ""
    oracle: bool | None = None
    mark: str | None = None
    marked_by: str = ""
    classifier: float | None = None
    classifier_success: bool | None = None
    steps: int = 0
    began: str = ""
    wall_s: float = 0.0
    latency_ms: dict[str, list[float]] = field(default_factory=dict)
    clamped: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    watchdog: dict[str, int] = field(default_factory=dict)
    start_error: dict[str, float] = field(default_factory=dict)
    strip: str = ""
    bag: str = ""
    message: str = ""

    def validate(self) -> None:
        """Raise DataError on a trial nobody has judged: on a robot the mark is missing, in simulation the oracle's answer."""
        if self.backend not in BACKENDS:
            raise DataError(f"trial {self.trial}: expected a backend of {', '.join(BACKENDS)}, found '{self.backend}'.")
        if self.backend != ROBOT and self.oracle is None:
            raise DataError(f"trial {self.trial}: expected the oracle's judgement in {self.backend}, found none.")
        if self.backend == ROBOT and self.mark not in OUTCOMES:
            raise DataError(
                f"trial {self.trial}: expected a mark ({', '.join(OUTCOMES)}), found {self.mark!r}. The trial is not kept; run it again."
            )

    @property
    def success(self) -> bool:
        """By mark on a robot, by the oracle in simulation."""
        return self.mark == SUCCESS if self.backend == ROBOT else bool(self.oracle)

    @property
    def counts(self) -> bool:
        """Whether it is not to be repeated."""
        return self.mark != DISCARD


class TrialJournal:
    """Rows in the order in which they were made. Raises DataError on a file that is none of ours or belongs to another plan."""

    def __init__(self, path: str | Path, plan: TrialPlan) -> None:
        self.plan = plan
        self.rows: list[TrialRow] = []
        self.file = LineFile(path, "a trial of this plan", self._take)

    def add(self, row: TrialRow) -> None:
        """Keep one finished trial. Raises DataError, also on one of another plan."""
        self._check(row)
        self.file.append(to_dict(row))
        self.rows.append(row)

    def finished(self, backend: str) -> dict[int, TrialRow]:
        """Trials that need not run again, by number: the first that was not discarded."""
        done: dict[int, TrialRow] = {}
        for row in self.rows:
            if row.backend == backend and row.counts:
                done.setdefault(row.trial, row)
        return done

    def discarded(self, backend: str) -> int:
        """How often the operator threw a trial away."""
        return sum(row.backend == backend and not row.counts for row in self.rows)

    def check_robot(self, backend: str, robot: str) -> None:
        """Raises ConfigError when trials of `backend` were made on another robot: one evaluation is about one robot."""
        others = sorted({row.robot for row in self.rows if row.backend == backend} - {robot})
        if others:
            raise ConfigError(
                f"{self.file.path}: expected trials on the robot '{robot}', found some on '{', '.join(others)}'. "
                "Give that --robot, or another --out for this one."
            )

    def _take(self, values: dict) -> None:
        row = from_dict(TrialRow, values)
        self._check(row)
        self.rows.append(row)

    def _check(self, row: TrialRow) -> None:
        row.validate()
        if row.plan != self.plan.identity:
            raise DataError(f"expected plan {self.plan.identity}, found {row.plan}: this journal belongs to another plan")
        if not 1 <= row.trial <= len(self.plan.trials):
            raise DataError(f"expected a trial of 1 to {len(self.plan.trials)}, found {row.trial}")
