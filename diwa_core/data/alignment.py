"""Observations on the camera clock, from streams that arrive in any order; no ROS in here.

The first image stream of the contract is the clock. For its frame at t every other stream gives the sample of stamp t, or, once it has
passed t, its newest one at or before t if that is at most `max_skew_s` older. The executed action is the one whose step ends nearest t.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from diwa_core.contract import Contract, Observation
from diwa_core.errors import DataError

JOINTS = "joint_states"  # value: float64 [8], arm joints then gripper width
POSE = "current_pose"  # value: float64 [6], TCP xyz and euler xyz
TARGET = "target_pose"  # value: float64 [6]
EXECUTED = "executed_action"  # value: float32 [7], stamp: END of the step
HISTORY = 64  # samples kept per stream: two seconds at 30 Hz
FROZEN_FRAMES, FROZEN_MOTION_M = 5, 0.02  # identical pictures of a camera that is frozen, if the hand moved so far meanwhile
TABLE_CENTRE_M, TABLE_REACH_M = np.array([0.0, -0.08, 0.5]), 0.25  # where both cameras of the play table are sure to see the hand


@dataclass
class Frame:
    """One aligned frame: what the world model filters. previous_action: float32 [7], of the step that ended with this frame."""

    stamp_ns: int
    observation: Observation
    previous_action: np.ndarray


@dataclass(frozen=True)
class Fault:
    """Why a stream cannot be trusted now."""

    stream: str
    message: str


class Stream:
    """The newest samples of one topic, in order of their stamps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples: deque[tuple[int, np.ndarray]] = deque(maxlen=HISTORY)
        self.lags_since_s: float | None = None  # when, after this stream's last sample, another one got ahead
        self.went_back = False
        self.is_skewed = False

    @property
    def newest_ns(self) -> int:
        """Stamp of the newest sample, -1 if there is none."""
        return self.samples[-1][0] if self.samples else -1

    def add(self, stamp_ns: int, value: np.ndarray) -> bool:
        """Append a sample; False for a repeated stamp. Raises DataError when time goes backwards."""
        if stamp_ns < self.newest_ns:
            self.went_back = True
            raise DataError(
                f"{self.name}: time went backwards; expected stamps that grow. Restart the source, or call encoder/reset to go on "
                "from the new time."
            )
        if stamp_ns == self.newest_ns:
            return False
        self.went_back = False
        self.lags_since_s = None
        self.samples.append((stamp_ns, value))
        return True

    def match(self, stamp_ns: int, max_skew_ns: int) -> np.ndarray | None:
        """The value that belongs to the frame at `stamp_ns`, or None while it may still come or when there is none."""
        sample = next((sample for sample in reversed(self.samples) if sample[0] <= stamp_ns), None)
        if sample is not None and sample[0] == stamp_ns:
            self.is_skewed = False
            return sample[1]
        if self.newest_ns < stamp_ns:
            return None
        self.is_skewed = sample is None or stamp_ns - sample[0] > max_skew_ns
        return None if self.is_skewed else sample[1]

    def match_nearest(self, stamp_ns: int, reach_ns: int) -> np.ndarray | None:
        """The value whose stamp is nearest, at most `reach_ns` away."""
        nearest = None
        for sample in reversed(self.samples):  # ordered by time, and the newest are asked for
            if nearest is not None and abs(sample[0] - stamp_ns) > abs(nearest[0] - stamp_ns):
                break
            nearest = sample
        return nearest[1] if nearest is not None and abs(nearest[0] - stamp_ns) <= reach_ns else None


class FreezeWatch:
    """Notices a camera that repeats one picture. Real cameras never do (noise): any repetition counts when `motion_m` is 0.

    A rendered picture repeats rightly while the arm is still or out of sight; then the hand must have moved `motion_m` over the table.
    """

    def __init__(self, frames: int, motion_m: float) -> None:
        self.frames, self.motion_m = frames, motion_m
        self.image: np.ndarray | None = None
        self.repeats = 0
        self.position: np.ndarray | None = None  # of the TCP when the picture last changed or the hand came into sight
        self.is_frozen = False

    def see(self, image: np.ndarray, position: np.ndarray | None) -> None:
        """Take the next picture and the TCP position (m) [3], if known."""
        in_sight = position is not None and np.linalg.norm(position - TABLE_CENTRE_M) <= TABLE_REACH_M
        changed = self.image is None or not np.array_equal(image, self.image)
        if changed:
            self.image, self.repeats, self.is_frozen = image, 0, False
        if changed or not in_sight or self.position is None:
            self.position = position if in_sight else None
        self.repeats += not changed
        moved_m = 0.0 if self.position is None else float(np.linalg.norm(position - self.position))
        self.is_frozen = self.is_frozen or (self.repeats >= self.frames and moved_m >= self.motion_m)


class FrameAligner:
    """Takes samples of every stream of `contract` and gives aligned frames in order."""

    def __init__(
        self,
        contract: Contract,
        max_skew_s: float = 0.04,
        timeout_s: float = 1.0,
        frozen_frames: int = FROZEN_FRAMES,
        frozen_motion_m: float = FROZEN_MOTION_M,
    ) -> None:
        """`timeout_s`: how long a stream may lag before it counts as missing; `frozen_*`: see FreezeWatch."""
        self.max_skew_ns = round(max_skew_s * 1e9)
        self.half_step_ns = round(0.5e9 / contract.rate_hz)
        self.timeout_s = timeout_s
        self.images = [stream.name for stream in contract.images]
        self.followers = [*self.images[1:], JOINTS, POSE, TARGET]
        self.streams = {name: Stream(name) for name in (*self.images, JOINTS, POSE, TARGET, EXECUTED)}
        self.freezes = {name: FreezeWatch(frozen_frames, frozen_motion_m) for name in self.images}
        self.done_ns = -1
        self.last: Frame | None = None
        self.skipped = 0  # frames of the clock that never became complete
        self.received_s: float | None = None
        self.watched_since_s: float | None = None

    def add(self, name: str, stamp_ns: int, value: np.ndarray, now_s: float) -> None:
        """Take one sample; `now_s` is a monotonic time. Raises DataError when the stream's time goes backwards."""
        if not self.streams[name].add(stamp_ns, value):
            return
        self.received_s = now_s
        for stream in self.streams.values():
            if stream.lags_since_s is None and stream.newest_ns < stamp_ns - self.half_step_ns:
                stream.lags_since_s = now_s
        if name in self.freezes:
            pose = self.streams[POSE].samples
            self.freezes[name].see(value, pose[-1][1][:3] if pose else None)

    def pop(self) -> list[Frame]:
        """Frames that have become complete since the last call, oldest first; none while a camera is frozen.

        An incomplete frame is skipped as soon as a later one is complete.
        """
        frames = []
        pending = [sample for sample in self.streams[self.images[0]].samples if sample[0] > self.done_ns]
        for index, (stamp_ns, image) in enumerate(pending):
            frame = self._assemble(stamp_ns, image)
            if frame is not None:
                frames.append((index, frame))
        if not frames:
            return []
        self.skipped += frames[-1][0] + 1 - len(frames)
        self.done_ns = frames[-1][1].stamp_ns
        if any(watch.is_frozen for watch in self.freezes.values()):
            return []
        self.last = frames[-1][1]
        return [frame for _, frame in frames]

    def restart(self) -> Frame | None:
        """Begin anew: the newest complete frame again, or None when there is none yet or time has gone backwards since."""
        if any(stream.went_back for stream in self.streams.values()):
            self.streams = {name: Stream(name) for name in self.streams}
            self.done_ns, self.last = -1, None
        return self.last

    def find_faults(self, now_s: float, may_rest: bool) -> list[Fault]:
        """Streams that are missing, out of step or frozen. `may_rest`: all may be silent together (lock-step between runs)."""
        self.watched_since_s = now_s if self.watched_since_s is None else self.watched_since_s
        quiet_s = now_s - (self.watched_since_s if self.received_s is None else self.received_s)
        if not may_rest and quiet_s > self.timeout_s:
            return [Fault("inputs", "all streams are silent" if self.received_s is not None else "nothing has arrived yet")]
        faults = []
        for name, stream in self.streams.items():
            if stream.lags_since_s is not None and now_s - stream.lags_since_s > self.timeout_s:
                faults.append(Fault(name, "nothing new arrives" if stream.samples else "nothing has ever arrived"))
            elif stream.is_skewed:
                faults.append(Fault(name, "no sample close enough before the camera's (max_skew_s)"))
            elif name in self.freezes and self.freezes[name].is_frozen:
                faults.append(Fault(name, "frozen: the same picture again and again"))
        return faults

    def is_faulty(self, name: str) -> bool:
        """Whether the last sample of a stream left it unusable."""
        stream = self.streams[name]
        return stream.went_back or stream.is_skewed or (name in self.freezes and self.freezes[name].is_frozen)

    def _assemble(self, stamp_ns: int, image: np.ndarray) -> Frame | None:
        values = {name: self.streams[name].match(stamp_ns, self.max_skew_ns) for name in self.followers}
        if any(value is None for value in values.values()):
            return None
        action = self.streams[EXECUTED].match_nearest(stamp_ns, self.half_step_ns * 3 // 2)
        if action is None:
            return None
        images = {self.images[0]: image, **{name: values[name] for name in self.images[1:]}}
        joints = values[JOINTS]
        robot_obs = np.concatenate([values[POSE], joints[7:8], joints[:7], [float(action[6])]])
        return Frame(stamp_ns, Observation(images, robot_obs, values[TARGET]), action)
