"""Refits: recorded episodes of policies, a world model that goes on from another one, and the environment steps both cost."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diwa_core.cli import main
from diwa_core.contract import Contract
from diwa_core.data.store import PlayStore
from diwa_core.errors import DataError
from diwa_core.evaluate.recording import append_rollout, count_steps, create_rollout_store, spent_steps
from diwa_core.evaluate.rollout import EpisodeResult
from diwa_core.sim.skills import SKILLS
from diwa_core.world_model.filter import load_world_model

TINY = {
    "model": {"deterministic": 8, "hidden": 8, "code_sizes": [3, 2]},
    "training": {
        "batch": 4,
        "horizons": [6],
        "horizon_starts": [0.0],
        "prefix": [3, 4],
        "code_updates": 2,
        "code_batch": 4,
        "autocast": False,
    },
}


def random_episode(length: int, seed: int) -> dict[str, np.ndarray]:
    """Noise with the fields of an episode, but for the mark of its skill."""
    rng = np.random.default_rng(seed)
    scene = np.abs(rng.normal(0.1, 0.1, (length, 24)))
    scene[:, 4:6] = rng.integers(0, 2, (length, 2))
    return {
        **{view: rng.integers(0, 255, (length, 64, 64, 3), dtype=np.uint8) for view in ("rgb_static", "rgb_gripper")},
        "robot_obs": rng.normal(size=(length, 15)),
        "target_pose": rng.normal(size=(length, 6)),
        "scene_obs": scene,
        "actions": rng.uniform(-1, 1, (length, 7)),
    }


def random_play(path: Path, length: int = 40, episodes: int = 2, seed: int = 0) -> Path:
    """A play store of noise."""
    store = PlayStore.create(path, Contract(), {"generator": "play", "seed": seed})
    for number in range(episodes):
        store.append_episode({**random_episode(length, 10 * seed + number), "skill": np.full(length, -1, np.int8)})
    return path


def random_rollouts(path: Path, lengths: tuple[int, ...] = (20, 30)) -> PlayStore:
    """Recorded episodes of noise."""
    store = create_rollout_store(path, "train", 0)
    for seed, length in enumerate(lengths):
        append_rollout(store, EpisodeResult("turn_on_led", True, length - 4, np.zeros(24), random_episode(length, seed)))
    return store


def train(tmp_path: Path, out: str, *words: str | Path, config: dict = TINY) -> int:
    path = tmp_path / f"{out}.yaml"
    path.write_text(yaml.safe_dump(config))
    folders = ["--out", tmp_path / out, "--run-dir", tmp_path / "runs" / out, "--config", path, "--device", "cpu"]
    return main.main(["world-model", "train", *map(str, (*words, *folders))])


def test_recorded_episodes_are_marked_and_counted(tmp_path):
    store = PlayStore.open(random_rollouts(tmp_path / "rollouts").path)
    assert store.episodes == [(0, 20), (20, 50)] and store.settings == {"generator": "evaluation", "split": "train", "seed": 0}
    assert set(store.read("skill", 0, 50).tolist()) == {SKILLS.index("turn_on_led")}
    assert count_steps(store) == 19 + 29  # the last frame of an episode is where its last step ended
    with pytest.raises(DataError, match="expected a free path"):
        create_rollout_store(store.path, "train", 0)


def test_play_costs_no_environment_steps_and_what_a_parent_spent_counts_once(tmp_path):
    play, rollouts = PlayStore.open(random_play(tmp_path / "play")), random_rollouts(tmp_path / "rollouts")
    assert spent_steps([play]) == {}
    assert sum(spent_steps([play, rollouts], {"rollouts": {rollouts.content_hash: 48}}, {"rollouts": {"other": 5}}, {}).values()) == 53


@pytest.mark.timeout(900)  # seconds of work, which a busy machine may stretch
def test_a_refit_goes_on_from_the_first_model_and_states_what_it_cost(tmp_path):
    play, rollouts = random_play(tmp_path / "play"), random_rollouts(tmp_path / "rollouts")
    assert train(tmp_path, "first", "--play", play, "--steps", "2") == 0
    refit = ("--play", play, rollouts.path, "--init", tmp_path / "first")
    slow = {"training": TINY["training"] | {"learning_rate": 0.0, "final_learning_rate": 0.0}}
    assert train(tmp_path, "same", *refit, "--steps", "1", config=slow) == 0
    assert train(tmp_path, "second", *refit, "--steps", "3", config={"training": TINY["training"]}) == 0
    (first, parent), (same, _), (second, child) = (load_world_model(tmp_path / name) for name in ("first", "same", "second"))
    dynamics = [name for name, _ in first.rssm.named_parameters()]
    assert all(torch.equal(first.rssm.get_parameter(name), same.rssm.get_parameter(name)) for name in dynamics)
    assert not all(torch.equal(first.rssm.get_parameter(name), second.rssm.get_parameter(name)) for name in dynamics)
    frames = {view: torch.from_numpy(image[:3]) for view, image in random_episode(3, 9).items() if view.startswith("rgb")}
    low = torch.randn(3, 27)
    assert second.config == first.config and torch.equal(first.embed(low, frames), second.embed(low, frames))
    assert parent.lineage["environment_steps"] == 0 and "init" not in parent.lineage
    assert child.lineage["environment_steps"] == 48 and child.lineage["init"] == parent.identity
    assert train(tmp_path, "third", "--play", play, "--codes", tmp_path / "second", "--steps", "1") == 0
    assert load_world_model(tmp_path / "third")[1].lineage["environment_steps"] == 48  # its codes come from a model that had them


def test_a_refit_of_another_shape_is_refused(tmp_path, capsys):
    play = random_play(tmp_path / "play")
    assert train(tmp_path, "first", "--play", play, "--steps", "1") == 0
    wider = {"model": {"deterministic": 9}, "training": TINY["training"]}
    assert train(tmp_path, "second", "--play", play, "--init", tmp_path / "first", "--steps", "1", config=wider) == 2
    assert "expected a model of the same shape" in capsys.readouterr().err
