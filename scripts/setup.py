"""Make .venv and install what the project needs; a finished set-up is recognised by its key and costs a moment.

ROS 2 wheels and build tools come first; then the interfaces are built while pip installs the rest.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from diwa_core.cli.preflight import check_machine  # noqa: E402  (needs the line above)

VENV, BUILD = ROOT / ".venv", ROOT / ".build"
PYTHON = VENV / "bin" / "python"
KEY_FILE = VENV / ".diwa-key"
INTERFACES = ROOT / "ros2_ws" / "src" / "diwa_interfaces"
LOGS = BUILD / "logs"
START = time.monotonic()


class SetupFailed(Exception):
    """The set-up cannot go on; the message is for people."""


def hash_files(paths: list[Path], *extra: str) -> str:
    """First 16 hex digits of the SHA-256 over names and contents."""
    digest = hashlib.sha256("\0".join(extra).encode())
    for path in sorted(paths):
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def interface_files() -> list[Path]:
    """Sources of the interfaces package."""
    return [path for path in INTERFACES.rglob("*") if path.is_file()]


def setup_key() -> str:
    """Changes whenever what is installed would change."""
    inputs = [ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__), *interface_files()]
    inputs.append(ROOT / "ros2_ws" / "src" / "diwa_ros" / "setup.cfg")
    return hash_files(inputs, str(ROOT), platform.python_version(), *map(str, shared_files()))


def ros_version() -> str:
    """The pinned ROS wheels, as one string."""
    return "".join(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ros-"))


def run(name: str, command: list[str | Path], environment: dict[str, str] | None = None) -> None:
    """Run one step with its output in a log file; raises SetupFailed with the log's end."""
    log = LOGS / f"{name}.log"
    with log.open("w") as stream:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SetupFailed(f"step '{name}' failed with exit code {done.returncode}. Whole log: {log}\n{tail}")


def pip(name: str, *arguments: str | Path) -> None:
    """pip in .venv under our constraints; Python compiles a module when it is first imported, which saves a quarter of the time here."""
    run(name, [PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-compile", "-c", ROOT / "constraints.txt"])


def requirements(*groups: str) -> list[str]:
    """Requirement strings of pyproject.toml: 'dependencies' or the name of an optional group."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    return [item for group in groups for item in known[group]]


def missing_build_tools() -> list[str]:
    """cmake (3.19 for deferred calls; any distribution of today) and ninja come as wheels where the system has none."""
    return [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]


def build_environment() -> dict[str, str]:
    """The venv is one ament prefix; CMake and its generators must see it and nothing of another ROS."""
    foreign = ("PYTHONPATH", "LD_LIBRARY_PATH", "_ROS_WHEELS_BOOTSTRAP_COMPLETE")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    prefix = {"AMENT_PREFIX_PATH": str(VENV), "CMAKE_PREFIX_PATH": str(VENV), "VIRTUAL_ENV": str(VENV)}
    return environment | prefix | {"PATH": f"{VENV / 'bin'}:{os.environ['PATH']}"}


def build_interfaces() -> Path:
    """The interfaces wheel from the user's cache, or built and put there; returns its path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diwa" / "interfaces"
    folder = cache / hash_files(interface_files(), ros_version(), platform.python_version(), platform.machine())
    if not any(folder.glob("*.whl")):
        fix = INTERFACES / "drop_missing_includes.cmake"
        wheels = BUILD / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        command = [PYTHON, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, INTERFACES]
        run("interfaces", [*command, "-C", f"cmake.define.CMAKE_PROJECT_INCLUDE={fix}"], build_environment())
        cache.mkdir(parents=True, exist_ok=True)
        staging = cache / f"{folder.name}.{os.getpid()}"
        shutil.copytree(wheels, staging)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    return next(folder.glob("*.whl"))


def shared_files() -> list[Path]:
    """What colcon would install into share/diwa_ros."""
    patterns = ("launch/*.launch.py", "config/*.yaml", "config/*.xml")
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def register_ros_package() -> None:
    """Make .venv an ament prefix of diwa_ros too, so that `ros2 launch diwa_ros ...` and `ros2 run` find it without colcon."""
    package, share = ROOT / "ros2_ws" / "src" / "diwa_ros", VENV / "share" / "diwa_ros"
    shutil.rmtree(share, ignore_errors=True)
    links = {share / path.relative_to(ROOT): path for path in shared_files()}
    links[share / "package.xml"] = package / "package.xml"
    links[VENV / "share/ament_index/resource_index/packages/diwa_ros"] = package / "resource" / "diwa_ros"
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    settings = configparser.ConfigParser()
    settings.read(package / "setup.cfg")
    scripts = VENV / "lib" / "diwa_ros"
    scripts.mkdir(parents=True, exist_ok=True)
    for line in settings["options.entry_points"]["console_scripts"].split("\n"):
        name, _, target = line.partition(" = ")
        if name:
            module, function = target.split(":")
            script = scripts / name
            script.write_text(f"#!{PYTHON}\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n")
            script.chmod(0o755)


def install() -> None:
    """Fill .venv; raises SetupFailed naming the step and its log."""
    if not PYTHON.exists():
        run("venv", [sys.executable, "-m", "venv", VENV])
    say("1/3 ROS 2 wheels and build tools")
    pip("ros", "install", *requirements("ros", "interfaces"), *missing_build_tools())
    say("2/3 torch, pybullet and the rest; meanwhile the interfaces are built")
    with ThreadPoolExecutor(2) as pool:
        wheel = pool.submit(build_interfaces)
        rest = pool.submit(pip, "packages", "install", *requirements("dependencies", "franka", "dev"))
        rest.result()
        built = wheel.result()
    say("3/3 diwa itself")
    pip("diwa", "install", "--no-deps", "--no-build-isolation", "--force-reinstall", built, "-e", ROOT)
    register_ros_package()


def say(text: str) -> None:
    """One line of progress with the seconds since the start."""
    print(f"diwa set-up: {time.monotonic() - START:4.0f} s  {text}", flush=True)


def is_finished(key: str) -> bool:
    """Whether .venv was filled for this key."""
    return KEY_FILE.exists() and KEY_FILE.read_text() == key


def main() -> int:
    """Check the machine, then install unless .venv already is what it should be."""
    key = setup_key()
    if is_finished(key):
        return 0
    for finding in check_machine(ROOT):
        if not finding.ok:
            print(f"diwa set-up: {finding.name}: found {finding.found}. Mend: {finding.mend}", file=sys.stderr)
            return 1
    LOGS.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_finished(key):  # another make did it while this one waited
            return 0
        try:
            install()
        except SetupFailed as error:
            print(f"diwa set-up: {error}", file=sys.stderr)
            return 1
        KEY_FILE.write_text(key)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
