"""Finished episodes of an evaluation, one JSON line each: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diwa_core.errors import DataError, DiwaError


@dataclass(frozen=True)
class EpisodeKey:
    """What decides an episode's outcome: the models by identity, the start, the policy's noise and the cap."""

    world_model: str
    policy: str
    skill: str
    split: str
    list_seed: int
    index: int
    noise_seed: int
    max_steps: int


@dataclass(frozen=True)
class Outcome:
    """How an episode ended. steps: policy steps until success or the cap."""

    success: bool
    steps: int


class LineFile:
    """JSON objects, one a line, appended to `path` as they come. Raises DataError on a file that cannot be read as such or written."""

    def __init__(self, path: str | Path, what: str, take: Callable[[dict[str, Any]], None]) -> None:
        """`take` gets every line that is there; what it raises means that the line is not `what`."""
        self.path = Path(path)
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a kill may leave half a line; that episode runs again
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, DiwaError) as error:
                raise DataError(
                    f"{self.path}: line {number}: expected {what}, found {line[:80]!r} ({error}). Remove it, or the file."
                ) from error
        self._write(lambda: self.path.parent.mkdir(parents=True, exist_ok=True))
        if len(whole) < len(text):
            self._write(lambda: self.path.write_bytes(whole))

    def append(self, row: dict[str, Any]) -> None:
        """Keep one row."""
        line = json.dumps(row) + "\n"
        self._write(lambda: self._append(line))

    def _append(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line)

    def _write(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written: {error}. Free space or choose another folder; the same command goes on."
            ) from error


class Journal:
    """Outcomes by episode. Raises DataError as LineFile does."""

    def __init__(self, path: str | Path) -> None:
        self.outcomes: dict[EpisodeKey, Outcome] = {}
        self.file = LineFile(path, "an episode", self._take)

    def add(self, key: EpisodeKey, outcome: Outcome) -> None:
        """Keep one finished episode."""
        self.file.append(asdict(key) | asdict(outcome))
        self.outcomes[key] = outcome

    def _take(self, row: dict[str, Any]) -> None:
        outcome = Outcome(row.pop("success"), row.pop("steps"))
        self.outcomes[EpisodeKey(**row)] = outcome
