"""How fast recordings become training data: import of bags, beside what reading them costs; and sampling, beside what training needs.

Bags of two views at 30 Hz are made on the spot and imported several times over under other names, so that starting the workers weighs
little without filling the disk. `python benchmarks/data.py [--seconds 60] [--copies 3] [--workers 2]`
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from rosbags.rosbag2 import Reader

from diwa_core.contract import Contract
from diwa_core.data.bag_import import ImportSettings, import_bags
from diwa_core.data.bag_reader import load_types

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from bag_support import FakeBag, frame_image

HEIGHT = 480  # of pictures that are wider
KINDS = {  # side or width in pixels, compression
    "64 x 64 raw": (64, ""),
    "640 x 480 raw": (640, ""),
    "640 x 480 jpeg": (640, "jpeg"),
}
BATCH, LENGTH = 64, 56
NEED = 20  # times real time


@cache
def make_noisy_image(number: int, size: int) -> np.ndarray:
    """A picture with a camera's noise: smooth ones would be too easy for JPEG."""
    noise = np.random.default_rng(number).integers(0, 12, (size, size, 3), dtype=np.uint8)
    return (frame_image(number, size) // 2 + noise)[:HEIGHT]


def write_bags(folder: Path, size: int, compressed: str, seconds: float, count: int) -> tuple[list[Path], Contract]:
    """`count` bags that together last `seconds`."""
    contract = Contract()
    contract = replace(contract, images=tuple(replace(stream, height=min(size, HEIGHT), width=size) for stream in contract.images))
    ticks = round(seconds / count * contract.rate_hz)
    bags = [
        FakeBag(ticks, k * 10_000, size, compressed, contract=contract, image=lambda n, side: make_noisy_image(n % 16, side))
        for k in range(count)
    ]
    return [bag.write(folder / f"bag_{k}") for k, bag in enumerate(bags)], contract


def read_with_rosbags(bags: list[Path]) -> int:
    """Every message deserialized by rosbags, and nothing done with it; returns how many there were."""
    count = 0
    for bag in bags:
        with Reader(bag) as reader:
            for connection, _, data in reader.messages(reader.connections):
                load_types().deserialize_cdr(data, connection.msgtype)
                count += 1
    return count


def cpu_s() -> float:
    """CPU-seconds of this process and the workers that have ended: they hold on a busy machine, too."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def link_bag(bag: Path, number: int) -> Path:
    """The same bag under another name."""
    linked = bag.with_name(f"{bag.name}_{number}")
    linked.mkdir()
    for file in bag.iterdir():
        (linked / file.name).hardlink_to(file)
    return linked


def measure_import(folder: Path, name: str, seconds: float, copies: int, workers: int) -> Path:
    """One row of the table; returns the store."""
    written, _ = write_bags(folder, *KINDS[name], seconds, workers)
    bags = [link_bag(bag, number) for number in range(copies) for bag in written]
    seconds *= copies
    megabytes = sum(file.stat().st_size for bag in bags for file in bag.iterdir()) / 1e6
    begin_s, begin_cpu_s = time.perf_counter(), cpu_s()
    messages = read_with_rosbags(bags)
    read_s, read_cpu_s = time.perf_counter() - begin_s, cpu_s() - begin_cpu_s
    begin_s, begin_cpu_s = time.perf_counter(), cpu_s()
    report = import_bags(bags, folder / "store", settings=ImportSettings(frozen_motion_m=0.0), workers=workers)
    import_s, import_cpu_s = time.perf_counter() - begin_s, cpu_s() - begin_cpu_s
    speed = seconds / import_s
    print(
        f"{name:15s} {megabytes:6.0f} MB, {messages:6d} messages: rosbags alone {seconds / read_s:6.1f} x real time, "
        f"import {speed:6.1f} x ({len(report.store) / import_s:5.0f} frames/s); needed {NEED} x: {'yes' if speed >= NEED else 'NO'}. "
        f"Per CPU-second {seconds / read_cpu_s:.0f} x and {seconds / import_cpu_s:.0f} x"
    )
    return report.store.path


def measure_sampling(path: Path) -> None:
    """Frames/s of sampled batches beside what the trainer of the small world model takes."""
    import torch  # here, because every worker of the import above reads this file, too
    from world_model import make_batch, time_call

    from diwa_core.data.sequences import WindowSampler
    from diwa_core.data.store import PlayStore
    from diwa_core.world_model.model import SIZES, WorldModel
    from diwa_core.world_model.train import PlayData

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = WorldModel(SIZES["small"])
    data = PlayData([PlayStore.open(path)], model.config)
    data.embeddings = torch.randn(len(data.low), model.embedding_size)
    sampler, steps = WindowSampler(data.episodes, BATCH, LENGTH, (4, 16), 0), iter(range(10**9))
    sample_s = time_call(lambda: data.batch(sampler.sample(next(steps)), model.device), "cpu", 1.0)
    batch, optimizer = make_batch(model, BATCH, LENGTH, "cpu"), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, _ = model.loss(batch, model.rssm.initial(BATCH))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    train_s = time_call(train, "cpu", 2.0)
    frames = BATCH * LENGTH
    print(
        f"sampling {frames / sample_s:9.0f} frames/s; training takes {frames / train_s:7.0f} ({100 * sample_s / train_s:.1f} % of its time)"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of recording, in as many bags as workers")
    parser.add_argument("--copies", type=int, default=3, help="how often those are imported")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    print(f"{args.workers} workers, {args.copies} times {args.seconds:g} s of two views at 30 Hz")
    for name in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            store = measure_import(Path(folder), name, args.seconds, args.copies, args.workers)
            if name == args.kinds[0]:
                measure_sampling(store)


if __name__ == "__main__":
    main()
