"""A Franka arm through franky, in a thread of its own: connects, streams one commanded pose per period, notices what the robot says.

No call to franky is made anywhere else than in here and in franka_hand.py, so whatever blocks there blocks nobody.
Letters: X pose coordinates (6) of the MotionFilter, J joints (7). Times are seconds on the monotonic clock.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.control.limits import Clamp
from diwa_core.control.motion import MotionFilter, from_coordinates, to_coordinates
from diwa_core.control.robot_config import RobotConfig
from diwa_core.errors import DiwaError, GateError, SetupError
from diwa_core.realtime import come_first

LOGGER = logging.getLogger(__name__)
RETRY_S = 1.0
POLL_STEPS = 2  # periods between two looks at errors of the running motion
STALE_S = 0.3  # a state older than this is no state
RECOVER_S = 1.0
RECOVER_POLL_S = 0.01
START_S = 1.0  # a motion may take this long to begin
HOME_DYNAMICS = 0.1  # share of the arm's own speed, acceleration and jerk
NO_PRIORITY = (
    "arm: expected to be allowed real-time priority %d, found that it is not: periods come late while a policy computes. "
    "'diwa doctor --robot' says how to allow it."
)
PRIORITY = 20  # below that of the library's own control thread where real time is enforced
PREEMPTED = "Move command preempted!"  # what a motion says that we stopped ourselves


class Phase(Enum):
    """What the arm is doing."""

    CONNECTING = "connecting"
    READY = "ready"  # held by the robot itself
    STREAMING = "streaming"
    STOPPING = "stopping"
    HOMING = "homing"
    RECOVERING = "recovering"
    REFLEX = "reflex"
    USER_STOPPED = "user stopped"
    FAULT = "fault"
    DISCONNECTED = "disconnected"


@dataclass(frozen=True)
class ArmState:
    """What the robot said last. pose: xyz (m) and quaternion xyzw [7] of the TCP in the base frame; wrench: N and Nm [6], likewise."""

    time_s: float
    robot_time_s: float
    pose: np.ndarray
    joints: np.ndarray
    velocities: np.ndarray
    torques: np.ndarray
    wrench: np.ndarray
    mode: str
    success_rate: float


@dataclass(frozen=True)
class Aim:
    """Be at `coordinates` [X] at `arrive_s`."""

    coordinates: np.ndarray
    arrive_s: float


def import_franky() -> Any:
    """The franky module. Raises SetupError."""
    try:
        import franky
    except ImportError as error:
        raise SetupError(
            f"franky-control is not installed ({error}). Mend: .venv/bin/pip install -c constraints.txt '.[franka]'"
        ) from error
    return franky


class Connector:
    """Makes the connection in a thread that may hang for ever, one at a time: a peer that accepts and never answers does that."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def connect(self, make: Any, timeout_s: float, address: str) -> Any:
        """The result of `make()`. Raises SetupError after `timeout_s`, and whatever `make` raises."""
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise SetupError(f"{address} accepted a connection and never answered: is another client connected, or FCI not activated?")
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(make())
            except BaseException as error:  # franky's exceptions have no common base
                results.append(error)

        self._thread = threading.Thread(target=run, name="franky-connect", daemon=True)
        self._thread.start()
        self._thread.join(timeout_s)
        if not results:
            raise SetupError(
                f"{address} accepted the connection and did not answer within {timeout_s:g} s: expected a robot with FCI activated and no "
                "other client. Activate FCI in Desk, end the other client, or restart the robot."
            )
        if isinstance(results[0], BaseException):
            raise results[0]
        return results[0]


def open_robot(config: RobotConfig, connector: Connector) -> Any:
    """A connected franky.Robot with our limits set. Raises SetupError saying what to do."""
    franky = import_franky()
    realtime = franky.RealtimeConfig.Enforce if config.realtime == "enforce" else franky.RealtimeConfig.Ignore
    try:
        robot = connector.connect(lambda: franky.Robot(config.address, realtime_config=realtime), config.connect_timeout_s, config.address)
        connector.connect(lambda: prepare_robot(robot, config), config.connect_timeout_s, config.address)
    except DiwaError:
        raise
    except franky.IncompatibleVersionException as error:
        raise SetupError(
            f"versions: {error}. The pinned franky-control speaks to an FR3 with System 5.9 or later. Update the robot, or install the "
            "franky-control built for its version."
        ) from error
    except franky.NetworkException as error:
        raise SetupError(f"no robot at {config.address}: {error}. Check the cable, the address and that FCI is activated.") from error
    except franky.RealtimeException as error:
        raise SetupError(f"{error}. Boot a PREEMPT_RT kernel and allow real-time priorities (diwa doctor --robot says how).") from error
    except Exception as error:
        raise SetupError(f"{config.address}: {type(error).__name__}: {error}") from error
    return robot


def prepare_robot(robot: Any, config: RobotConfig) -> None:
    """Our limits, tool, load and collision thresholds: the wheel's own are those of another arm."""
    limits = config.motion
    for name, value in (
        ("translation_velocity", limits.max_speed_m_s),
        ("translation_acceleration", limits.max_acceleration_m_s2),
        ("translation_jerk", limits.max_jerk_m_s3),
        ("rotation_velocity", limits.max_speed_rad_s),
        ("rotation_acceleration", limits.max_acceleration_rad_s2),
        ("rotation_jerk", limits.max_jerk_rad_s3),
    ):
        getattr(robot, f"{name}_limit").set(value)
    robot.set_collision_behavior(config.collision.torque_nm, config.collision.force_n)
    nominal = robot.state.F_T_NE.matrix
    wanted = config.tcp_in_flange
    robot.set_ee(list((np.linalg.inv(nominal) @ wanted).flatten(order="F")))
    inertia = np.diag(config.tool.load_inertia_kg_m2).flatten(order="F")
    robot.set_load(config.tool.load_kg, list(config.tool.load_centre_in_flange_m), list(inertia))


class FrankaArm:
    """The thread. `aim` says where to be; `stop`, `resume`, `recover` and `home` ask for things; `phase`, `reason`, `state` tell."""

    def __init__(self, config: RobotConfig) -> None:
        self.config = config
        self.filter = MotionFilter(config.motion, 1.0 / config.stream_hz)
        self.phase, self.reason = Phase.CONNECTING, f"connecting to {config.address}"
        self.state: ArmState | None = None
        self.commanded: np.ndarray | None = None  # coordinates [X] sent last, None while the robot holds itself
        self.clamps = Clamp.NONE  # of the last period
        self.periods_late_s: list[float] = []  # how late each period of streaming began, newest last, for the diagnostics
        self.recoveries = 0
        self._aim: Aim | None = None
        self._aimed_s = 0.0
        self._source: np.ndarray | None = None
        self._robot = self._tracker = None
        self._requests: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._connector = Connector()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="franka-arm", daemon=True)

    # -- for other threads -------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to connect, and to connect again whenever the link is lost."""
        self._thread.start()

    def close(self, timeout_s: float = 4.0) -> None:
        """Stop the arm and end the thread; a thread that hangs in the library is left behind."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            del self.filter  # its library complains of objects that outlive the interpreter

    def aim(self, coordinates: np.ndarray, arrive_s: float) -> None:
        """Be at coordinates [X] at `arrive_s`; the arm begins to stream if it is ready."""
        self._aimed_s = time.monotonic()
        self._aim = Aim(coordinates, arrive_s)

    def request(self, what: str) -> None:
        """Ask for 'stop', 'resume', 'recover' or 'home'. Raises GateError when that makes no sense now."""
        wanted = {
            "recover": (Phase.REFLEX, Phase.FAULT),
            "home": (Phase.READY,),
            "resume": (Phase.READY, Phase.STREAMING, Phase.STOPPING, Phase.USER_STOPPED, Phase.FAULT),
        }.get(what)
        if wanted and self.phase not in wanted:
            names = " or ".join(phase.value for phase in wanted)
            raise GateError(f"{what}: expected the arm to be {names}, found {self.phase.value} ({self.reason}).")
        if what == "resume" and self.state is not None and self.state.mode == "UserStopped":
            raise GateError("resume: expected the user stop to be released, found it pressed. Release it, look round, and resume again.")
        self._requests.put(what)

    @property
    def age_s(self) -> float:
        """Age of the newest state, infinite without one."""
        return time.monotonic() - self.state.time_s if self.state is not None else float("inf")

    # -- the thread --------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if not come_first(PRIORITY):
            LOGGER.warning(NO_PRIORITY, PRIORITY)
        while not self._ending.is_set():
            try:
                self._session(open_robot(self.config, self._connector))
            except SetupError as error:
                self._enter(Phase.DISCONNECTED, str(error))
            except Exception as error:
                self._enter(Phase.DISCONNECTED, f"the link was lost: {describe(error)}")
            self.commanded = self._aim = self._robot = self._tracker = None  # a robot serves one client: this one must be gone
            self._ending.wait(RETRY_S)

    def _session(self, robot: Any) -> None:
        """Serve a connected robot until the link is lost (an exception) or the end. A lost Robot is dead; the next session has its own."""
        self._robot, self._franky = robot, import_franky()
        self._tracker, self._moved_s, self._has_begun = None, 0.0, False
        self._drain()
        self._enter(Phase.READY, "ready")
        period_s, steps = 1.0 / self.config.stream_hz, 0
        due_s = time.monotonic()
        while not self._ending.is_set() or self._comes_to_rest():
            self._read_state()
            self._judge_mode()
            self._serve()
            if steps % POLL_STEPS == 0:
                self._poll()
            if self.phase is Phase.STREAMING:
                self._stream(time.monotonic(), period_s)
            elif self.phase is Phase.READY and self._aim is not None:
                self._begin_streaming()
            steps += 1
            due_s = self._wait(due_s + period_s, period_s)

    def _comes_to_rest(self) -> bool:
        """Whether the arm must be served a little longer before the thread may end."""
        self._end_streaming()
        return self.phase is Phase.STOPPING

    def _wait(self, due_s: float, period_s: float) -> float:
        """Sleep until `due_s`; periods missed are skipped, not made up for."""
        now_s = time.monotonic()
        if due_s > now_s:
            time.sleep(due_s - now_s)
        late_s = time.monotonic() - due_s
        if self.phase is Phase.STREAMING:
            self.periods_late_s.append(late_s)
            del self.periods_late_s[:-1000]
        return due_s if late_s < period_s else time.monotonic()

    def _enter(self, phase: Phase, reason: str) -> None:
        if (phase, reason) != (self.phase, self.reason):
            LOGGER.info("arm: %s: %s", phase.value, reason)
        self.phase, self.reason = phase, reason

    def _read_state(self) -> None:
        state = self._robot.state
        pose, robot_time_s, last = state.O_T_EE, state.time.to_sec(), self.state
        repeated = last is not None and last.robot_time_s == robot_time_s  # a moving robot that froze: the library gives the last one
        self.state = ArmState(
            last.time_s if repeated else time.monotonic(),
            robot_time_s,
            np.concatenate([pose.translation, pose.quaternion]),
            np.array(state.q),
            np.array(state.dq),
            np.array(state.tau_J),
            np.array(state.O_F_ext_hat_K),
            state.robot_mode.name,
            state.control_command_success_rate,
        )
        self._errors = [name for name in dir(state.current_errors) if name[0] != "_" and getattr(state.current_errors, name) is True]

    def _judge_mode(self) -> None:
        """A user stop and a reflex show in the robot's mode; a user stop is no error to the library."""
        mode = self.state.mode
        if mode == "UserStopped" and self.phase is not Phase.USER_STOPPED:
            self._abandon(Phase.USER_STOPPED, "the user stop is pressed; release it and call controller/resume")
        elif mode == "Reflex" and self.phase not in (Phase.REFLEX, Phase.RECOVERING):
            self._abandon(
                Phase.REFLEX, f"reflex ({', '.join(self._errors) or 'cause unknown'}); look at the arm, then call controller/recover"
            )
            if self.config.reflex_recovery and not self.recoveries:
                self._requests.put("recover")
        elif mode == "Other" and self.phase is not Phase.FAULT:
            self._abandon(Phase.FAULT, "the robot reports a safety stop or a start-up; see Desk, then call controller/resume")
        elif mode == "Guiding" and self.phase is not Phase.USER_STOPPED:
            self._abandon(Phase.USER_STOPPED, "the arm is being guided by hand; let go and call controller/resume")

    def _serve(self) -> None:
        """What other threads asked for."""
        while not self._requests.empty():
            what = self._requests.get()
            if what == "stop":
                self._aim = None
                self._end_streaming()
            elif what == "resume":
                self._resume()
            elif what == "recover" and self.phase in (Phase.REFLEX, Phase.FAULT):
                self._recover()
            elif what == "home" and self.phase is Phase.READY:
                self._go_home()

    def _drain(self) -> None:
        while not self._requests.empty():
            self._requests.get()

    def _resume(self) -> None:
        """Forget the old target; the next one begins at the measured pose."""
        self._aim = None
        if self.phase in (Phase.USER_STOPPED, Phase.FAULT) and self.state.mode in ("Idle", "Move"):
            self._forget_motion()
            self._enter(Phase.READY, "ready")

    def _recover(self) -> None:
        """The robot's automatic error recovery, once, because somebody asked for it."""
        self._enter(Phase.RECOVERING, "recovering from a reflex")
        self.recoveries, refusal = self.recoveries + 1, ""
        try:
            self._robot.recover_from_errors()  # says whether errors show in the state before it: only a newer state tells
        except Exception as error:
            self._check_link(error)
            refusal = describe(error)
        end_s = time.monotonic() + RECOVER_S
        self._forget_motion()  # until its error has been told, the library gives the state in which the motion ended
        self._read_state()
        while not refusal and self.state.mode == "Reflex" and time.monotonic() < end_s:
            time.sleep(RECOVER_POLL_S)
            self._forget_motion()
            self._read_state()
        if not refusal and self.state.mode in ("Idle", "Move"):
            self._forget_motion()
            self._aim = None
            self._enter(Phase.READY, "ready")
        else:
            self._enter(Phase.REFLEX, f"recovery was refused ({refusal or 'the robot is still not idle'}); recover in Desk")

    def _forget_motion(self) -> None:
        """The motion that was cut off may still have an error to tell."""
        try:
            self._robot.poll_motion()
        except Exception as error:
            self._check_link(error)

    def _go_home(self) -> None:
        """To the home joints, slowly."""
        motion = self._franky.JointMotion(list(self.config.home_joints_rad), relative_dynamics_factor=HOME_DYNAMICS)
        self._enter(Phase.HOMING, "going home")
        self._try_move(motion)

    # -- motion ------------------------------------------------------------------------------------------------------------------------

    def _begin_streaming(self) -> None:
        """Take the arm from where it is; the filter refuses when that is outside the workspace."""
        measured = self.measured_coordinates()
        try:
            self.filter.reset(measured)
        except GateError as error:
            self._aim = None
            self._enter(Phase.FAULT, f"{error} Then call controller/resume")
            return
        self._source, self.commanded = measured, measured
        self._moved_s, self._has_begun = time.monotonic(), False
        try:
            if self.config.streaming == "impedance":
                self._tracker = self._make_tracker()
            self._enter(Phase.STREAMING, "streaming")
        except Exception as error:
            self._fail(error)

    def _make_tracker(self) -> Any:
        gains, limits = self.config.impedance, self.config.motion
        return self._franky.CartesianImpedanceTracker(
            self._robot,
            translational_stiffness=gains.translational_n_m,
            rotational_stiffness=gains.rotational_nm_rad,
            translational_error_clip=np.full(3, gains.error_clip_m),
            rotational_error_clip=np.full(3, gains.error_clip_rad),
            friction=self._franky.FrictionCompensationParams(coulomb=gains.friction_nm, max_torque=gains.friction_nm),
            lower_joint_limits=np.array(limits.joint_lower_rad),
            upper_joint_limits=np.array(limits.joint_upper_rad),
        )

    def _stream(self, now_s: float, period_s: float) -> None:
        """One period: interpolate, limit, send."""
        if now_s - self._aimed_s > self.config.release_after_s:
            self._end_streaming()
            return
        aim = self._aim
        if aim is not None:
            steps_left = max(1.0, (aim.arrive_s - now_s) / period_s + 1.0)
            step = (aim.coordinates - self._source) / steps_left
            self._source = self._source + step
            arriving = steps_left <= 1.0
            rate = None if arriving else step / period_s
            before = self.commanded
            self.commanded, self.clamps = self.filter.follow(self._source, rate, self.measured_coordinates(), self.state.joints)
        else:
            before, self.commanded = self.commanded, self.filter.brake()
        self._send(before, self.commanded, period_s)

    def _send(self, before: np.ndarray, after: np.ndarray, period_s: float) -> None:
        franky, limits = self._franky, self.config.motion
        position, turn = from_coordinates(after, limits)
        pose = franky.Affine(position, turn.as_quat())
        try:
            if self._tracker is not None:
                spin = (turn * from_coordinates(before, limits)[1].inv()).as_rotvec() / period_s
                self._tracker.set_target(pose, franky.Twist((position - before[:3]) / period_s, spin))
            else:
                motion = franky.CartesianMotion(pose, franky.ReferenceType.Absolute, return_when_finished=False)
                self._robot.move(motion, asynchronous=True)
        except Exception as error:
            self._fail(error)

    def _end_streaming(self) -> None:
        """Bring the arm to rest; the robot then holds it."""
        if self.phase not in (Phase.STREAMING, Phase.HOMING):
            return
        homing, tracker = self.phase is Phase.HOMING, self._tracker
        self._tracker = self._aim = self.commanded = None
        stop = self._franky.TorqueStopMotion() if tracker else self._franky.CartesianStopMotion()
        stop = self._franky.JointStopMotion() if homing else stop
        self._enter(Phase.STOPPING, "stopping")
        self._try_move(stop)

    def _try_move(self, motion: Any) -> None:
        self._moved_s, self._has_begun = time.monotonic(), False
        try:
            self._robot.move(motion, asynchronous=True)
        except Exception as error:
            self._fail(error)

    def _abandon(self, phase: Phase, reason: str) -> None:
        """The robot itself has stopped: nothing more is sent, and the target is forgotten."""
        self._tracker = self._aim = self.commanded = None
        self._enter(phase, reason)

    def _poll(self) -> None:
        """Errors of the running motion are raised here, once; and its end shows (what poll_motion returns does not tell that)."""
        try:
            self._robot.poll_motion()
        except Exception as error:
            self._fail(error)
            return
        if self._robot.is_in_control or self.state.mode == "Move":
            self._has_begun = True
            return
        if not self._has_begun and time.monotonic() - self._moved_s < START_S:
            return
        if self.phase in (Phase.STOPPING, Phase.HOMING):
            self._enter(Phase.READY, "ready")
        elif self.phase is Phase.STREAMING:
            self._abandon(Phase.FAULT, "the robot ended the motion by itself; call controller/resume")

    def _fail(self, error: Exception) -> None:
        """A motion failed: the robot's mode says whether by reflex or user stop; a motion that we stopped says so."""
        self._check_link(error)
        if PREEMPTED in str(error) and self.phase in (Phase.STOPPING, Phase.USER_STOPPED, Phase.READY):
            return
        self._read_state()
        self._judge_mode()
        if self.phase not in (Phase.REFLEX, Phase.USER_STOPPED, Phase.RECOVERING):
            self._abandon(Phase.FAULT, f"{describe(error)}; call controller/resume")

    def _check_link(self, error: Exception) -> None:
        """Raise `error` again if it ends the session."""
        if isinstance(error, self._franky.NetworkException):
            raise error

    def measured_coordinates(self) -> np.ndarray:
        """The measured pose, [X]."""
        return to_coordinates(self.state.pose[:3], Rotation.from_quat(self.state.pose[3:]), self.config.motion)


def describe(error: BaseException) -> str:
    """One line about an error of the library."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
