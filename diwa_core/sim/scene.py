"""The play table as primitives: URDF text for table, robot and blocks, and loading it into a PyBullet client.

World frame: x right, y away from the robot, z up; metres and radians; all table joints at 0. On the cabinet's 60 degree front plane
`s` runs up the slope from (y, z) = (0.02, 0.44) and `n` points outward.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pybullet
import pybullet_data

BASE_POSITION = (-0.34, -0.46, 0.24)
NEUTRAL_JOINTS = (-1.21779206, 1.03987646, 2.11978261, -2.34205014, -0.87015947, 1.64119353, 0.55344866)
JOINT_LOWER = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)  # Franka Emika Research limits
JOINT_UPPER = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)
SLOPE = math.pi / 3

WOOD, DARK_WOOD, CABINET, DOOR = (0.76, 0.60, 0.42), (0.45, 0.33, 0.22), (0.66, 0.48, 0.32), (0.36, 0.40, 0.34)
DRAWER, DRAWER_HANDLE, SLIDER_HANDLE, SWITCH = (0.86, 0.72, 0.52), (0.15, 0.45, 0.75), (0.90, 0.55, 0.10), (0.55, 0.20, 0.60)
BUTTON, RING, FLOOR, STAND = (0.05, 0.70, 0.70), (0.20, 0.20, 0.22), (0.55, 0.58, 0.62), (0.35, 0.36, 0.38)
WHITE = (0.93, 0.93, 0.95)
ROBOT_SHADES = {"finger": (0.25, 0.26, 0.28), "hand": (0.55, 0.57, 0.60), **dict.fromkeys(("link2", "link4", "link6"), (0.80, 0.82, 0.86))}
LED_COLOURS = ((0.22, 0.24, 0.22), (0.10, 1.00, 0.20))  # off, on
BULB_COLOURS = ((0.72, 0.72, 0.76), (1.00, 0.90, 0.05))
BLOCKS = {
    "red": ((0.056, 0.04, 0.04), (0.85, 0.10, 0.10)),
    "blue": ((0.04, 0.04, 0.04), (0.10, 0.20, 0.90)),
    "pink": ((0.08, 0.04, 0.04), (0.95, 0.45, 0.75)),
}


@dataclass(frozen=True)
class Part:
    """One box (size xyz), cylinder (radius, length), sphere (radius,) or mesh (file name) at `centre` in the world."""

    shape: str
    size: tuple
    centre: tuple[float, float, float]
    colour: tuple[float, float, float]
    roll: float = 0.0


@dataclass(frozen=True)
class MovingLink:
    """A link of the table on its own prismatic joint (range None: fixed) whose frame lies at `frame` in the world."""

    name: str
    frame: tuple[float, float, float]
    parts: tuple[Part, ...]
    mass: float
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)
    range_m: float | None = None


@dataclass(frozen=True)
class Scene:
    """Body, joint and link numbers of a loaded scene."""

    table: int
    robot: int
    blocks: tuple[int, ...]
    joints: dict[str, int]  # slider, drawer, button, switch
    lights: dict[str, int]  # bulb, led
    arm: tuple[int, ...]
    fingers: tuple[int, int]
    tcp: int
    camera: int


def span(x: tuple, y: tuple, z: tuple, colour: tuple) -> Part:
    """The axis-aligned box between the given limits."""
    limits = (x, y, z)
    return Part("box", tuple(b - a for a, b in limits), tuple((a + b) / 2 for a, b in limits), colour)


def slope_span(x: tuple, s: tuple, n: tuple, colour: tuple) -> Part:
    """The box between limits in x, along the slope and outward from the front plane."""
    along, out = (s[0] + s[1]) / 2, (n[0] + n[1]) / 2
    centre = ((x[0] + x[1]) / 2, *slope_point(along, out))
    return Part("box", (x[1] - x[0], s[1] - s[0], n[1] - n[0]), centre, colour, SLOPE)


def slope_point(s: float, n: float) -> tuple[float, float]:
    """(y, z) of a point on or in front of the cabinet's front plane."""
    return 0.02 + s * math.cos(SLOPE) - n * math.sin(SLOPE), 0.44 + s * math.sin(SLOPE) + n * math.cos(SLOPE)


def table_parts() -> tuple[Part, ...]:
    """Everything of the table that never moves."""
    legs = tuple(span((x - 0.02, x + 0.02), (y - 0.016, y + 0.016), (0, 0.40), DARK_WOOD) for x in (-0.42, 0.42) for y in (-0.164, 0.164))
    top = (
        span((-0.44, 0.44), (-0.18, 0.18), (0.40, 0.42), WOOD),
        span((-0.44, 0.44), (-0.18, 0.0085), (0.42, 0.44), WOOD),
    )
    apron = (
        span((-0.42, -0.02), (-0.16, 0.16), (0.30, 0.40), DARK_WOOD),
        span((0.38, 0.42), (-0.16, 0.16), (0.30, 0.40), DARK_WOOD),
        span((-0.02, 0.38), (0.06, 0.16), (0.30, 0.40), DARK_WOOD),
        span((-0.02, 0.38), (-0.16, 0.06), (0.30, 0.32), DARK_WOOD),
    )
    cabinet = (
        Part("mesh", ("wedge_left.obj",), (0, 0, 0), CABINET),
        Part("mesh", ("wedge_right.obj",), (0, 0, 0), CABINET),
        span((-0.36, 0.16), (0.16, 0.18), (0.42, 0.6278), CABINET),
        span((-0.36, 0.16), (0.1285, 0.18), (0.6278, 0.6478), CABINET),
        Part("cylinder", (0.04, 0.016), (-0.12, -0.12, 0.448), RING),
    )
    return legs + top + apron + cabinet


def table_links() -> tuple[MovingLink, ...]:
    """Drawer, slider, switch and button, and the two lights."""
    drawer = (
        span((-0.04, 0.40), (-0.18, -0.16), (0.30, 0.40), DRAWER),
        span((-0.02, 0.38), (-0.16, 0.06), (0.32, 0.34), DRAWER),
        span((-0.02, 0.00), (-0.16, 0.06), (0.34, 0.39), DRAWER),
        span((0.36, 0.38), (-0.16, 0.06), (0.34, 0.39), DRAWER),
        span((0.00, 0.36), (0.04, 0.06), (0.34, 0.39), DRAWER),
        span((0.06, 0.30), (-0.26, -0.24), (0.34, 0.38), DRAWER_HANDLE),
        span((0.06, 0.08), (-0.24, -0.18), (0.35, 0.37), DRAWER_HANDLE),
        span((0.28, 0.30), (-0.24, -0.18), (0.35, 0.37), DRAWER_HANDLE),
    )
    slider = (
        slope_span((-0.10, 0.18), (0.01, 0.23), (0.0, 0.02), DOOR),
        slope_span((0.02, 0.06), (0.04, 0.20), (0.052, 0.072), SLIDER_HANDLE),
        slope_span((0.03, 0.05), (0.05, 0.07), (0.02, 0.052), SLIDER_HANDLE),
        slope_span((0.03, 0.05), (0.17, 0.19), (0.02, 0.052), SLIDER_HANDLE),
    )
    switch = (
        span((0.24, 0.36), (0.005, 0.032), (0.513, 0.545), SWITCH),
        Part("box", (0.02, 0.02, 0.046), (0.30, 0.0384, 0.5175), SWITCH, SLOPE),
    )
    button = (Part("cylinder", (0.032, 0.024), (-0.12, -0.12, 0.472), BUTTON),)
    led = (span((-0.20, -0.04), (0.14, 0.18), (0.6478, 0.6638), LED_COLOURS[0]),)
    bulb = (Part("sphere", (0.028,), (0.30, 0.16, 0.6696), BULB_COLOURS[0]),)
    return (
        MovingLink("drawer", (0.18, 0.0, 0.32), drawer, 4.23, (0, -1, 0), 0.22),
        MovingLink("slider", (-0.10, 0.075, 0.5353), slider, 1.54, (-1, 0, 0), 0.28),
        MovingLink("switch", (0.30, 0.0609, 0.4949), switch, 0.24, (0, math.cos(SLOPE), math.sin(SLOPE)), 0.088),
        MovingLink("button", (-0.12, -0.12, 0.472), button, 0.15, (0, 0, -1), 0.02),
        MovingLink("led", (-0.12, 0.16, 0.6558), led, 0.1),
        MovingLink("bulb", (0.30, 0.16, 0.6696), bulb, 0.1),
    )


def _geometry_xml(part: Part) -> str:
    if part.shape == "box":
        return '<box size="{:.5f} {:.5f} {:.5f}"/>'.format(*part.size)
    if part.shape == "cylinder":
        return '<cylinder radius="{:.5f}" length="{:.5f}"/>'.format(*part.size)
    if part.shape == "sphere":
        return f'<sphere radius="{part.size[0]:.5f}"/>'
    return f'<mesh filename="{part.size[0]}"/>'


def _part_xml(part: Part, frame: tuple[float, float, float]) -> list[str]:
    """Visual and collision elements of one part, relative to its link's frame."""
    xyz = " ".join(f"{c - f:.5f}" for c, f in zip(part.centre, frame, strict=True))
    colour = " ".join(f"{value:.3f}" for value in part.colour)
    origin, geometry = f'<origin xyz="{xyz}" rpy="{part.roll:.6f} 0 0"/>', f"<geometry>{_geometry_xml(part)}</geometry>"
    material = f'<material name="c{colour.replace(" ", "_")}"><color rgba="{colour} 1"/></material>'
    return [f"<visual>{origin}{geometry}{material}</visual>", f"<collision>{origin}{geometry}</collision>"]


def _link_xml(name: str, parts: tuple[Part, ...], frame: tuple[float, float, float], mass: float, friction: float) -> list[str]:
    inertia = " ".join(f'{axis}="{0.01 * mass:.5f}"' for axis in ("ixx", "iyy", "izz")) + ' ixy="0" ixz="0" iyz="0"'
    return [
        f'<link name="{name}">',
        f'<contact><lateral_friction value="{friction}"/></contact>',
        f'<inertial><mass value="{mass}"/><inertia {inertia}/></inertial>',
        *(line for part in parts for line in _part_xml(part, frame)),
        "</link>",
    ]


def _joint_xml(link: MovingLink) -> list[str]:
    kind = "fixed" if link.range_m is None else "prismatic"
    lines = [
        f'<joint name="{link.name}_joint" type="{kind}"><parent link="base"/><child link="{link.name}"/>',
        '<origin xyz="{} {} {}"/>'.format(*link.frame),
    ]
    if link.range_m is not None:
        lines.append('<axis xyz="{:.6f} {:.6f} {:.6f}"/>'.format(*link.axis))
        lines.append(f'<limit lower="0" upper="{link.range_m}" effort="100" velocity="2"/><dynamics damping="0" friction="0"/>')
    return [*lines, "</joint>"]


def table_urdf() -> str:
    """URDF of the table; one element per line, because PyBullet cannot parse a long URDF on one line."""
    lines = ['<?xml version="1.0"?>', '<robot name="play_table">', *_link_xml("base", table_parts(), (0, 0, 0), 0.0, 0.5)]
    for link in table_links():
        lines += _link_xml(link.name, link.parts, link.frame, link.mass, 0.5) + _joint_xml(link)
    return "\n".join([*lines, "</robot>", ""])


def block_urdf(name: str) -> str:
    """URDF of one free block."""
    size, colour = BLOCKS[name]
    inertia = [1.0 / 12 * (size[(i + 1) % 3] ** 2 + size[(i + 2) % 3] ** 2) for i in range(3)]
    lines = _link_xml("block", (Part("box", size, (0, 0, 0), colour),), (0, 0, 0), 1.0, 0.7)
    diagonal = " ".join(f'{axis}="{value:.6f}"' for axis, value in zip(("ixx", "iyy", "izz"), inertia, strict=True))
    lines[2] = f'<inertial><mass value="1"/><inertia {diagonal} ixy="0" ixz="0" iyz="0"/></inertial>'
    return "\n".join(['<?xml version="1.0"?>', f'<robot name="{name}">', *lines, "</robot>", ""])


def wedge_obj(x: tuple[float, float]) -> str:
    """Wavefront mesh of the cabinet's solid prism between two x: front on the 60 degree plane, back at y 0.18."""
    profile = [(0.0085, 0.42), (0.14, 0.6478), (0.18, 0.6478), (0.18, 0.42)]
    left, right = [(x[0], *p) for p in profile], [(x[1], *p) for p in profile]
    faces = [left, right[::-1]] + [[left[i], right[i], right[(i + 1) % 4], left[(i + 1) % 4]] for i in range(4)]
    lines, count = [], 0
    for a, b, c, d in faces:
        u, v = [b[i] - a[i] for i in range(3)], [c[i] - a[i] for i in range(3)]
        normal = (u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0])
        length = math.sqrt(sum(value**2 for value in normal))
        lines += ["v {:.5f} {:.5f} {:.5f}".format(*point) for point in (a, b, c, d)]
        lines += ["vn {:.5f} {:.5f} {:.5f}".format(*(value / length for value in normal))] * 4
        lines += ["vt 0 0"] * 4
        corners = [f"{count + i}/{count + i}/{count + i}" for i in (1, 2, 3, 4)]
        lines += ["f " + " ".join(corners[:3]), "f " + " ".join((corners[0], corners[2], corners[3]))]
        count += 4
    return "\n".join([*lines, ""])


def robot_urdf() -> str:
    """PyBullet's Panda with its collision meshes as visuals, longer fingers, and the links `tcp` and `gripper_cam`."""
    folder = Path(pybullet_data.getDataPath()) / "franka_panda"
    robot = ElementTree.parse(folder / "panda.urdf").getroot()
    for mesh in robot.iter("mesh"):
        mesh.set("filename", mesh.get("filename").replace("package://", f"{folder}/").replace("/visual/", "/collision/"))
    for link in robot.findall("link"):
        shade = next((shade for part, shade in ROBOT_SHADES.items() if part in link.get("name")), WHITE)
        if "finger" in link.get("name"):
            _replace_finger(link, 1.0 if "left" in link.get("name") else -1.0)
        for visual in link.findall("visual"):
            for material in visual.findall("material"):
                visual.remove(material)
            material = ElementTree.SubElement(visual, "material", name="shade_" + link.get("name"))
            ElementTree.SubElement(material, "color", rgba="{} {} {} 1".format(*shade))
    for name, xyz, rpy in (("tcp", "0 0 0.14", "0 0 0"), ("gripper_cam", "-0.1 0 0", "1.3 0 -1.57")):
        _add_frame(robot, name, xyz, rpy)
    ElementTree.indent(robot)
    return ElementTree.tostring(robot, encoding="unicode")


def _replace_finger(link: ElementTree.Element, side: float) -> None:
    """Two boxes in place of the finger mesh: a stem and a pad whose inner face is the closing plane."""
    for kind in ("visual", "collision"):
        for element in link.findall(kind):
            link.remove(element)
        for thickness, length, z in ((0.012, 0.050, 0.023), (0.014, 0.036, 0.066)):
            element = ElementTree.SubElement(link, kind)
            inner = 0.0 if z > 0.05 else 0.006
            ElementTree.SubElement(element, "origin", xyz=f"0 {side * (inner + thickness / 2):.4f} {z}", rpy="0 0 0")
            ElementTree.SubElement(ElementTree.SubElement(element, "geometry"), "box", size=f"0.022 {thickness} {length}")


def _add_frame(robot: ElementTree.Element, name: str, xyz: str, rpy: str) -> None:
    link = ElementTree.SubElement(robot, "link", name=name)
    inertial = ElementTree.SubElement(link, "inertial")
    ElementTree.SubElement(inertial, "mass", value="0.0")
    ElementTree.SubElement(inertial, "inertia", ixx="0", ixy="0", ixz="0", iyy="0", iyz="0", izz="0")
    joint = ElementTree.SubElement(robot, "joint", name=f"{name}_joint", type="fixed")
    ElementTree.SubElement(joint, "parent", link="panda_hand")
    ElementTree.SubElement(joint, "child", link=name)
    ElementTree.SubElement(joint, "origin", xyz=xyz, rpy=rpy)


def write_scene_files(folder: Path) -> None:
    """Write every URDF and mesh of the scene into `folder`."""
    (folder / "table.urdf").write_text(table_urdf())
    (folder / "robot.urdf").write_text(robot_urdf())
    (folder / "wedge_left.obj").write_text(wedge_obj((-0.44, -0.36)))
    (folder / "wedge_right.obj").write_text(wedge_obj((0.16, 0.44)))
    for name in BLOCKS:
        (folder / f"{name}.urdf").write_text(block_urdf(name))
    ground = (span((-3, 3), (-3, 3), (-0.1, 0), FLOOR), span((-0.44, -0.24), (-0.56, -0.36), (0, 0.24), STAND))
    text = ['<?xml version="1.0"?>', '<robot name="ground">', *_link_xml("base", ground, (0, 0, 0), 0.0, 0.5), "</robot>", ""]
    (folder / "ground.urdf").write_text("\n".join(text))


def load_scene(client: int, folder: Path) -> Scene:
    """Load the scene written to `folder` into an empty client and return its numbers; all joints are at 0."""
    pybullet.loadURDF(str(folder / "ground.urdf"), useFixedBase=True, physicsClientId=client)
    table = pybullet.loadURDF(str(folder / "table.urdf"), useFixedBase=True, physicsClientId=client)
    robot = pybullet.loadURDF(str(folder / "robot.urdf"), BASE_POSITION, useFixedBase=True, physicsClientId=client)
    heights = {name: 0.46 + 0.1 * i for i, name in enumerate(BLOCKS)}
    blocks = tuple(pybullet.loadURDF(str(folder / f"{n}.urdf"), (0, -0.1, z), physicsClientId=client) for n, z in heights.items())
    table_index, robot_index = _joint_index(table, client), _joint_index(robot, client)
    scene = Scene(
        table,
        robot,
        blocks,
        joints={name: table_index[f"{name}_joint"] for name in ("slider", "drawer", "button", "switch")},
        lights={name: table_index[f"{name}_joint"] for name in ("bulb", "led")},
        arm=tuple(robot_index[f"panda_joint{i}"] for i in range(1, 8)),
        fingers=(robot_index["panda_finger_joint1"], robot_index["panda_finger_joint2"]),
        tcp=robot_index["tcp_joint"],
        camera=robot_index["gripper_cam_joint"],
    )
    _set_dynamics(scene, client)
    return scene


def _joint_index(body: int, client: int) -> dict[str, int]:
    infos = (pybullet.getJointInfo(body, i, physicsClientId=client) for i in range(pybullet.getNumJoints(body, physicsClientId=client)))
    return {info[1].decode(): info[0] for info in infos}


def _set_dynamics(scene: Scene, client: int) -> None:
    """Motors of the table joints and the gear that keeps both fingers symmetric."""
    for name, index in scene.joints.items():
        if name == "button":
            mode = {"controlMode": pybullet.POSITION_CONTROL, "targetPosition": 0.0, "force": 4.0}
        else:
            mode = {"controlMode": pybullet.VELOCITY_CONTROL, "targetVelocity": 0.0, "force": 4.0}
        pybullet.setJointMotorControl2(scene.table, index, physicsClientId=client, **mode)
    left, right = scene.fingers
    gear = pybullet.createConstraint(
        scene.robot, left, scene.robot, right, pybullet.JOINT_GEAR, (1, 0, 0), (0, 0, 0), (0, 0, 0), physicsClientId=client
    )
    pybullet.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50, physicsClientId=client)
