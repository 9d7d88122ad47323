"""`diwa robot`: state of the arm on the running graph, stop, resume, recover, home, and one run of a skill. Not a safety function."""

from __future__ import annotations

import argparse

from diwa_core.cli.running_graph import find_running_graph
from diwa_core.errors import ConfigError

TOLD = ("enable", "stop", "resume", "recover", "home")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    what = "status; enable, stop, resume, recover, home: the controller's services; run: one run of a skill, Ctrl-C holds the arm"
    parser.add_argument("action", choices=("status", *TOLD, "run"), help=what)
    parser.add_argument("skill", nargs="?", default="", help="of run")
    parser.add_argument("--max-steps", type=int, default=72, help="run: policy steps after which it ends (default: 72)")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait for the graph (default: 10)")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when it was done, 1 when the run ended before its steps; a refusal is a GateError."""
    if (args.action == "run") != bool(args.skill):
        raise ConfigError(f"diwa robot {args.action}: expected a skill with run, and with run alone; found '{args.skill}'.")
    find_running_graph()
    from diwa_ros.robot_client import open_client

    with open_client(args.timeout) as client:
        if args.action == "run":
            result = client.run_skill(args.skill, args.max_steps)
            print(f"{result.message}: {result.steps} steps, policy {result.checkpoint_id[:16]}")
            return 0 if result.completed else 1
        if args.action != "status":
            print(client.tell(args.action))
        status = client.read_status()
        print(f"{status.state_name} ({status.backend}): {status.reason}; {status.commands} commands, {status.clamped} clamped")
    return 0
