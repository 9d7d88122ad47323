"""Retraining from recordings: what is cut out of stores, which commands follow from a request, and the node that runs them."""

import argparse
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from action_msgs.msg import GoalStatus
from diwa_interfaces.action import Finetune
from rclpy.action import ActionClient
from rclpy.parameter import Parameter
from ros_support import Probe, private_graph

from diwa_core import tether
from diwa_core.checkpoint import load_checkpoint
from diwa_core.cli.finetune import start_banks
from diwa_core.cli.pipeline import check_command
from diwa_core.contract import Contract
from diwa_core.data.attempts import BEGINNING_FRAMES, find_attempts, find_beginnings, gather_attempts
from diwa_core.data.store import FIELDS, PlayStore
from diwa_core.errors import ConfigError, DataError
from diwa_core.pipeline.retrain import Request, Retraining, fingerprint, retrain
from diwa_core.pipeline.runner import StageFailed
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier
from diwa_core.reward.store import load_classifier, save_classifier
from diwa_core.sim.skills import DRAWER, SKILLS
from diwa_core.world_model.filter import load_world_model, save_world_model
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_ros.finetune import FinetuneNode

SKILL, OTHER = "open_drawer", "close_drawer"
TINY = replace(SIZES["small"], code_sizes=(6, 5), deterministic=12, hidden=12)
BACKGROUND_SCRIPT = """
import os, subprocess, sys
show = "import os; p = '/proc/self/autogroup'; "
show += "print(os.sched_getscheduler(0), os.nice(0), open(p).read() if os.path.exists(p) else 'none')"
words = [sys.executable, "-S", "-E", sys.argv[1], str(os.getpid()), sys.executable, "-S", "-c", show]
subprocess.run(words, start_new_session=True, check=True)
"""
RECIPE = {"finetune": {"batch": 4, "judge_episodes": 8, "report_episodes": 8, "finetuned_steps": 2, "threshold": 0.99}}


def episode(length: int = 24, skill: str = SKILL, drawer: np.ndarray | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Frames that are all labelled with one skill; the drawer is at `drawer` [T] metres (default: it opens by 0.18)."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(0, 0.01, (length, *kind.shape)) for name, kind in FIELDS.items() if kind.dtype == "float32"}
    arrays |= {view: rng.integers(0, 255, (length, 64, 64, 3), dtype=np.uint8) for view in ("rgb_static", "rgb_gripper")}
    arrays["scene_obs"] = np.zeros((length, 24))
    arrays["scene_obs"][:, DRAWER] = np.linspace(0, 0.18, length) if drawer is None else drawer
    return arrays | {"skill": np.full(length, SKILLS.index(skill), np.int8)}


def make_store(path: Path, episodes: list[dict]) -> PlayStore:
    store = PlayStore.create(path, Contract(), {}, tuple(name for name in FIELDS if name in episodes[0]))
    for arrays in episodes:
        store.append_episode(arrays)
    return store


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """checkpoints/ with a random world model, policy and classifier; store/ with six attempts; recipe.yaml with the least work."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model, contract, checkpoints = WorldModel(TINY).eval(), Contract(), folder / "checkpoints"
    identity = save_world_model(checkpoints / "world_model", model, contract, {})
    config = PolicyConfig(feature_size=model.feature_size, hidden=(16, 16, 16), denoising_steps=4, sampler_steps=4)
    save_policy(checkpoints / "policies" / SKILL, DiffusionPolicy(config), contract, SKILL, identity, {"episodes": 2})
    classifier = SuccessClassifier(ClassifierConfig(model.rssm.latent.size, hidden=8, embedding=4))
    save_classifier(checkpoints / "classifiers" / SKILL, classifier, contract, SKILL, identity, {})
    make_store(folder / "store", [episode(seed=seed) for seed in range(6)])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def request(inputs: Path, **changes) -> Request:
    values = {"stores": (str(inputs / "store"),), "recipe": str(inputs / "recipe.yaml"), "iterations": 10} | changes
    return Request(SKILL, str(inputs / "checkpoints"), **values)


# -- data --------------------------------------------------------------------------------------------------------------------------


def test_attempts_end_with_the_success_and_failures_are_left_out(tmp_path):
    shut = np.zeros(24)
    parts = [episode(), episode(drawer=shut), episode(skill=OTHER, drawer=np.linspace(0.2, 0, 24))]
    play = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    play["skill"][20:24] = play["skill"][44:48] = -1  # nothing is attempted
    number, other = SKILLS.index(SKILL), SKILLS.index(OTHER)
    opened = int(np.flatnonzero(play["scene_obs"][:24, DRAWER] > 0.12)[0])
    closed = 48 + int(np.flatnonzero(play["scene_obs"][48:, DRAWER] < 0.08)[0])
    store = make_store(tmp_path / "play", [play])
    assert find_attempts(store) == [(number, 0, opened + 1), (other, 48, closed + 1)]
    assert gather_attempts([str(store.path)], str(tmp_path / "demos")) == {SKILL: 1, OTHER: 1}
    gathered = PlayStore.open(tmp_path / "demos")
    np.testing.assert_array_equal(gathered.load()["actions"][: opened + 1], store.load()["actions"][: opened + 1])
    assert find_attempts(gathered) == [(number, 0, opened + 1), (other, opened + 1, opened + 1 + closed - 47)]


def test_without_the_simulated_scene_the_label_is_the_mark(tmp_path):
    real = {name: values for name, values in episode().items() if name != "scene_obs"}
    unmarked = real | {"skill": np.full(24, -1, np.int8)}
    assert find_attempts(make_store(tmp_path / "real", [real, unmarked, real])) == [(0, 0, 24), (0, 48, 72)]


def test_gathering_is_limited_replaces_what_was_there_and_refuses_nothing_to_learn(tmp_path):
    first, second = (make_store(tmp_path / name, [episode(seed=seed) for seed in range(3)]) for name in ("a", "b"))
    paths, out = [str(first.path), str(second.path)], str(tmp_path / "demos")
    assert gather_attempts(paths, out, most=4) == {SKILL: 4}
    assert gather_attempts(paths[:1], out) == {SKILL: 3} and len(PlayStore.open(out).episodes) == 3
    failed = make_store(tmp_path / "failed", [episode(drawer=np.zeros(24))])
    with pytest.raises(DataError, match="expected successful attempts at skills, found none"):
        gather_attempts([str(failed.path)], str(tmp_path / "none"))
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".none*"))


def test_play_without_labels_gives_starts_to_learn_on(inputs, tmp_path, caplog):
    """Its beginnings come along with the demonstrations, are no attempts, and are never judged on."""
    unlabelled = [episode(seed=seed) | {"skill": np.full(24, -1, np.int8)} for seed in range(5)]
    longer = {name: np.concatenate([values] * 3) for name, values in unlabelled[0].items()}
    play = make_store(tmp_path / "play", [*unlabelled[1:], longer])
    assert find_attempts(play) == []
    assert find_beginnings(play) == [*((-1, 24 * n, 24 * n + 24) for n in range(4)), (-1, 96, 96 + BEGINNING_FRAMES)]
    out = tmp_path / "demos"
    assert gather_attempts([str(play.path), str(inputs / "store")], str(out)) == {SKILL: 6}
    gathered = PlayStore.open(out)
    assert len(find_attempts(gathered)) == 6 and len(find_beginnings(gathered)) == 5
    model, _ = load_world_model(inputs / "checkpoints" / "world_model")

    classifier, _ = load_classifier(inputs / "checkpoints" / "classifiers" / SKILL)
    caplog.set_level("INFO")

    def recorded(path, learn):
        """Starts before the classifier has its say: to learn on, to judge on."""
        arguments = argparse.Namespace(demos=str(path), play=[], seed=1)
        _, (judged,) = start_banks([model], classifier, arguments, SKILL, learn)
        return int(re.search(r"of (\d+) recorded", caplog.messages[-1])[1]), len(judged.h)

    (learned, judged), (with_play, still) = recorded(inputs / "store", 4), recorded(out, 4)
    assert judged == still == 2 and with_play >= learned + 5
    with pytest.raises(DataError, match="expected more than 6 demonstrations of 'open_drawer', so that some are left to judge on, found 6"):
        recorded(out, 6)
    with pytest.raises(DataError, match=r"found none in 5 episodes, 5 of them play without a skill label.*mark each attempt"):
        gather_attempts([str(play.path)], str(tmp_path / "none"))


# -- requests ----------------------------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_worked_on_are_refused(inputs):
    for changes, words in (
        ({"stores": ()}, "expected bags or stores to learn from, found neither"),
        ({"refit": ("polici",)}, "expected some of world_model, policy, classifier, found 'polici'"),
        ({"bags": ("/nowhere",)}, "expected '/nowhere' to exist"),
        ({"refit": ("world_model",)}, "expected held-out play"),
    ):
        with pytest.raises(ConfigError, match=words):
            request(inputs, **changes)
    with pytest.raises(ConfigError, match="expected one of open_drawer"):
        Request("fly", "checkpoints", stores=(str(inputs),))


def test_the_commands_that_follow_from_a_request(inputs):
    plain = Retraining(request(inputs), inputs / "run")
    assert [stage.name for stage in plain.stages(4)] == ["demos", "finetune"]
    store = str(inputs / "store")
    whole = Retraining(request(inputs, bags=(store,), held_out=(store,), refit=("world_model",)), inputs / "run")
    stages = {stage.name: stage for stage in whole.stages(4, minutes=2.0)}
    assert list(stages) == ["import", "demos", "world_model", "policy", "classifier", "finetune"]
    for stage in stages.values():
        check_command(stage.words(inputs / "run"), "retrain")
    words = stages["policy"].words(inputs / "run")
    assert words[words.index("--per-skill") + 1] == "4"
    assert stages["finetune"].speed == ("--max-minutes", "1.5")
    assert str(inputs / "run" / "world_model") in stages["finetune"].words(inputs / "run")


def test_a_changed_input_is_noticed(inputs, tmp_path):
    store = make_store(tmp_path / "store", [episode()])
    before = fingerprint(store.path)
    assert fingerprint(store.path) == before
    store.append_episode(episode(seed=1))
    assert fingerprint(store.path) != before
    checkpoint = inputs / "checkpoints" / "policies" / SKILL
    assert fingerprint(checkpoint) == load_checkpoint(checkpoint).identity[:16]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_too_few_attempts_to_judge_on_and_failing_stages_are_told(inputs, tmp_path):
    few = make_store(tmp_path / "few", [episode(seed=seed) for seed in range(2)])
    with pytest.raises(DataError, match=r"expected more than 2 successful attempts at 'open_drawer'.* found 2"):
        retrain(request(inputs, stores=(str(few.path),)), tmp_path / "run", lambda line: None)
    failed = make_store(tmp_path / "failed", [episode(drawer=np.zeros(24))])
    with pytest.raises(StageFailed, match="expected successful attempts at skills, found none"):
        retrain(request(inputs, stores=(str(failed.path),)), tmp_path / "run2", lambda line: None)


def test_background_work_steps_aside_with_all_it_tethers():
    """The child of a tethered child, in a session of its own, as the stages of a worker are."""
    words = [sys.executable, "-S", "-E", tether.__file__, str(os.getpid()), sys.executable, "-S", "-c", BACKGROUND_SCRIPT, tether.__file__]
    told = subprocess.run(words, env={**os.environ, tether.BACKGROUND: "1"}, capture_output=True, text=True, check=True, timeout=150)
    scheduler, niceness, *group = told.stdout.split()
    assert (int(scheduler), int(niceness)) == (os.SCHED_IDLE, 19)
    assert group[1:] in ([], ["nice", "19"])


# -- the node ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_node_refuses_a_second_goal_survives_a_kill_cancels_and_goes_on(inputs, tmp_path):
    """One run folder from the first goal to the finished policy."""
    with private_graph():
        probe, feedback = Probe(), []
        values = {"checkpoints": str(inputs / "checkpoints"), "runs": str(tmp_path), "recipe": str(inputs / "recipe.yaml")}
        overrides = [Parameter(name, value=value) for name, value in {**values, "background": False}.items()]
        node = FinetuneNode(parameter_overrides=overrides)
        node.start()
        probe.add(node)
        client = ActionClient(probe.node, Finetune, "finetune")
        probe.until(client.server_is_ready, 60)

        def send(iterations: int, **fields):
            goal = Finetune.Goal(skill=SKILL, stores=[str(inputs / "store")], name="mine", iterations=iterations, **fields)
            sent = client.send_goal_async(goal, feedback_callback=lambda message: feedback.append(message.feedback))
            probe.until(sent.done, 60)
            return sent.result()

        def refusal() -> str:
            return probe.diagnostics.get("finetune: finetune", (b"", ""))[1]

        first = send(100_000)
        assert first.accepted
        assert not send(1).accepted
        probe.until(lambda: "found one of 'open_drawer' running" in refusal(), 60)
        probe.until(lambda: any(np.isfinite(f.held_out) for f in feedback), 600)
        last = feedback[-1]
        assert (last.stage, last.stages_done, last.stages) == ("finetune", 1, 2) and 0 <= last.imagined <= 1
        killed = node.worker.popen.pid
        os.kill(killed, signal.SIGKILL)
        probe.until(lambda: node.worker.popen.pid != killed and feedback.clear() is None, 60)
        probe.until(lambda: any(f.stage == "finetune" for f in feedback), 600)
        log = tmp_path / "mine" / "logs" / "finetune.log"
        probe.until(lambda: "resumed" in log.read_text(), 600)

        cancelled = first.cancel_goal_async()
        result = first.get_result_async()
        probe.until(lambda: cancelled.done() and result.done(), 120)
        assert result.result().status == GoalStatus.STATUS_CANCELED and "goes on" in result.result().result.message
        assert node.request is None and (tmp_path / "mine" / "runs" / "finetune" / "learner.tar").exists()

        for fields, words in (({"refit": ["model"]}, "found 'model'"), ({"budget_minutes": -1.0}, "budget_minutes of 0 or more")):
            assert not send(10, **fields).accepted
            probe.until(lambda words=words: words in refusal(), 60)

        again = send(100_000, budget_minutes=1.0)
        assert again.accepted
        ended = again.get_result_async()
        probe.until(ended.done, 600)
        made = ended.result().result
        assert made.success, made.message
        assert load_checkpoint(made.checkpoint, "policy").identity == made.checkpoint_id and Path(made.report).exists()
        client.destroy()
        probe.executor.remove_node(node)
        node.stop()
        probe.close()
