"""`diwa security --out FOLDER`: SROS 2 policies for a graph, and the script that makes keys of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from diwa_core.errors import SetupError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("graph", nargs="?", default="deploy", help="a description in config/, or the path of one (default: deploy)")
    parser.add_argument("assignments", nargs="*", metavar="name:=value", help="arguments of the graph, as with diwa up")
    parser.add_argument("--also", nargs="*", default=[], metavar="GRAPH", help="further descriptions with default arguments, as loop")
    parser.add_argument("--out", type=Path, required=True, help="folder for policies.xml and make_keystore.sh")


def run(args: argparse.Namespace) -> int:
    """Write both files and say what comes next. Raises ConfigError."""
    try:
        from diwa_ros.graph import enclave_path, load_graph, parse_assignments
        from diwa_ros.security import with_teleop, write_policies
    except ImportError as error:
        raise SetupError(f"the ROS nodes are not installed ({error}). Mend: make setup, or source the workspace.") from error
    processes = load_graph(args.graph).resolve(parse_assignments(args.assignments))
    for name in args.also:
        known = {process.name for process in processes}
        processes += [process for process in load_graph(name).resolve() if process.name not in known]
    processes = with_teleop(processes)
    policies, script = write_policies(processes, args.out)
    print(f"wrote {policies} and {script}")
    print(f"next, where ROS 2 has the sros2 package: {script}, then for every node:")
    print(f"  export ROS_SECURITY_ENABLE=true ROS_SECURITY_STRATEGY=Enforce ROS_SECURITY_KEYSTORE={args.out.resolve() / 'keystore'}")
    for process in processes:
        print(f"  {process.name}: --ros-args --enclave {enclave_path(process.namespace, process.name)}")
    return 0
