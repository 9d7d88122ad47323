"""The safety gate between policy and robot: what is checked, clamped, dropped or held, and when; no ROS in here.

Letters: H chunk, A action (7). Stamps are integer nanoseconds on the observation clock, ages are seconds on a monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from diwa_core.contract import ACTION_SIZE
from diwa_core.control.limits import Clamp
from diwa_core.errors import GateError

MAX_HORIZON = 256
MAX_ACTION = 10.0  # a little outside [-1, 1] is clamped; this far outside is a defect


class State(IntEnum):
    """As in ControllerStatus.msg."""

    DISCONNECTED = 0
    CONNECTING = 1
    IDLE = 2
    ACTIVE = 3
    HOLD = 4
    REFLEX = 5
    USER_STOPPED = 6
    FAULT = 7


@dataclass(frozen=True)
class Chunk:
    """H actions of one policy for stamp_ns, stamp_ns + step_ns, ...; an empty one ends the stream. actions: float32 [H, A]."""

    stamp_ns: int
    step_ns: int
    actions: np.ndarray
    hold: bool
    checkpoint_id: str
    contract_id: str


@dataclass(frozen=True)
class Command:
    """One checked action. action: float32 [A] in [-1, 1] with the gripper exactly -1 or +1; clamps: bit mask of Clamp."""

    action: np.ndarray
    hold: bool
    observation_stamp_ns: int
    checkpoint_id: str
    clamps: int


class DroppedChunk(GateError):
    """A chunk was refused; `reason` is the name of its counter in DropCounts."""

    def __init__(self, reason: str, expected: str, found: str) -> None:
        super().__init__(f"chunk dropped: expected {expected}, found {found}.")
        self.reason = reason


@dataclass
class DropCounts:
    """Chunks refused, by reason."""

    stale: int = 0
    nonfinite: int = 0
    shape: int = 0
    foreign: int = 0


class ChunkGate:
    """Accepts chunks, splices them by time and gives the command for a stamp.

    A new chunk replaces every waypoint at or after its first usable one. A stream belongs to one checkpoint until its empty chunk ends it.
    """

    def __init__(self, contract_id: str, step_ns: int, max_age_s: float = 0.5) -> None:
        """`max_age_s`: chunks of an observation older than this are dropped."""
        self.contract_id = contract_id
        self.step_ns = step_ns
        self.max_age_ns = round(max_age_s * 1e9)
        self.drops = DropCounts()
        self.clamped = 0
        self.checkpoint_id: str | None = None  # of the running stream
        self._waypoints: list[tuple[int, Command]] = []

    def accept(self, chunk: Chunk, now_ns: int) -> None:
        """Splice `chunk` in at `now_ns`, the newest robot stamp. Raises DroppedChunk, with the plan unchanged, when it is unfit."""
        self._check(chunk, now_ns)
        if len(chunk.actions) == 0:
            self.clear()
            return
        actions, clamps = clamp_actions(chunk.actions)
        self.clamped += int((clamps != 0).sum())
        self.checkpoint_id = chunk.checkpoint_id
        earliest_ns = now_ns - self.step_ns // 2
        fresh = []
        for index, action in enumerate(actions):
            stamp_ns = chunk.stamp_ns + index * chunk.step_ns
            if stamp_ns >= earliest_ns:
                fresh.append((stamp_ns, Command(action, chunk.hold, chunk.stamp_ns, chunk.checkpoint_id, int(clamps[index]))))
        if not fresh:
            self._drop("stale", "actions for now or later", f"a chunk {self._age_ms(chunk, now_ns)} ms old")
        kept = [waypoint for waypoint in self._waypoints if waypoint[0] < fresh[0][0] - self.step_ns // 2]
        self._waypoints = kept + fresh

    def command_at(self, stamp_ns: int) -> Command | None:
        """The command whose step contains the middle of the step at `stamp_ns`; None when no accepted chunk covers it."""
        self._waypoints = [waypoint for waypoint in self._waypoints if waypoint[0] > stamp_ns - 2 * self.step_ns]
        half_ns = self.step_ns // 2
        return next((command for stamp, command in reversed(self._waypoints) if abs(stamp - stamp_ns) <= half_ns), None)

    def clear(self) -> None:
        """Forget every waypoint and the stream they belong to."""
        self._waypoints = []
        self.checkpoint_id = None

    def _check(self, chunk: Chunk, now_ns: int) -> None:
        if chunk.contract_id != self.contract_id:
            self._drop("foreign", f"contract {self.contract_id}", chunk.contract_id or "none")
        if self.checkpoint_id not in (None, chunk.checkpoint_id):
            self._drop("foreign", f"checkpoint {self.checkpoint_id}", chunk.checkpoint_id or "none")
        if len(chunk.actions) == 0:
            return
        if chunk.actions.ndim != 2 or chunk.actions.shape[1] != ACTION_SIZE or len(chunk.actions) > MAX_HORIZON:
            self._drop("shape", f"[1 to {MAX_HORIZON}, {ACTION_SIZE}] actions", str(chunk.actions.shape))
        if abs(chunk.step_ns - self.step_ns) > self.step_ns // 100:
            self._drop("shape", f"steps of {self.step_ns / 1e6:.1f} ms", f"{chunk.step_ns / 1e6:.1f} ms")
        if not np.isfinite(chunk.actions).all():
            self._drop("nonfinite", "finite actions", "NaN or infinity")
        if np.abs(chunk.actions).max() > MAX_ACTION:
            self._drop("nonfinite", f"actions in [-1, 1], at most {MAX_ACTION:g}", f"{np.abs(chunk.actions).max():g}")
        age_ns = now_ns - chunk.stamp_ns
        if age_ns > self.max_age_ns or age_ns < -2 * self.step_ns:
            self._drop("stale", f"an age of 0 to {self.max_age_ns / 1e6:.0f} ms", f"{self._age_ms(chunk, now_ns)} ms")

    def _drop(self, reason: str, expected: str, found: str) -> None:
        setattr(self.drops, reason, getattr(self.drops, reason) + 1)
        raise DroppedChunk(reason, expected, found)

    @staticmethod
    def _age_ms(chunk: Chunk, now_ns: int) -> int:
        return round((now_ns - chunk.stamp_ns) / 1e6)


def clamp_actions(actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finite actions [H, A] -> (float32 [H, A] in [-1, 1] with the gripper exactly -1 or +1, Clamp mask [H])."""
    clamped = np.clip(actions, -1.0, 1.0).astype(np.float32)
    mask = np.where((np.abs(actions) > 1.0).any(axis=1), int(Clamp.RANGE), 0)
    clamped[:, 6] = np.where(actions[:, 6] >= 0, 1.0, -1.0)
    return clamped, mask


@dataclass
class ClockCheck:
    """Notices when the robot's stamps and the monotonic clock disagree about how much time has passed.

    Late messages look like small jumps, there and back; `limit_s` is what a busy machine may delay one.
    """

    limit_s: float = 0.5
    offset_s: float | None = None

    def jump_s(self, stamp_ns: int, now_s: float) -> float:
        """Seconds by which the stamps have jumped at this one; 0 when they have not. `now_s`: when it arrived."""
        offset_s = stamp_ns / 1e9 - now_s
        last_s, self.offset_s = self.offset_s, offset_s
        if last_s is None or abs(offset_s - last_s) <= self.limit_s:
            return 0.0
        return offset_s - last_s


@dataclass
class Watchdog:
    """The state of the controller and the rules that change it. All times are seconds on a monotonic clock.

    In real time a stream that falls silent is held after `hold_after_s` and stopped after `stop_after_s`; a stop needs `resume`.
    In lock-step silence moves nothing, so it is only reported.
    """

    hold_after_s: float = 0.3
    stop_after_s: float = 1.0
    lockstep: bool = False
    state: State = State.CONNECTING
    reason: str = "waiting for the robot"
    heard_s: float = field(default=0.0)  # last accepted chunk
    stopped: tuple[State, str] | None = None  # a stop that outlasts a lost connection
    caution: str = ""  # why a running policy is slowed
    imposed: bool = False  # the state is the robot's own
    kept: tuple[State, str] | None = None  # a stop of ours that goes on after the robot's own state has ended

    @property
    def accepts_chunks(self) -> bool:
        """Whether a chunk may be spliced in now."""
        return self.state in (State.IDLE, State.ACTIVE, State.HOLD)

    @property
    def running(self) -> str:
        """The reason of ACTIVE."""
        return self.caution or "a policy is running"

    @property
    def may_command(self) -> bool:
        """Whether a command may be sent now."""
        return self.state == State.ACTIVE

    def connect(self) -> None:
        """The robot answers. What had been stopped before it was lost still is."""
        if self.state in (State.DISCONNECTED, State.CONNECTING):
            self._enter(*(self.stopped or (State.IDLE, "ready")))
            self.stopped = None

    def hear(self, now_s: float, ends: bool) -> None:
        """A chunk was accepted; `ends`: it was the empty one that ends the stream."""
        if not self.accepts_chunks:
            return
        self.heard_s = now_s
        if ends:
            self._enter(State.IDLE, "ready")
        else:
            self._enter(State.ACTIVE, self.running)

    def check(self, now_s: float) -> None:
        """Apply the rules of silence; call it at least every 20 ms."""
        if self.lockstep or self.state not in (State.ACTIVE, State.HOLD):
            return
        silent_s = now_s - self.heard_s
        if silent_s > self.stop_after_s:
            self._enter(State.FAULT, f"no action chunk for {self.stop_after_s:g} s; call controller/resume")
        elif silent_s > self.hold_after_s:
            self._enter(State.HOLD, f"no action chunk for {self.hold_after_s:g} s")

    def warn(self, caution: str) -> None:
        """Say why a running policy is slowed; empty: it no longer is."""
        self.caution = caution
        if self.state == State.ACTIVE:
            self._enter(State.ACTIVE, self.running)

    def hold(self, reason: str) -> None:
        """Hold until the next accepted chunk."""
        if self.state in (State.ACTIVE, State.HOLD):
            self._enter(State.HOLD, reason)

    def fault(self, reason: str) -> None:
        """Stop until `resume`."""
        self._enter(State.FAULT, reason)

    def stop(self) -> None:
        """A person stopped the arm; only `resume` ends that."""
        self._enter(State.USER_STOPPED, "stopped by controller/stop; call controller/resume")
        if self.imposed:
            self.kept = (self.state, self.reason)

    def resume(self) -> None:
        """Leave FAULT or USER_STOPPED, now or when the robot's own state ends. Raises GateError in any other state."""
        if self.state not in (State.FAULT, State.USER_STOPPED):
            raise GateError(f"resume: expected FAULT or USER_STOPPED, found {self.state.name}. Nothing to resume.")
        self.kept = None
        if not self.imposed:
            self._enter(State.IDLE, "ready")

    def impose(self, state: State, reason: str) -> None:
        """The robot itself is in this state; it lasts until `release`."""
        if not self.imposed:
            self.kept = (self.state, self.reason) if self.state in (State.FAULT, State.USER_STOPPED) else None
        self.imposed = True
        self._enter(state, reason)

    def release(self) -> None:
        """The robot takes commands again; a stop from before goes on."""
        if self.imposed:
            self.imposed = False
            self._enter(*(self.kept or (State.IDLE, "ready")))

    def disconnect(self, reason: str) -> None:
        """The robot no longer answers or the node ends."""
        if self.state in (State.FAULT, State.USER_STOPPED):
            self.stopped = (self.state, self.reason)
        self._enter(State.DISCONNECTED, reason)

    def _enter(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason
