"""The play table in MuJoCo: the same scene, moved by the same forces, seen by two cameras that agree with PyBullet's where things are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("franky_sim", reason="extra [franka]")

import mujoco
from franky_sim.mujoco_simulator import MujocoSimulator

from diwa_core.sim.mujoco_table import RayCameras, TableState, add_table
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.scene import BASE_POSITION, NEUTRAL_JOINTS
from diwa_core.sim.state import SceneState


@pytest.fixture(scope="module")
def simulator() -> Iterator[MujocoSimulator]:
    with MujocoSimulator() as simulator:
        simulator.add_robot(initial_q=NEUTRAL_JOINTS, initial_hand_width=0.08, position=BASE_POSITION)
        add_table(simulator)
        simulator.start()
        yield simulator


@pytest.fixture
def table(simulator: MujocoSimulator) -> TableState:
    table = TableState(simulator.model, simulator.data)
    table.place(SceneState())
    return table


def push(simulator: MujocoSimulator, joint: str, force_n: float, steps: int) -> float:
    """Push a joint of the table, the arm held still; returns where the joint ends."""
    address = simulator.model.joint(joint).dofadr[0]
    arm = [simulator.model.joint(f"robot0_fr3_joint{index}").dofadr[0] for index in range(1, 8)]
    for _ in range(steps):
        simulator.data.qvel[arm] = 0.0
        simulator.data.qfrc_applied[address] = force_n
        mujoco.mj_step(simulator.model, simulator.data)
        simulator.data.qpos[simulator.model.joint("robot0_fr3_joint1").qposadr[0] :][:7] = NEUTRAL_JOINTS
    simulator.data.qfrc_applied[address] = 0.0
    return float(simulator.data.qpos[simulator.model.joint(joint).qposadr[0]])


def test_a_start_state_is_what_scene_obs_says(table: TableState) -> None:
    state = SceneState(slider=0.2, drawer=0.1, switch=0.08, led=True)
    table.place(state)
    obs = table.scene_obs
    assert obs[[0, 1, 3]] == pytest.approx([0.2, 0.1, 0.08]) and list(obs[4:6]) == [1.0, 1.0]
    assert obs[6:].reshape(3, 6) == pytest.approx(state.blocks, abs=1e-6)


def test_the_drawer_needs_more_than_its_friction(simulator: MujocoSimulator, table: TableState) -> None:
    assert push(simulator, "drawer", 2.0, 200) < 0.002
    assert push(simulator, "drawer", 8.0, 400) > 0.02


def test_a_press_of_the_button_toggles_the_led_once(simulator: MujocoSimulator, table: TableState) -> None:
    assert push(simulator, "button", 12.0, 300) > 0.01
    table.update_lights()
    table.update_lights()
    assert table.led
    assert push(simulator, "button", 0.0, 500) < 0.005
    table.update_lights()
    assert table.led and not table.button_down


def test_the_bulb_follows_the_switch(simulator: MujocoSimulator, table: TableState) -> None:
    table.place(SceneState(switch=0.08))
    assert table.bulb
    table.place(SceneState(switch=0.0))
    table.update_lights()
    assert not table.bulb


@pytest.mark.parametrize("view", ["rgb_static", "rgb_gripper"])
def test_both_renderers_see_the_same_things_in_the_same_places(simulator: MujocoSimulator, table: TableState, view: str) -> None:
    positions = simulator.data.qpos.copy()
    address = simulator.model.joint("robot0_fr3_joint1").qposadr[0]
    positions[address : address + 7] = NEUTRAL_JOINTS
    cameras = RayCameras(simulator.model, 64)
    cameras.look(positions)
    seen = cameras.view(view).astype(float)
    assert not np.array_equal(seen, cameras.view(view))  # noise, as a real camera has
    env = PlayTable(64, (view,))
    expected = env.reset(options={"state": SceneState()})[0][view].astype(float)
    env.close()
    assert np.abs(seen - expected).mean() < 25
    assert np.corrcoef(seen.ravel(), expected.ravel())[0, 1] > 0.85
