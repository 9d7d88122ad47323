"""`diwa swap CHECKPOINT`: exchange a policy on the running graph, let it shadow, undo that, or list what happened (docs/swap.md)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from diwa_core.cli.running_graph import find_running_graph
from diwa_core.errors import ConfigError

if TYPE_CHECKING:
    from diwa_interfaces.msg import SwapEvent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        help="policy (folder or .tar), a folder of them, or a folder with world_model/ and policies/, which swaps both",
    )
    parser.add_argument("--skill", default="", help="refuse a policy that was not made for this skill")
    parser.add_argument("--world-model", type=Path, help="world model to swap in together with the policies")
    parser.add_argument("--max-difference", type=float, default=0.0, help="of its actions to the running policy's; 2 lets everything pass")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the graph (default: 60)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--shadow", action="store_true", help="compute beside the running policy and publish policy/shadow; send nothing")
    action.add_argument("--end-shadow", action="store_true", help="end the shadow")
    action.add_argument("--rollback", action="store_true", help="undo the last swap")
    action.add_argument("--history", action="store_true", help="list the last swaps")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when it was done; a refusal is a GateError naming the gate."""
    without_checkpoint = args.end_shadow or args.rollback or args.history
    if without_checkpoint == (args.checkpoint is not None):
        raise ConfigError("diwa swap: expected either a checkpoint or one of --end-shadow, --rollback and --history.")
    find_running_graph()
    from diwa_ros.swap_client import open_client

    with open_client(args.timeout) as client:
        if args.history:
            show_history(client.read_history())
        elif args.rollback:
            print(client.roll_back())
        else:
            policies, world_model = find_parts(args)
            response = client.load(policies, args.skill, world_model, args.shadow or args.end_shadow, args.max_difference)
            print(f"{response.message} (chunk in {response.latency_ms:.1f} ms, difference {response.action_difference:.2f})")
    return 0


def find_parts(args: argparse.Namespace) -> tuple[Path | str, Path | str]:
    """Paths of policy or policies and of the world model; empty where there is none to swap."""
    if args.checkpoint is None:
        return "", ""
    both = args.checkpoint / "world_model", args.checkpoint / "policies"
    if args.world_model is None and all(path.is_dir() for path in both):
        return both[1], both[0]
    return args.checkpoint, args.world_model or ""


def show_history(events: list[SwapEvent]) -> None:
    """One line per event, oldest first."""
    table = Table("when", "event", "skill", "policy", "before", "ms", "difference", "why")
    for event in events:
        stamp_s = event.header.stamp.sec + event.header.stamp.nanosec * 1e-9
        figures = f"{event.latency_ms:.1f}", f"{event.action_difference:.2f}"
        ids = event.checkpoint_id[:12], event.previous_id[:12]
        table.add_row(f"{stamp_s:.3f}", event.event, event.skill, *ids, *figures, event.reason)
    Console().print(table)
