"""`diwa up deploy name:=value ...`: the graph in the foreground, until Ctrl-C or until a node that it needs ends."""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import time
from pathlib import Path

from diwa_core.errors import SetupError

EXIT_NODE_DIED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("graph", nargs="?", default="deploy", help="a description in config/, or the path of one (default: deploy)")
    parser.add_argument("assignments", nargs="*", metavar="name:=value", help="arguments of the graph, as with ros2 launch")
    parser.add_argument("-s", "--show-args", action="store_true", help="list the graph's arguments and end")
    parser.add_argument("-n", "--dry-run", action="store_true", help="print the processes that would start and end")
    parser.add_argument("--only", default="", metavar="NODE,NODE", help="start these nodes alone; the others run elsewhere, or not at all")
    parser.add_argument("--log-dir", type=Path, help="folder for one log file per node (default: runs/logs/<time>)")
    parser.add_argument("--quiet", action="store_true", help="write the logs to the files only")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 after an orderly stop, 1 when a required node ended by itself."""
    try:
        from diwa_ros.graph import load_graph, parse_assignments, select_nodes
        from diwa_ros.up import command_line
    except ImportError as error:
        raise SetupError(f"the ROS nodes are not installed ({error}). Mend: make setup, or source the workspace.") from error
    graph_name, assignments = args.graph, args.assignments
    if ":=" in graph_name:  # `diwa up sim:=false`
        graph_name, assignments = "deploy", [graph_name, *assignments]
    graph = load_graph(graph_name)
    if args.show_args:
        for argument in graph.description.arguments:
            print(f"{argument.name}:={argument.default!r:24} {argument.help}")
        return 0
    processes = select_nodes(graph.resolve(parse_assignments(assignments)), args.only)
    if args.dry_run:
        print("\n".join(shlex.join(command_line(process)) for process in processes))
        return 0
    log_folder = args.log_dir or Path("runs") / "logs" / time.strftime("%Y%m%d-%H%M%S")
    return run_graph(processes, log_folder, quiet=args.quiet)


def run_graph(processes: list, log_folder: Path, quiet: bool = False) -> int:
    """Run until a signal or a death; SIGINT, SIGTERM and SIGHUP stop in order, a second one at once."""
    from diwa_ros.up import GraphRunner

    logging.basicConfig(level=logging.INFO, format="diwa up: %(message)s")
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: signals.append(received))
    width = max(len(process.name) for process in processes)
    echo = None if quiet else lambda name, line: print(f"{name:>{width}} | {line}", flush=True)
    runner = GraphRunner(processes, log_folder, echo)
    print(f"diwa up: {', '.join(process.name for process in processes)}; logs in {log_folder}; Ctrl-C stops", flush=True)
    try:
        runner.start()
        death = runner.wait(lambda: bool(signals))
    finally:
        codes = runner.stop(lambda: len(signals) > 1)
    if death:
        print(f"diwa up: {death.sentence}. The other nodes were stopped. Its last lines:", flush=True)
        print("\n".join(f"    {line}" for line in death.last_lines), flush=True)
        return EXIT_NODE_DIED
    unclean = {name: code for name, code in codes.items() if code}
    print(f"diwa up: stopped{f'; exit codes that are not 0: {unclean}' if unclean else ''}", flush=True)
    return 0
