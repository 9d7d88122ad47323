"""`diwa demo` through real ROS, its failures, and the open-loop strips."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from ros_support import private_environment

from diwa_core.checkpoint import load_checkpoint
from diwa_core.cli.demo_report import card_rate
from diwa_core.cli.demo_view import describe_sides, make_table
from diwa_core.contract import Contract
from diwa_core.errors import ConfigError, DataError
from diwa_core.evaluate.statistics import Estimate
from diwa_core.evaluate.strips import Recording, imagine_episode, open_loop_strips
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.world_model.filter import load_world_model, save_world_model
from diwa_core.world_model.model import WorldModel, WorldModelConfig
from diwa_ros.demo import DemoRecord, SkillRecord, choose_skills
from diwa_ros.tap import STAGES

SKILL, OTHER = "open_drawer", "turn_on_led"  # the first has a fine-tuned policy too
TUNED_CARD = {"success_evaluation": {"success": 0.9, "low": 0.8, "high": 0.95, "episodes": 100, "seed": 0}}
CARD = {"success_evaluation": {"success": 0.5, "low": 0.4, "high": 0.6, "episodes": 100, "seed": 0}}  # as evaluate --write-card leaves it
LIMIT_S = 90.0
INTERRUPTS_ITSELF = """
import io, os, signal, sys
from diwa_core.cli.main import main

class Output(io.TextIOWrapper):
    def write(self, text):
        super().write(text)
        if "Ctrl-C stops" in text:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's shell starts what runs in its background
sys.stdout = Output(sys.stdout.buffer)
sys.exit(main())
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A tiny world model, two base policies and one fine-tuned one, all with random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig(name="tiny", code_sizes=(8, 6), deterministic=32, hidden=32))
    identity = save_world_model(folder / "world_model", model, Contract(), {})
    policy = DiffusionPolicy(PolicyConfig(feature_size=model.feature_size, hidden=(32,), denoising_steps=5, sampler_steps=5))
    for skill in (SKILL, OTHER):
        save_policy(folder / "policies" / skill, policy, Contract(), skill, identity, {}, CARD)
    save_policy(folder / "finetuned" / SKILL, policy.add_finetuned(2), Contract(), SKILL, identity, {}, TUNED_CARD)
    return folder


# -- through ROS -----------------------------------------------------------------------------------------------------------------------


class Demo:
    """A `diwa demo` in a process of its own, whose children can be told from all others."""

    def __init__(self, folder: Path, checkpoints: Path, *arguments: str, python: tuple[str, ...] = ("-m", "diwa_core.cli.main")) -> None:
        self.mark = f"DIWA_TEST={folder}"
        environment = {**os.environ, **private_environment(), "DIWA_TEST": str(folder), "PYTHONUNBUFFERED": "1", "COLUMNS": "80"}
        command = [sys.executable, *python, "demo", "--checkpoint", str(checkpoints), *arguments]
        self.errors = (folder / "stderr").open("w+")
        self.popen = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=self.errors, text=True)

    def read_until(self, word: str) -> str:
        """The next line of output that contains `word`."""
        for line in self.popen.stdout:
            if word in line:
                return line
        raise AssertionError(f"the demo ended without '{word}': {self.stderr()}")

    def wait(self) -> tuple[int, str]:
        """Exit code and the rest of the output."""
        output = self.popen.stdout.read()
        return self.popen.wait(LIMIT_S), output

    def stderr(self) -> str:
        """Everything it complained about."""
        self.errors.seek(0)
        return self.errors.read()

    def processes(self) -> dict[int, str]:
        """Command lines of all living processes of this demo, itself included, by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark in (entry / "environ").read_text(errors="replace").split("\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # it ended while being looked at, or belongs to another user
        return found


@pytest.fixture
def start(tmp_path, checkpoints) -> Iterator:
    """Starts demos and kills what they leave, after the test has looked."""
    demos: list[Demo] = []

    def start_demo(*arguments: str, **options: tuple[str, ...]) -> Demo:
        demos.append(Demo(tmp_path, checkpoints, *arguments, **options))
        return demos[-1]

    yield start_demo
    for demo in demos:
        for pid in demo.processes():
            os.kill(pid, signal.SIGKILL)
        demo.popen.wait()
        demo.popen.stdout.close()
        demo.errors.close()


class Page(HTMLParser):
    """Tags and text of a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.codes: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "path", "rect", "br"):
            self.open.append(tag)
        if tag == "code":
            self.codes.append(dict(attrs)["title"])

    def handle_endtag(self, tag):
        if tag not in ("path", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.mark.timeout(LIMIT_S)
def test_demo_runs_a_skill_and_reports_it(start, tmp_path, checkpoints):
    demo = start("--episodes", "1", "--max-steps", "9", "--seed", "5", "--out", "out/page.html")
    code, output = demo.wait()
    assert code == 0, output + demo.stderr()
    lines = [line.split()[:5] for line in output.splitlines() if "failed" in line]
    assert lines == [[*words, "1/1", "failed", "9"] for words in ((SKILL, "base"), (SKILL, "fine-tuned"), (OTHER, "base"))]
    assert f"no fine-tuned policy of {OTHER} in the checkpoint folder" in output
    assert output.rstrip().splitlines()[-2].endswith("report in out/page.html: open it in a browser.")
    assert not demo.processes()
    page = Page((tmp_path / "out/page.html").read_text())
    parts = ("world_model", f"policies/{SKILL}", f"policies/{OTHER}", f"finetuned/{SKILL}")
    assert page.codes == [load_checkpoint(checkpoints / part).identity for part in parts]
    assert page.tags.count("img") == 4 and "9 frames imagined from the executed actions alone, after 4 observed ones" in page.words
    assert f"{SKILL}, fine-tuned policy, episode 1" in page.words and f"{OTHER}, base policy, episode 1" in page.words
    assert all(stage in page.words for stage in STAGES) and "--seed 5" in page.words
    assert "0 of 1 episodes succeeded after fine-tuning, 0 of 1 from the same starts before" in page.words
    assert f"No fine-tuned policy of {OTHER}" in page.words and f"{OTHER} base only" in page.words and "1 swaps" in page.words
    assert "90 % 80–95" in page.words and page.words.count("50 % 40–60") == 2
    assert sorted(path.name for path in tmp_path.glob("runs/logs/*/*.log")) == sorted(
        f"{name}.log" for name in ("calvin_bridge", "franka_controller", "encoder", "policy")
    )


@pytest.mark.timeout(LIMIT_S)
def test_node_killed_in_mid_run_fails_the_demo_by_name(start, tmp_path):
    demo = start("--episodes", "200")
    demo.read_until("1/200")
    victim = next(pid for pid, command in demo.processes().items() if "diwa_ros.encoder" in command)
    os.kill(victim, signal.SIGKILL)
    begin_s = time.monotonic()
    code, _ = demo.wait()
    assert code == 2 and "node 'encoder' ended with signal SIGKILL" in demo.stderr()
    assert time.monotonic() - begin_s < 15
    assert not demo.processes() and not (tmp_path / "reports").exists()


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("after", ["starting the graph", "1/200"])
def test_interrupt_stops_every_process(start, after):
    demo = start("--episodes", "200")
    demo.read_until(after)
    demo.popen.send_signal(signal.SIGINT)
    code, _ = demo.wait()
    assert code == 130, demo.stderr()
    assert not demo.processes()


@pytest.mark.timeout(LIMIT_S)
def test_interrupt_counts_as_soon_as_the_demo_promises_so(start, tmp_path):
    """No later: a signal between the promise and the handler is lost where the shell had it ignored."""
    demo = start("--episodes", "1", "--max-steps", "9", python=("-c", INTERRUPTS_ITSELF))
    code, output = demo.wait()
    assert code == 130, output + demo.stderr()
    assert not (tmp_path / "runs").exists()  # so the graph was not even started
    assert not demo.processes()


def test_missing_checkpoints_are_refused_before_anything_starts(start, tmp_path):
    demo = start("--checkpoint", str(tmp_path / "none"))
    code, _ = demo.wait()
    assert code == 2 and "expected world_model/ and policies/<skill>/" in demo.stderr() and not (tmp_path / "runs").exists()


def test_skills_are_those_with_a_policy():
    assert choose_skills((), ["turn_on_led", "open_drawer"]) == ["open_drawer", "turn_on_led"]
    assert choose_skills(("turn_on_led",), ["turn_on_led", "open_drawer"]) == ["turn_on_led"]
    with pytest.raises(ConfigError, match="found close_drawer"):
        choose_skills(("close_drawer",), ["open_drawer"])
    with pytest.raises(ConfigError, match="found 'open_door'"):
        choose_skills(("open_door",), ["open_drawer"])


# -- strips ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(checkpoints) -> WorldModel:
    """The tiny world model."""
    return load_world_model(checkpoints / "world_model")[0]


def record(model: WorldModel, frames: int, seed: int = 0) -> Recording:
    """A recording of random frames."""
    random = np.random.default_rng(seed)
    images = {view: random.integers(0, 256, (frames, 64, 64, 3), np.uint8) for view in model.config.views}
    features = random.normal(size=(frames, model.feature_size)).astype(np.float32)
    return Recording(images, features, random.uniform(-1, 1, (frames, 7)).astype(np.float32))


def test_imagination_starts_at_the_last_observed_frame_and_sees_only_later_actions(model):
    recording, warmup = record(model, 20), model.config.warmup_frames
    base = imagine_episode(model, recording).feature
    assert base.shape == (20 - warmup + 1, model.feature_size)
    assert np.array_equal(base[0].numpy(), recording.features[warmup - 1])
    blind = Recording(recording.images, recording.features.copy(), recording.actions.copy())
    blind.features[warmup:], blind.actions[:warmup] = 7.0, 0.5
    assert torch.equal(imagine_episode(model, blind).feature, base)
    other = Recording(recording.images, recording.features, recording.actions.copy())
    other.actions[warmup + 3] *= -1
    changed = (imagine_episode(model, other).feature != base).any(-1)
    assert changed.tolist() == [False] * 4 + [True] * (len(base) - 4)


def test_strips_pair_each_prediction_with_the_camera_frame_of_its_time(model):
    recording = record(model, 20)
    for number in range(20):
        recording.images["rgb_static"][number] = number
    static, gripper = open_loop_strips(model, recording, "title", columns=5)
    assert static.labels == gripper.labels == ["last seen", "+4", "+8", "+12", "+16"]
    assert static.camera[:, 0, 0, 0].tolist() == [3, 7, 11, 15, 19]
    assert static.predicted.shape == static.camera.shape == (5, 64, 64, 3) and static.predicted.dtype == np.uint8
    assert (static.title, gripper.title) == ("title, static camera", "title, gripper camera")


def test_short_or_foreign_recordings_are_refused(model):
    with pytest.raises(DataError, match="expected more than 4 frames"):
        imagine_episode(model, record(model, 4))
    foreign = record(model, 9)
    foreign.features = foreign.features[:, 1:]
    with pytest.raises(DataError, match=f"features of {model.feature_size}"):
        imagine_episode(model, foreign)


# -- table -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """What the table needs of a result."""

    success: bool
    steps: int
    latency_ms: dict[str, list[float]] = field(default_factory=lambda: {"camera → chunk": [10.0, 20.0]})


def table_lines(skills: dict[str, SkillRecord], running: tuple[str, str] | None = None, steps: int = 0) -> list[str]:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(make_table(DemoRecord(skills, {"camera → chunk": [10.0, 20.0] * 2}), 3, running, steps))
    return console.export_text().splitlines()


def test_table_shows_outcomes_of_both_sides_running_episode_and_latency():
    drawer = SkillRecord("open_drawer", {"base": [Episode(False, 72)] * 3, "fine-tuned": [Episode(True, 31), Episode(False, 72)]})
    skills = {"open_drawer": drawer, "turn_off_lightbulb": SkillRecord("turn_off_lightbulb", {"base": []})}
    lines = table_lines(skills, ("open_drawer", "fine-tuned"), 12)
    shown = next(line for line in lines if "open_drawer" in line)
    assert "✗ 72  ✗ 72  ✗ 72" in shown and "✓ 31  ✗ 72  ▸ 12" in shown and "15.0 / 20.0" in shown
    assert next(line for line in lines if "turn_off_lightbulb" in line).count("·") == 3
    assert re.search(r"successes +│ 0/3 +│ 1/2 ", lines[-2])
    assert describe_sides(DemoRecord(skills, {})).startswith("no fine-tuned policy of turn_off_lightbulb in")


def test_table_without_any_fine_tuned_policy_has_one_column_of_outcomes():
    skills = {"open_drawer": SkillRecord("open_drawer", {"base": [Episode(True, 31), Episode(False, 72)]})}
    lines = table_lines(skills)
    assert "base: steps" in "".join(lines) and "fine-tuned" not in "".join(lines) and "1/2" in lines[-2]
    assert "no fine-tuned policy of any of the skills" in describe_sides(DemoRecord(skills, {}))
    skills["open_drawer"].results["fine-tuned"] = []
    assert describe_sides(DemoRecord(skills, {})) == ""


def test_model_card_rate_is_optional():
    assert card_rate({}) is None and card_rate(CARD) == Estimate(0.5, 0.4, 0.6)
