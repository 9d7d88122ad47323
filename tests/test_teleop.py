"""Teleoperation: scripts, keys and joysticks drive the arm through the controller's gate, and let go when the operator does."""

import numpy as np
import pytest
from diwa_interfaces.msg import ActionChunk, EpisodeMark, ExecutedAction
from rclpy.parameter import Parameter
from ros_support import Probe, make_checkpoints, make_graph, private_graph
from sensor_msgs.msg import Joy

from diwa_core.contract import Contract
from diwa_core.errors import ConfigError, DiwaError
from diwa_core.sim.demos import demonstrate
from diwa_ros.messages import from_floats, reliable, to_ns
from diwa_ros.pilot import DISCARD, FAILURE, JOY_MAPS, SUCCESS, JoyMap, JoyPilot, KeyPilot, load_joy_map
from diwa_ros.scripted_play import LiveTable, demonstrate_live, play_live
from diwa_ros.teleop import Teleop
from diwa_ros.teleop_stream import OPERATOR

# -- keys --------------------------------------------------------------------------------------------------------------------------


def test_keys_move_only_while_they_repeat():
    pilot = KeyPilot(speed=0.5, hold_s=0.2)
    assert pilot.intent(0.0) is None
    pilot.press("w", 1.0)
    pilot.press("r", 1.1)
    np.testing.assert_allclose(pilot.intent(1.15), [0, 0.5, 0.5, 0, 0, 0, 1])
    np.testing.assert_allclose(pilot.intent(1.25), [0, 0, 0.5, 0, 0, 0, 1])
    assert pilot.intent(1.4) is None
    pilot.press("?", 2.0)
    assert pilot.intent(2.0) is None


def test_opposite_keys_cancel_and_a_held_gripper_key_is_one_wish():
    pilot = KeyPilot(speed=1.0)
    for press_s in (0.0, 0.05, 0.1, 0.15):
        pilot.press(" ", press_s)
    pilot.press("a", 0.15)
    pilot.press("d", 0.15)
    np.testing.assert_allclose(pilot.intent(0.2), [0, 0, 0, 0, 0, 0, -1])
    pilot.press(" ", 1.0)
    assert pilot.intent(1.1)[6] == 1


def test_keys_mark():
    pilot = KeyPilot()
    for key in "123":
        pilot.press(key, 0.0)
    assert pilot.pop_marks() == [SUCCESS, FAILURE, DISCARD] and pilot.pop_marks() == []
    assert pilot.intent(0.0) is None


# -- joysticks ---------------------------------------------------------------------------------------------------------------------


def joy(deadman: int, axes: dict[int, float] | None = None, **pressed: int) -> tuple[list[float], list[int]]:
    """Axes and buttons of the gamepad."""
    values, buttons = [0.0] * 8, [0] * 11
    for axis, value in (axes or {}).items():
        values[axis] = value
    for name, value in pressed.items():
        buttons[getattr(JOY_MAPS["gamepad"], name)] = value
    buttons[JOY_MAPS["gamepad"].deadman] = deadman
    return values, buttons


def test_a_joystick_moves_only_with_the_deadman_and_while_it_is_heard():
    pilot = JoyPilot(timeout_s=0.3)
    assert pilot.intent(0.0) is None
    pilot.take(*joy(0, {0: 1.0}), 0.0)
    assert pilot.intent(0.0) is None
    pilot.take(*joy(1, {0: 1.0, 1: 0.05, 4: -1.0}), 1.0)
    np.testing.assert_allclose(pilot.intent(1.2), [-1, 0, -1, 0, 0, 0, 1])  # 0.05 is within the dead zone
    assert pilot.intent(1.31) is None
    pilot.take(*joy(0), 1.4)
    assert pilot.intent(1.4) is None


def test_a_joystick_begins_slowly_behind_its_dead_zone():
    pilot = JoyPilot(JoyMap(dead_zone=0.2), speed=0.5)
    pilot.take(*joy(1, {1: 0.6}), 0.0)
    assert pilot.intent(0.0)[1] == pytest.approx(0.25)


def test_buttons_count_when_they_go_down():
    pilot = JoyPilot()
    pilot.take(*joy(1, success=1), 0.0)  # held since before the node came: no wish
    assert pilot.pop_marks() == []
    pilot.take(*joy(1), 0.1)
    for moment in (0.2, 0.3):
        pilot.take(*joy(1, success=1, gripper=1), moment)
    assert pilot.pop_marks() == [SUCCESS] and pilot.intent(0.3)[6] == -1


def test_unfit_devices_and_maps_are_refused(tmp_path):
    pilot = JoyPilot()
    with pytest.raises(ConfigError, match=r"at least 5 axes and 5 buttons, found 3 and 2"):
        pilot.take([0.0] * 3, [0] * 2, 0.0)
    with pytest.raises(ConfigError, match="finite"):
        pilot.take(*joy(1, {0: float("nan")}), 0.0)
    assert pilot.intent(0.0) is None
    with pytest.raises(ConfigError, match="dead-man"):
        JoyMap(deadman=-1)
    (tmp_path / "mine.yaml").write_text("deadman: 5\ngriper: 1\n")
    with pytest.raises(ConfigError, match="Did you mean 'gripper'"):
        load_joy_map(str(tmp_path / "mine.yaml"))
    assert load_joy_map("spacemouse").deadman == 0


# -- the node ----------------------------------------------------------------------------------------------------------------------


def test_the_node_answers_every_tick_while_the_deadman_is_held_then_ends_its_stream():
    with private_graph():
        probe = Probe()
        chunks, marks = probe.hear(ActionChunk, "action_chunk"), probe.hear(EpisodeMark, "episode_mark")
        ticks, stick = (
            probe.node.create_publisher(kind, topic, reliable(5)) for kind, topic in ((ExecutedAction, "executed_action"), (Joy, "joy"))
        )
        node = Teleop(
            parameter_overrides=[
                Parameter("joy_timeout_s", value=1.0),
                Parameter("skill", value="open_drawer"),
                Parameter("speed", value=1.0),
            ]
        )
        node.start()
        probe.add(node)
        probe.until(lambda: all(p.get_subscription_count() for p in (ticks, stick)) and node.mark_publisher.get_subscription_count() > 0)
        tick = ExecutedAction()
        tick.header.stamp.sec = 7

        def push(deadman: int, **pressed: int) -> None:
            axes, buttons = joy(deadman, {1: 1.0}, **pressed)
            stick.publish(Joy(axes=axes, buttons=buttons))
            ticks.publish(tick)
            node.tick()

        push(0)
        probe.spin(0.2)
        assert not chunks
        probe.until(lambda: push(1) or probe.spin(0.05) or bool(chunks))
        first = chunks[0]
        assert to_ns(first.header.stamp) == 7 * 10**9 + round(1e9 / 30) and first.horizon == 1 and first.skill == "open_drawer"
        assert (first.checkpoint_id, first.contract_id) == (OPERATOR, Contract().identity)
        np.testing.assert_allclose(from_floats(first.actions), [0, 1, 0, 0, 0, 0, 1])
        probe.until(lambda: push(0, success=1) or probe.spin(0.05) or (node.tick() or (chunks[-1].horizon == 0 and bool(marks))))
        assert marks[0].outcome == SUCCESS and marks[0].skill == "open_drawer"
        ends = len([chunk for chunk in chunks if chunk.horizon == 0])
        push(0)
        probe.spin(0.2)
        assert len([chunk for chunk in chunks if chunk.horizon == 0]) == ends  # let go once
        push(1)
        probe.until(lambda: push(1) or probe.spin(0.05) or chunks[-1].horizon == 1)
        node.stop()
        probe.until(lambda: chunks[-1].horizon == 0)
        probe.close()


def test_a_keyboard_needs_a_terminal():
    with private_graph():
        node = Teleop(parameter_overrides=[Parameter("source", value="keyboard")])
        with pytest.raises(DiwaError, match="expected a terminal, found none"):
            node.start()
        node.stop()


# -- scripts -----------------------------------------------------------------------------------------------------------------------


def test_a_scripted_demonstration_through_the_graph_is_the_one_without_ros(tmp_path):
    """Lock-step: what the controller reports as executed is what the same expert does on the table itself."""
    expected = demonstrate("turn_on_led", 0, seed=3, noise=0.0)
    checkpoints, nodes = make_checkpoints(tmp_path), ("calvin_bridge", "franka_controller")
    with private_graph(), make_graph(checkpoints, tmp_path, nodes, mode="lockstep", commands_from="scripted_play") as graph:
        probe = Probe()
        executed = probe.hear(ExecutedAction, "executed_action")
        with LiveTable(check=lambda: probe.executor.spin_once(timeout_sec=0)) as table:
            table.wait_ready()
            probe.until(lambda: len(executed) > 0, 60)  # the world at rest sends copies
            assert demonstrate_live(table, "turn_on_led", 0, 3, 0.0)
            assert len(table) == len(expected["actions"])
            assert table.scene_obs[5] == 1
            moves = {to_ns(m.header.stamp): m for m in executed if m.source == ExecutedAction.SOURCE_TELEOP}
            play_live(table, 20, seed=1)
        done = [np.array(message.action) for message in moves.values()]
        np.testing.assert_allclose(done, expected["actions"][: len(done)], atol=1e-5)
        assert len(done) >= len(expected["actions"]) - 1
        probe.close()
        assert graph.stop() == {"calvin_bridge": 0, "franka_controller": 0}
