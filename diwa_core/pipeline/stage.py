"""A stage is one command with what it reads and writes; its stamp says what it was made from, so that it is run only when that changes.

Stages do not know each other: one needs another because a path it reads is a path the other writes. Paths are relative to a root folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from diwa_core import __version__
from diwa_core.errors import ConfigError, DataError
from diwa_core.pipeline.sources import digest_sources

At = PurePosixPath  # a path in a command, relative to the pipeline's root


@dataclass(frozen=True, eq=False)
class Stage:
    """One command. `command` begins with 'diwa <verb>' or 'python -m <module>' and decides the result together with `files` and what is
    read; `speed` (devices, workers) only decides how fast it comes.

    files: YAML files the command reads, written before it starts. keeps: what a cut-off run leaves behind; removed before a new start.
    resumes: the command continues from what it kept. checks_itself: it refuses a folder made with other settings, so may be given one.
    cores: processes it keeps busy.
    """

    name: str
    command: tuple[str | At, ...]
    inputs: tuple[At, ...] = ()
    outputs: tuple[At, ...] = ()
    speed: tuple[str, ...] = ()
    files: dict[At, Any] = field(default_factory=dict)
    keeps: tuple[At, ...] = ()
    resumes: bool = False
    checks_itself: bool = False
    cores: int = 1

    @property
    def group(self) -> str:
        """The kind of stage: the first part of its name, behind the number of a refit."""
        return next(part for part in self.name.split("/") if not part.startswith("refit"))

    @property
    def module(self) -> str:
        """The Python module that does the work."""
        if self.command[0] == "diwa":
            from diwa_core.cli.main import VERBS

            return next(verb.module for verb in VERBS if verb.name == self.command[1])
        return str(self.command[2])

    def words(self, root: Path) -> list[str]:
        """The command as a user would type it."""
        return [str(root / word) if isinstance(word, At) else word for word in (*self.command, *self.speed)]

    def show(self, root: Path) -> str:
        """The command as one line for a shell."""
        return shlex.join(self.words(root))

    def argv(self, root: Path) -> list[str]:
        """The command with this interpreter."""
        words = self.words(root)
        start = ["-m", "diwa_core.cli.main"] if words[0] == "diwa" else []
        return [sys.executable, *start, *words[1:]]


class Action(Enum):
    """What to do with a stage."""

    SKIP = "skip"
    START = "run"
    RESUME = "resume"
    AFTER = "after"  # to be decided when stages it needs have run


@dataclass(frozen=True)
class Decision:
    """What to do with a stage, and why."""

    action: Action
    reason: str

    def __str__(self) -> str:
        return f"{self.action.value} {self.reason}" if self.action is Action.AFTER else f"{self.action.value}, {self.reason}"


class Pipeline:
    """Stages under one root folder, in an order in which they can run."""

    def __init__(self, root: str | Path, stages: list[Stage], strict: bool = False) -> None:
        """strict: a stage whose code was changed since it finished is run again.

        Raises ConfigError if two stages share a name or write the same path, or one reads what only a later one writes.
        """
        self.root, self.stages, self.strict = Path(root), stages, strict
        self._producers: dict[At, Stage] = {}
        for stage in stages:
            missing = [path for path in stage.inputs if path not in self._producers]
            doubled = [path for path in stage.outputs if path in self._producers]
            if missing or doubled or any(stage.name == other.name for other in self._producers.values()):
                raise ConfigError(f"stage '{stage.name}': its name or {doubled} are taken already, or nothing before it writes {missing}.")
            self._producers |= {path: stage for path in stage.outputs}

    def needs(self, stage: Stage) -> list[Stage]:
        """The stages that write what `stage` reads."""
        return list(dict.fromkeys(self._producers[path] for path in stage.inputs))

    def stamp_path(self, stage: Stage) -> Path:
        """Where the stamp lies."""
        return self.root / "stamps" / f"{stage.name}.json"

    def read_stamp(self, stage: Stage) -> dict[str, Any] | None:
        """The stamp, None if there is none; raises DataError on a file that is none."""
        path = self.stamp_path(stage)
        if not path.exists():
            return None
        try:
            stamp = json.loads(path.read_text())
            if stamp.keys() >= {"made_from", "code", "finished", "outputs", "seconds"}:
                return stamp
        except (ValueError, AttributeError):
            pass
        raise DataError(f"{path}: expected the stamp of a stage, found something else. Remove it, and the stage runs again.")

    def made_from(self, stage: Stage) -> dict[str, Any]:
        """What decides the stage's result: its command, files, what it reads (identities), and the version of this package."""
        inputs = {}
        for path in stage.inputs:
            stamp = self.read_stamp(self._producers[path])
            inputs[str(path)] = stamp["outputs"].get(str(path)) if stamp else None
        files = {str(path): content for path, content in stage.files.items()}
        made_from = {"command": [str(word) for word in stage.command], "files": files, "inputs": inputs, "version": __version__}
        return json.loads(json.dumps(made_from))  # as a stamp gives it back

    def decide(self, stage: Stage, unsettled: set[str] = frozenset()) -> Decision:
        """Whether `stage` must run. unsettled: names of stages that may still change what it reads.

        Raises DataError if something lies at its outputs that no stage put there.
        """
        waits = [need.name for need in self.needs(stage) if need.name in unsettled]
        if waits:
            return Decision(Action.AFTER, list_some(waits))
        stamp = self.read_stamp(stage)
        if stamp is None:
            return self._decide_unstamped(stage)
        difference = find_difference(stamp["made_from"], self.made_from(stage))
        if difference:
            return Decision(Action.START, difference)
        changed_code = stamp["code"] != digest_sources(stage.module)
        if changed_code and self.strict:
            return Decision(Action.START, "its code was changed")
        found = {str(path): identify(self.root / path) for path in stage.outputs}
        absent = [path for path, identity in found.items() if identity is None]
        if not stamp["finished"] or absent:
            reason = "was cut off" if not stamp["finished"] else f"{absent[0]} is gone"
            return Decision(Action.RESUME if stage.resumes else Action.START, reason)
        edited = [path for path, identity in found.items() if identity != stamp["outputs"].get(path, identity)]
        if edited:
            return Decision(Action.START, f"{edited[0]} was changed by something else")
        return Decision(Action.SKIP, "unchanged" + (", although its code was changed since" if changed_code else ""))

    def _decide_unstamped(self, stage: Stage) -> Decision:
        found = [path for path in (*stage.outputs, *stage.keeps) if identify(self.root / path) is not None]
        if found and not stage.checks_itself:
            raise DataError(
                f"{self.root / found[0]}: expected nothing or what stage '{stage.name}' made, found something without its stamp. "
                "Move it away, or choose another --out."
            )
        return Decision(Action.RESUME, "begun by hand") if found else Decision(Action.START, "never ran")

    def begin(self, stage: Stage, decision: Decision) -> None:
        """Make ready for the stage's command: remove what another start left behind (a cut-off stamp goes last), write its files."""
        before = self.read_stamp(stage)
        if decision.action is not Action.RESUME:
            for path in stage.keeps:
                remove(self.root / path)
        for path, content in stage.files.items():
            write_whole(self.root / path, yaml.safe_dump(content, sort_keys=False))
        seconds = before["seconds"] if before and decision.action is Action.RESUME else 0.0
        self._write_stamp(stage, {"finished": False, "outputs": {}, "seconds": seconds, "usual_seconds": usual_seconds(before)})

    def pause(self, stage: Stage, seconds: float) -> None:
        """Note that a run of `seconds` ended before the stage was finished."""
        stamp = self.read_stamp(stage)
        self._write_stamp(stage, stamp | {"seconds": stamp["seconds"] + seconds})

    def finish(self, stage: Stage, seconds: float) -> None:
        """Stamp the stage as finished after a run of `seconds`. Raises DataError if it did not write what it should have."""
        outputs = {str(path): identify(self.root / path) for path in stage.outputs}
        absent = [path for path, identity in outputs.items() if identity is None]
        if absent:
            raise DataError(f"stage '{stage.name}' ended well, but {self.root / absent[0]} is not there. It must run again.")
        total = self.read_stamp(stage)["seconds"] + seconds
        self._write_stamp(stage, {"finished": True, "outputs": outputs, "seconds": round(total, 1), "usual_seconds": round(total, 1)})

    def _write_stamp(self, stage: Stage, values: dict[str, Any]) -> None:
        stamp = {"made_from": self.made_from(stage), "code": digest_sources(stage.module), "shown": stage.show(self.root), **values}
        write_whole(self.stamp_path(stage), json.dumps(stamp, indent=1))


def usual_seconds(stamp: dict[str, Any] | None) -> float | None:
    """How long the stage took when it last finished, None if it never did."""
    return stamp.get("usual_seconds") if stamp else None


def find_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """One phrase about the first thing that changed between two `made_from`, None if nothing did."""
    if before["version"] != now["version"]:
        return f"made by version {before['version']}, now {now['version']}"
    if before["command"] != now["command"]:
        gone, new = (shlex.join(w for w in a["command"] if w not in b["command"]) for a, b in ((before, now), (now, before)))
        return f"its command changed: {gone or 'nothing'} became {new or 'nothing'}"
    for part, phrase in (("files", "its configuration {} changed"), ("inputs", "{} changed")):
        for path in before[part].keys() | now[part].keys():
            if before[part].get(path) != now[part].get(path):
                return phrase.format(path)
    return None


def identify(path: Path) -> str | None:
    """What lies at `path`, in 16 hex digits: a checkpoint by its own identity (its card does not count), otherwise the SHA-256 of all
    names and bytes; None if nothing is there."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    manifest = path / "manifest.json"
    if manifest.is_file():
        try:
            return json.loads(manifest.read_bytes())["identity"][:16]
        except (ValueError, KeyError, TypeError):
            pass  # broken: its bytes then tell that it is not what it was
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]


def list_some(names: list[str], most: int = 3) -> str:
    """Names for a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def remove(path: Path) -> None:
    """Remove a file or folder if it is there; a kill leaves it whole or gone, or what is left of it under another name."""
    going = path.with_name(f".{path.name}.old")
    for found in (going, path):
        if found.is_dir():
            os.replace(found, going)
            shutil.rmtree(going)
        else:
            found.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    os.replace(temporary, path)
