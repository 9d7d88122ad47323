"""Finished episodes of an evaluation, one JSON line each: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from diwa_core.errors import DataError


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


class Journal:
    """Outcomes by episode, appended to `path` as they come. Raises DataError on a file that is none of ours or cannot be written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.outcomes: dict[EpisodeKey, Outcome] = {}
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a kill may leave half a line; that episode runs again
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                outcome = Outcome(row.pop("success"), row.pop("steps"))
                self.outcomes[EpisodeKey(**row)] = outcome
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{self.path}: line {number}: expected an episode, found {line[:80]!r} ({error}). Remove it, or the file."
                ) from error
        self._write(lambda: self.path.parent.mkdir(parents=True, exist_ok=True))
        if len(whole) < len(text):
            self._write(lambda: self.path.write_bytes(whole))

    def add(self, key: EpisodeKey, outcome: Outcome) -> None:
        """Keep one finished episode."""
        line = json.dumps(asdict(key) | asdict(outcome)) + "\n"
        self._write(lambda: self._append(line))
        self.outcomes[key] = outcome

    def _append(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line)

    def _write(self, action) -> None:
        try:
            action()
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written: {error}. Free space or choose another folder; the same command goes on."
            ) from error
