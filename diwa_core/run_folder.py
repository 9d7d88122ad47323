"""The folder of a training: what it was started with, and files that a kill leaves either old or new."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diwa_core.errors import ConfigError


def guard_run(run_dir: str | Path, wanted: dict[str, Any]) -> None:
    """Keep what a run was started with in run.json; raises ConfigError if `wanted` differs from what is there."""
    path = Path(run_dir) / "run.json"
    wanted = json.loads(json.dumps(wanted))
    if not path.exists():
        replace_text(path, json.dumps(wanted, indent=1))
        return
    found, wanted = _flatten(json.loads(path.read_text())), _flatten(wanted)
    changed = [key for key in wanted | found if found.get(key) != wanted.get(key)]
    if changed:
        was, now = (", ".join(f"{key} = {values.get(key)}" for key in changed) for values in (found, wanted))
        raise ConfigError(f"{run_dir} was started with {was}, now {now}. Use another run folder, or what it was started with.")


def replace_text(path: Path, text: str) -> None:
    """Write `text`; whatever was there is replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
