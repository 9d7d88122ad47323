"""`diwa record`: record the running graph until Ctrl-C, or tell a running recorder what to do (docs/recording.md)."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diwa_core.data.bag_format import DISCARD, FAILURE, OUTCOMES, SUCCESS
from diwa_core.errors import ConfigError, DataError, SetupError

if TYPE_CHECKING:
    from diwa_interfaces.msg import EpisodeReport

    from diwa_ros.recorder_client import RecorderClient

KEYS = {"s": SUCCESS, "f": FAILURE, "d": DISCARD}
SHOW_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    words = "run (default): a recorder of its own until Ctrl-C; start, stop, mark, save: tell the recorder that runs already"
    parser.add_argument("action", nargs="?", default="run", choices=("run", "start", "stop", "mark", "save"), help=words)
    parser.add_argument("outcome", nargs="?", default="", help=f"of mark and stop: {', '.join(OUTCOMES)}")
    parser.add_argument("--name", default="", help="folder name of the bag (default: skill and time)")
    parser.add_argument("--skill", default="", help="what is tried")
    parser.add_argument("--note", default="", help="of a mark, or why the last seconds are saved")
    parser.add_argument("--folder", type=Path, default=Path("runs/bags"), help="run: where bags are made (default: runs/bags)")
    parser.add_argument("--seconds", type=float, default=0.0, help="run: stop after so long; save: the last so many (default: no limit)")
    parser.add_argument("--compression", default="none", choices=("none", "zstd"))
    parser.add_argument("--contract", default="", metavar="YAML", help="of the robot (default: the play table's)")
    parser.add_argument("--topics", default="", metavar="A,B", help="run: further topics")
    parser.add_argument("--lockstep", action="store_true", help="run: the graph's simulation waits for every command")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the recorder (default: 60)")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when it was done, 1 when the recording ended by an error or an episode is bad."""
    if args.outcome not in ("", *OUTCOMES) or (args.action == "mark") > bool(args.outcome):
        raise ConfigError(f"diwa record {args.action}: expected an outcome ({', '.join(OUTCOMES)}), found '{args.outcome}'.")
    try:
        import rclpy

        from diwa_ros.graph import load_graph
        from diwa_ros.recorder_client import RecorderClient
        from diwa_ros.up import GraphRunner
    except ImportError as error:
        raise SetupError(f"the ROS nodes are not installed ({error}). Mend: make setup, or source the workspace.") from error
    processes = load_graph("record").resolve(
        {
            "folder": str(args.folder),
            "name": args.name,
            "skill": args.skill,
            "mode": "lockstep" if args.lockstep else "real_time",
            "contract": args.contract,
            "compression": args.compression,
            "extra_topics": args.topics,
        }
    )
    for process in processes:
        os.environ.update(process.extra_environment)  # find the graph where `diwa up` puts it
    stops: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: stops.append(received))
    rclpy.init(args=[], signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
    try:
        with RecorderClient(args.timeout) as client:
            if args.action != "run":
                return tell(client, args)
            with GraphRunner(processes, Path("runs") / "logs" / time.strftime("record-%Y%m%d-%H%M%S")) as runner:
                return record(client, args.seconds, stops, lambda: check_alive(runner.poll()))
    finally:
        rclpy.try_shutdown()


def tell(client: RecorderClient, args: argparse.Namespace) -> int:
    """One call of a service. Raises DataError with the recorder's reason."""
    if args.action == "start":
        print(client.start(args.name, args.skill).message)
    elif args.action == "mark":
        print(client.mark(args.outcome, args.skill, args.note).message)
    elif args.action == "save":
        print(client.save(args.seconds, args.note).message)
    else:
        response = client.stop(args.outcome)
        print(response.message)
        return show_episodes(response.episodes)
    return 0


def record(client: RecorderClient, seconds: float, stops: list[int], check: Callable[[], None]) -> int:
    """Show how the recording goes, take marks by key, and close the bag at the end. Raises DataError when it ended by an error."""
    client.wait_for(lambda: (check(), bool(stops) or (client.status is not None and client.status.state == "recording"))[1], "a recording")
    if stops:
        return 130
    keys = ", ".join(f"{key} marks {outcome}" for key, outcome in KEYS.items())
    print(f"{client.status.detail}; Ctrl-C closes the bag, {keys}", flush=True)
    end_s, show_s = time.monotonic() + (seconds or float("inf")), 0.0
    with keyboard() as read_keys:
        while not stops and time.monotonic() < end_s and client.status.state == "recording":
            client.spin(0.05)
            check()
            for outcome in (KEYS[key] for key in read_keys() if key in KEYS):
                print(f"\r\x1b[K{client.mark(outcome).message}", flush=True)
            if sys.stdout.isatty() and time.monotonic() >= show_s:
                show_s = time.monotonic() + SHOW_S
                print(f"\r\x1b[K{show_status(client)}", end="", flush=True)
    print()
    if client.status.state == "failed":
        raise DataError(client.status.detail)
    response = client.stop()
    print(response.message)
    return show_episodes(response.episodes)


def show_status(client: RecorderClient) -> str:
    """One line."""
    status = client.status
    size = f"{status.bytes / 2**20:.1f} MiB"
    return f"{status.duration_s:6.1f} s  episode {status.episode}  {status.messages} messages  {size}  {status.dropped} dropped"


def show_episodes(episodes: list[EpisodeReport]) -> int:
    """A line per episode; returns 1 when one is bad."""
    for episode in episodes:
        end_s, begin_s = (stamp.sec + stamp.nanosec * 1e-9 for stamp in (episode.end, episode.begin))
        frames = f"{sum(episode.received)} messages"
        judgement = f"BAD: {episode.reason}" if episode.bad else "complete"
        print(f"  episode {episode.index}: {episode.outcome or 'not marked'}, {end_s - begin_s:.1f} s, {frames}, {judgement}")
    return int(any(episode.bad for episode in episodes))


def check_alive(death: object) -> None:
    """Raises DataError when the recorder's process has ended."""
    if death is not None:
        raise DataError(f"{death.sentence}. Its last lines:\n" + "\n".join(f"    {line}" for line in death.last_lines))


@contextmanager
def keyboard() -> Iterator[Callable[[], str]]:
    """A function that returns the keys pressed since its last call; where there is no terminal, none."""
    if not sys.stdin.isatty():
        yield lambda: ""
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)

    def read() -> str:
        return os.read(number, 64).decode(errors="replace") if select.select([number], [], [], 0)[0] else ""

    try:
        yield read
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
