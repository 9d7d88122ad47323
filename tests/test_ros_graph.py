"""The graph as processes: the same episodes as without ROS, a killed policy, a clean end."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ControllerStatus, RobotCommand, SimState
from rclpy.action import ActionClient
from ros_support import ABOVE_BUTTON, Probe, make_checkpoints, make_graph, private_graph

from diwa_core.checkpoint import load_checkpoint
from diwa_core.contract import Contract
from diwa_core.errors import DataError, GateError
from diwa_core.evaluate.comparison import compare_policies
from diwa_core.evaluate.rollout import AFTER_SUCCESS, run_episode
from diwa_core.policy.store import load_policy, save_policy
from diwa_core.realtime import come_first
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.skills import start_states
from diwa_core.world_model.filter import LatentFilter
from diwa_ros.evaluator import GraphEpisode, GraphEvaluator
from diwa_ros.messages import LATCHED, to_ns

HOLD_AFTER_S = 0.3  # the controller's default


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def to_state(start):
    """SceneState -> the 39 values of ResetSim."""
    scene = [start.slider, start.drawer, 0, start.switch, start.bulb, start.led, *start.blocks.reshape(-1)]
    return (*start.tcp_pose, *[0.0] * 8, start.gripper, *map(float, scene))


def is_real_time_allowed():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(come_first, 10).result()


def test_lockstep_gives_the_same_episodes_as_without_ros(checkpoints, tmp_path):
    """Success, steps, every picture, every feature and the final scene are equal bit for bit; twice, because order must not matter."""
    env, latent_filter = PlayTable(), LatentFilter.load(checkpoints / "world_model")
    plan = [
        (GraphEpisode("turn_on_led", state=to_state(ABOVE_BUTTON), noise_seed=32), ABOVE_BUTTON),
        (GraphEpisode("open_drawer", index=1, noise_seed=3, max_steps=30), start_states("open_drawer", 2, 0)[1]),
        (GraphEpisode("turn_on_led", state=to_state(ABOVE_BUTTON), noise_seed=32), ABOVE_BUTTON),
    ]
    with private_graph(), make_graph(checkpoints, tmp_path, mode="lockstep") as graph:
        with GraphEvaluator(keep_frames=True) as evaluator:
            for episode, start in plan:
                live = evaluator.run_episode(episode)
                policy, _ = load_policy(checkpoints / "policies" / episode.skill)
                offline = run_episode(env, latent_filter, policy, episode.skill, start, episode.noise_seed, episode.max_steps, record=True)
                assert (live.success, live.steps) == (offline.success, offline.steps)
                np.testing.assert_array_equal(live.final_scene_obs, offline.final_scene_obs)
                tail = AFTER_SUCCESS if offline.success else 0
                assert len(live.frames) == len(offline.frames["rgb_static"]) - tail
                np.testing.assert_array_equal(live.frames, offline.frames["rgb_static"][: len(live.frames)])
                assert all(len(live.latency_ms[stage]) for stage in ("latent", "chunk", "command"))
            with pytest.raises(DataError, match="expected one of open_drawer, turn_on_led; found 'close_drawer'"):
                evaluator.run_episode(GraphEpisode("close_drawer"))
        assert {os.sched_getscheduler(pid) for pid in graph.pids.values()} == {os.SCHED_OTHER}
        assert graph.stop() == dict.fromkeys(("calvin_bridge", "franka_controller", "encoder", "policy"), 0)
    env.close()


def test_graph_compares_policies_as_the_simulator_does(checkpoints, tmp_path):
    """The same function with another runner: swapped on the running graph, the fine-tuned policy does what it does without ROS."""
    (base, origin), skill = load_policy(checkpoints / "policies" / "open_drawer"), "open_drawer"
    tuned = base.add_finetuned(10).requires_grad_(False)
    for weight in tuned.finetuned.parameters():
        weight += 0.05
    save_policy(tmp_path / "finetuned" / skill, tuned, Contract(), skill, origin.lineage["world_model"], {"base": origin.identity})
    pair, options = (checkpoints / "policies", tmp_path / "finetuned"), {"starts": 2, "max_steps": 13}
    env, latent_filter = PlayTable(), LatentFilter.load(checkpoints / "world_model")
    scenes = {}

    def simulate(plans, report):
        for plan in plans:
            start, policy = start_states(skill, 2, 0)[plan.index], load_policy(plan.policy)[0]
            result = run_episode(env, latent_filter, policy, skill, start, plan.noise_seed, plan.max_steps)
            scenes[plan] = result.final_scene_obs
            report(plan, result)

    expected = compare_policies([pair], tmp_path / "simulator.jsonl", simulate, **options)
    env.close()
    with private_graph(), make_graph(checkpoints, tmp_path, mode="lockstep"), GraphEvaluator() as evaluator:
        found = {}

        def run(plans, report):
            evaluator.run_plans(plans, lambda plan, result: (found.update({plan: result}), report(plan, result)))

        assert compare_policies([pair], tmp_path / "graph.jsonl", run, **options) == expected
        np.testing.assert_array_equal([found[plan].final_scene_obs for plan in scenes], list(scenes.values()))
        identity = load_checkpoint(tmp_path / "finetuned" / skill).identity
        assert [result.checkpoint_id for result in found.values()] == [origin.identity] * 2 + [identity] * 2
        with pytest.raises(GateError, match="gate 'skill': expected turn_on_led, found open_drawer"):
            evaluator.load_policy(tmp_path / "finetuned" / skill, "turn_on_led")


def test_killed_policy_is_held_in_time_and_the_arm_rests(checkpoints, tmp_path):
    """Real time: SIGKILL to the policy while the arm moves; the controller holds within hold_after_s, stops, and the target stays."""
    with private_graph(), make_graph(checkpoints, tmp_path) as graph:
        probe = Probe()
        statuses, commands = probe.hear(ControllerStatus, "controller/status", LATCHED), probe.hear(RobotCommand, "sim/command")
        states = probe.hear(SimState, "sim/state")
        client = ActionClient(probe.node, RunSkill, "run_skill")
        probe.until(lambda: client.server_is_ready() and statuses and statuses[-1].state_name == "IDLE", 30)
        goal = client.send_goal_async(RunSkill.Goal(skill="turn_on_led", max_steps=10_000))
        probe.until(lambda: goal.done() and len(commands) > 20)
        policies = {os.sched_getscheduler(pid) for pid in graph.pids.values()}
        assert policies == {os.SCHED_FIFO if is_real_time_allowed() else os.SCHED_OTHER}
        os.kill(graph.pids["policy"], signal.SIGKILL)
        killed_s = time.monotonic()
        probe.until(lambda: statuses[-1].state_name == "HOLD")
        assert time.monotonic() - killed_s < HOLD_AFTER_S + 0.15
        assert "0.3 s" in statuses[-1].reason and probe.diagnostics["franka_controller: state"][0] == b"\x01"
        held_ns = to_ns(states[-1].header.stamp)
        probe.until(lambda: statuses[-1].state_name == "FAULT", 3)
        assert to_ns(commands[-1].header.stamp) < held_ns
        late = [state for state in states if to_ns(state.header.stamp) > held_ns]
        assert len(late) > 10 and all(state.applied_is_hold and not state.applied_action[:6].any() for state in late)
        client.destroy()
        probe.close()
        codes = graph.stop()
        assert codes.pop("policy") == -signal.SIGKILL and set(codes.values()) == {0}
