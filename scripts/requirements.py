"""Requirements of pyproject.toml, one per line: `python scripts/requirements.py [--without NAME ...] dependencies franka`."""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path


def requirements(groups: list[str], without: list[str]) -> list[str]:
    """Of 'dependencies' and of optional groups. Raises ValueError on an unknown group, or on a name that is not among them."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    known = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    unknown = [group for group in groups if group not in known]
    if unknown:
        raise ValueError(f"expected some of {', '.join(known)}, found '{unknown[0]}'.")
    found = {re.split(r"[\[<>=~! ]", item)[0]: item for group in groups for item in known[group]}
    for name in without:
        if name not in found:
            raise ValueError(f"expected one of {', '.join(found)} to leave out, found '{name}'.")
        del found[name]
    return list(found.values())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="+", metavar="GROUP")
    parser.add_argument("--without", action="append", default=[], metavar="NAME")
    arguments = parser.parse_args()
    try:
        print("\n".join(requirements(arguments.groups, arguments.without)))
    except ValueError as error:
        print(f"requirements: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
