"""`diwa doctor`: what is there, what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from diwa_core.cli.preflight import Finding, check_machine
from diwa_core.cli.robot_doctor import examine_robot

ROOT = Path(__file__).resolve().parents[2]
SETUP = "make setup"
EXIT_MISSING = 1
SHARED_MEMORY_MIB = 192  # six nodes and some room


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    what = "examine a Franka, the line to it and this machine's fitness to control it; a YAML like config/robot.yaml is examined, too"
    parser.add_argument("--robot", metavar="ADDRESS|YAML", help=what)
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints", help="folder with world_model/ and policies/")


def run(args: argparse.Namespace) -> int:
    """Print one line per finding; exit code 1 if something is missing."""
    findings = examine_robot(args.robot) if args.robot else examine(args.checkpoints)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok     ' if finding.ok else 'MISSING'} {finding.name:{width}}  {finding.found}")
        if not finding.ok:
            print(f"{'':{width + 8}}  mend: {finding.mend}")
    missing = [finding.name for finding in findings if not finding.ok]
    print(f"missing: {', '.join(missing)}" if missing else "everything is there")
    return EXIT_MISSING if missing else 0


def examine(checkpoints: Path) -> list[Finding]:
    """Every finding, in the order in which to mend them."""
    packages = [check_package(name) for name in ("torch", "pybullet", "gymnasium", "zarr", "safetensors")]
    ros = [check_import("rclpy", "ros-jazzy-rclpy"), check_import("diwa_interfaces", "diwa-interfaces"), check_import("diwa_ros", "diwa")]
    graph = [*ros, check_dds_profile(), check_shared_memory()]
    return [*check_machine(ROOT), check_cores(), *packages, check_device(), *graph, *check_checkpoints(checkpoints)]


def check_cores() -> Finding:
    """Simulation, encoder, policy and controller together need two cores."""
    cores = len(os.sched_getaffinity(0))
    return Finding("cores", cores >= 2, f"{cores} usable", "the graph needs 2 cores; give this process more (taskset, container limits)")


def check_package(name: str) -> Finding:
    """An installed distribution."""
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, "not installed", SETUP)


def check_import(module: str, distribution: str) -> Finding:
    """A module that must really import: a shared library that does not load is the usual trouble."""
    try:
        importlib.import_module(module)
        if module == "diwa_interfaces":
            importlib.import_module("diwa_interfaces.msg")
    except ImportError as error:
        return Finding(module, False, str(error), SETUP)
    found = check_package(distribution)
    return Finding(module, True, found.found if found.ok else "from the sourced workspace")


def check_device() -> Finding:
    """Which device torch uses; the CPU suffices."""
    if importlib.util.find_spec("torch") is None:
        return Finding("torch device", False, "torch is not installed", SETUP)
    torch = importlib.import_module("torch")
    return Finding("torch device", True, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


def check_dds_profile() -> Finding:
    """The Fast DDS profile that the graph description names, and the variables that decide who hears whom."""
    profile = ROOT / "config" / "fastdds.xml"
    used = os.environ.get("FASTDDS_DEFAULT_PROFILES_FILE", f"{profile} (set by diwa up)")
    middleware, domain = os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp"), os.environ.get("ROS_DOMAIN_ID", "0")
    mend = "git checkout config/fastdds.xml, or unset FASTDDS_DEFAULT_PROFILES_FILE"
    return Finding("DDS profile", Path(used.removesuffix(" (set by diwa up)")).is_file(), f"{used}; {middleware}, domain {domain}", mend)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Every node takes a segment for its pictures, and one that was killed leaves it behind."""
    free_mib = shutil.disk_usage(folder).free >> 20 if folder.is_dir() else 0
    taken_mib = sum(path.stat().st_size for path in folder.glob("fastrtps_*")) >> 20
    found = f"{free_mib} MiB free, {taken_mib} taken by nodes, those that were killed included"
    mend = f"while no ROS node runs: rm -f {folder}/*fastrtps_*; in a container: docker run --shm-size 256m"
    return Finding("shared memory", free_mib >= SHARED_MEMORY_MIB, found, mend)


def check_checkpoints(folder: Path) -> list[Finding]:
    """The world model and one policy per skill."""
    mend = "git checkout checkpoints"
    model = folder / "world_model"
    policies = sorted(path.name for path in (folder / "policies").iterdir()) if (folder / "policies").is_dir() else []
    found_model = Finding("world model", model.exists() or model.with_suffix(".tar").exists(), str(model), mend)
    return [found_model, Finding("policies", bool(policies), ", ".join(policies) or f"none in {folder / 'policies'}", mend)]
