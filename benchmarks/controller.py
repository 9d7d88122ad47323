"""How well a Franka is driven: tracking, seams and torques on the fake FR3, the cost of the gate, the evenness of the 100 Hz loop.

    .venv/bin/python benchmarks/controller.py [--seconds 20] [--inference-ms 150] [--rate-hz 15] [--chunk 8] [--busy]

Chunks come at their rate, late by the inference, along a circle; the same circle streamed point by point is the smooth reference.
Figures count only where the robot's time kept up with the clock (the share is printed): a busy machine slows the simulated robot.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection

import numpy as np

from diwa_core.contract import Contract
from diwa_core.control.franka_arm import FrankaArm, Phase
from diwa_core.control.robot_config import RobotConfig
from diwa_core.control.target import TargetIntegrator, world_to_coordinates
from diwa_core.realtime import come_first
from diwa_core.sim.fake_robot import FakeRobot
from diwa_ros.franky_backend import FrankyBackend, read_robot
from diwa_ros.gate import Chunk, ChunkGate, DroppedChunk
from diwa_ros.node import prepare_process

RADIUS_M, PERIOD_S = 0.05, 6.0
GATE_TICKS = 20_000
LEAST_PACE = 0.8
TAKE_OVER_STEPS = 500
NODE_PRIORITY = 10  # realtime_priority of config/deploy.yaml
BUSY = "import numpy\na = numpy.ones((64, 64))\nwhile True: a @ a"


class RecordedArm(FrankaArm):
    """An arm that remembers what it was sent and where it was."""

    def __init__(self, config: RobotConfig) -> None:
        super().__init__(config)
        self.samples: list[tuple[np.ndarray, np.ndarray]] = []

    def _send(self, before: np.ndarray, after: np.ndarray, period_s: float) -> None:
        super()._send(before, after, period_s)
        self.samples.append((after, self.measured_coordinates()))


@dataclass
class Run:
    """samples: commanded and measured coordinates per period; torques: Nm [T, 7] per ms of the robot's time."""

    commanded: np.ndarray
    measured: np.ndarray
    torques: np.ndarray
    late_s: np.ndarray
    pace: float  # robot's time by the clock's


def circle(seconds: float) -> np.ndarray:
    """Offset from the start (m) [3]: a circle in the horizontal plane, entered gently."""
    angle = 2 * np.pi * seconds / PERIOD_S
    size = RADIUS_M * min(1.0, seconds / PERIOD_S)
    return np.array([size * np.sin(angle), size * (1 - np.cos(angle)), 0.0])


def serve_robot(config: RobotConfig, pipe: Connection) -> None:
    """A process of its own, as in the graph: a fake robot that answers every line of `pipe` with its steps and torques since the last."""
    torques: list[np.ndarray] = []

    def keep(simulator: object) -> None:
        torques.append(simulator.robots[0]._applied_torques.copy())

    with FakeRobot(config.address, config.home_joints_rad, config.base_position_m, after_step=keep) as fake:
        pipe.send(None)
        while pipe.recv():
            pipe.send((fake.steps, np.array(torques)))
            torques.clear()


@contextmanager
def robot_process(config: RobotConfig) -> Iterator[Callable[[], tuple[int, np.ndarray]]]:
    """Yields a function that returns the robot's steps so far (ms of its time) and the torques (Nm [T, 7]) since it was last called."""
    ours, theirs = Pipe()
    process = get_context("spawn").Process(target=serve_robot, args=(config, theirs), daemon=True)
    process.start()
    theirs.close()

    def ask() -> tuple[int, np.ndarray]:
        ours.send(True)
        return ours.recv()

    try:
        ours.recv()
        yield ask
        ours.send(False)
    except EOFError as error:
        raise SystemExit("the fake robot ended: see above") from error
    finally:
        process.join(5.0)


def record(config: RobotConfig, seconds: float, drive: Callable[[FrankaArm, float], None]) -> Run:
    """Run `drive(arm, seconds)` on a fresh fake robot."""
    with robot_process(config) as ask:
        arm = RecordedArm(config)
        arm.start()
        while arm.phase is not Phase.READY or arm.state is None:
            time.sleep(0.01)
        (before, _), begin_s = ask(), time.monotonic()
        with ThreadPoolExecutor(1, initializer=lambda: come_first(NODE_PRIORITY)) as pool:
            pool.submit(drive, arm, seconds).result()
        (after, torques), end_s = ask(), time.monotonic()
        arm.close()
    commanded, measured = (np.array(values) for values in zip(*arm.samples, strict=True))
    return Run(commanded, measured, torques, np.array(arm.periods_late_s), (after - before) / 1000 / (end_s - begin_s))


def drive_smoothly(arm: FrankaArm, seconds: float) -> None:
    """The circle, point by point, at the rate of the stream."""
    start, begin_s, period_s = arm.measured_coordinates(), time.monotonic(), 1 / arm.config.stream_hz
    while (now_s := time.monotonic() - begin_s) < seconds:
        arm.aim(start + np.append(circle(now_s), np.zeros(3)), begin_s + now_s + period_s)
        time.sleep(period_s)


def drive_by_chunks(arm: FrankaArm, seconds: float, contract: Contract, chunk_size: int, inference_s: float) -> None:
    """The circle as chunks of deltas, each spliced in `inference_s` after its observation, through gate and integrator."""
    step_ns = round(1e9 * contract.step_s)
    gate, integrator = ChunkGate(contract.identity, step_ns, max_age_s=2.0), TargetIntegrator(arm.config, contract)
    measured = FrankyBackend.to_world(argparse.Namespace(config=arm.config), arm.state.pose)
    integrator.start(measured)
    under_way: deque[tuple[float, Chunk]] = deque()
    begin_s, tick = time.monotonic(), 0
    while tick * contract.step_s < seconds:
        now_s = tick * contract.step_s
        if tick % max(1, chunk_size // 2) == 0:
            times = now_s + contract.step_s * np.arange(chunk_size + 1)
            deltas = np.diff([circle(at_s) for at_s in times], axis=0) / contract.max_delta_m
            actions = np.concatenate([deltas, np.zeros((chunk_size, 3)), np.ones((chunk_size, 1))], 1).astype(np.float32)
            under_way.append((now_s + inference_s, Chunk(tick * step_ns, step_ns, actions, False, "circle", contract.identity)))
        while under_way and under_way[0][0] <= now_s:
            gate.accept(under_way.popleft()[1], tick * step_ns)
        command = gate.command_at(tick * step_ns)
        if command is not None:
            integrator.apply(command.action, integrator.target, arm.state.joints)
            arm.aim(world_to_coordinates(integrator.target, arm.config), time.monotonic() + contract.step_s)
        tick += 1
        time.sleep(max(0.0, begin_s + tick * contract.step_s - time.monotonic()))


def measure_gate(contract: Contract) -> np.ndarray:
    """Seconds of CPU time per tick of checking, splicing and choosing."""
    step_ns, spent_s = round(1e9 * contract.step_s), np.empty(GATE_TICKS)
    gate, random = ChunkGate(contract.identity, step_ns), np.random.default_rng(0)
    for tick in range(GATE_TICKS):
        chunk = Chunk(tick * step_ns, step_ns, random.uniform(-1, 1, (8, 7)).astype(np.float32), False, "a", contract.identity)
        begin_s = time.thread_time()
        try:
            gate.accept(chunk, tick * step_ns)
        except DroppedChunk as error:
            raise SystemExit(f"the benchmark's own chunk was refused: {error}") from error
        gate.command_at(tick * step_ns)
        spent_s[tick] = time.thread_time() - begin_s
    return spent_s


def print_run(name: str, run: Run, config: RobotConfig) -> None:
    """Tracking and seams."""
    error_m = np.linalg.norm((run.commanded - run.measured)[:, :3], axis=1)
    acceleration = np.diff(run.commanded[:, :3], n=2, axis=0) * config.stream_hz**2
    caveat = "" if run.pace >= LEAST_PACE else ": too busy a machine, these figures do not count"
    print(f"{name}: robot's time {run.pace:.0%} of the clock's{caveat}")
    print(f"  tracking error          mean {error_m.mean() * 1e3:.1f} mm, p99 {np.percentile(error_m, 99) * 1e3:.1f} mm (goal: mean 5)")
    print(
        f"  commanded acceleration  at most {np.abs(acceleration).max():.2f} m/s2 per axis, limit {config.motion.max_acceleration_m_s2:g}"
    )
    print(f"  torque step             at most {peak_torque_step(run):.2f} Nm/ms")
    print(f"  loop, late              p50 {np.median(run.late_s) * 1e3:.2f} ms, p99 {np.percentile(run.late_s, 99) * 1e3:.2f} ms (goal: 2)")


def peak_torque_step(run: Run) -> float:
    """Largest change of a joint torque in a millisecond, the first half second, in which the arm is taken over, left out."""
    if len(run.torques) < 2 * TAKE_OVER_STEPS:
        return float("nan")
    return float(np.abs(np.diff(run.torques[TAKE_OVER_STEPS:], axis=0)).max())


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--inference-ms", type=float, default=150.0)
    parser.add_argument("--rate-hz", type=float, default=15.0)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--busy", action="store_true", help="another process computes meanwhile, as a policy does")
    args = parser.parse_args()
    config = replace(read_robot("fake_fr3"), address="127.0.0.90")
    contract = Contract(rate_hz=args.rate_hz)
    spent_s = measure_gate(contract)
    print(f"gate: p50 {np.median(spent_s) * 1e3:.3f} ms, p99 {np.percentile(spent_s, 99) * 1e3:.3f} ms of CPU per tick (goal: p99 0.2)")
    worker = subprocess.Popen([sys.executable, "-c", BUSY], env={**os.environ, "OMP_NUM_THREADS": "1"}) if args.busy else None
    prepare_process()  # as every node does
    try:
        smooth = record(config, args.seconds, drive_smoothly)
        print_run("smooth reference", smooth, config)
        chunks = record(config, args.seconds, lambda arm, s: drive_by_chunks(arm, s, contract, args.chunk, args.inference_ms / 1e3))
        print_run(f"chunks of {args.chunk} at {args.rate_hz:g} Hz, {args.inference_ms:g} ms late", chunks, config)
        print(f"peak torque step, chunks by smooth reference: {peak_torque_step(chunks) / peak_torque_step(smooth):.2f} (goal: 1.5)")
    finally:
        if worker is not None:
            worker.terminate()


if __name__ == "__main__":
    main()
