"""PlayTable: the play table as a Gymnasium environment, with CALVIN's observation and action conventions at 30 Hz.

Bit-identical: the same start state and actions give the same frames, in any process and after any history, because `reset` rebuilds
the physics from nothing (20 ms). `save_state` and `restore_state` build on that.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pybullet

from diwa_core.contract import ACTION_SIZE, ROBOT_OBS_SIZE, TARGET_POSE_SIZE, Observation
from diwa_core.errors import ContractError, DataError, SetupError
from diwa_core.sim.cameras import VIEWS, Cameras, check_view
from diwa_core.sim.scene import BULB_COLOURS, JOINT_LOWER, JOINT_UPPER, LED_COLOURS, NEUTRAL_JOINTS, Scene, load_scene, write_scene_files
from diwa_core.sim.skills import draw_state
from diwa_core.sim.state import BULB_THRESHOLD_M, MAX_DELTA_M, MAX_DELTA_RAD, SCENE_OBS_SIZE, SceneState, wrap_angle

SUBSTEPS, PHYSICS_HZ = 8, 240
ARM_FORCE, ARM_VELOCITY = 200.0, 2.0
OPEN_FORCE, CLOSE_FORCE, FINGER_OPEN_M = 2.0, 200.0, 0.04
BUTTON_THRESHOLD_M = 0.010
WORKSPACE_LOWER, WORKSPACE_UPPER = np.array([-0.50, -0.62, 0.30]), np.array([0.50, 0.20, 0.85])  # of the target, m
LEASH_M, LEASH_RAD = 0.08, 0.60  # how far the target may lead the measured TCP
IK_RESET_ROUNDS = 30


@dataclass(frozen=True)
class Snapshot:
    """A state as its history: the start and every action since; picklable, a few bytes per step.

    PyBullet's own snapshots lose the order of contacts and so are not bit-exact; a replay is. `robot_obs` and `scene_obs` prove it.
    """

    start: SceneState
    actions: np.ndarray  # [T, 7]
    robot_obs: np.ndarray
    scene_obs: np.ndarray


class PlayTable(gymnasium.Env):
    """The play table with a Franka arm. Action [7] in [-1, 1]: dxyz * 0.02 m, deuler * 0.05 rad, gripper (open from 0 up).

    image_size: side of the pictures in pixels, None renders nothing; views: which of rgb_static and rgb_gripper are rendered.
    `reset(options={"state": SceneState})` starts there; `options={"skill": name}` draws a start state of that skill from the seed.
    Raises ContractError on an unknown view and on an action of another shape or with values that are not finite.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, image_size: int | None = 64, views: tuple[str, ...] = VIEWS, render_mode: str | None = None):
        self._set_spaces(image_size, views, render_mode)
        self.client = pybullet.connect(pybullet.DIRECT)
        if self.client < 0:
            raise SetupError("PyBullet could not start a physics client: expected a client number, found -1. Close other clients first.")
        self.cameras = Cameras(self.client)
        self._files = tempfile.TemporaryDirectory(prefix="diwa_scene_")
        write_scene_files(Path(self._files.name))
        self._bulb = self._led = self._button_down = False
        self._load(SceneState())

    def _set_spaces(self, image_size: int | None, views: tuple[str, ...], render_mode: str | None) -> None:
        """Check the views and declare observation and action spaces."""
        self.views = tuple(check_view(view) for view in views) if image_size else ()
        self.image_size, self.render_mode = image_size, render_mode
        box = gymnasium.spaces.Box
        spaces = {view: box(0, 255, (image_size, image_size, 3), np.uint8) for view in self.views}
        sizes = {"robot_obs": ROBOT_OBS_SIZE, "scene_obs": SCENE_OBS_SIZE, "target_pose": TARGET_POSE_SIZE}
        spaces |= {name: box(-np.inf, np.inf, (size,), np.float64) for name, size in sizes.items()}
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = box(-1.0, 1.0, (ACTION_SIZE,), np.float32)

    # -- Gymnasium -----------------------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict]:
        """Rebuild the scene in a start state: the given one, one drawn for a skill, or a random one; returns (observation, info)."""
        super().reset(seed=seed)
        options = options or {}
        unknown = set(options) - {"state", "skill"}
        if unknown:
            raise ContractError(f"reset options: expected 'state' or 'skill', found {sorted(unknown)}.")
        state = options.get("state")
        if state is None:
            state = draw_state(options.get("skill"), self.np_random)
        state.validate()
        self._load(state)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """Apply one action for 1/30 s; reward is 0 and nothing terminates: skills are judged by SkillOracle."""
        self.apply(action)
        return self._observe(), 0.0, False, False, {}

    def render(self) -> np.ndarray:
        """The static view at 200 x 200."""
        return self.cameras.static(200)

    def close(self) -> None:
        """Disconnect the physics client; closing twice is harmless."""
        if self.client >= 0:
            pybullet.disconnect(self.client)
            self.client = -1
            self._files.cleanup()

    # -- stepping ------------------------------------------------------------------------------------------------------------------

    def apply(self, action: np.ndarray) -> None:
        """Step without making an observation (the scripted experts and the benchmark use it)."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_SIZE,):
            raise ContractError(f"action: expected shape ({ACTION_SIZE},), found {action.shape}.")
        if not np.isfinite(action).all():
            raise ContractError(f"action: expected finite values, found {action}.")
        action = np.clip(action, -1.0, 1.0)
        self._history.append(action)
        self._advance(action)

    def _advance(self, action: np.ndarray) -> None:
        """One control step of the physics with a valid action."""
        self._gripper = 1.0 if action[6] >= 0 else -1.0
        self._move_target(action)
        self._command_arm()
        self._command_fingers()
        for _ in range(SUBSTEPS):
            pybullet.stepSimulation(physicsClientId=self.client)
        self._update_lights()

    def _move_target(self, action: np.ndarray) -> None:
        """Integrate the action on the target pose, inside the workspace and on a leash to the measured TCP."""
        target = self._target.copy()
        target[:3] += action[:3] * MAX_DELTA_M
        target[3:] = wrap_angle(target[3:] + action[3:6] * MAX_DELTA_RAD)
        position, orientation = self._tcp()
        lead = np.clip(target[:3], WORKSPACE_LOWER, WORKSPACE_UPPER) - position
        distance = float(np.sqrt(lead @ lead))
        target[:3] = position + lead * min(1.0, LEASH_M / max(distance, 1e-9))
        wanted = pybullet.getQuaternionFromEuler(target[3:])
        angle = _quaternion_angle(orientation, wanted)
        if angle > LEASH_RAD:
            wanted = pybullet.getQuaternionSlerp(orientation, wanted, LEASH_RAD / angle)
            target[3:] = pybullet.getEulerFromQuaternion(wanted)
        self._target = target

    def _solve_ik(self, pose: np.ndarray) -> np.ndarray:
        """Arm joints [7] for a TCP pose, from the present joints, drawn to the neutral ones and inside the limits."""
        ranges = [high - low for low, high in zip(JOINT_LOWER, JOINT_UPPER, strict=True)]
        joints = pybullet.calculateInverseKinematics(
            self.scene.robot,
            self.scene.tcp,
            pose[:3],
            pybullet.getQuaternionFromEuler(pose[3:]),
            lowerLimits=(*JOINT_LOWER, 0.0, 0.0),
            upperLimits=(*JOINT_UPPER, 0.04, 0.04),
            jointRanges=(*ranges, 0.04, 0.04),
            restPoses=(*NEUTRAL_JOINTS, 0.04, 0.04),
            physicsClientId=self.client,
        )
        return np.clip(joints[:7], JOINT_LOWER, JOINT_UPPER)

    def _command_arm(self) -> None:
        joints = self._solve_ik(self._target)
        for index, joint in zip(self.scene.arm, joints, strict=True):
            pybullet.setJointMotorControl2(
                self.scene.robot,
                index,
                pybullet.POSITION_CONTROL,
                targetPosition=joint,
                force=ARM_FORCE,
                maxVelocity=ARM_VELOCITY,
                physicsClientId=self.client,
            )

    def _command_fingers(self) -> None:
        position, force = (FINGER_OPEN_M, OPEN_FORCE) if self._gripper > 0 else (0.0, CLOSE_FORCE)
        pybullet.setJointMotorControlArray(
            self.scene.robot,
            self.scene.fingers,
            pybullet.POSITION_CONTROL,
            targetPositions=(position, position),
            forces=(force, force),
            physicsClientId=self.client,
        )

    def _update_lights(self) -> None:
        """The bulb follows the switch; each rising edge of the button toggles the LED; colours change on edges only."""
        switch, button = self._table_joint("switch"), self._table_joint("button")
        bulb = switch > BULB_THRESHOLD_M if switch != BULB_THRESHOLD_M else self._bulb
        pressed = button > BUTTON_THRESHOLD_M
        led = self._led != (pressed and not self._button_down)
        self._button_down = pressed
        if bulb != self._bulb:
            self._set_lights(bulb, self._led)
        if led != self._led:
            self._set_lights(self._bulb, led)

    def _set_lights(self, bulb: bool, led: bool) -> None:
        self._bulb, self._led = bool(bulb), bool(led)
        for name, colour in (("bulb", BULB_COLOURS[bulb]), ("led", LED_COLOURS[led])):
            pybullet.changeVisualShape(self.scene.table, self.scene.lights[name], rgbaColor=(*colour, 1), physicsClientId=self.client)

    # -- observing -----------------------------------------------------------------------------------------------------------------

    @property
    def target_pose(self) -> np.ndarray:
        """Commanded TCP pose [6]: xyz (m) and euler xyz (rad)."""
        return self._target.copy()

    @property
    def robot_obs(self) -> np.ndarray:
        """float64 [15]: TCP xyz and euler, gripper width, seven joints, last gripper action."""
        position, orientation = self._tcp()
        states = pybullet.getJointStates(self.scene.robot, (*self.scene.arm, *self.scene.fingers), physicsClientId=self.client)
        joints = [state[0] for state in states]
        euler = pybullet.getEulerFromQuaternion(orientation)
        return np.array([*position, *euler, joints[7] + joints[8], *joints[:7], self._gripper], dtype=np.float64)

    @property
    def scene_obs(self) -> np.ndarray:
        """float64 [24]: slider, drawer, button, switch (m), bulb, LED (0/1), then xyz and euler of the red, blue and pink block."""
        values = [self._table_joint(name) for name in ("slider", "drawer", "button", "switch")] + [float(self._bulb), float(self._led)]
        for block in self.scene.blocks:
            position, orientation = pybullet.getBasePositionAndOrientation(block, physicsClientId=self.client)
            values += [*position, *pybullet.getEulerFromQuaternion(orientation)]
        return np.array(values, dtype=np.float64)

    def observation(self) -> Observation:
        """The present frame as the models see it, without the scene's true state."""
        return Observation(self._images(), self.robot_obs, self.target_pose)

    def _observe(self) -> dict[str, np.ndarray]:
        return {**self._images(), "robot_obs": self.robot_obs, "scene_obs": self.scene_obs, "target_pose": self.target_pose}

    def _images(self) -> dict[str, np.ndarray]:
        return {view: self.cameras.view(view, self.image_size, self.scene) for view in self.views}

    def _tcp(self) -> tuple[np.ndarray, tuple]:
        link = pybullet.getLinkState(self.scene.robot, self.scene.tcp, computeForwardKinematics=True, physicsClientId=self.client)
        return np.array(link[4]), link[5]

    def _table_joint(self, name: str) -> float:
        return pybullet.getJointState(self.scene.table, self.scene.joints[name], physicsClientId=self.client)[0]

    # -- state ---------------------------------------------------------------------------------------------------------------------

    def _load(self, state: SceneState) -> None:
        """Rebuild the physics from nothing and put it into `state`."""
        pybullet.resetSimulation(physicsClientId=self.client)
        pybullet.setGravity(0, 0, -9.81, physicsClientId=self.client)
        pybullet.setPhysicsEngineParameter(
            fixedTimeStep=1 / PHYSICS_HZ, numSubSteps=0, deterministicOverlappingPairs=1, physicsClientId=self.client
        )
        self.scene: Scene = load_scene(self.client, Path(self._files.name))
        for name in ("slider", "drawer", "switch"):
            pybullet.resetJointState(self.scene.table, self.scene.joints[name], getattr(state, name), physicsClientId=self.client)
        for block, pose in zip(self.scene.blocks, state.blocks, strict=True):
            quaternion = pybullet.getQuaternionFromEuler(pose[3:])
            pybullet.resetBasePositionAndOrientation(block, pose[:3], quaternion, physicsClientId=self.client)
        self._place_arm(state)
        self._start, self._history = copy.deepcopy(state), []
        self._button_down = False
        self._set_lights(state.switch > BULB_THRESHOLD_M, state.led)

    def _place_arm(self, state: SceneState) -> None:
        self._gripper = 1.0 if state.gripper > 0 else -1.0
        for finger in self.scene.fingers:
            pybullet.resetJointState(self.scene.robot, finger, FINGER_OPEN_M if self._gripper > 0 else 0.0, physicsClientId=self.client)
        self._set_arm(np.array(NEUTRAL_JOINTS))
        if state.tcp_pose is not None:
            for _ in range(IK_RESET_ROUNDS):
                self._set_arm(self._solve_ik(np.asarray(state.tcp_pose, dtype=np.float64)))
        position, orientation = self._tcp()
        self._target = np.array([*position, *pybullet.getEulerFromQuaternion(orientation)])
        self._command_arm()
        self._command_fingers()

    def _set_arm(self, joints: np.ndarray) -> None:
        for index, joint in zip(self.scene.arm, joints, strict=True):
            pybullet.resetJointState(self.scene.robot, index, joint, physicsClientId=self.client)

    def save_state(self) -> Snapshot:
        """Everything that decides what happens next; costs nothing and changes nothing."""
        actions = np.array(self._history, dtype=np.float64).reshape(-1, ACTION_SIZE)
        return Snapshot(copy.deepcopy(self._start), actions, self.robot_obs, self.scene_obs)

    def restore_state(self, snapshot: Snapshot) -> None:
        """Go to a snapshot of this or another PlayTable, bit by bit; takes about 1 ms per step since its reset.

        Raises DataError if the replay does not end where the snapshot was taken (another PyBullet or machine type).
        """
        self._load(snapshot.start)
        for action in snapshot.actions:
            self.apply(action)
        for name in ("robot_obs", "scene_obs"):
            expected, found = getattr(snapshot, name), getattr(self, name)
            if not np.array_equal(expected, found):
                raise DataError(
                    f"snapshot: expected {name} {expected}, found {found} after the replay. "
                    "Restore it with the PyBullet version and machine type that saved it."
                )


def _quaternion_angle(a: tuple, b: tuple) -> float:
    """Angle in radians between two orientations given as xyzw quaternions."""
    dot = abs(sum(x * y for x, y in zip(a, b, strict=True)))
    return 2.0 * float(np.arccos(min(1.0, dot)))
