"""How often the world-model monitor fires on clean play, and which injected faults it catches, how soon.

Calibrated on one half of held-out play and measured on the other. Camera faults are put into recorded pictures; dynamics faults into the
arm of the simulation, which replays recorded actions while it reports what it was told to do.
`python benchmarks/monitor.py [--validation data/validation_scenes] [--windows 24] [--parts clean camera dynamics] [--markdown]`
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pybullet
import torch
from scipy import stats

from diwa_core.contract import low_vector
from diwa_core.data.store import PlayStore
from diwa_core.evaluate.statistics import success_rate
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.state import SceneState
from diwa_core.world_model.filter import load_world_model
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.monitor import Calibration, calibrate, compare_sequences, find_peaks, judge, list_groups
from diwa_core.world_model.monitor_data import drop_copies, stack_episodes
from diwa_core.world_model.train import PlayData

ONSET, LENGTH = 25, 60  # frames of a window: clean, then a second and a bit with the fault
RATE_HZ = 30.0
STATED_PER_HOUR = (1.0, 10.0, 30.0)
Pictures = np.ndarray  # uint8 [B, T, 64, 64, 3]


class Bench:
    """The model, its calibration from the first half of the episodes, and the other half to measure on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, checkpoint = load_world_model(arguments.world_model)
        self.store = PlayStore.open(arguments.validation)
        self.data = PlayData([self.store], replace(self.model.config, views=(), code_sizes=()), arguments.max_frames)
        episodes = drop_copies(self.data)
        self.used, self.held_out = episodes[: len(episodes) // 2], episodes[len(episodes) // 2 :]
        self.windows = draw_windows(self.held_out, arguments.windows)
        self.identity, self.debounce_frames = checkpoint.identity, arguments.debounce
        if arguments.calibration:
            self.calibration = Calibration.load(arguments.calibration, self.model, self.identity)
        else:
            self.calibration = self.calibrate(self.residuals(self.used), arguments.false_alarms)

    def calibrate(self, residuals: list[np.ndarray], false_alarms_per_hour: float) -> Calibration:
        """A calibration of the world model from some residuals."""
        return calibrate(residuals, self.model, self.identity, RATE_HZ, false_alarms_per_hour, self.debounce_frames)[0]

    def pictures(self, start: int, end: int) -> dict[str, np.ndarray]:
        """uint8 [T, 64, 64, 3] of each view."""
        return {view: self.store.read(view, start, end) for view in self.model.config.views}

    def sequences(self, episodes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, T, E] and the actions [B, T, A] that led into each frame."""
        self.data.embeddings = torch.zeros(len(self.data.low), self.model.embedding_size)
        for start, end in episodes:
            images = {view: torch.from_numpy(image) for view, image in self.pictures(start, end).items()}
            self.data.embeddings[start:end] = self.model.embed(self.data.low[start:end], images)
        return stack_episodes(self.data, episodes, self.model.device)

    def residuals(self, episodes: list[tuple[int, int]]) -> list[np.ndarray]:
        """Residuals [T, K, E] of recorded episodes."""
        batch = compare_sequences(self.model, *self.sequences(episodes))
        return [part[: end - start] for part, (start, end) in zip(batch, episodes, strict=True)]

    def measure(self, name: str, embeddings: torch.Tensor, actions: torch.Tensor) -> dict:
        """How many windows [B] with a fault from ONSET on are caught, by which group, and after how long."""
        alarms = [judge(part, self.model, self.calibration) for part in compare_sequences(self.model, embeddings, actions)]
        quiet = [alarm for alarm in alarms if not alarm[:ONSET].any()]  # one that fires before the fault tells nothing about it
        caught = [alarm[ONSET:] for alarm in quiet if alarm[ONSET:].any()]
        delays_ms = [1e3 * (int(alarm.any(1).argmax()) + 1) / RATE_HZ for alarm in caught]
        first = [alarm[alarm.any(1).argmax()] for alarm in caught]
        groups = [name for g, name in enumerate(list_groups(self.model)) if sum(row[g] for row in first) > len(first) / 2]
        return {"fault": name, "windows": len(quiet), "caught": len(caught), "delays_ms": delays_ms, "first": groups}


def draw_windows(episodes: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """(start, end) of `count` windows, spread over the episodes."""
    rng = np.random.default_rng(0)
    starts = [int(rng.integers(begin, end - LENGTH)) for begin, end in (episodes[i % len(episodes)] for i in range(count))]
    return [(start, start + LENGTH) for start in starts]


# -- clean play ------------------------------------------------------------------------------------------------------------------------


def measure_clean(bench: Bench) -> list[dict]:
    """For several stated rates: alarms on each half of the play with the calibration of the other; several within a second are one."""
    halves = [bench.residuals(bench.used), bench.residuals(bench.held_out)]
    rows = []
    for stated in STATED_PER_HOUR:
        row = {"stated": stated, "alarms": 0, "minutes": 0.0}
        for used, other in (halves, reversed(halves)):
            calibration = bench.calibrate(used, stated)
            alarms = [judge(part, bench.model, calibration).any(1) for part in other]
            row["alarms"] += sum(len(find_peaks(alarm.astype(float), 0.5)) for alarm in alarms)
            row["minutes"] += sum(map(len, alarms)) / RATE_HZ / 60
        rows.append(row)
    return rows


def rate_per_hour(count: int, minutes: float) -> tuple[float, float, float]:
    """Events per hour with the exact 95 % Poisson interval (Garwood 1936)."""
    low = stats.chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    high = stats.chi2.ppf(0.975, 2 * count + 2) / 2
    return tuple(60 * value / minutes for value in (count, low, high))


# -- camera faults ---------------------------------------------------------------------------------------------------------------------


def frozen(images: Pictures) -> Pictures:
    return np.repeat(images[:, :1], images.shape[1], 1)


def dark(images: Pictures) -> Pictures:
    return (images * 0.3).astype(np.uint8)


def blurred(images: Pictures) -> Pictures:
    return each(images, lambda image: cv2.GaussianBlur(image, (0, 0), 2.5))


def shifted(images: Pictures) -> Pictures:
    return np.roll(images, 4, axis=3)


def occluded(images: Pictures) -> Pictures:
    images = images.copy()
    images[:, :, 20:44, 20:44] = 30
    return images


def noisy(images: Pictures) -> Pictures:
    noise = np.random.default_rng(0).normal(0, 40, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def each(images: Pictures, change: Callable[[np.ndarray], np.ndarray]) -> Pictures:
    """Every picture changed."""
    return np.stack([change(image) for image in images.reshape(-1, *images.shape[2:])]).reshape(images.shape)


CAMERA_FAULTS = {
    "frozen": frozen,
    "dark (30 % of the light)": dark,
    "blurred (2.5 pixels)": blurred,
    "shifted (4 of 64 pixels)": shifted,
    "occluded (14 % of the picture)": occluded,
    "noise (40 of 255)": noisy,
}


def measure_cameras(bench: Bench) -> list[dict]:
    """One row for each fault and view, and one for swapped views; nothing wrong comes first."""
    frames = torch.from_numpy(np.array([np.arange(*window) for window in bench.windows]))
    embeddings, actions = bench.sequences(bench.windows)
    seen = [bench.pictures(*window) for window in bench.windows]
    pictures = {view: np.stack([window[view] for window in seen]) for view in bench.model.config.views}
    rows = [bench.measure("nothing (recorded play)", embeddings, actions)]

    def inject(name: str, changed: dict[str, Pictures]) -> None:
        late = {view: torch.from_numpy(np.ascontiguousarray(changed.get(view, pictures[view])[:, ONSET:])) for view in pictures}
        low = bench.data.low[frames[:, ONSET:]].flatten(0, 1)
        wrong = bench.model.embed(low, {view: images.flatten(0, 1) for view, images in late.items()})
        faulty = torch.cat([embeddings[:, :ONSET], wrong.unflatten(0, (len(frames), -1))], 1)
        rows.append(bench.measure(name, faulty, actions))

    for view in pictures:
        for name, fault in CAMERA_FAULTS.items():
            late = np.concatenate([pictures[view][:, :ONSET], fault(pictures[view][:, ONSET:])], 1)
            inject(f"{view}: {name}", {view: late})
    inject("views swapped", dict(zip(pictures, reversed(pictures.values()), strict=True)))
    return rows


# -- dynamics faults -------------------------------------------------------------------------------------------------------------------


class FaultyTable(PlayTable):
    """The arm follows a command that `fault` makes of the action; the table reports the target pose that the action asked for."""

    fault: Callable[[np.ndarray], np.ndarray] | None = None
    stuck = False  # the gripper

    def _advance(self, action: np.ndarray) -> None:
        self._told = action
        if self.fault is None:
            self._followed = self._target
        super()._advance(action)

    def _command_arm(self) -> None:
        if self.fault is None:
            super()._command_arm()
            return
        reported, self._target = self._target, self._followed
        self._move_target(self.fault(self._told))
        super()._command_arm()
        self._followed, self._target = self._target, reported

    def _command_fingers(self) -> None:
        if not self.stuck:
            super()._command_fingers()


def ignore_axis(run: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda action: np.where(np.arange(7) == run % 3, 0.0, action)


def halve(run: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda action: action * np.array([0.5] * 6 + [1.0])


def delay(run: int) -> Callable[[np.ndarray], np.ndarray]:
    waiting = deque([np.zeros(7)] * 3)

    def late(action: np.ndarray) -> np.ndarray:
        waiting.append(action)
        return waiting.popleft()

    return late


def move_object(table: FaultyTable, run: int) -> None:
    """Drawer or slider half a range away, or the red block 10 cm along the table."""
    name, span = (("drawer", 0.22), ("slider", 0.28), ("block", 0.1))[run % 3]
    if name == "block":
        position, orientation = pybullet.getBasePositionAndOrientation(table.scene.blocks[0], physicsClientId=table.client)
        moved = (position[0] + (span if position[0] < 0 else -span), *position[1:])
        pybullet.resetBasePositionAndOrientation(table.scene.blocks[0], moved, orientation, physicsClientId=table.client)
        return
    joint = table.scene.joints[name]
    value = pybullet.getJointState(table.scene.table, joint, physicsClientId=table.client)[0]
    pybullet.resetJointState(table.scene.table, joint, value + (span if value < span / 2 else -span) / 2, physicsClientId=table.client)


ARM_FAULTS = {"one axis ignored": ignore_axis, "gain halved": halve, "delayed by 3 frames": delay}
DYNAMICS = ("nothing (simulation)", "nothing, gripper moves", *ARM_FAULTS, "gripper stuck", "object moved suddenly")


def measure_dynamics(bench: Bench) -> list[dict]:
    """Recorded actions replayed from the start of held-out episodes, every fault from the same frame on."""
    table, store = FaultyTable(), bench.data
    seen = {name: [] for name in DYNAMICS}
    told = {name: [] for name in DYNAMICS}
    for run, (begin, _) in enumerate(bench.held_out[i % len(bench.held_out)] for i in range(len(bench.windows))):
        skip = 40 * (run // len(bench.held_out))  # another part of the same episode
        actions = np.clip(store.actions[begin + skip : begin + skip + LENGTH], -1, 1).astype(np.float64)
        table.fault, table.stuck = None, False
        table.reset(options={"state": start_of(store, begin + skip)})
        frames = [table._observe()]
        for action in actions[: ONSET - 1]:
            frames.append(table.step(action)[0])
        snapshot = table.save_state()
        for name in DYNAMICS:
            table.fault, table.stuck = None, False
            table.restore_state(snapshot)
            after = actions[ONSET - 1 :].copy()
            if "gripper" in name:
                after[:, 6] = -actions[ONSET - 2, 6]
            table.fault = ARM_FAULTS[name](run) if name in ARM_FAULTS else None
            table._followed, table.stuck = table._target, name == "gripper stuck"
            if name == "object moved suddenly":
                move_object(table, run)
            episode = [*frames, *(table.step(action)[0] for action in after[:-1])]
            seen[name].append(embed(bench.model, episode))
            executed = np.concatenate([actions[: ONSET - 1], after[:-1]])
            told[name].append(np.concatenate([[[0, 0, 0, 0, 0, 0, 1.0]], executed]).astype(np.float32))
    table.close()
    return [bench.measure(name, torch.stack(seen[name]), torch.from_numpy(np.array(told[name]))) for name in DYNAMICS]


def start_of(data: PlayData, frame: int) -> SceneState:
    """The start state that looks like a recorded frame."""
    scene, low = data.labels["scene_obs"][frame].astype(np.float64), data.low[frame].numpy()
    pose = np.concatenate([low[:3], euler_of(low[3:9])]).astype(np.float64)
    joints = {name: float(max(scene[i], 0.0)) for i, name in ((0, "slider"), (1, "drawer"), (3, "switch"))}
    return SceneState(tcp_pose=pose, gripper=float(np.sign(low[17])), led=bool(scene[5] > 0.5), blocks=scene[6:24].reshape(3, 6), **joints)


def euler_of(columns: np.ndarray) -> np.ndarray:
    """Rotation as its first two columns [6] -> euler xyz [3]."""
    from scipy.spatial.transform import Rotation

    x, y = columns[:3].astype(np.float64), columns[3:].astype(np.float64)
    return Rotation.from_matrix(np.stack([x, y, np.cross(x, y)], 1)).as_euler("xyz")


def embed(model: WorldModel, frames: list[dict]) -> torch.Tensor:
    """Embeddings [T, E] of simulated frames."""
    low = np.stack([low_vector(frame["robot_obs"], frame["target_pose"], None, 0) for frame in frames])
    return model.embed(torch.from_numpy(low), {view: torch.from_numpy(np.stack([f[view] for f in frames])) for view in model.config.views})


# -- printing --------------------------------------------------------------------------------------------------------------------------


def print_clean(rows: list[dict], markdown: bool) -> None:
    """One line for each stated rate: what was found on play that the limits were not made from."""
    header = "| false alarms per hour, stated | found | per hour | 95 % interval |\n|---|---|---|---|"
    print(f"\n{header}" if markdown else "\nclean play: false alarms per hour")
    for row in rows:
        rate, low, high = rate_per_hour(row["alarms"], row["minutes"])
        found = f"{row['alarms']} in {row['minutes']:.1f} minutes"
        if markdown:
            print(f"| {row['stated']:g} | {found} | {rate:.0f} | {low:.0f} to {high:.0f} |")
        else:
            print(f"stated {row['stated']:4g}, found {found}: {rate:.0f}, 95 % interval {low:.0f} to {high:.0f}", flush=True)


def print_rows(title: str, rows: list[dict], markdown: bool) -> None:
    """One line for each fault: share caught with its Wilson interval, median and slowest delay, the groups that told."""
    print(
        f"\n| {title} | caught | 95 % interval | after ms, median (most) | told first by |\n|---|---|---|---|---|"
        if markdown
        else f"\n{title}"
    )
    for row in rows:
        share = success_rate(row["caught"], row["windows"])
        delay = f"{np.median(row['delays_ms']):.0f} ({max(row['delays_ms']):.0f})" if row["delays_ms"] else "-"
        cells = (row["fault"], f"{row['caught']} of {row['windows']}", f"{100 * share.low:.0f} to {100 * share.high:.0f} %", delay)
        told = ", ".join(row["first"]) or "-"
        print(
            f"| {' | '.join(cells)} | {told} |" if markdown else f"{cells[0]:44s} {cells[1]:10s} {cells[2]:16s} {cells[3]:14s} {told}",
            flush=True,
        )


def main() -> None:
    """Calibrate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-model", default="checkpoints/world_model")
    parser.add_argument("--validation", default="data/validation_scenes")
    parser.add_argument("--max-frames", type=int, help="of the play: its first whole episodes up to so many frames")
    parser.add_argument("--windows", type=int, default=24, help="for each fault")
    parser.add_argument("--calibration", help="use this one, of the first half of the episodes, instead of making it")
    parser.add_argument("--false-alarms", type=float, default=1.0, help="per hour, that the calibration allows")
    parser.add_argument("--debounce", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["clean", "camera", "dynamics"], choices=("clean", "camera", "dynamics"))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin_s, result = time.process_time(), {}
    bench = Bench(arguments)
    calibration: Calibration = bench.calibration
    print(
        f"world model {calibration.world_model[:16]}, calibrated on {60 * calibration.hours:.1f} minutes of {arguments.validation} "
        f"for {calibration.false_alarms_per_hour:g} false alarms per hour, {calibration.debounce_frames} frames in a row"
    )
    for group in calibration.groups:
        print(f"limit of {group}: {calibration.limits_of(group)} frames ahead")
    if "clean" in arguments.parts:
        result["clean"] = measure_clean(bench)
        print_clean(result["clean"], arguments.markdown)
    if "camera" in arguments.parts:
        result["camera"] = measure_cameras(bench)
        print_rows("camera fault", result["camera"], arguments.markdown)
    if "dynamics" in arguments.parts:
        result["dynamics"] = measure_dynamics(bench)
        print_rows("dynamics fault", result["dynamics"], arguments.markdown)
    print(f"\n{time.process_time() - begin_s:.0f} s of one core")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
