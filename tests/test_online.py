"""The simulator as an environment of denoising PPO: the same numbers as evaluation, steps counted, runs that stop, resume and repeat."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diwa_core.cli import main
from diwa_core.contract import Contract, Observation, hold_action
from diwa_core.errors import CheckpointError, ConfigError, DiwaError
from diwa_core.evaluate.rollout import MAX_STEPS, run_episode
from diwa_core.finetune.online import BatchFilter, OnlineBudget, SimulatorEnv, finetune_online
from diwa_core.finetune.ppo import DenoisingPPO, PPOConfig
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import load_policy, save_policy
from diwa_core.sim.episodes import EpisodePool, EpisodeSettings, EpisodeTable
from diwa_core.sim.experts import Expert, Style
from diwa_core.sim.skills import start_state
from diwa_core.world_model.filter import LatentFilter, save_world_model
from diwa_core.world_model.model import SIZES, WorldModel

SKILL = "open_drawer"
LOW = replace(SIZES["lowdim"], deterministic=8, hidden=8)
CONFIG = PPOConfig(batch=2, chunks=4, finetuned_steps=2, epochs=1, minibatch=8, critic_warmup=1)


def make_model(config=LOW) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(config).eval().requires_grad_(False)


def make_policy(model: WorldModel) -> DiffusionPolicy:
    torch.manual_seed(1)
    config = PolicyConfig(model.feature_size, hidden=(16,) * 3, denoising_steps=5, sampler_steps=5)
    return DiffusionPolicy(config).eval().requires_grad_(False)


def make_table(views: tuple[str, ...] = (), first: int = 0) -> EpisodeTable:
    return EpisodeTable(EpisodeSettings(SKILL, 0, 4, MAX_STEPS // 4, views), first, stride=10)


def some_chunk(seed: int) -> np.ndarray:
    chunk = np.random.default_rng(seed).uniform(-1, 1, (4, 7)).astype(np.float32)
    chunk[:, 6] = 1
    return chunk


# ---- the filter -------------------------------------------------------------------------------------------------------------------


def filter_one_by_one(model: WorldModel, frames: dict[str, np.ndarray], latent_filter: LatentFilter, begins: bool) -> np.ndarray:
    blank = {name: np.zeros((64, 64, 3), np.uint8) for name in ("rgb_static", "rgb_gripper")}
    for i, action in enumerate(frames["actions"]):
        images = {name: frames[name][i] if name in frames else image for name, image in blank.items()}
        observation = Observation(images, frames["robot_obs"][i], frames["target_pose"][i], frames["scene_obs"][i])
        feature = latent_filter.update(observation, None if begins and i == 0 else action)
    return feature


@pytest.mark.parametrize("config", [SIZES["small"], LOW, replace(LOW, latent="categorical", groups=4, classes=4)], ids=lambda c: c.latent)
def test_the_batch_filter_gives_the_numbers_of_the_latent_filter(config) -> None:
    model, tables = make_model(config), [make_table(config.views, first) for first in (0, 1)]
    single = [LatentFilter(model, Contract(), "") for _ in tables]
    batch = BatchFilter(model, 2)
    warmups = [table.begin() for table in tables]
    expected = [filter_one_by_one(model, frames, one, True) for frames, one in zip(warmups, single, strict=True)]
    assert np.allclose(batch.update(dict(enumerate(warmups))), expected, atol=1e-5)
    executed = {0: tables[0].run(some_chunk(0)).frames, 1: tables[1].run(some_chunk(1)[:2]).frames}  # of different lengths
    expected = [filter_one_by_one(model, executed[i], one, False) for i, one in enumerate(single)]
    assert np.allclose(batch.update(executed), expected, atol=1e-5)
    batch.reset([1])
    single[1].reset()
    again = tables[1].begin()
    expected[1] = filter_one_by_one(model, again, single[1], True)
    assert np.allclose(batch.update({1: again}), expected, atol=1e-5)


# ---- episodes ---------------------------------------------------------------------------------------------------------------------


class Replay:
    """A policy that samples recorded chunks."""

    def __init__(self, chunks: list[np.ndarray]) -> None:
        self.chunks = [torch.from_numpy(chunk) for chunk in chunks]

    def sample(self, feature, generator):
        return self.chunks.pop(0)[None]


def expert_chunks() -> list[np.ndarray]:
    """An expert's actions from start state 0 on, by the chunk."""
    table = make_table()
    table.begin()
    expert = Expert(SKILL, np.random.default_rng(0), Style())
    expert.start(table.table.robot_obs, table.table.scene_obs)
    actions = []
    while len(actions) < MAX_STEPS:
        action = expert.act(table.table.robot_obs, table.table.target_pose).astype(np.float32)
        actions.append(np.append(np.clip(action[:6], -1, 1), np.sign(action[6])).astype(np.float32))
        table.table.apply(actions[-1])
    return list(np.array(actions).reshape(-1, 4, 7))


@pytest.mark.parametrize("succeeds", [True, False])
def test_the_same_actions_succeed_at_the_same_step_as_in_an_evaluation(succeeds: bool) -> None:
    from diwa_core.sim.play_table import PlayTable

    chunks = expert_chunks() if succeeds else [np.tile(hold_action(1), (4, 1))] * 18
    low_dimensional = LatentFilter(make_model(), Contract(), "")
    expected = run_episode(PlayTable(), low_dimensional, Replay(chunks), SKILL, start_state(SKILL, 0, 0, "train"), seed=0)
    table, steps, results = make_table(), 0, []
    table.begin()
    while not results or not (results[-1].success or results[-1].truncated):
        results.append(table.run(chunks[len(results)]))
        steps += len(results[-1].frames["actions"])
    assert expected.success == succeeds == results[-1].success and results[-1].truncated != succeeds
    assert steps == expected.steps
    assert np.array_equal(results[-1].frames["scene_obs"][-1], expected.final_scene_obs)
    assert results[-1].steps == len(results[-1].frames["actions"]) + 3  # and the next episode's warm-up
    assert table.number == 10 and table.chunks == 0


def test_episodes_repeat_for_any_number_of_processes_steps_are_counted_and_a_saved_state_goes_on_bit_for_bit() -> None:
    model, chunk = make_model(), torch.zeros(3, 4, 7)
    chunk[:, :, 6] = 1
    chunk[:, :, 0] = torch.tensor([-0.5, 0.0, 0.5])[:, None]
    with SimulatorEnv(model, SKILL, 3, workers=1) as one, SimulatorEnv(model, SKILL, 3, workers=2) as two:
        assert torch.equal(one.reset(), two.reset())
        assert one.env_steps == two.env_steps == 3 * 3
        for _ in range(17):
            first, second = one.step(chunk), two.step(chunk)
            assert torch.equal(first.feature, second.feature) and torch.equal(first.feature, first.final_feature)
            assert not first.truncated.any() and not first.terminated.any() and first.reward.tolist() == [0, 0, 0]
        saved = {name: value.clone() for name, value in one.state().items()}
        last = one.step(chunk)
        assert last.truncated.all() and one.env_steps == 3 * (72 + 3 + 3)
        assert not torch.equal(last.feature, last.final_feature)
        assert one.state()["counters"].tolist() == [[3, 0, 3], [4, 0, 3], [5, 0, 3]]
        two.reset()  # whatever it did before is forgotten
        two.load_state(saved)
        assert two.env_steps == 3 * 3 + 17 * 12
        again = two.step(chunk)
        assert torch.equal(again.feature, last.feature) and torch.equal(again.final_feature, last.final_feature)
        with pytest.raises(CheckpointError, match="3 tables"):
            two.load_state(saved | {"counters": saved["counters"][:2]})


def test_a_dead_process_and_an_impossible_pool_are_clear_errors() -> None:
    settings = EpisodeSettings(SKILL, 0, 4, 18, ())
    with pytest.raises(ConfigError, match="at least one table"):
        EpisodePool(settings, 0, 1)
    with pytest.raises(ConfigError, match="open_drawer"):
        EpisodePool(replace(settings, skill="open_door"), 1, 1)
    with EpisodePool(settings, 2, 2) as pool:
        pool._processes[1].kill()
        pool._processes[1].join()
        with pytest.raises(DiwaError, match="one ended"):
            pool.begin()


# ---- runs -------------------------------------------------------------------------------------------------------------------------


def run_online(run_dir: Path, budget: OnlineBudget, rates=(0.0,)) -> tuple[dict, dict]:
    """The last row and the weights of a tiny run whose validations give `rates`, the last one again and again."""
    model, rates = make_model(), list(rates)
    with SimulatorEnv(model, SKILL, CONFIG.batch, workers=1) as env:
        learner = DenoisingPPO(make_policy(model), env, CONFIG, seed=0)
        last = finetune_online(learner, run_dir, budget, lambda policy: {"value": rates.pop(0) if rates[1:] else rates[0]})
    return last, learner.policy.state_dict()


def rows(run_dir: Path) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def test_a_killed_run_continues_bit_for_bit_until_its_budget_is_spent(tmp_path: Path) -> None:
    # 6 steps of warm-up, then 32 an iteration while no episode ends: 6, 38, 70, 102, 134
    last, whole = run_online(tmp_path / "whole", OnlineBudget(env_steps=130, evaluate_every=3))
    assert last["iteration"] == 3 and last["env_steps"] == 134
    found = rows(tmp_path / "whole")
    assert [row["env_steps"] for row in found] == [6, 38, 70, 102, 134]
    assert [row["iteration"] for row in found if "validation" in row] == [-1, 2, 3]  # the base, every third, and the last
    killed = tmp_path / "killed"
    run_online(killed, OnlineBudget(iterations=2, evaluate_every=3))
    lines = (killed / "metrics.jsonl").read_text()
    (killed / "metrics.jsonl").write_text(lines + '{"iteration": 2, "env_steps": 102}\n{"iter')  # killed before the state was saved
    _, resumed = run_online(killed, OnlineBudget(env_steps=130, evaluate_every=3))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    expected = [{**row} for row in found]
    stopped = rows(killed)
    stopped[2].pop("validation")  # evaluated where the shorter budget ended
    assert stopped == expected


def test_a_run_stops_at_the_match_point_and_knows_it_when_started_again(tmp_path: Path) -> None:
    budget = OnlineBudget(evaluate_every=1, match=0.8)
    last, _ = run_online(tmp_path, budget, rates=(0.2, 0.5, 0.9))
    assert last["iteration"] == 1 and last["validation"]["value"] == 0.9
    assert last["matched"] == {"rate": 0.8, "env_steps": 70} and "matched" not in rows(tmp_path)[1]
    again, _ = run_online(tmp_path, budget, rates=(0.0,))
    assert again == last and len(rows(tmp_path)) == 3
    with pytest.raises(ConfigError, match="evaluate_every 0"):
        OnlineBudget(evaluate_every=0, match=0.8)
    with pytest.raises(ConfigError, match="found 80"):
        OnlineBudget(match=80)


@pytest.mark.slow
@pytest.mark.timeout(600)  # an evaluation has processes of its own to start
def test_the_command_writes_a_checkpoint_with_its_lineage_and_refuses_another_configuration(tmp_path: Path) -> None:
    model = make_model()
    world = save_world_model(tmp_path / "world", model, Contract(), {})
    base = save_policy(tmp_path / "base", make_policy(model), Contract(), SKILL, world, {"episodes": 4})
    paths = {"--world-model": "world", "--policy": "base", "--out": "out", "--run-dir": "run"}
    words = ["dppo", *(word for flag, name in paths.items() for word in (flag, str(tmp_path / name)))]
    words += ["--batch", "2", "--chunks", "2", "--workers", "1", "--episodes", "1", "--iterations", "1", "--evaluate-every", "5"]
    assert main.main(words) == 0
    policy, checkpoint = load_policy(tmp_path / "out" / "policies" / SKILL, world_model_id=world)
    assert policy.config.finetuned_steps == PPOConfig().finetuned_steps
    assert checkpoint.lineage["base"] == base and checkpoint.lineage["env_steps"] == 6 + 16 and checkpoint.lineage["episodes"] == 4
    assert checkpoint.card["validation"]["episodes"] == 1
    assert main.main([*words, "--bc-scale", "0.5"]) == 2
