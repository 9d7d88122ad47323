"""What recording costs: the graph in real time with and without it, and how long handing a message over takes while the disk is busy.

`python benchmarks/recorder.py [--seconds 60] [--rounds 2] [--size small] [--json FILE]`. Rounds with and without the recorder take turns,
so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from runtime import STAGES, Measurement, make_random_checkpoint, measure

from diwa_core.contract import Contract
from diwa_core.data.bag_format import BagTopic, Recording
from diwa_core.data.bag_recorder import BagRecorder, Packet, RecorderSettings

IMAGES = {"64 x 64": 64 * 64 * 3, "640 x 480": 640 * 480 * 3}  # bytes
HANDED = 600  # images: half as many at 60 Hz, then all of them at once
PAUSE_S = 1 / 60  # two cameras at 30 Hz


@dataclass
class Handing:
    """One size of image. Times of `take` in microseconds, [p50, p99, max]; frames/s: what the writer managed."""

    image: str
    take_us: list[float]
    dropped: int
    frames_per_s: float
    mib_per_s: float


def measure_handing(image: str, folder: Path) -> Handing:
    """Hand images over at 60 Hz, then as many as fit at once, and wait until they are on the disk."""
    name, payload = "/camera", os.urandom(IMAGES[image])
    recorder = BagRecorder(RecorderSettings(folder, recent_s=0.0, real_time=False), Contract())
    recorder.add_topic(BagTopic(name, "std_msgs/msg/Empty", ""))
    recorder.start(image.replace(" ", ""))
    times = []
    for _ in range(HANDED // 2):
        begin = time.perf_counter()
        recorder.take(Packet(name, time.time_ns(), 0, payload))
        times.append(time.perf_counter() - begin)
        time.sleep(PAUSE_S)
    begin = time.perf_counter()
    for _ in range(HANDED):
        recorder.take(Packet(name, time.time_ns(), 0, payload))
    dropped = recorder.recording.dropped
    recorder.stop().result()
    seconds = time.perf_counter() - begin
    written = HANDED - dropped
    figures = [round(float(value) * 1e6, 1) for value in (*np.percentile(times, (50, 99)), max(times))]
    return Handing(image, figures, dropped, round(written / seconds, 1), round(written * len(payload) / seconds / 2**20, 1))


def read_losses(bags: Path) -> tuple[int, int, int]:
    """Messages in the newest bag, messages dropped by the recorder, and expected frames that are missing."""
    folder = max(bags.iterdir(), key=lambda path: path.stat().st_mtime)
    information = yaml.safe_load((folder / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    episodes = Recording.from_custom_data(information["custom_data"]).episodes
    dropped, missing = (sum(sum(getattr(episode, name).values()) for episode in episodes) for name in ("dropped", "missing"))
    return information["message_count"], dropped, missing


def show(results: dict[str, list[Measurement]], console: Console) -> None:
    """One column per variant, rounds in order."""
    table = Table("", *results)
    rows = {"ticks": "ticks", "missed ticks": "missed_ticks", "overslept ticks": "overslept_ticks"}
    for label, name in rows.items():
        table.add_row(label, *(", ".join(str(getattr(one, name)) for one in rounds) for rounds in results.values()))
    for stage, label in STAGES.items():
        for index, which in ((0, "p50"), (2, "p99")):
            known = ([one.latency_ms[stage][index] for one in rounds if stage in one.latency_ms] for rounds in results.values())
            table.add_row(f"{label}, {which}, ms", *(", ".join(f"{value:.1f}" for value in values) for values in known))
    cpu = (", ".join(f"{one.cpu_percent.get('recorder', 0):.0f}" for one in rounds) for rounds in results.values())
    table.add_row("recorder, % of one core", *cpu)
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each kind")
    parser.add_argument("--size", default="small", choices=("small", "paper"), help="world model")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    console = Console(width=120)
    console.print(f"{os.cpu_count()} cores, load average before the start {os.getloadavg()[0]:.1f}")
    results: dict[str, list[Measurement]] = {"without recorder": [], "recording": []}
    with tempfile.TemporaryDirectory(prefix="diwa_recorder_", dir=".") as text:
        folder = Path(text)
        handings = [measure_handing(image, folder) for image in IMAGES]
        table = Table("handing images over", "take p50, us", "p99", "max", "dropped", "frames/s to the disk", "MiB/s")
        for one in handings:
            table.add_row(one.image, *map(str, one.take_us), str(one.dropped), str(one.frames_per_s), str(one.mib_per_s))
        console.print(table)
        shutil.rmtree(folder)
        checkpoint = make_random_checkpoint(options.size, folder / "checkpoint")
        for number in range(options.rounds):
            for variant, rounds in results.items():
                logs = Path("runs") / "benchmark_recorder" / f"{variant.replace(' ', '_')}_{number}"
                arguments = {"record": variant == "recording", "bags": str(folder / "bags")}
                rounds.append(measure(options.size, "random weights", checkpoint, options.seconds, logs, **arguments))
                if arguments["record"]:
                    messages, dropped, missing = read_losses(folder / "bags")
                    console.print(f"bag: {messages} messages, {dropped} dropped by the recorder, {missing} frames missing")
    show(results, console)
    if options.json:
        measured = {variant: [asdict(one) for one in rounds] for variant, rounds in results.items()}
        options.json.write_text(json.dumps({"handing": [asdict(one) for one in handings], "graph": measured}, indent=2))


if __name__ == "__main__":
    main()
