"""One node at a time against everything bad that can reach it: a clear error or a held robot, a diagnostic that names it, and recovery."""

import subprocess
import sys
import time

import numpy as np
import pytest
from action_msgs.msg import GoalStatus
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ActionChunk, ControllerStatus, ExecutedAction, LatentState, PolicyStatus, RobotCommand, SimState
from diwa_interfaces.srv import LoadPolicy, ResetSim
from geometry_msgs.msg import PoseStamped
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.action import ActionClient
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from ros_support import Probe, make_checkpoints, private_graph
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger

from diwa_core.contract import Contract, ImageStream, hold_action
from diwa_core.errors import ConfigError, DiwaError
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.skills import start_states
from diwa_core.world_model.filter import LatentFilter
from diwa_ros.calvin_bridge import CalvinBridge
from diwa_ros.encoder import Encoder
from diwa_ros.franka_controller import FrankaController
from diwa_ros.images import make_image
from diwa_ros.messages import LATCHED, from_floats, reliable, to_duration, to_float32, to_float64, to_ns, to_pose, to_time
from diwa_ros.policy import ASK_AGAIN_FRAMES, Policy
from diwa_ros.teleop_stream import OPERATOR

STEP = 33_333_333
CONTRACT = Contract()
OK, ERROR = b"\x00", b"\x02"


@pytest.fixture(scope="module", autouse=True)
def ros():
    with private_graph():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def start():
    """Start a node of this process with parameters beside a probe; both end with the test."""
    probe, nodes = Probe(), []

    def start_node(node_class, **parameters):
        if node_class is FrankaController:
            parameters.setdefault("command_sources", probe.node.get_name())
        node = node_class(parameter_overrides=[Parameter(name, value=value) for name, value in parameters.items()])
        nodes.append(node)
        probe.add(node)
        node.start()
        return node, probe

    yield start_node
    for node in nodes:
        probe.executor.remove_node(node)
        node.stop()
    probe.close()


# -- encoder ---------------------------------------------------------------------------------------------------------------------------


class Robot:
    """Publishes complete ticks to the encoder; `change` replaces or removes a message of a tick."""

    def __init__(self, probe):
        self.rng = np.random.default_rng(0)
        node = probe.node
        self.publishers = {
            "rgb_static": node.create_publisher(Image, "camera/static/image_raw", reliable(5)),
            "rgb_gripper": node.create_publisher(Image, "camera/gripper/image_raw", reliable(5)),
            "joint_states": node.create_publisher(JointState, "joint_states", reliable(10)),
            "current_pose": node.create_publisher(PoseStamped, "current_pose", reliable(10)),
            "target_pose": node.create_publisher(PoseStamped, "target_pose", reliable(10)),
            "executed_action": node.create_publisher(ExecutedAction, "executed_action", reliable(10)),
        }
        probe.until(lambda: all(p.get_subscription_count() for p in self.publishers.values()))
        self.n = 1000

    def messages(self, n):
        stamp = n * STEP
        pose = np.array([0.01 * (n - 1000), -0.08, 0.5, 3, 0, 1.5])
        joints = JointState(name=[*CONTRACT.arm_joints, *CONTRACT.finger_joints], position=to_float64(np.full(9, 0.02)))
        executed = ExecutedAction(action=hold_action(1.0))
        joints.header.stamp, executed.header.stamp = to_time(stamp), to_time(stamp - STEP)
        images = {
            name: make_image(self.rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), stamp, name) for name in ("rgb_static", "rgb_gripper")
        }
        poses = {name: to_pose(pose, stamp, "world") for name in ("current_pose", "target_pose")}
        return {**images, "joint_states": joints, **poses, "executed_action": executed}

    def tick(self, n=None, **change):
        self.n = self.n + 1 if n is None else n
        for name, message in {**self.messages(self.n), **change}.items():
            if message is not None:
                self.publishers[name].publish(message)


@pytest.fixture
def encoder(start, checkpoints):
    node, probe = start(Encoder, world_model=str(checkpoints / "world_model"), stream_timeout_s=0.3, mode="lockstep", frozen_frames=3)
    latents = probe.hear(LatentState, "latent")
    probe.until(lambda: node.latent_publisher.get_subscription_count() > 0)
    robot = Robot(probe)
    robot.tick()
    probe.until(lambda: len(latents) == 1)
    return node, probe, latents, robot


def check_refused_then_recovered(encoder, check, words, **change):
    """One bad tick gives no latent and a diagnostic; the next good one is filtered again and the diagnostic clears."""
    _, probe, latents, robot = encoder
    robot.tick(**change)
    name = f"encoder: {check}"
    probe.until(lambda: probe.diagnostics.get(name, (OK, ""))[0] == ERROR)
    assert words in probe.diagnostics[name][1]
    assert len(latents) == 1
    robot.tick()
    probe.until(lambda: len(latents) == 2 and probe.diagnostics[name][0] == OK)


def test_encoder_refuses_another_size(encoder):
    image = make_image(np.zeros((48, 64, 3), np.uint8), 1001 * STEP, "x")
    image.header.stamp = to_time(1002 * STEP)
    words = "expected uint8 (64, 64, 3), found uint8 (48, 64, 3)"
    check_refused_then_recovered(encoder, "camera/static/image_raw", words, rgb_static=image)


def test_encoder_refuses_another_encoding(encoder):
    image = make_image(np.zeros((64, 64, 3), np.uint8), 1002 * STEP, "x")
    image.encoding = "16UC1"
    check_refused_then_recovered(encoder, "camera/gripper/image_raw", "found '16UC1'", rgb_gripper=image)


def test_encoder_refuses_nan_in_joint_states(encoder):
    joints = JointState(name=[*CONTRACT.arm_joints, *CONTRACT.finger_joints], position=[float("nan")] * 9)
    joints.header.stamp = to_time(1002 * STEP)
    check_refused_then_recovered(encoder, "joint_states", "expected finite values", joint_states=joints)


def test_encoder_refuses_joint_states_without_the_arm(encoder):
    joints = JointState(name=["panda_finger_joint1"], position=[0.0])
    joints.header.stamp = to_time(1002 * STEP)
    check_refused_then_recovered(encoder, "joint_states", "missing are panda_joint1", joint_states=joints)


def test_encoder_refuses_a_pose_that_is_none(encoder):
    pose = PoseStamped()
    pose.pose.orientation.w = 0.0
    pose.header.stamp = to_time(1002 * STEP)
    check_refused_then_recovered(encoder, "current_pose", "expected finite values", current_pose=pose)


def test_encoder_names_a_missing_camera(encoder):
    _, probe, latents, robot = encoder
    name = "encoder: camera/gripper/image_raw"
    robot.tick(rgb_gripper=None)
    probe.until(lambda: probe.diagnostics.get(name, (OK, ""))[0] == ERROR)
    assert "nothing new arrives" in probe.diagnostics[name][1] and len(latents) == 1
    robot.tick()
    probe.until(lambda: len(latents) == 2 and probe.diagnostics[name][0] == OK)


def test_encoder_names_a_frozen_camera(encoder):
    _, probe, latents, robot = encoder
    frozen = np.zeros((64, 64, 3), np.uint8)
    for n in range(1002, 1012):
        robot.tick(n, rgb_static=make_image(frozen, n * STEP, "x"))
        probe.spin(0.02)
    name = "encoder: camera/static/image_raw"
    probe.until(lambda: probe.diagnostics.get(name, (OK, ""))[0] == ERROR)
    assert "frozen" in probe.diagnostics[name][1]
    assert max(to_ns(latent.header.stamp) for latent in latents) < 1008 * STEP
    robot.tick()
    probe.until(lambda: to_ns(latents[-1].header.stamp) == 1012 * STEP and probe.diagnostics[name][0] == OK)


def test_encoder_refuses_time_that_jumps_backwards_until_reset(encoder):
    _, probe, latents, robot = encoder
    robot.tick(500)
    name = "encoder: camera/static/image_raw"
    probe.until(lambda: probe.diagnostics.get(name, (OK, ""))[0] == ERROR)
    assert "time went backwards" in probe.diagnostics[name][1] and len(latents) == 1
    assert probe.call(Trigger, "encoder/reset").success
    robot.tick(501)
    probe.until(lambda: len(latents) == 2 and probe.diagnostics[name][0] == OK)
    assert to_ns(latents[1].header.stamp) == 501 * STEP and latents[1].frames_since_reset == 1


def test_encoder_reset_filters_the_newest_frame_again_as_the_first(encoder):
    _, probe, latents, robot = encoder
    robot.tick()
    probe.until(lambda: len(latents) == 2)
    assert [latent.frames_since_reset for latent in latents] == [1, 2]
    assert probe.call(Trigger, "encoder/reset").success
    probe.until(lambda: len(latents) == 3)
    assert latents[2].frames_since_reset == 1 and latents[2].header.stamp == latents[1].header.stamp
    assert not np.array_equal(latents[2].feature, latents[1].feature)


def test_encoder_begins_anew_after_a_gap(encoder):
    _, probe, latents, robot = encoder
    robot.tick(1060)
    probe.until(lambda: len(latents) == 2)
    assert latents[1].frames_since_reset == 1


def test_encoder_without_checkpoint_says_what_it_expected(start, tmp_path):
    for path, words in (("", "parameter 'world_model'"), (str(tmp_path / "none"), "none")):
        with pytest.raises(DiwaError, match=words):
            start(Encoder, world_model=path)


# -- bridge and encoder: what is filtered is what the simulation shows -----------------------------------------------------------------


def test_encoder_sees_exactly_what_the_environment_observes(start, checkpoints):
    """Every latent of a driven bridge equals the filter's on env.observation(): no stream is mixed up, shifted or rounded."""
    _, probe = start(CalvinBridge, mode="lockstep")
    start(Encoder, world_model=str(checkpoints / "world_model"), mode="lockstep")
    start(FrankaController, mode="lockstep")
    latents, states = probe.hear(LatentState, "latent"), probe.hear(SimState, "sim/state")
    commands = probe.node.create_publisher(RobotCommand, "sim/command", 1)
    probe.until(lambda: latents and states)
    assert probe.call(ResetSim, "sim/reset", ResetSim.Request(skill="open_drawer", index=2)).success
    probe.until(lambda: states[-1].first_of_episode and latents[-1].header.stamp == states[-1].header.stamp)
    assert probe.call(Trigger, "encoder/reset").success
    probe.until(lambda: latents[-1].frames_since_reset == 1)

    env, latent_filter = PlayTable(), LatentFilter.load(checkpoints / "world_model")
    env.reset(options={"state": start_states("open_drawer", 3, 0)[2]})
    rng, action = np.random.default_rng(0), None
    for frame in range(1, 9):
        observation = env.observation()
        feature = latent_filter.update(observation, action)
        assert latents[-1].frames_since_reset == frame
        assert latents[-1].gripper == observation.robot_obs[14]
        np.testing.assert_allclose(from_floats(latents[-1].feature), feature, atol=1e-6)
        action = np.array([*rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0])], np.float32)
        env.apply(action)
        command = RobotCommand(action=action)
        command.header.stamp = states[-1].header.stamp
        commands.publish(command)
        probe.until(lambda n=frame + 1: latents[-1].frames_since_reset == n)
    np.testing.assert_array_equal(states[-1].scene_obs, env.scene_obs)
    env.close()


def test_bridge_refuses_a_bad_reset_and_keeps_the_scene(start):
    _, probe = start(CalvinBridge, mode="lockstep")
    states = probe.hear(SimState, "sim/state")
    probe.until(lambda: states)
    for request, words in (
        (ResetSim.Request(skill="fly"), "expected one of open_drawer"),
        (ResetSim.Request(skill="open_drawer", index=-1), "index and seed"),
        (ResetSim.Request(skill="open_drawer", split="holiday"), "split"),
        (ResetSim.Request(state=[0.0] * 5), "39 finite values"),
        (ResetSim.Request(state=[float("nan")] * 39), "39 finite values"),
    ):
        response = probe.call(ResetSim, "sim/reset", request)
        assert not response.success and words in response.message
    assert states[-1].episode == 0


def test_bridge_applies_each_tick_once_and_only_its_own_command(start):
    _, probe = start(CalvinBridge, mode="lockstep")
    states = probe.hear(SimState, "sim/state")
    commands = probe.node.create_publisher(RobotCommand, "sim/command", 1)
    probe.until(lambda: states and commands.get_subscription_count())
    first = states[-1]
    for stamp in (0, to_ns(first.header.stamp) + STEP, to_ns(first.header.stamp), to_ns(first.header.stamp)):
        command = RobotCommand(action=np.array([1, 0, 0, 0, 0, 0, 1], np.float32))
        command.header.stamp = to_time(stamp)
        commands.publish(command)
        probe.spin(0.1)
    assert states[-1].tick == first.tick + 1


# -- policy ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(start, checkpoints):
    """A policy node with a pretended encoder."""
    node, probe = start(Policy, policies=str(checkpoints / "policies"), latent_timeout_s=1.0)
    probe.resets = []

    def reset(request, response):
        probe.resets.append(request)
        return Trigger.Response(success=True)

    probe.node.create_service(Trigger, "encoder/reset", reset)
    client = ActionClient(probe.node, RunSkill, "run_skill")
    probe.until(lambda: client.server_is_ready() and node.reset_client.service_is_ready())
    latents = probe.node.create_publisher(LatentState, "latent", reliable(1))
    chunks, statuses = probe.hear(ActionChunk, "action_chunk"), probe.hear(PolicyStatus, "policy/status", LATCHED)
    probe.until(lambda: latents.get_subscription_count() and node.chunk_publisher.get_subscription_count() and statuses)

    def send_latent(frame, world_model_id=node.store.world_model_id, size=node.store.feature_size):
        latent = LatentState(world_model_id=world_model_id, frames_since_reset=frame, warmup_frames=4, gripper=-1.0)
        latent.header.stamp = to_time((1000 + frame) * STEP)
        latent.feature = to_float32(np.zeros(size))
        latents.publish(latent)

    yield node, probe, client, chunks, statuses, send_latent
    client.destroy()


def send_goal(probe, client, skill, max_steps=72, seed=0):
    future = client.send_goal_async(RunSkill.Goal(skill=skill, max_steps=max_steps, seed=seed))
    probe.until(future.done)
    return future.result()


def wait_result(probe, handle):
    future = handle.get_result_async()
    probe.until(future.done)
    return future.result()


def test_policy_that_missed_the_first_latents_asks_for_another_reset(policy):
    node, probe, client, chunks, _, send_latent = policy
    assert send_goal(probe, client, "open_drawer").accepted
    probe.until(lambda: len(probe.resets) == 1)
    for count in range(ASK_AGAIN_FRAMES):
        assert not chunks and len(probe.resets) == 1
        send_latent(10 + count)
        probe.until(lambda n=count: node.ignored == (n + 1) % ASK_AGAIN_FRAMES)
    probe.until(lambda: len(probe.resets) == 2)
    send_latent(1)
    probe.until(lambda: chunks)


def test_policy_runs_an_episode_by_the_rules(policy):
    _, probe, client, chunks, statuses, send_latent = policy
    handle = send_goal(probe, client, "open_drawer", max_steps=6)
    assert handle.accepted
    for frame in range(1, 11):
        count = len(chunks)
        send_latent(frame)
        probe.until(lambda c=count, f=frame: len(chunks) > c or f in (5, 6, 7, 9))
        probe.spin(0.02)
    result = wait_result(probe, handle)
    assert result.status == GoalStatus.STATUS_SUCCEEDED and result.result.completed
    assert (result.result.steps, result.result.chunks) == (6, 2)
    seen = [(to_ns(c.header.stamp) // STEP - 1000, c.horizon, c.hold) for c in chunks[:-1]]
    assert seen == [(1, 1, True), (2, 1, True), (3, 1, True), (4, 4, False), (8, 4, False)]
    assert chunks[-1].horizon == 0 and chunks[0].actions[6] == -1.0
    assert statuses[-1].state == PolicyStatus.STATE_IDLE


def test_policy_begins_although_the_first_latent_was_lost(policy):
    _, probe, client, chunks, _, send_latent = policy
    for frame in (50, 51):
        send_latent(frame)
        probe.spin(0.05)
    assert send_goal(probe, client, "open_drawer").accepted
    for frame in (52, 53):
        send_latent(frame)
        probe.spin(0.05)
    assert not chunks, "latents from before the reset"
    for frame in (2, 3, 3, 4, 5, 5):
        send_latent(frame)
        probe.spin(0.05)
    chunks = list({to_ns(c.header.stamp): c for c in chunks}.values())
    assert [(to_ns(c.header.stamp) // STEP - 1000, c.hold) for c in chunks] == [(2, True), (3, True), (4, False)]


def test_policy_repeats_itself_for_a_seed(policy):
    _, probe, client, chunks, _, send_latent = policy
    drawn = []
    for seed in (5, 5, 6):
        handle = send_goal(probe, client, "open_drawer", max_steps=1, seed=seed)
        del chunks[:]
        for frame in range(1, 6):
            send_latent(frame)
            probe.spin(0.05)
        wait_result(probe, handle)
        drawn.append(next(np.array(c.actions) for c in chunks if c.horizon and not c.hold))
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_policy_refuses_an_unknown_skill_naming_the_known_ones(policy):
    _, probe, client, _, statuses, _ = policy
    assert not send_goal(probe, client, "fold_laundry").accepted
    probe.until(lambda: "fold_laundry" in statuses[-1].detail)
    assert "expected one of open_drawer, turn_on_led" in statuses[-1].detail
    assert probe.diagnostics["policy: run_skill"][0] == ERROR


def test_policy_refuses_a_second_goal_and_cancels_at_once(policy):
    _, probe, client, chunks, statuses, send_latent = policy
    handle = send_goal(probe, client, "open_drawer")
    send_latent(1)
    probe.until(lambda: chunks)
    assert not send_goal(probe, client, "turn_on_led").accepted
    probe.until(lambda: "'open_drawer' running" in statuses[-1].detail)
    begin_s = time.monotonic()
    future = handle.cancel_goal_async()
    probe.until(future.done)
    assert wait_result(probe, handle).status == GoalStatus.STATUS_CANCELED
    assert time.monotonic() - begin_s < 0.5
    probe.until(lambda: chunks[-1].horizon == 0)
    assert send_goal(probe, client, "turn_on_led").accepted


@pytest.mark.parametrize("wrong, words", [({"world_model_id": "f" * 64}, "expected world model"), ({"size": 3}, "found 3")])
def test_policy_ends_a_run_on_latents_of_another_world_model(policy, wrong, words):
    _, probe, client, chunks, _, send_latent = policy
    handle = send_goal(probe, client, "open_drawer")
    send_latent(1, **wrong)
    result = wait_result(probe, handle)
    assert result.status == GoalStatus.STATUS_ABORTED and words in result.result.message
    assert not [chunk for chunk in chunks if chunk.horizon]


def test_policy_gives_up_when_latents_stop(policy):
    _, probe, client, chunks, _, send_latent = policy
    handle = send_goal(probe, client, "open_drawer")
    send_latent(1)
    result = wait_result(probe, handle)
    assert result.status == GoalStatus.STATUS_ABORTED and "found none" in result.result.message
    assert chunks[-1].horizon == 0


def test_policy_load_refuses_by_gate_and_changes_nothing(policy, checkpoints, tmp_path):
    node, probe, *_ = policy
    before = dict(node.store.policies)
    smaller = (ImageStream("rgb_static", "camera/static/image_raw", 48, 48), CONTRACT.images[1])
    foreign = make_checkpoints(tmp_path / "foreign", Contract(images=smaller), seed=0)
    other = make_checkpoints(tmp_path / "other", seed=1)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (checkpoints / "policies" / "open_drawer").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:-1] if file.suffix == ".safetensors" else file.read_bytes())
    for path, skill, gate, found in (
        (tmp_path / "missing", "", "files", "missing"),
        (damaged, "", "files", "damaged"),
        (checkpoints / "world_model", "", "files", "world_model"),
        (foreign / "policies" / "open_drawer", "", "contract", "48"),
        (other / "policies" / "open_drawer", "", "world_model", ""),
        (checkpoints / "policies" / "open_drawer", "turn_on_led", "skill", "open_drawer"),
    ):
        response = probe.call(LoadPolicy, "policy/load", LoadPolicy.Request(path=str(path), skill=skill))
        assert (response.success, response.gate) == (False, gate), response.message
        assert response.expected and found in response.found and gate in response.message
        assert node.store.policies == before
    probe.until(lambda: probe.diagnostics["policy: policy/load"][0] == ERROR)
    response = probe.call(LoadPolicy, "policy/load", LoadPolicy.Request(path=str(checkpoints / "policies" / "open_drawer")))
    assert response.success and response.checkpoint_id == node.store.policies["open_drawer"].identity


def test_policies_of_different_contracts_do_not_start_together(start, checkpoints, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    other = make_checkpoints(tmp_path / "other", Contract(name="other_table"), seed=0)
    (folder / "a").symlink_to(checkpoints / "policies" / "open_drawer")
    (folder / "b").symlink_to(other / "policies" / "turn_on_led")
    with pytest.raises(DiwaError, match=r"gate 'contract'.*other_table"):
        start(Policy, policies=str(folder))


# -- controller ------------------------------------------------------------------------------------------------------------------------


class Simulation:
    """Pretended bridge and policy beside a real controller."""

    def __init__(self, node, probe):
        self.node, self.probe, self.n = node, probe, 1000
        self.states = probe.node.create_publisher(SimState, "sim/state", reliable(10))
        self.chunks = probe.node.create_publisher(ActionChunk, "action_chunk", reliable(5))
        self.commands = probe.hear(RobotCommand, "sim/command")
        self.executed = probe.hear(ExecutedAction, "executed_action")
        self.statuses = probe.hear(ControllerStatus, "controller/status", LATCHED)
        probe.until(
            lambda: self.states.get_subscription_count() and self.chunks.get_subscription_count() and node.count_subscribers("sim/command")
        )
        self.tick()
        probe.until(lambda: self.state == "IDLE")

    @property
    def state(self):
        return self.statuses[-1].state_name if self.statuses else ""

    def tick(self, action=None, first=False, late=0.0):
        self.n += 1
        state = SimState(tick=self.n, applied_action=hold_action(1.0) if action is None else action, first_of_episode=first)
        state.header.stamp, state.applied_is_hold = to_time(round((self.n + late) * STEP)), action is None
        self.states.publish(state)

    def chunk(self, actions=None, contract_id=CONTRACT.identity, n=None, checkpoint_id="p" * 64, shape=None):
        actions = np.full((4, 7), 0.5, np.float32) if actions is None else actions
        message = ActionChunk(checkpoint_id=checkpoint_id, contract_id=contract_id, step_period=to_duration(STEP))
        message.header.stamp = to_time((self.n if n is None else n) * STEP)
        message.horizon, message.action_dim = shape or actions.shape
        message.actions = to_float32(actions)
        self.chunks.publish(message)


@pytest.fixture
def simulation(start):
    return Simulation(*start(FrankaController, hold_after_s=0.2, stop_after_s=0.6, robot_timeout_s=5.0))


def test_controller_answers_each_tick_once_with_clamped_actions(simulation):
    probe = simulation.probe
    simulation.chunk(np.array([[3, 0, 0, 0, 0, 0, 0.2]] * 4, np.float32))
    probe.until(lambda: len(simulation.commands) == 1)
    np.testing.assert_array_equal(simulation.commands[0].action, [1, 0, 0, 0, 0, 0, 1])
    simulation.tick(action=np.array([1, 0, 0, 0, 0, 0, 1], np.float32))
    probe.until(lambda: len(simulation.commands) == 2 and simulation.executed[-1].source == ExecutedAction.SOURCE_POLICY)
    executed = simulation.executed[-1]
    assert to_ns(executed.header.stamp) == (simulation.n - 1) * STEP and executed.checkpoint_id == "p" * 64
    assert to_ns(executed.observation_stamp) == (simulation.n - 1) * STEP and executed.clamps == ExecutedAction.CLAMP_RANGE
    assert simulation.state == "ACTIVE"


def test_what_a_late_tick_executed_is_still_the_policys(simulation):
    simulation.chunk()
    simulation.probe.until(lambda: len(simulation.commands) == 1)
    simulation.tick(action=np.full(7, 0.5, np.float32), late=0.4)
    simulation.probe.until(lambda: to_ns(simulation.executed[-1].header.stamp) > (simulation.n - 1) * STEP)
    assert simulation.executed[-1].source == ExecutedAction.SOURCE_POLICY


def test_what_the_operator_did_is_told_from_what_a_policy_did(simulation):
    probe = simulation.probe
    simulation.chunk(checkpoint_id=OPERATOR)
    probe.until(lambda: len(simulation.commands) == 1)
    simulation.tick(action=np.full(7, 0.5, np.float32))
    probe.until(lambda: simulation.executed[-1].source == ExecutedAction.SOURCE_TELEOP)
    executed = simulation.executed[-1]
    assert not executed.checkpoint_id and to_ns(executed.observation_stamp) == (simulation.n - 1) * STEP
    assert all(e.source in (ExecutedAction.SOURCE_HOLD, ExecutedAction.SOURCE_TELEOP) for e in simulation.executed)


@pytest.mark.parametrize(
    "bad, counter",
    [
        ({"actions": np.full((4, 7), np.nan, np.float32)}, "dropped_nonfinite"),
        ({"contract_id": "another"}, "dropped_foreign"),
        ({"n": 900}, "dropped_stale"),
        ({"shape": (5, 7)}, "dropped_shape"),
        ({"actions": np.zeros((4, 6), np.float32)}, "dropped_shape"),
    ],
)
def test_controller_drops_a_bad_chunk_and_the_arm_rests(simulation, bad, counter):
    probe = simulation.probe
    simulation.chunk(**bad)
    probe.until(lambda: "dropped: " + counter.split("_")[1] in probe.diagnostics.get("franka_controller: action_chunk", (OK, ""))[1])
    probe.until(lambda: getattr(simulation.statuses[-1], counter) == 1, 3.0)
    assert not simulation.commands and simulation.state == "IDLE"
    simulation.chunk()
    probe.until(lambda: simulation.commands and probe.diagnostics["franka_controller: action_chunk"][0] == OK)


def test_controller_follows_one_checkpoint_until_its_stream_ends(simulation):
    probe = simulation.probe
    simulation.chunk()
    probe.until(lambda: len(simulation.commands) == 1)
    simulation.chunk(np.full((4, 7), -0.5, np.float32), checkpoint_id="q" * 64)
    simulation.tick()
    probe.until(lambda: len(simulation.commands) == 2)
    assert simulation.commands[1].action[0] == 0.5
    simulation.chunk(np.zeros((0, 7), np.float32))
    probe.until(lambda: simulation.state == "IDLE")
    simulation.tick()
    simulation.chunk(np.full((4, 7), -0.5, np.float32), checkpoint_id="q" * 64)
    probe.until(lambda: len(simulation.commands) == 3)
    assert simulation.commands[2].action[0] == -0.5


def test_controller_answers_a_tick_once_however_often_it_or_the_chunk_comes(simulation):
    probe = simulation.probe
    for _ in range(3):
        simulation.chunk()
        simulation.n -= 1
        simulation.tick()
        probe.spin(0.05)
    assert len(simulation.commands) == 1 and len(simulation.executed) == 1


def test_controller_forgets_the_plan_when_the_scene_is_reset(simulation):
    """The rest of a chunk of the last episode must not move the arm of the next one."""
    probe = simulation.probe
    simulation.chunk()
    probe.until(lambda: len(simulation.commands) == 1)
    simulation.tick(first=True)
    probe.until(lambda: simulation.state == "IDLE")
    simulation.tick()
    probe.spin(0.1)
    assert len(simulation.commands) == 1


def test_controller_holds_on_silence_stops_and_resumes_when_asked(simulation):
    probe = simulation.probe
    simulation.chunk()
    probe.until(lambda: simulation.state == "ACTIVE")
    begin_s = time.monotonic()
    probe.until(lambda: simulation.state == "HOLD")
    assert 0.15 < time.monotonic() - begin_s < 0.35
    probe.until(lambda: simulation.state == "FAULT")
    count = len(simulation.commands)
    for _ in range(3):
        simulation.tick()
        simulation.chunk()
        probe.spin(0.05)
    assert len(simulation.commands) == count and simulation.state == "FAULT"
    assert probe.diagnostics["franka_controller: state"][0] == ERROR
    assert probe.call(Trigger, "controller/resume").success
    assert not probe.call(Trigger, "controller/resume").success
    simulation.chunk()
    probe.until(lambda: len(simulation.commands) > count)


def test_controller_stop_wins_over_chunks(simulation):
    probe = simulation.probe
    assert probe.call(Trigger, "controller/stop").success
    simulation.chunk()
    probe.spin(0.2)
    assert not simulation.commands and simulation.state == "USER_STOPPED"
    assert probe.call(Trigger, "controller/resume").success
    simulation.chunk()
    probe.until(lambda: simulation.commands)


def test_controller_notices_a_silent_robot(start):
    node, probe = start(FrankaController, robot_timeout_s=0.3)
    simulation = Simulation(node, probe)
    probe.until(lambda: simulation.state == "DISCONNECTED")
    assert "silent" in simulation.statuses[-1].reason
    simulation.tick()
    probe.until(lambda: simulation.state == "IDLE")


def test_controller_that_is_not_enabled_moves_nothing(start):
    simulation = Simulation(*start(FrankaController, start_enabled=False))
    simulation.chunk()
    simulation.probe.spin(0.2)
    assert not simulation.commands
    assert simulation.probe.call(Trigger, "controller/enable").success
    simulation.chunk()
    simulation.probe.until(lambda: simulation.commands)


def test_dry_run_integrates_its_target_and_reports_what_it_executed(start):
    node, probe = start(FrankaController, backend="dry_run")
    poses, executed = probe.hear(PoseStamped, "target_pose"), probe.hear(ExecutedAction, "executed_action")
    chunks = probe.node.create_publisher(ActionChunk, "action_chunk", 5)
    probe.until(lambda: len(poses) > 2 and chunks.get_subscription_count())
    start_x = poses[-1].pose.position.x
    chunk = ActionChunk(checkpoint_id="p", contract_id=CONTRACT.identity, step_period=to_duration(STEP), horizon=4, action_dim=7)
    chunk.header.stamp = node.get_clock().now().to_msg()
    chunk.actions = to_float32(np.array([[1, 0, 0, 0, 0, 0, 1]] * 4))
    chunks.publish(chunk)
    probe.until(lambda: sum(e.source == ExecutedAction.SOURCE_POLICY for e in executed) >= 3)
    probe.until(lambda: executed[-1].source == ExecutedAction.SOURCE_HOLD)
    moved = sum(e.source == ExecutedAction.SOURCE_POLICY for e in executed)
    assert abs(poses[-1].pose.position.x - start_x - moved * CONTRACT.max_delta_m) < 1e-6


def test_dry_run_on_live_cameras_gives_latents(start, checkpoints):
    """Best-effort cameras on their own clock and a controller without a robot: the encoder filters."""
    start(FrankaController, backend="dry_run")
    encoder, probe = start(Encoder, world_model=str(checkpoints / "world_model"), camera_qos="sensor_data", frozen_motion_m=0.0)
    latents, rng = probe.hear(LatentState, "latent"), np.random.default_rng(0)
    cameras = {stream.name: probe.node.create_publisher(Image, stream.topic, qos_profile_sensor_data) for stream in CONTRACT.images}
    probe.until(lambda: all(camera.get_subscription_count() for camera in cameras.values()))

    def take_pictures():
        stamp = encoder.get_clock().now().nanoseconds
        for name, camera in cameras.items():
            camera.publish(make_image(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), stamp, name))

    probe.node.create_timer(1 / 30, take_pictures)
    probe.until(lambda: len(latents) > 20)
    assert latents[-1].frames_since_reset > 15


# -- parameters ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"hold_after_s": 99.0}, "parameter 'hold_after_s': expected 0.05 to 2, found 99.0"),
        ({"hold_after_s": float("nan")}, "parameter 'hold_after_s': expected 0.05 to 2, found nan"),
        ({"hold_after_s": 1}, "expected float, found 1"),
        ({"backend": "frankly"}, "expected one of calvin, dry_run, franky, found 'frankly'"),
        ({"mode": "lock_step"}, "Did you mean 'lockstep'"),
    ],
)
def test_parameter_out_of_range_at_start_is_refused(parameters, words):
    with pytest.raises(ConfigError, match=words):
        FrankaController(parameter_overrides=[Parameter(name, value=value) for name, value in parameters.items()])


@pytest.mark.parametrize("value, words", [(99.0, "hold_after_s"), (0.5, "read when the node is configured")])
def test_parameter_change_while_running_is_refused_with_a_reason(start, value, words):
    _, probe = start(FrankaController)
    wanted = ParameterMessage(name="hold_after_s", value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value))
    response = probe.call(SetParameters, "franka_controller/set_parameters", SetParameters.Request(parameters=[wanted]))
    assert not response.results[0].successful and words in response.results[0].reason


@pytest.mark.parametrize("node_class", [CalvinBridge, Encoder, Policy, FrankaController])
def test_lifecycle_can_go_round_and_leaves_nothing_behind(start, checkpoints, node_class):
    paths = {Encoder: {"world_model": str(checkpoints / "world_model")}, Policy: {"policies": str(checkpoints / "policies")}}
    node, probe = start(node_class, **paths.get(node_class, {}))

    def count_entities():
        return len(list(node.publishers)), len(list(node.subscriptions)), len(list(node.timers)), len(list(node.services))

    before = count_entities()
    for label in ("deactivate", "activate", "deactivate", "cleanup", "configure", "activate"):
        request = ChangeState.Request()
        request.transition.label = label
        assert probe.call(ChangeState, f"{node.get_name()}/change_state", request).success, label
        assert node.active == (label == "activate")
    assert count_entities() == before
    probe.spin(0.1)


def test_process_that_cannot_start_says_why_and_fails(tmp_path):
    command = [sys.executable, "-m", "diwa_ros.encoder", "--ros-args", "-p", f"world_model:={tmp_path}/nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "encoder cannot configure" in done.stderr and "nothing" in done.stderr
