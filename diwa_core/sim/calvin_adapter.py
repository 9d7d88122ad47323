"""CalvinTable: the official calvin_env behind the interface of PlayTable, from the user's own checkout.

The checkout (github.com/mees/calvin_env, with its data folder) and its packages are not part of this project. calvin_env addresses
PyBullet's first client in places: make one CalvinTable per process, before any other PyBullet client.
"""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from diwa_core.errors import SetupError
from diwa_core.sim.cameras import VIEWS
from diwa_core.sim.play_table import IK_RESET_ROUNDS, PlayTable
from diwa_core.sim.scene import NEUTRAL_JOINTS
from diwa_core.sim.state import SceneState

PACKAGES = ("hydra-core==1.3.*", "omegaconf==2.3.*", "gym==0.26.*", "numpy-quaternion", "gitpython", "hydra-colorlog")
NATIVE_SIZES = {"rgb_static": 200, "rgb_gripper": 84}


class CalvinTable(PlayTable):
    """calvin_env as a PlayTable: same observations, actions, start states, oracle and experts; pictures area-resized to `image_size`.

    checkout: folder of a calvin_env checkout; scene: name of one of its scenes. The official physics has no leash and no workspace.
    Raises SetupError if the checkout or one of its packages is missing.
    """

    def __init__(
        self,
        checkout: str | Path,
        image_size: int | None = 64,
        views: tuple[str, ...] = VIEWS,
        render_mode: str | None = None,
        scene: str = "calvin_scene_D",
    ):
        self._set_spaces(image_size, views, render_mode)
        self.calvin = _make_calvin_env(Path(checkout).expanduser(), scene)
        self._random_state = self.calvin.np_random.bit_generator.state
        self._load(SceneState())

    def close(self) -> None:
        """Disconnect calvin_env; closing twice is harmless."""
        if self.calvin is not None:
            self.calvin.close()
            self.calvin.ownsPhysicsClient = False
            self.calvin = None

    def render(self) -> np.ndarray:
        """The static view at 200 x 200."""
        return self._render_native("rgb_static")

    def _advance(self, action: np.ndarray) -> None:
        """calvin_env's own step, without rendering its pictures."""
        action = action.copy()
        action[6] = 1 if action[6] >= 0 else -1
        self.calvin.robot.apply_action(action)
        for _ in range(self.calvin.action_repeat):
            self.calvin.p.stepSimulation(physicsClientId=self.calvin.cid)
        self.calvin.scene.step()

    @property
    def target_pose(self) -> np.ndarray:
        """Commanded TCP pose [6]: xyz (m) and euler xyz (rad)."""
        return np.concatenate([self.calvin.robot.target_pos, self.calvin.robot.target_orn]).astype(np.float64)

    @property
    def robot_obs(self) -> np.ndarray:
        """float64 [15], as PlayTable.robot_obs."""
        return np.asarray(self.calvin.robot.get_observation()[0], dtype=np.float64)

    @property
    def scene_obs(self) -> np.ndarray:
        """float64 [24], as PlayTable.scene_obs."""
        return np.asarray(self.calvin.scene.get_obs(), dtype=np.float64)

    def _images(self) -> dict[str, np.ndarray]:
        size = (self.image_size, self.image_size)
        return {view: cv2.resize(self._render_native(view), size, interpolation=cv2.INTER_AREA) for view in self.views}

    def _render_native(self, view: str) -> np.ndarray:
        camera = next(camera for camera in self.calvin.cameras if f"rgb_{camera.name}" == view)
        return np.ascontiguousarray(camera.render()[0][..., :3], dtype=np.uint8)

    def _load(self, state: SceneState) -> None:
        """Rebuild calvin_env's physics, so that nothing drifts from reset to reset, and put it into `state`."""
        self.calvin.np_random.bit_generator.state = self._random_state  # loading places the blocks at random first
        self.calvin.load()
        self.calvin.p.setPhysicsEngineParameter(deterministicOverlappingPairs=1, physicsClientId=self.calvin.cid)  # lost in loading
        lights = [0.0, state.switch, float(state.bulb), float(state.led)]  # after the button
        scene_obs = np.array([state.slider, state.drawer, *lights, *np.ravel(state.blocks)])
        robot_obs = np.zeros(15)
        robot_obs[6], robot_obs[7:14], robot_obs[14] = (0.08 if state.gripper > 0 else 0.0), self._solve_start(state), state.gripper
        self.calvin.robot.gripper_action = int(state.gripper)
        self.calvin.reset(robot_obs=robot_obs, scene_obs=scene_obs)
        self._start, self._history = copy.deepcopy(state), []

    def _solve_start(self, state: SceneState) -> np.ndarray:
        """Arm joints [7] that reach the state's TCP pose from the neutral ones."""
        robot, physics = self.calvin.robot, self.calvin.p
        joints = np.array(NEUTRAL_JOINTS)
        if state.tcp_pose is None:
            return joints
        orientation = physics.getQuaternionFromEuler(state.tcp_pose[3:])
        for _ in range(IK_RESET_ROUNDS):
            for index, joint in zip(robot.arm_joint_ids, joints, strict=True):
                physics.resetJointState(robot.robot_uid, index, joint, physicsClientId=self.calvin.cid)
            joints = np.array(robot.mixed_ik.get_ik(state.tcp_pose[:3], orientation))[:7]
        return joints


def _make_calvin_env(checkout: Path, scene: str) -> Any:
    """Import calvin_env from the checkout and build it headless with both cameras."""
    for needed in ("calvin_env/envs/play_table_env.py", "conf/config_data_collection.yaml", f"conf/scene/{scene}.yaml", "data"):
        if not (checkout / needed).exists():
            raise SetupError(
                f"calvin_env: expected a checkout of github.com/mees/calvin_env at {checkout}, found no '{needed}' there. "
                "Clone it and give the path to it."
            )
    sys.path.insert(0, str(checkout))
    try:
        hydra = importlib.import_module("hydra")
        importlib.import_module("hydra.utils")
        importlib.import_module("calvin_env.envs.play_table_env")
    except ImportError as error:
        packages = " ".join(f"'{package}'" for package in PACKAGES)
        raise SetupError(f"calvin_env: expected its packages, found {error}. Install them with: pip install {packages}") from error
    overrides = ["cameras=static_and_gripper", f"scene={scene}", "use_vr=false", "env.use_egl=false"]
    with hydra.initialize_config_dir(str((checkout / "conf").resolve()), version_base="1.1"):
        config = hydra.compose("config_data_collection", overrides=overrides)
    return hydra.utils.instantiate(config.env, show_gui=False, use_vr=False, use_scene_info=False)
