"""The play table of scene.py as MuJoCo bodies round franky-sim's FR3, and two cameras that cast rays: another physics, another renderer.

Nothing of it is stored: the bodies are written from the same parts as the PyBullet scene when the model is built.
Rays need no display and no OpenGL, and give the same pictures everywhere, up to the noise that is added as a real camera would.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.sim.cameras import GRIPPER_FAR_M, GRIPPER_FOV_DEG, STATIC_EYE, STATIC_FAR_M, STATIC_FOV_DEG, STATIC_TARGET, STATIC_UP
from diwa_core.sim.play_table import BUTTON_THRESHOLD_M
from diwa_core.sim.scene import (
    BLOCKS,
    BULB_COLOURS,
    FLOOR,
    LED_COLOURS,
    ROBOT_SHADES,
    STAND,
    WHITE,
    Part,
    span,
    table_links,
    table_parts,
    wedge_obj,
)
from diwa_core.sim.state import BULB_THRESHOLD_M, SceneState

ROBOT, TABLE, ANYTHING = ("1", "1"), ("2", "1"), ("3", "3")  # contype, conaffinity: parts of the table do not collide with each other
FRICTION_N, BUTTON_SPRING_N, BUTTON_STIFFNESS_N_M = 4.0, 4.0, 20.0
WEDGES = {"wedge_left.obj": (-0.44, -0.36), "wedge_right.obj": (0.16, 0.44)}
FINGER_BOXES = ((0.012, 0.050, 0.023, 0.006), (0.014, 0.036, 0.066, 0.0))  # thickness, length, height, distance from the closing plane
FINGER_WIDTH_M = 0.022
CAMERA_IN_HAND = (-0.1, 0.0, 0.0), (1.3, 0.0, -1.57)
LIGHT, AMBIENT, DIFFUSE = np.array([1.5, -1.5, 3.0]) / np.linalg.norm([1.5, -1.5, 3.0]), 0.55, 0.5
SKY = (0.80, 0.84, 0.90)
NOISE = 1.5  # standard deviation, of 255
MESHES_SEEN = np.array([1, 1, 0, 1, 1, 1], np.uint8)  # the robot shows its collision meshes, as in the PyBullet scene


def add_table(simulator: Any) -> None:
    """Put table, stand and blocks into a franky_sim MujocoSimulator that has its robot and is not started yet."""
    world, scene = simulator.worldbody, simulator.scene
    assets = scene.find("asset")
    for name, x in WEDGES.items():
        vertices = sorted({tuple(line.split()[1:]) for line in wedge_obj(x).splitlines() if line.startswith("v ")})
        ElementTree.SubElement(assets, "mesh", name=name, vertex=" ".join(" ".join(vertex) for vertex in vertices))
    _simplify_robot(world, assets)
    world.find("geom[@name='ground']").attrib.pop("material")
    world.find("geom[@name='ground']").set("rgba", _colour(FLOOR))
    stand = span((-0.44, -0.24), (-0.56, -0.36), (0, 0.235), STAND)
    table = ElementTree.SubElement(world, "body", name="table")
    for part in (*table_parts(), stand):
        _add_part(table, part, (0, 0, 0), TABLE)
    for link in table_links():
        body = ElementTree.SubElement(world, "body", name=link.name, pos=_numbers(link.frame))
        if link.range_m is not None:
            _add_slide(body, link)
        for part in link.parts:
            _add_part(body, part, link.frame, TABLE)
    for index, (name, (size, colour)) in enumerate(BLOCKS.items()):
        body = ElementTree.SubElement(world, "body", name=name, pos=f"0 -0.1 {0.46 + 0.1 * index}")
        ElementTree.SubElement(body, "freejoint", name=name)
        _add_part(body, Part("box", size, (0, 0, 0), colour), (0, 0, 0), ANYTHING, mass="0.2")


def _simplify_robot(world: ElementTree.Element, assets: ElementTree.Element) -> None:
    """Show the collision meshes, shaded as in the PyBullet scene, and put its longer fingers on."""
    for body in world.iter("body"):
        name = body.get("name", "")
        for geom in list(body.findall("geom")):
            if geom.get("class") == "visual" or "finger" in name:
                body.remove(geom)
            else:
                shade = next((shade for part, shade in ROBOT_SHADES.items() if part in name), WHITE)
                geom.set("rgba", _colour(shade))
        if name.endswith("_finger"):
            for thickness, length, height, inner in FINGER_BOXES:
                part = Part("box", (FINGER_WIDTH_M, thickness, length), (0, inner + thickness / 2, height), ROBOT_SHADES["finger"])
                _add_part(body, part, (0, 0, 0), ROBOT)
    for mesh in list(assets.findall("mesh")):
        if not mesh.get("name").endswith(("_coll", ".obj")):
            assets.remove(mesh)


def _add_part(body: ElementTree.Element, part: Part, frame: tuple, bits: tuple[str, str], mass: str = "") -> None:
    """One primitive as a geom, relative to its body's frame."""
    position = [c - f for c, f in zip(part.centre, frame, strict=True)]
    geom = ElementTree.SubElement(
        body, "geom", type=part.shape, pos=_numbers(position), euler=f"{part.roll:.6f} 0 0", rgba=_colour(part.colour)
    )
    geom.set("contype", bits[0])
    geom.set("conaffinity", bits[1])
    geom.set("friction", "0.7 0.005 0.0001")
    if part.shape == "mesh":
        geom.set("mesh", part.size[0])
    else:
        *sides, last = part.size  # MuJoCo takes half lengths, but whole radii
        sides = [side / 2 for side in sides] if part.shape == "box" else sides
        geom.set("size", _numbers([*sides, last if part.shape == "sphere" else last / 2]))
    if mass:
        geom.set("mass", mass)


def _add_slide(body: ElementTree.Element, link: Any) -> None:
    """A sliding joint with the friction of the PyBullet scene's motor, or the button's spring."""
    joint = ElementTree.SubElement(
        body, "joint", name=link.name, type="slide", axis=_numbers(link.axis), range=f"0 {link.range_m}", limited="true"
    )
    joint.set("damping", "2")
    if link.name == "button":
        joint.set("stiffness", str(BUTTON_STIFFNESS_N_M))
        joint.set("springref", str(-BUTTON_SPRING_N / BUTTON_STIFFNESS_N_M))
    else:
        joint.set("frictionloss", str(FRICTION_N))
    inertia = _numbers([0.01 * link.mass] * 3)
    ElementTree.SubElement(body, "inertial", pos="0 0 0", mass=str(link.mass), diaginertia=inertia)


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.6f}" for value in values)


def _colour(colour: tuple) -> str:
    return f"{_numbers(colour)} 1"


class TableState:
    """The moving parts of a started simulator: reads and sets scene_obs, switches the lights."""

    def __init__(self, model: Any, data: Any) -> None:
        self.model, self.data = model, data
        self.bulb = self.led = self.button_down = False
        self._slides = {name: self._address(name) for name in ("slider", "drawer", "button", "switch")}
        self._blocks = [self._address(name) for name in BLOCKS]
        bodies = [mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name) for name in ("bulb", "led")]
        self._lights = [int(model.body_geomadr[body]) for body in bodies]

    def place(self, state: SceneState) -> None:
        """Put table joints, blocks and lights into a start state; the arm stays where it is."""
        for name in ("slider", "drawer", "switch"):
            self.data.qpos[self._slides[name]] = getattr(state, name)
        self.data.qpos[self._slides["button"]] = 0.0
        for address, pose in zip(self._blocks, state.blocks, strict=True):
            x, y, z, w = Rotation.from_euler("xyz", pose[3:]).as_quat()
            self.data.qpos[address : address + 7] = [*pose[:3], w, x, y, z]
        for name in (*self._slides, *BLOCKS):
            joint = self.model.joint(name)
            self.data.qvel[joint.dofadr[0] : joint.dofadr[0] + (6 if name in BLOCKS else 1)] = 0.0
        self.button_down = False
        self._set_lights(state.bulb, state.led)

    def update_lights(self) -> None:
        """The bulb follows the switch, each press of the button toggles the LED; once per control step."""
        pressed = self.data.qpos[self._slides["button"]] > BUTTON_THRESHOLD_M
        led = self.led != bool(pressed and not self.button_down)
        self.button_down = bool(pressed)
        self._set_lights(bool(self.data.qpos[self._slides["switch"]] > BULB_THRESHOLD_M), led)

    @property
    def scene_obs(self) -> np.ndarray:
        """float64 [24], as the PyBullet scene has it."""
        values = [float(self.data.qpos[address]) for address in self._slides.values()] + [float(self.bulb), float(self.led)]
        for address in self._blocks:
            x, y, z, qw, qx, qy, qz = self.data.qpos[address : address + 7]
            values += [x, y, z, *Rotation.from_quat([qx, qy, qz, qw]).as_euler("xyz")]
        return np.array(values)

    def _set_lights(self, bulb: bool, led: bool) -> None:
        self.bulb, self.led = bulb, led
        for geom, colour in zip(self._lights, (BULB_COLOURS[bulb], LED_COLOURS[led]), strict=True):
            self.model.geom_rgba[geom, :3] = colour

    def _address(self, name: str) -> int:
        return int(self.model.joint(name).qposadr[0])


class RayCameras:
    """Static and gripper camera of a started simulator, uint8 [size, size, 3], from a copy of its state."""

    def __init__(self, model: Any, size: int, seed: int = 0) -> None:
        self.model, self.size = model, size
        self.data = mujoco.MjData(model)
        self.noise = np.random.default_rng(seed)
        self._hand = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, "robot0_hand")
        self._near_hand = Rotation.from_euler("xyz", CAMERA_IN_HAND[1]).as_matrix()
        self._views: dict[str, Callable[[], np.ndarray]] = {"rgb_static": self.static, "rgb_gripper": self.gripper}

    def look(self, joint_positions: np.ndarray) -> None:
        """Take the state to be rendered: all positions of the model."""
        self.data.qpos[:] = joint_positions
        mujoco.mj_fwdPosition(self.model, self.data)

    def view(self, name: str) -> np.ndarray:
        """rgb_static or rgb_gripper."""
        return self._views[name]()

    def static(self) -> np.ndarray:
        """The camera beside the table."""
        forward = np.subtract(STATIC_TARGET, STATIC_EYE)
        return self._render(np.array(STATIC_EYE), forward, np.array(STATIC_UP), STATIC_FOV_DEG, STATIC_FAR_M)

    def gripper(self) -> np.ndarray:
        """The camera on the hand."""
        turn = self.data.xmat[self._hand].reshape(3, 3)
        eye = self.data.xpos[self._hand] + turn @ CAMERA_IN_HAND[0]
        camera = turn @ self._near_hand
        return self._render(eye, camera[:, 1], -camera[:, 2], GRIPPER_FOV_DEG, GRIPPER_FAR_M)

    def _render(self, eye: np.ndarray, forward: np.ndarray, up: np.ndarray, fov_deg: float, far_m: float) -> np.ndarray:
        rays = pixel_rays(forward, up, fov_deg, self.size)
        count = len(rays)
        geoms, distances, normals = np.empty((count, 1), np.int32), np.empty((count, 1)), np.empty((3 * count, 1))
        mujoco.mj_multiRay(
            self.model, self.data, eye, rays.reshape(-1, 1), MESHES_SEEN, True, -1, geoms, distances, normals, count, 2 * far_m
        )
        geoms = geoms[:, 0]
        light = AMBIENT + DIFFUSE * np.clip(normals.reshape(count, 3) @ LIGHT, 0.0, None)
        colours = np.where((geoms >= 0)[:, None], self.model.geom_rgba[geoms, :3] * light[:, None], SKY)
        noisy = 255 * colours + self.noise.normal(0.0, NOISE, colours.shape)
        return np.clip(noisy, 0, 255).astype(np.uint8).reshape(self.size, self.size, 3)


def pixel_rays(forward: np.ndarray, up: np.ndarray, fov_deg: float, size: int) -> np.ndarray:
    """Unit directions [size * size, 3] through the pixels of a square pinhole camera, row by row from the top left."""
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    upward = np.cross(right, forward)
    extent = np.tan(np.radians(fov_deg) / 2) * ((np.arange(size) + 0.5) / size * 2 - 1)
    rays = forward + extent[None, :, None] * right - extent[:, None, None] * upward
    return (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3)
