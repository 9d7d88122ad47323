"""Which code a stage runs: a digest over its module and everything of this package that it imports."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import diwa_core

_PACKAGE = Path(diwa_core.__file__).parent


@cache
def digest_sources(module: str) -> str:
    """16 hex digits over the syntax of `module` and all it imports from diwa_core, directly or not; comments and layout do not count."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in seen and _file(name):
            seen.add(name)
            pending += _read(name)[1]
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(f"{name}\0{_read(name)[0]}\0".encode())
    return digest.hexdigest()[:16]


def _file(module: str) -> Path | None:
    base = _PACKAGE.parent.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file() and _PACKAGE in path.parents), None)


@cache
def _read(module: str) -> tuple[str, list[str]]:
    """The module's syntax as text, and the names it may import."""
    tree = ast.parse(_file(module).read_text())
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return ast.dump(tree), names
