"""The two cameras of the play table, rendered in software (TinyRenderer): no display, no GPU, the same pixels everywhere."""

from __future__ import annotations

import numpy as np
import pybullet

from diwa_core.errors import ContractError
from diwa_core.sim.scene import Scene

STATIC_EYE, STATIC_TARGET = (2.871459, -2.166602, 2.555160), (-0.026242, -0.030233, 0.392)
STATIC_UP, STATIC_FOV_DEG, STATIC_NEAR_M, STATIC_FAR_M = (0.404140, 0.226298, 0.886262), 10.0, 1.0, 10.0
GRIPPER_FOV_DEG, GRIPPER_NEAR_M, GRIPPER_FAR_M = 75.0, 0.01, 2.0
LIGHT = {"lightDirection": (1.5, -1.5, 3.0), "lightAmbientCoeff": 0.55, "lightDiffuseCoeff": 0.5, "lightSpecularCoeff": 0.05, "shadow": 0}
VIEWS = ("rgb_static", "rgb_gripper")


def check_view(name: str) -> str:
    """Return `name`, or raise ContractError if it is none of the two views."""
    if name not in VIEWS:
        raise ContractError(f"view: expected one of {', '.join(VIEWS)}; found '{name}'.")
    return name


class Cameras:
    """Renders the static and the gripper view of one physics client as uint8 [size, size, 3]."""

    def __init__(self, client: int):
        self.client = client
        self._static_view = pybullet.computeViewMatrix(STATIC_EYE, STATIC_TARGET, STATIC_UP)
        self._static_projection = pybullet.computeProjectionMatrixFOV(STATIC_FOV_DEG, 1.0, STATIC_NEAR_M, STATIC_FAR_M)
        self._gripper_projection = pybullet.computeProjectionMatrixFOV(GRIPPER_FOV_DEG, 1.0, GRIPPER_NEAR_M, GRIPPER_FAR_M)

    def view(self, name: str, size: int, scene: Scene) -> np.ndarray:
        """Render one of VIEWS; raises ContractError for another name."""
        return self.static(size) if check_view(name) == "rgb_static" else self.gripper(size, scene)

    def static(self, size: int) -> np.ndarray:
        """The camera beside the table."""
        return self._render(size, self._static_view, self._static_projection)

    def gripper(self, size: int, scene: Scene) -> np.ndarray:
        """The camera on the hand, looking along its +y axis with -z up."""
        link = pybullet.getLinkState(scene.robot, scene.camera, computeForwardKinematics=True, physicsClientId=self.client)
        rotation = np.reshape(pybullet.getMatrixFromQuaternion(link[5]), (3, 3))
        eye = np.array(link[4])
        view = pybullet.computeViewMatrix(eye, eye + rotation[:, 1], -rotation[:, 2])
        return self._render(size, view, self._gripper_projection)

    def _render(self, size: int, view: tuple, projection: tuple) -> np.ndarray:
        picture = pybullet.getCameraImage(
            size,
            size,
            view,
            projection,
            renderer=pybullet.ER_TINY_RENDERER,
            flags=pybullet.ER_NO_SEGMENTATION_MASK,
            physicsClientId=self.client,
            **LIGHT,
        )
        return np.ascontiguousarray(np.reshape(picture[2], (size, size, 4))[..., :3], dtype=np.uint8)
