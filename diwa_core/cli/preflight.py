"""What the machine must offer before anything is installed. Standard library only: the set-up runs this before .venv exists."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

PYTHON = (3, 11)
DISK_GIB = 4.0  # .venv takes 2.2, downloads and build the rest; torch with CUDA takes 5 more
UPDATE_GIB = 1.0


@dataclass(frozen=True)
class Finding:
    """One checked thing: what was found, and, if it does not do, the command or sentence that mends it."""

    name: str
    ok: bool
    found: str
    mend: str = ""


def check_platform() -> Finding:
    """The ROS wheels exist for Linux on x86-64 only."""
    found = f"{platform.system()} {platform.machine()}"
    mend = "The pip path runs on Linux x86-64; elsewhere use an ordinary ROS 2 or its container: see docker/README.md."
    return Finding("platform", found == "Linux x86_64", found, mend)


def check_python() -> Finding:
    """pybullet has no wheels for Python 3.12 and later, zarr 3 and numpy 2.4 none for 3.10 and earlier."""
    wanted = ".".join(map(str, PYTHON))
    mend = f"sudo apt-get install python{wanted} python{wanted}-venv, then make PYTHON=python{wanted} setup"
    return Finding("python", sys.version_info[:2] == PYTHON, f"{platform.python_version()} ({sys.executable})", mend)


def check_venv_module() -> Finding:
    """Debian keeps ensurepip in a package of its own."""
    present = importlib.util.find_spec("venv") is not None and importlib.util.find_spec("ensurepip") is not None
    name = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    return Finding("venv module", present, "present" if present else "missing", f"sudo apt-get install {name}")


def check_compiler() -> Finding:
    """The interfaces package is compiled once, with a C and a C++ compiler."""
    paths = [shutil.which("gcc") or shutil.which("cc"), shutil.which("g++") or shutil.which("c++")]
    found = " and ".join(path or "none" for path in paths)
    return Finding("compiler", None not in paths, found, "sudo apt-get install build-essential")


def check_disk(folder: Path, needed_gib: float) -> Finding:
    """Free space where .venv will be."""
    free_gib = shutil.disk_usage(folder).free / 2**30
    mend = f"free {max(needed_gib - free_gib, 0):.1f} GiB on the disk that holds {folder}, or clone to another disk"
    return Finding("disk", free_gib >= needed_gib, f"{free_gib:.1f} GiB free, {needed_gib:.1f} GiB needed", mend)


def check_machine(folder: Path) -> list[Finding]:
    """Everything the set-up needs, in the order in which to mend it; a filled .venv needs room for updates only."""
    needed_gib = UPDATE_GIB if (folder / ".venv").exists() else DISK_GIB
    return [check_platform(), check_python(), check_venv_module(), check_compiler(), check_disk(folder, needed_gib)]
