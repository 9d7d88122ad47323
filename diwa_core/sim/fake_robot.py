"""A stand-in for a Franka: franky-sim's FR3 behind the real protocol on loopback, paced so that a busy machine slows it, with faults.

It is a simulation. It shows that the client, the limits and the states work; it does not show how a real arm, cable or load behaves.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum

import numpy as np

from diwa_core.errors import ConfigError, SetupError

try:
    from franky_sim.franka_gripper_protocol import GripperCommandStatus
    from franky_sim.franka_gripper_server import FrankaGripperServer
    from franky_sim.franka_robot_protocol import (
        AutomaticErrorRecoveryCommand,
        AutomaticErrorRecoveryStatus,
        MoveStatus,
        RobotCommand,
        RobotMode,
    )
    from franky_sim.franka_robot_server import FrankaRobotServer
    from franky_sim.franka_server import BaseCommand, Command, ConnectCommand, ConnectStatus, MessageHeader
    from franky_sim.mujoco_simulator import FrankaMujocoRobot, MujocoSimulator
except ImportError as error:
    raise SetupError(f"franky-sim is not installed ({error}). Mend: .venv/bin/pip install -c constraints.txt '.[franka]'") from error

LOGGER = logging.getLogger(__name__)
STEP_S = 0.001
CLIENT_WAIT_S = 0.02  # a moving robot waits this long for a late client: time slows down instead of torques going stale
MAX_PENDING = 2  # states that the client may be behind before it is late
CLIENT_LOST_S = 5.0  # without an answer for this long it stops with a reflex, as hardware does after 20 ms; until then it stands still
REANCHOR_S = 0.1
GRIPPER_STEPS = 10
ERRORS = 41
OTHER_VERSION = 9
CARTESIAN_REFLEX, COMMUNICATION = 7, 25  # places in the robot's list of errors


class Fault(Enum):
    """What can be made to go wrong."""

    NONE = "none"  # ends a user stop, a safety stop, a freeze, a refusal and a gripper's silence; a reflex ends by recovery only
    REFLEX = "reflex"
    USER_STOP = "user_stop"
    SAFETY_STOP = "safety_stop"
    REJECT_MOTION = "reject_motion"
    FREEZE = "freeze"
    LINK_LOSS = "link_loss"  # the connection breaks; a new one is welcome
    MUTE = "mute"  # connections are accepted and never answered
    WRONG_VERSION = "wrong_version"
    GRIPPER_ABORT = "gripper_abort"  # commands to the gripper are never answered, and it does not move


class RecoverCommand(AutomaticErrorRecoveryCommand):
    """Automatic error recovery: ends a reflex, nothing else."""

    def handle(self, server: FakeRobotServer) -> None:
        """Answer as the robot would."""
        if server.mode is RobotMode.kReflex:
            server.mode, server.errors = None, (False,) * ERRORS
            self.reply(AutomaticErrorRecoveryStatus.kSuccess)
        elif server.mode is None:
            self.reply(AutomaticErrorRecoveryStatus.kSuccess)
        else:
            self.reply(AutomaticErrorRecoveryStatus.kCommandNotPossibleRejected)


class VersionedConnectCommand(ConnectCommand):
    """A connection, refused by a robot of another version."""

    def handle(self, server: FakeRobotServer, command_type_struct: str = "I") -> None:
        """Answer as the robot would."""
        if not server.wrong_version:
            super().handle(server, command_type_struct)
            return
        header = MessageHeader(self.command_type, self.command_id, 8).to_bytes(command_type_struct=command_type_struct)
        self.client_socket.sendall(header + struct.pack("<HH4x", ConnectStatus.kIncompatibleLibraryVersion, OTHER_VERSION))


class FakeGripperServer(FrankaGripperServer):
    """The gripper. An aborted one does not move and answers nothing; a stop ends the command before it, as the real one does."""

    aborted = False

    def start_move(self, width: float, speed: float, command_id: int, tcp_socket: socket.socket) -> None:
        """Open or close to a width."""
        super().start_move(self._robot.hand_width if self.aborted else width, speed, command_id, tcp_socket)

    def start_grasp(self, width: float, speed: float, *rest: object) -> None:
        """Close with a force."""
        super().start_grasp(self._robot.hand_width if self.aborted else width, speed, *rest)

    def stop(self, command_id: int, tcp_socket: socket.socket) -> None:
        """Stop, and say so to the command that was running."""
        if self.aborted:
            return
        if self._pending_command_id is not None:
            kind, pending = self._pending_command_type, self._pending_command_id
            BaseCommand.send_response(tcp_socket, kind, pending, GripperCommandStatus.kFail, b"", "H", "H")
        super().stop(command_id, tcp_socket)

    def _check_motion_state(self) -> None:
        if not self.aborted:
            super()._check_motion_state()

    def _setup_udp_connection(self, network_udp_port: int) -> None:
        super()._setup_udp_connection(network_udp_port)
        bind_to_loopback(self)


class FakeRobotServer(FrankaRobotServer):
    """The robot's interface with modes and errors that a fault sets. All of it runs in the simulation's thread."""

    def __init__(self, robot: FrankaMujocoRobot, address: str) -> None:
        self.mode: RobotMode | None = None  # None: as the simulator has it
        self.errors: tuple[bool, ...] = (False,) * ERRORS
        self.rejects = self.wrong_version = False
        self.pending = 0  # states sent in a motion and not answered
        super().__init__(robot, [address])
        # franky-sim keeps its table of commands to itself; there, recovery and connecting always succeed.
        commands = self._FrankaServer__command_class_map
        commands[RobotCommand.kAutomaticErrorRecovery], commands[Command.kConnect] = RecoverCommand, VersionedConnectCommand

    def _bind_children(self, hostname: str) -> None:
        self.gripper = FakeGripperServer(self._FrankaRobotServer__robot, hostname)
        self.gripper.init()
        self._FrankaRobotServer__gripper_server = None  # driven by FakeRobot, at its own rate

    def _setup_udp_connection(self, network_udp_port: int) -> None:
        super()._setup_udp_connection(network_udp_port)
        bind_to_loopback(self)

    @property
    def robot_state(self) -> object:
        """The state that is sent."""
        state = super().robot_state
        if self.mode is None:
            return state
        return state.replace(robot_mode=self.mode, errors=self.errors, reflex_reason=self.errors)

    @property
    def is_moving(self) -> bool:
        """Whether a client's motion runs."""
        return self.current_motion_id > 0

    def start_motion(self, *arguments: object) -> None:
        """Begin a motion, or refuse it (an exception is answered with 'aborted')."""
        if self.rejects or self.mode is not None:
            raise RuntimeError("motions are refused")
        super().start_motion(*arguments)

    def abort(self, status: MoveStatus, mode: RobotMode, error: int | None = None) -> None:
        """Stop where the arm is and tell the client why."""
        self.mode = mode
        self.errors = tuple(index == error for index in range(ERRORS))
        motion = self.current_motion_id
        self.stop_motion(send_preemption_signal=False)
        self._FrankaRobotServer__holding_q = tuple(self.robot.inner_state.q)
        if motion:
            BaseCommand.send_response(self._tcp_socket, RobotCommand.kMove, motion, status)
            self.reset_current_motion_id()

    def send_state(self) -> None:
        """Send the state and count it as unanswered."""
        super().send_state()
        self.pending = self.pending + 1 if self.is_moving else 0

    def _handle_udp_command(self, command_data: bytes) -> None:
        self.pending = max(0, self.pending - 1)
        super()._handle_udp_command(command_data)

    def wait_for_command(self, timeout_s: float) -> bool:
        """Whether the client keeps up, or has a command to read."""
        udp = self._FrankaServer__udp_socket
        return self.pending < MAX_PENDING or (udp is not None and bool(select.select([udp], [], [], timeout_s)[0]))


def bind_to_loopback(server: object) -> None:
    """franky-sim binds its UDP socket to every interface; this one belongs to the machine alone."""
    server._FrankaServer__udp_socket.close()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((server.hostname, 0))
    udp.setblocking(False)
    server._FrankaServer__udp_socket = udp
    server._FrankaServer__udp_receiver.sock = udp


class FakeRobot:
    """A context manager: a simulated FR3 that answers on `address` from a thread of its own.

    `prepare(simulator)` may put bodies into the scene before it is built. `world(action)` runs an action between two steps.
    Raises ConfigError when the address is taken.
    """

    def __init__(
        self,
        address: str = "127.0.0.1",
        joints: tuple[float, ...] = (0.0, -0.7854, 0.0, -2.3562, 0.0, 1.5708, 0.7854),
        position: tuple[float, float, float] = (0.0, 0.0, 0.0),
        prepare: Callable[[MujocoSimulator], None] = lambda simulator: None,
        after_step: Callable[[MujocoSimulator], None] = lambda simulator: None,
    ) -> None:
        self.address, self.after_step = address, after_step
        self.simulator = MujocoSimulator()
        self.simulator.init()
        self.robot = self.simulator.add_robot(initial_q=joints, initial_hand_width=0.08, position=position)
        prepare(self.simulator)
        self.server = FakeRobotServer(self.robot, address)
        self.steps, self.late_s = 0, 0.0
        self._actions: list[Callable[[], None]] = []
        self._lock, self._running = threading.Lock(), False
        self._frozen = self._mute = False
        self._heard_s = 0.0
        self._listeners: list[socket.socket] = []

    def __enter__(self) -> FakeRobot:
        try:
            self.server.init()
        except OSError as error:
            raise ConfigError(f"fake FR3: expected {self.address} ports 1337 and 1338 to be free, found {error}.") from error
        self.simulator.start()
        self._running = True
        self._thread = threading.Thread(target=self._run, name="fake-robot", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join(5.0)
        for server in (self.server.gripper, self.server):
            server.reset_state()
            server.cleanup()
        self.simulator.cleanup()

    def world(self, action: Callable[[], None]) -> None:
        """Run `action` between two steps and wait for it."""
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        with self._lock:
            self._actions.append(act)
        if not done.wait(10.0):
            raise SetupError("fake FR3: expected the simulation to go on, found it stuck.")

    def inject(self, fault: Fault) -> None:
        """Make something go wrong, or well again (Fault.NONE)."""
        self.world(lambda: self._apply(fault))

    @property
    def joints(self) -> np.ndarray:
        """rad [7]."""
        return np.array(self.robot.inner_state.q)

    def _apply(self, fault: Fault) -> None:
        server = self.server
        if fault is Fault.NONE:
            if server.mode is not RobotMode.kReflex:
                server.mode = None
            server.rejects = server.wrong_version = server.gripper.aborted = self._frozen = self._mute = False
        elif fault is Fault.REFLEX:
            server.abort(MoveStatus.kReflexAborted, RobotMode.kReflex, CARTESIAN_REFLEX)
        elif fault is Fault.USER_STOP:
            server.abort(MoveStatus.kPreemptedDueToActivatedSafetyFunctions, RobotMode.kUserStopped)
        elif fault is Fault.SAFETY_STOP:
            server.abort(MoveStatus.kEmergencyAborted, RobotMode.kOther)
        elif fault is Fault.REJECT_MOTION:
            server.rejects = True
        elif fault is Fault.FREEZE:
            self._frozen = True
        elif fault is Fault.LINK_LOSS:
            self._cut_link()
        elif fault is Fault.MUTE:
            self._mute = True
            self._cut_link()
        elif fault is Fault.WRONG_VERSION:
            server.wrong_version = True
            self._cut_link()
        elif fault is Fault.GRIPPER_ABORT:
            server.gripper.aborted = True

    def _cut_link(self) -> None:
        for server in (self.server, self.server.gripper):
            server.reset_state()

    def _run(self) -> None:
        begin_s, steps = time.monotonic(), 0
        while self._running:
            self._act()
            if self._frozen or self._mute:
                time.sleep(0.01)
                begin_s, steps = time.monotonic(), 0
                continue
            self._step()
            steps += 1
            ahead_s = begin_s + steps * STEP_S - time.monotonic()
            if ahead_s > STEP_S:
                time.sleep(ahead_s)
            elif ahead_s < -REANCHOR_S:
                self.late_s -= ahead_s
                begin_s, steps = time.monotonic(), 0

    def _act(self) -> None:
        with self._lock:
            actions, self._actions = self._actions, []
        for action in actions:
            action()

    def _step(self) -> None:
        """One millisecond of the robot's time."""
        self._await_client()
        self.server.process_commands()
        if self.steps % GRIPPER_STEPS == 0:
            self.server.gripper.process_commands()
        self.simulator.step()
        self.after_step(self.simulator)
        with suppress(BlockingIOError, ConnectionError, OSError):
            self.server.send_state()
            if self.steps % GRIPPER_STEPS == 0:
                self.server.gripper.send_state()
        self.steps += 1

    def _await_client(self) -> None:
        now_s = time.monotonic()
        if not self.server.is_moving or self.server.wait_for_command(CLIENT_WAIT_S):
            self._heard_s = now_s
        elif now_s - self._heard_s > CLIENT_LOST_S:
            self.server.abort(MoveStatus.kReflexAborted, RobotMode.kReflex, COMMUNICATION)
