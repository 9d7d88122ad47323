"""`diwa doctor --robot ADDRESS`: is this machine, the line and the robot fit for control at 1 kHz? Nothing moves and nothing is changed."""

from __future__ import annotations

import platform
import re
import resource
import shutil
import socket
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from diwa_core.cli.preflight import Finding
from diwa_core.control.franka_arm import Connector, describe, import_franky
from diwa_core.control.robot_config import RobotConfig, load_robot_config
from diwa_core.errors import DiwaError

ROBOT_PORT, GRIPPER_PORT = 1337, 1338
CONNECT_S = 5.0
PINGS, PING_INTERVAL_S = 200, 0.005
MAX_RTT_MS, MAX_JITTER_MS = 1.0, 0.3  # of the line; the robot wants its answer within the millisecond
RT_PRIORITY = 80
STATES, MAX_LATE_MS = 500, 5.0
INSTALL = ".venv/bin/pip install -c constraints.txt '.[franka]'"


def examine_robot(robot: str) -> list[Finding]:
    """Every finding, in the order in which to mend them; later ones are left out when the robot cannot be reached.

    robot: its address, or its YAML. Raises ConfigError on a YAML with mistakes.
    """
    described, address = [], robot
    if Path(robot).suffix in (".yaml", ".yml"):
        config = load_robot_config(robot)
        described, address = [describe_config(robot, config)], config.address
    findings = [
        check_client(),
        check_kernel(),
        check_priority(),
        check_memory_lock(),
        check_line(address),
        check_port(address, ROBOT_PORT, "FCI"),
    ]
    if findings[0].ok and findings[-1].ok:
        findings += ask_robot(address)
    return [*described, *findings]


def describe_config(path: str, config: RobotConfig) -> Finding:
    """What the robot's YAML allows, to be read by whoever stands beside the arm."""
    limits = config.motion
    box = f"{limits.workspace_lower_m} to {limits.workspace_upper_m} m from the base"
    speed = f"{limits.max_speed_m_s:g} m/s, {limits.max_speed_rad_s:g} rad/s"
    load = f"load {config.tool.load_kg:g} kg; stops at {config.collision.force_n:g} N"
    return Finding(path, True, f"{config.model} at {config.address}; up to {speed} in {box}; {load}")


def check_client() -> Finding:
    """The library that speaks to the robot."""
    try:
        return Finding("franky-control", True, f"{version('franky-control')}, for an FR3 with System 5.9 or later")
    except PackageNotFoundError:
        return Finding("franky-control", False, "not installed", INSTALL)


def check_kernel() -> Finding:
    """Without PREEMPT_RT the robot stops with communication_constraints_violation sooner or later."""
    flag = Path("/sys/kernel/realtime")
    is_realtime = (flag.is_file() and flag.read_text().strip() == "1") or "PREEMPT_RT" in platform.version()
    mend = "boot a PREEMPT_RT kernel (Ubuntu: sudo pro enable realtime-kernel; Debian: sudo apt-get install linux-image-rt-amd64)"
    return Finding("real-time kernel", is_realtime, platform.release() + (", PREEMPT_RT" if is_realtime else ", no PREEMPT_RT"), mend)


def check_priority() -> Finding:
    """The control thread asks for a real-time priority."""
    highest = resource.getrlimit(resource.RLIMIT_RTPRIO)[1]
    allowed = highest == resource.RLIM_INFINITY or highest >= RT_PRIORITY
    mend = (
        f"{RT_PRIORITY} needed; in /etc/security/limits.conf: '@realtime - rtprio 99', join (sudo usermod -aG realtime $USER), log in again"
    )
    return Finding("priorities", allowed, f"rtprio up to {'any' if highest == resource.RLIM_INFINITY else highest}", mend)


def check_memory_lock() -> Finding:
    """Memory of the control thread must stay in memory."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    allowed = locked == resource.RLIM_INFINITY or locked >= 100 * 2**20
    mend = "in /etc/security/limits.conf: '@realtime - memlock 102400', then log in again"
    return Finding("locked memory", allowed, "any" if locked == resource.RLIM_INFINITY else f"{locked // 2**20} MiB", mend)


def check_line(address: str) -> Finding:
    """Round trips of the line: their worst and their jitter."""
    if shutil.which("ping") is None:
        return Finding("line", False, "no ping here to measure it with", "sudo apt-get install iputils-ping")
    command = ["ping", "-n", "-c", str(PINGS), "-i", str(PING_INTERVAL_S), "-W", "1", address]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PINGS * PING_INTERVAL_S + 15, check=False).stdout
    except subprocess.TimeoutExpired:
        answer = ""
    times_ms = np.array([float(value) for value in re.findall(r"time[=<]([\d.]+)", answer)])
    if len(times_ms) == 0:
        return Finding(
            "line",
            False,
            f"no answer to {PINGS} pings",
            "check cable, address and subnet (robot and this machine in one, as 172.16.0.0/24)",
        )
    lost, worst_ms, jitter_ms = PINGS - len(times_ms), times_ms.max(), times_ms.std()
    found = f"{times_ms.mean():.2f} ms, worst {worst_ms:.2f} ms, jitter {jitter_ms:.2f} ms, {lost} of {PINGS} lost"
    mend = (
        "a cable straight into the control cabinet, no switch; power saving of the network card and the CPU off (cpupower -g performance)"
    )
    return Finding("line", lost == 0 and worst_ms <= MAX_RTT_MS and jitter_ms <= MAX_JITTER_MS, found, mend)


def check_port(address: str, port: int, name: str) -> Finding:
    """Whether somebody listens."""
    mend = "open https://ADDRESS/desk, unlock the joints and choose 'Activate FCI' in the menu at the top right"
    try:
        socket.create_connection((address, port), timeout=2.0).close()
    except OSError as error:
        return Finding(name, False, f"port {port}: {error}", mend.replace("ADDRESS", address))
    return Finding(name, True, f"port {port} answers")


def ask_robot(address: str) -> list[Finding]:
    """Connect as a client would, read one state, let go."""
    franky = import_franky()
    try:
        robot = Connector().connect(lambda: franky.Robot(address, realtime_config=franky.RealtimeConfig.Ignore), CONNECT_S, address)
    except franky.IncompatibleVersionException as error:
        mend = "update the robot to System 5.9 or later, or install the franky-control that was built for its version"
        return [Finding("versions", False, describe(error), mend)]
    except DiwaError as error:
        return [Finding("connection", False, str(error), "activate FCI, end other clients (a robot serves one), then try again")]
    except Exception as error:
        return [Finding("connection", False, describe(error), "see the line above that is not ok; restart the robot if there is none")]
    state = robot.state
    return [
        Finding("versions", True, "robot and library agree"),
        judge_mode(state.robot_mode.name),
        judge_errors(state),
        describe_load(state),
        check_hand(address),
    ]


def check_states(robot: object) -> Finding:
    """States come once a millisecond; what is lost or late on the way in will be on the way out."""
    arrivals_s, robot_s = np.empty(STATES), np.empty(STATES)
    for index in range(STATES):
        robot_s[index], arrivals_s[index] = robot.state.time.to_sec(), time.perf_counter()
    late_ms = (np.diff(arrivals_s) - np.diff(robot_s)) * 1e3
    lost = round(float(np.maximum(np.diff(robot_s) * 1e3 - 1, 0).sum()))
    found = f"{STATES} states, {lost} lost, up to {late_ms.max():.1f} ms late"
    mend = "mend the line and the kernel first; nothing else may run on the core that controls"
    return Finding("states", lost <= STATES // 100 and late_ms.max() <= MAX_LATE_MS, found, mend)


def judge_mode(mode: str) -> Finding:
    """The robot must be idle, not stopped."""
    mends = {
        "UserStopped": "release the user stop (the external activation device), with everybody out of reach",
        "Reflex": "look at the arm, then recover: controller/recover, or Desk",
        "Guiding": "let go of the guiding buttons",
        "Move": "end the program that moves it",
    }
    return Finding("mode", mode == "Idle", mode, mends.get(mode, "see Desk: joints unlocked, no safety stop, execution mode (blue light)"))


def judge_errors(state: object) -> Finding:
    """Errors that the robot still has."""
    errors = [name for name in dir(state.current_errors) if name[0] != "_" and getattr(state.current_errors, name) is True]
    return Finding("errors", not errors, ", ".join(errors) or "none", "controller/recover, or Desk")


def describe_load(state: object) -> Finding:
    """What the robot believes to hang on its flange: a wrong load pushes the arm and fakes contacts."""
    x, y, z = state.F_T_EE.translation
    found = f"end effector {state.m_ee:.2f} kg, load {state.m_load:.2f} kg, TCP {x:.3f}, {y:.3f}, {z:.3f} m from the flange"
    return Finding(
        "payload", state.m_ee > 0, found, "set the end effector in Desk (Settings, End Effector); the load belongs into the robot's YAML"
    )


def check_hand(address: str) -> Finding:
    """The Franka Hand."""
    finding = check_port(address, GRIPPER_PORT, "gripper")
    return (
        finding
        if finding.ok
        else Finding(
            "gripper", False, finding.found, "connect the hand and home it in Desk, or 'gripper: {present: false}' in the robot's YAML"
        )
    )
