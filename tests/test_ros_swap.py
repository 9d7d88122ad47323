"""Hot swap on the nodes: gates, takeover at a chunk border, shadow, rollback, both models at the same frame, and the races."""

import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ActionChunk, ControllerStatus, LatentState, PolicyHistory, PolicyStatus, ShadowReport, SwapEvent
from diwa_interfaces.srv import LoadPolicy
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.action import ActionClient
from rclpy.parameter import Parameter
from ros_support import Probe, make_checkpoints, private_graph
from std_srvs.srv import Trigger

import diwa_ros.swapper
from diwa_core.contract import Contract
from diwa_core.policy.diffusion import DiffusionPolicy
from diwa_core.policy.store import load_policy, save_policy
from diwa_ros.calvin_bridge import CalvinBridge
from diwa_ros.encoder import Encoder
from diwa_ros.franka_controller import FrankaController
from diwa_ros.messages import LATCHED, from_floats, reliable, to_float32, to_ns, to_time
from diwa_ros.policy import Policy

STEP = 33_333_333
SKILL = "open_drawer"
SLOW_MS = 1000.0  # a latency budget that a busy machine keeps, too


@pytest.fixture(scope="module", autouse=True)
def ros():
    with private_graph():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two world models with policies of their own; `near` and `far` are other policies of SKILL on the first one."""
    folder = tmp_path_factory.mktemp("swap")
    make_checkpoints(folder / "first", seed=0)
    make_checkpoints(folder / "second", seed=1)
    base, origin = load_policy(folder / "first" / "policies" / SKILL)
    for name, shift in (("near", 0.001), ("far", 0.3)):
        policy = DiffusionPolicy(base.config).requires_grad_(False)
        policy.load_state_dict(base.state_dict())
        for weight in policy.base.parameters():
            weight += shift
        save_policy(folder / name, policy, Contract(), SKILL, origin.lineage["world_model"], {})
    return folder


class Rig:
    """A policy node whose encoder and controller are pretended: latents come when the test says so."""

    def __init__(self, probe, node):
        self.probe, self.node = probe, node
        probe.node.create_service(Trigger, "encoder/reset", lambda request, response: Trigger.Response(success=True))
        self.client = ActionClient(probe.node, RunSkill, "run_skill")
        self.latents = probe.node.create_publisher(LatentState, "latent", reliable(1))
        self.controller = probe.node.create_publisher(ControllerStatus, "controller/status", LATCHED)
        self.chunks = probe.hear(ActionChunk, "action_chunk")
        self.shadows = probe.hear(ShadowReport, "policy/shadow")
        self.histories = probe.hear(PolicyHistory, "policy/history", LATCHED)
        self.statuses = probe.hear(PolicyStatus, "policy/status", LATCHED)
        self.loader = probe.node.create_client(LoadPolicy, "policy/load")
        probe.until(lambda: self.client.server_is_ready() and self.loader.service_is_ready() and self.latents.get_subscription_count())
        probe.until(lambda: node.chunk_publisher.get_subscription_count() and self.controller.get_subscription_count())
        probe.until(lambda: node.reset_client.service_is_ready() and node.swapper.shadow_publisher.get_subscription_count())
        self.frame, self.rng = 0, np.random.default_rng(0)

    @property
    def running(self):
        return self.node.store.policies[SKILL].identity

    def begin_run(self, frames=4):
        """A run whose first chunk, on frame 4, has been published."""
        goal = self.client.send_goal_async(RunSkill.Goal(skill=SKILL, max_steps=10_000))
        self.probe.until(goal.done)
        self.frame = 0
        for _ in range(frames):
            self.tick()
        self.probe.until(lambda: self.node.last_chunk is not None and not self.node.last_chunk.hold)
        return goal.result()

    def tick(self, count=1):
        """Send latents and wait until the node has taken each."""
        for _ in range(count):
            self.frame += 1
            latent = LatentState(world_model_id=self.node.store.world_model_id, frames_since_reset=self.frame, warmup_frames=4, gripper=1.0)
            latent.header.stamp = to_time((1000 + self.frame) * STEP)
            latent.feature = to_float32(self.rng.normal(size=self.node.store.feature_size))
            self.latents.publish(latent)
            self.probe.until(
                lambda sent=latent: self.node.last_latent is not None and self.node.last_latent.header.stamp == sent.header.stamp
            )

    def ask(self, path, **fields):
        """Call policy/load without waiting for its answer."""
        return self.loader.call_async(LoadPolicy.Request(path=str(path), **fields))

    def load(self, path, **fields):
        future = self.ask(path, **fields)
        self.probe.until(future.done, 20)
        return future.result()

    def arm(self, path, **fields):
        """Ask for a swap and wait until it only waits for the chunk border."""
        future = self.ask(path, **fields)
        self.probe.until(lambda: self.node.swapper.armed is not None or future.done(), 20)
        assert not future.done(), future.result().message
        return future

    def report(self, state, reason="no action chunk for 0.3 s"):
        names = {ControllerStatus.ACTIVE: "ACTIVE", ControllerStatus.HOLD: "HOLD", ControllerStatus.FAULT: "FAULT"}
        self.controller.publish(ControllerStatus(state=state, state_name=names[state], reason=reason))
        self.probe.until(lambda: self.node.swapper.controller_state == state)

    def sent(self, since=0):
        """(frame, checkpoint) of the chunks so far, without warm-up and ends of streams."""
        return [(round(to_ns(c.header.stamp) / STEP) - 1000, c.checkpoint_id) for c in self.chunks[since:] if c.horizon and not c.hold]

    def events(self):
        return [event.event for event in self.histories[-1].events] if self.histories else []


@pytest.fixture
def make_rig(checkpoints):
    probe, nodes = Probe(), []

    def make(**parameters):
        defaults = {"policies": str(checkpoints / "first" / "policies"), "latency_budget_ms": SLOW_MS, "latent_timeout_s": 60.0}
        overrides = [Parameter(name, value=value) for name, value in (defaults | parameters).items()]
        nodes.append(Policy(parameter_overrides=overrides))
        probe.add(nodes[-1])
        nodes[-1].start()
        return Rig(probe, nodes[-1])

    yield make
    for node in nodes:
        probe.executor.remove_node(node)
        node.stop()
    probe.close()


@pytest.fixture
def rig(make_rig):
    return make_rig()


# -- takeover --------------------------------------------------------------------------------------------------------------------------


def test_takeover_at_the_chunk_border_blended_and_named_from_the_first_new_chunk(rig, checkpoints):
    old = rig.running
    rig.begin_run()
    rig.tick(5)  # chunks on frames 4 and 8
    future = rig.arm(checkpoints / "near")
    rig.tick(2)
    assert rig.running == old and not future.done(), "frame 11 is inside a chunk"
    rig.tick(6)
    rig.probe.until(future.done)
    new, answer = rig.running, future.result()
    assert answer.success and answer.checkpoint_id == new != old
    assert 0 < answer.latency_ms < SLOW_MS and 0 < answer.action_difference < 0.5
    rig.probe.until(lambda: len(rig.sent()) == 4)
    assert rig.sent() == [(4, old), (8, old), (12, new), (16, new)]
    chunks = [c for c in rig.chunks if c.horizon and not c.hold]
    before, first = (from_floats(c.actions).reshape(4, 7) for c in chunks[1:3])
    drawn = rig.node.store.policies[SKILL]  # what it would have drawn is blended with what the arm did last
    assert np.abs(first[0, :6] - before[3, :6].clip(-1, 1)).max() <= 2 / 4 + 1e-6 and drawn.identity == new
    event = rig.histories[-1].events[-1]
    assert (event.event, event.checkpoint_id, event.previous_id) == (SwapEvent.TOOK_OVER, new, old)
    assert to_ns(event.header.stamp) == 1012 * STEP
    rig.probe.until(lambda: rig.statuses[-1].checkpoint_id == new and rig.statuses[-1].on_probation)


def test_without_a_run_it_takes_over_at_once_and_a_run_ends_the_wait(rig, checkpoints):
    old = rig.running
    assert rig.load(checkpoints / "near").success and rig.running != old
    handle = rig.begin_run()
    future = rig.arm(checkpoints / "first" / "policies" / SKILL)
    handle.cancel_goal_async()
    rig.probe.until(future.done)
    assert future.result().success and rig.running == old
    rig.begin_run()
    assert rig.load(checkpoints / "first" / "policies" / "turn_on_led").success, "another skill than the running one"


def test_parameter_and_late_joiner(rig, checkpoints):
    wanted = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=str(checkpoints / "near"))
    request = SetParameters.Request(parameters=[ParameterMessage(name="checkpoint", value=wanted)])
    old = rig.running
    assert rig.probe.call(SetParameters, "policy/set_parameters", request).results[0].successful
    rig.probe.until(lambda: rig.running != old, 20)
    late = rig.probe.hear(PolicyHistory, "policy/history", LATCHED)
    rig.probe.until(lambda: late and late[-1].events)
    assert late[-1].events[-1].checkpoint_id == rig.running


def test_parameter_at_start_is_loaded_on_top(make_rig, checkpoints):
    assert make_rig(checkpoint=str(checkpoints / "near")).running == load_policy(checkpoints / "near")[1].identity


@pytest.mark.timeout(300)
def test_command_line_swaps_lists_and_rolls_back(rig, checkpoints):
    """`diwa swap` as a process beside the graph: exit codes, refusals as one sentence."""
    old = rig.running

    def run_swap(*words):
        command = [sys.executable, "-m", "diwa_core.cli.main", "swap", *map(str, words)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "200"}
        )
        rig.probe.until(lambda: process.poll() is not None, 100)
        return process.returncode, process.communicate()[0]

    code, output = run_swap(checkpoints / "near")
    assert code == 0 and rig.running != old and rig.running[:12] in output
    code, output = run_swap("--history")
    assert code == 0 and "took_over" in output and old[:12] in output
    code, output = run_swap(checkpoints / "missing")
    assert code == 2 and "gate 'files'" in output and "Traceback" not in output
    code, output = run_swap("--rollback")
    assert code == 0 and rig.running == old, output


# -- gates -----------------------------------------------------------------------------------------------------------------------------


def check_refused(rig, answer, gate, words=""):
    assert (answer.success, answer.gate) == (False, gate), answer.message
    assert answer.expected and answer.found and gate in answer.message and words in answer.message
    assert answer.checkpoint_id in (rig.running, "")  # empty: the file does not even say its skill, and none runs
    rig.probe.until(lambda: rig.histories and rig.histories[-1].events[-1].gate == gate)
    assert rig.histories[-1].events[-1].event == SwapEvent.REFUSED and not rig.node.swapper.job


def test_actions_gate_on_the_last_latents(rig, checkpoints):
    before = dict(rig.node.store.policies)
    unmeasured = rig.load(checkpoints / "far", max_action_difference=0.01)
    assert unmeasured.success and np.isnan(unmeasured.action_difference), "no latents, nothing to compare on"
    assert rig.load(checkpoints / "first" / "policies" / SKILL).success
    rig.begin_run()
    rig.tick(3)
    check_refused(rig, rig.load(checkpoints / "far", max_action_difference=0.01), "actions", "at most 0.01")
    check_refused(rig, rig.load(checkpoints / "near", max_action_difference=3.0), "actions", "to 2")
    assert {skill: one.identity for skill, one in rig.node.store.policies.items()} == {s: one.identity for s, one in before.items()}
    future = rig.arm(checkpoints / "far", max_action_difference=2.0)
    rig.tick(4)
    rig.probe.until(future.done)
    assert future.result().success


def test_latency_and_statistics_gates(make_rig, checkpoints, tmp_path):
    rig = make_rig(latency_budget_ms=0.1)
    check_refused(rig, rig.load(checkpoints / "near"), "latency", "at most 0.1 ms")
    policy, origin = load_policy(checkpoints / "near")
    policy.feature_mean += 1e3
    save_policy(tmp_path / "shifted", policy, Contract(), SKILL, origin.lineage["world_model"], {})
    rig.begin_run()
    rig.tick(3)
    check_refused(rig, rig.load(tmp_path / "shifted"), "statistics", "found 100%")


# -- shadow ----------------------------------------------------------------------------------------------------------------------------


def test_shadow_computes_and_reports_and_nothing_of_it_is_sent(rig, checkpoints):
    old, shadow = rig.running, load_policy(checkpoints / "far")[1].identity
    answer = rig.load(checkpoints / "far", shadow=True, max_action_difference=0.01)
    assert answer.success and answer.checkpoint_id == old
    rig.begin_run()
    for border in range(3):
        rig.tick(4)
        rig.probe.until(lambda n=border: len(rig.shadows) > n)
    rig.probe.until(lambda: rig.statuses[-1].shadow_id == shadow, 5)
    report = rig.shadows[-1]
    assert (report.checkpoint_id, report.running_id, report.horizon, report.action_dim) == (shadow, old, 4, 7)
    assert report.chunks + report.skipped >= 3 and 0 < report.difference <= 2 and 0 < report.mean_difference <= 2
    chunk = next(c for c in rig.chunks if c.header.stamp == report.header.stamp)
    assert (
        abs(np.abs(np.clip(chunk.actions, -1, 1) - np.clip(report.actions, -1, 1)).reshape(4, 7)[:, :6].mean() - report.difference) < 1e-5
    )
    assert {identity for _, identity in rig.sent()} == {old}
    assert rig.load("", shadow=True).success
    assert rig.events()[-2:] == [SwapEvent.SHADOW_BEGAN, SwapEvent.SHADOW_ENDED] and rig.running == old
    assert rig.histories[-1].events[-1].action_difference == pytest.approx(report.mean_difference, rel=0.5)


# -- rollback --------------------------------------------------------------------------------------------------------------------------


def swap_in_run(rig, checkpoints):
    """A run in which `near` has just taken over; returns both identities."""
    old = rig.running
    rig.report(ControllerStatus.ACTIVE)
    rig.begin_run()
    future = rig.arm(checkpoints / "near")
    rig.tick(4)
    rig.probe.until(future.done)
    assert future.result().success
    return old, rig.running


@pytest.mark.parametrize("state", [ControllerStatus.HOLD, ControllerStatus.FAULT])
def test_watchdog_event_in_the_probation_rolls_back_with_the_next_latent(rig, checkpoints, state):
    old, new = swap_in_run(rig, checkpoints)
    rig.report(state)
    assert rig.running == old and rig.events()[-1:] != []
    rig.tick()
    rig.probe.until(lambda: len(rig.sent()) == 3)
    assert rig.sent()[-2:] == [(8, new), (9, old)], "one tick after the event, not at the next border"
    event = rig.histories[-1].events[-1]
    assert (event.event, event.checkpoint_id, event.previous_id) == (SwapEvent.ROLLED_BACK, old, new) and "0.3 s" in event.reason
    rig.report(ControllerStatus.ACTIVE)
    rig.report(state)
    assert rig.running == old, "nothing more to undo"


def test_events_before_the_takeover_or_after_the_probation_do_not_roll_back(make_rig, checkpoints):
    rig = make_rig(probation_s=0.5)
    rig.report(ControllerStatus.ACTIVE)
    rig.report(ControllerStatus.HOLD)
    rig.begin_run()
    future = rig.arm(checkpoints / "near")
    rig.tick(4)
    rig.probe.until(future.done)
    new = rig.running
    rig.report(ControllerStatus.FAULT)
    assert rig.running == new, "it was held before"
    rig.probe.until(lambda: rig.node.swapper.probation is None, 10)
    rig.report(ControllerStatus.ACTIVE)
    rig.report(ControllerStatus.FAULT)
    assert rig.running == new


def test_slow_policy_is_rolled_back_before_its_third_chunk(rig, checkpoints):
    old, new = swap_in_run(rig, checkpoints)
    rig.node.swapper.probation.budget_ms = 0.0  # from now on every chunk is late; its first one was not
    rig.tick(12)
    rig.probe.until(lambda: len(rig.sent()) == 5)
    assert [identity for _, identity in rig.sent()] == [old, new, new, new, old]
    assert "in a row took longer" in rig.histories[-1].events[-1].reason


def test_rollback_on_request_and_only_once(rig, checkpoints):
    old, _ = swap_in_run(rig, checkpoints)
    assert rig.probe.call(Trigger, "policy/rollback").success and rig.running == old
    again = rig.probe.call(Trigger, "policy/rollback")
    assert not again.success and "found none" in again.message


# -- races -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_loading(monkeypatch):
    """Loading waits in the worker until the test lets it go on."""
    go_on, begun, read = threading.Event(), threading.Event(), diwa_ros.swapper.read_checkpoints

    def read_slowly(store, path):
        begun.set()
        assert go_on.wait(60)
        return read(store, path)

    monkeypatch.setattr(diwa_ros.swapper, "read_checkpoints", read_slowly)
    yield begun, go_on
    go_on.set()


def test_two_swaps_at_once_the_second_is_refused_and_the_first_goes_on(rig, checkpoints, slow_loading):
    begun, go_on = slow_loading
    first = rig.ask(checkpoints / "near")
    rig.probe.until(begun.is_set)
    second = rig.load(checkpoints / "far")
    assert second.gate == "busy" and "near" in second.found and not first.done()
    go_on.set()
    rig.probe.until(first.done, 20)
    assert first.result().success and rig.running == first.result().checkpoint_id
    assert rig.load(checkpoints / "far").success


def test_swap_while_the_node_goes_round(rig, checkpoints, slow_loading):
    """Deactivated while loading: refused, nothing changed, and what the worker ends with later disturbs nobody."""
    begun, go_on = slow_loading
    old = rig.running
    future = rig.ask(checkpoints / "near")
    rig.probe.until(begun.is_set)
    rig.node.trigger_deactivate()
    rig.probe.until(future.done)
    assert future.result().gate == "state" and rig.running == old
    assert rig.load(checkpoints / "near").gate == "state"
    rig.node.trigger_activate()
    go_on.set()
    assert rig.load(checkpoints / "far").success
    rig.node.trigger_deactivate()
    rig.node.trigger_cleanup()
    assert rig.load(checkpoints / "near").gate == "state"
    rig.node.trigger_configure()
    rig.node.trigger_activate()
    assert rig.running == old, "configured anew from its folder"
    assert rig.load(checkpoints / "near").success


def test_cleanup_while_a_swap_is_armed(rig, checkpoints):
    rig.begin_run()
    future = rig.arm(checkpoints / "near")
    rig.node.trigger_deactivate()
    rig.node.trigger_cleanup()
    rig.probe.until(future.done)
    assert future.result().success, "the end of the run was the end of the wait"


def test_checkpoint_still_being_written_is_refused_until_it_is_whole(rig, checkpoints, tmp_path):
    old, growing = rig.running, tmp_path / "growing"
    growing.mkdir()
    for name in ("manifest.json", "contract.yaml", "model.safetensors"):
        data = (checkpoints / "near" / name).read_bytes()
        for size in (0, len(data) // 2, len(data) - 1):
            (growing / name).write_bytes(data[:size])
            answer = rig.load(growing)
            assert (answer.gate, rig.running) == ("files", old), answer.message
        (growing / name).write_bytes(data)
    assert rig.load(growing).success and rig.running != old


def test_checkpoint_deleted_meanwhile(rig, checkpoints, tmp_path, slow_loading):
    """Before it is read: refused. After that the file is not needed any more."""
    begun, go_on = slow_loading
    old = rig.running
    shutil.copytree(checkpoints / "near", tmp_path / "gone")
    future = rig.ask(tmp_path / "gone")
    rig.probe.until(begun.is_set)
    shutil.rmtree(tmp_path / "gone")
    go_on.set()
    rig.probe.until(future.done, 20)
    assert future.result().gate == "files" and "nothing there" in future.result().found and rig.running == old
    shutil.copytree(checkpoints / "near", tmp_path / "gone")
    rig.begin_run()
    future = rig.arm(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    rig.tick(4)
    rig.probe.until(future.done)
    assert future.result().success and rig.running != old


def test_rollback_supersedes_a_swap_in_progress(rig, checkpoints, slow_loading):
    begun, go_on = slow_loading
    go_on.set()
    old, new = rig.running, None
    assert rig.load(checkpoints / "near").success
    go_on.clear()
    begun.clear()
    future = rig.ask(checkpoints / "far")
    rig.probe.until(begun.is_set)
    assert rig.probe.call(Trigger, "policy/rollback").success
    rig.probe.until(future.done)
    assert future.result().gate == "superseded" and rig.running == old and new is None
    go_on.set()
    assert rig.load(checkpoints / "far").success


def test_strange_checkpoint_cannot_end_the_node(rig, checkpoints, monkeypatch):
    def fail(store, path):
        raise MemoryError("tensor of 10 TB")

    monkeypatch.setattr(diwa_ros.swapper, "read_checkpoints", fail)
    check_refused(rig, rig.load(checkpoints / "near"), "files", "MemoryError: tensor of 10 TB")


# -- policy and world model together ---------------------------------------------------------------------------------------------------


@pytest.fixture
def graph(checkpoints, monkeypatch):
    """Bridge, controller, encoder and policy of this process in lock-step."""
    monkeypatch.setattr(diwa_ros.swapper, "FRAMES_LIMIT_S", 120.0)  # a frame may take a second on a busy machine
    probe, first = Probe(), checkpoints / "first"
    nodes = {}
    for node_class, parameters in (
        (CalvinBridge, {}),
        (FrankaController, {}),
        (Encoder, {"world_model": str(first / "world_model")}),
        (Policy, {"policies": str(first / "policies")}),
    ):
        overrides = [Parameter(name, value=value) for name, value in {"mode": "lockstep", **parameters}.items()]
        nodes[node_class] = node_class(parameter_overrides=overrides)
        probe.add(nodes[node_class])
        nodes[node_class].start()
    client = ActionClient(probe.node, RunSkill, "run_skill")
    loader = probe.node.create_client(LoadPolicy, "policy/load")
    probe.until(lambda: client.server_is_ready() and loader.service_is_ready() and nodes[Encoder].last_latent is not None, 20)
    probe.until(lambda: nodes[Policy].swapper.encoder.service_is_ready() and nodes[Policy].reset_client.service_is_ready())
    yield probe, nodes, client, loader
    for node in nodes.values():
        probe.executor.remove_node(node)
        node.stop()
    probe.close()


@pytest.mark.timeout(400)
def test_both_swap_at_the_same_frame_and_roll_back_together(graph, checkpoints):
    """In a running episode every chunk reads the world model its policy was trained on, and no frame is missing."""
    probe, nodes, client, loader = graph
    encoder, policy = nodes[Encoder], nodes[Policy]
    chunks, latents = probe.hear(ActionChunk, "action_chunk"), probe.hear(LatentState, "latent")
    histories = probe.hear(PolicyHistory, "policy/history", LATCHED)
    first, second = encoder.filter.identity, checkpoints / "second"
    old = policy.store.policies[SKILL].identity
    goal = client.send_goal_async(RunSkill.Goal(skill=SKILL, max_steps=10_000))
    probe.until(lambda: goal.done() and len(chunks) > 8, 20)

    request = LoadPolicy.Request(path=str(second / "policies"), world_model=str(second / "world_model"), max_action_difference=2.0)
    swap = loader.call_async(request)
    probe.until(swap.done, 150)
    assert swap.result().success, swap.result().message
    count = len(chunks)
    probe.until(lambda: len(chunks) > count + 3, 60)
    new = policy.store.policies[SKILL].identity
    assert encoder.filter.identity == policy.store.world_model_id != first and policy.store.skills == [SKILL, "turn_on_led"]
    assert swap.result().action_difference > 0

    assert probe.call(Trigger, "policy/rollback").success
    probe.until(lambda: policy.store.world_model_id == first, 60)
    count = len(chunks)
    probe.until(lambda: len(chunks) > count + 3, 60)
    assert encoder.filter.identity == first and not policy.finished.done()
    assert [event.event for event in histories[-1].events] == [SwapEvent.TOOK_OVER, SwapEvent.ROLLED_BACK]

    sampled = [c for c in chunks if c.horizon and not c.hold]
    assert {(c.checkpoint_id, c.world_model_id) for c in sampled} == {(old, first), (new, policy_world(second))}
    models = {to_ns(latent.header.stamp): latent.world_model_id for latent in latents}
    assert all(models.get(to_ns(c.header.stamp), c.world_model_id) == c.world_model_id for c in sampled)
    assert np.diff([round(to_ns(c.header.stamp) / 1e9 * 30) for c in sampled]).max() == 4, "every border was answered"
    frames = [latent.frames_since_reset for latent in latents[latents.index(next(x for x in latents if x.frames_since_reset > 4)) :]]
    assert (np.diff(frames) >= 0).all(), "a swap is no reset"


def policy_world(folder):
    return load_policy(folder / "policies" / SKILL)[1].lineage["world_model"]


def test_refused_swap_of_both_leaves_both(graph, checkpoints, tmp_path):
    probe, nodes, _, loader = graph
    encoder, policy = nodes[Encoder], nodes[Policy]
    before = encoder.filter, dict(policy.store.policies)
    for path, world_model, gate in (
        (checkpoints / "near", checkpoints / "second" / "world_model", "world_model"),
        (checkpoints / "second" / "policies", tmp_path / "none", "files"),
        (checkpoints / "second" / "policies", checkpoints / "near", "files"),
        (tmp_path / "none", checkpoints / "second" / "world_model", "files"),
        (checkpoints / "second" / "policies", "", "world_model"),
    ):
        swap = loader.call_async(LoadPolicy.Request(path=str(path), world_model=str(world_model)))
        probe.until(swap.done, 60)
        assert (swap.result().success, swap.result().gate) == (False, gate), swap.result().message
        probe.until(lambda: not encoder.other_filters)
        assert (encoder.filter, policy.store.policies) == before


def test_both_swap_at_rest_and_the_next_run_reads_the_new_one(graph, checkpoints):
    probe, nodes, client, loader = graph
    second = checkpoints / "second"
    swap = loader.call_async(LoadPolicy.Request(path=str(second / "policies"), world_model=str(second / "world_model")))
    probe.until(swap.done, 60)
    assert swap.result().success, swap.result().message
    chunks = probe.hear(ActionChunk, "action_chunk")
    goal = client.send_goal_async(RunSkill.Goal(skill=SKILL, max_steps=8))
    probe.until(goal.done, 20)
    ended = goal.result().get_result_async()
    probe.until(ended.done, 60)
    assert ended.result().result.completed and ended.result().result.checkpoint_id == nodes[Policy].store.policies[SKILL].identity
    assert {c.world_model_id for c in chunks if c.horizon} == {policy_world(second)}
