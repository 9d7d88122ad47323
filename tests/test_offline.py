"""Dreams of several models, and offline fine-tuning that resumes, chooses and refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diwa_core.contract import Contract
from diwa_core.data.store import PlayStore
from diwa_core.errors import CheckpointError, ConfigError, DataError, DiwaError
from diwa_core.evaluate.rollout import EpisodeResult
from diwa_core.finetune.candidates import ChoiceQuality, candidate_path, format_choice, measure_choice
from diwa_core.finetune.offline import (
    FinetuneConfig,
    Imagination,
    beginning_windows,
    demonstration_windows,
    filter_starts,
    finetune,
    worth_trying,
)
from diwa_core.finetune.ppo import PPOConfig
from diwa_core.imagination.dream import Dream
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_core.world_model.rssm import State

SMALL = replace(SIZES["lowdim"], deterministic=8, hidden=8)
PPO = PPOConfig(iterations=6, batch=16, chunks=3, finetuned_steps=2, epochs=1, minibatch=32, critic_warmup=1)


class ForwardClassifier(SuccessClassifier):
    """Success once the arm's commanded x has moved on by 0.3 deviations."""

    def success(self, now, start):
        return now[:, 18] - start[:, 18] > 0.3


def make_model(seed: int) -> WorldModel:
    torch.manual_seed(seed)
    return WorldModel(SMALL).eval().requires_grad_(False)


def make_imagination(**changes) -> Imagination:
    models = [make_model(0), make_model(1)]
    torch.manual_seed(2)
    z = torch.randn(7, models[0].rssm.latent.size) * 0.1
    starts = [State(torch.full((7, 8), 0.1 * i), z) for i in range(2)]
    classifier = ForwardClassifier(ClassifierConfig(models[0].rssm.latent.size))
    return replace(Imagination(models, classifier, starts, starts, drivers=(0,), judges=(1,)), **changes)


def make_policy(imagination: Imagination) -> DiffusionPolicy:
    torch.manual_seed(3)
    config = PolicyConfig(feature_size=imagination.models[0].feature_size, hidden=(16, 16, 16), denoising_steps=4, sampler_steps=4)
    return DiffusionPolicy(config).eval().requires_grad_(False)


def test_the_driver_decides_and_the_first_model_takes_note():
    imagination = make_imagination()
    dream = replace(imagination, drivers=(0, 1)).dream(5, seed=0)
    seer, driver = (model.rssm for model in imagination.models)
    rows = {0: slice(0, 2), 1: slice(2, 5)}
    seen, driven_h = State(dream.latent.h.clone(), dream.latent.z.clone()), dream.driver_h.clone()
    assert torch.equal(driven_h[rows[0]], seen.h[rows[0]]) and (driven_h[rows[1]] == 0.1).all()
    action = torch.rand(5, 1, 7) * 0.01
    action[..., 6] = 1.0
    dream.step(action)
    own = seer.imagine(seen[rows[0]], action[rows[0], 0])
    other = driver.imagine(State(driven_h[rows[1]], seen.z[rows[1]]), action[rows[1], 0])
    assert torch.allclose(dream.latent.z, torch.cat([own.z, other.z]), atol=1e-6)
    assert torch.allclose(dream.latent.h, seer.advance(seen, action[:, 0]), atol=1e-6)
    assert torch.allclose(dream.driver_h, torch.cat([own.h, other.h]), atol=1e-6)


def test_dreams_in_bfloat16_are_nearly_those_in_float32():
    imagination = make_imagination()
    dreams = [
        Dream(imagination.models[:1], imagination.classifier, imagination.starts[:1], 5, autocast=autocast) for autocast in (False, True)
    ]
    chunk = torch.rand(5, 4, 7) * 0.1
    exact, rounded = (dream.step(chunk).final_feature for dream in dreams)
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, atol=0.02)


def test_an_ensemble_of_equal_models_dreams_as_one():
    imagination = make_imagination()
    twice = replace(imagination, models=[imagination.models[0]] * 2, starts=[imagination.starts[0]] * 2)
    alone, together = imagination.dream(6, 0), replace(twice, drivers=(0, 1)).dream(6, 0)
    for _ in range(4):
        action = torch.rand(6, 2, 7)
        first, second = alone.step(action), together.step(action)
        assert torch.allclose(first.feature, second.feature, atol=1e-5) and torch.equal(first.terminated, second.terminated)


def test_a_misplaced_arm_is_driven_where_it_is_and_seen_where_it_is_not():
    imagination = replace(make_imagination(), misplaced_m=0.01)
    dream = imagination.dream(400, seed=0)
    model = imagination.models[0]
    metres = dream.offset[:, 18:21] * model.command.std[18:21]
    assert metres.std(0).sub(0.01).abs().max() < 0.002 and dream.offset.count_nonzero() == 1200
    seen, offset = dream.latent, dream.offset.clone()
    action = torch.rand(400, 1, 7) * 0.01
    action[..., 6] = 1.0
    driven = model.rssm.imagine(State(dream.driver_h.clone(), seen.z + offset), action[:, 0])
    dream.step(action)
    going = (dream.chunks == 1)[:, None]
    assert torch.allclose(dream.latent.z * going, (driven.z - offset) * going, atol=1e-6)
    assert torch.allclose(dream.latent.h * going, model.rssm.advance(seen, action[:, 0]) * going, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"drivers": (2,)}, {"drivers": ()}, {"starts": []}])
def test_dreams_that_do_not_fit_their_models_are_refused(arguments):
    imagination = make_imagination()
    fields = {"starts": imagination.starts, "drivers": (0,)} | arguments
    with pytest.raises(ConfigError, match="a dream of"):
        Dream(imagination.models, imagination.classifier, fields["starts"], 4, drivers=fields["drivers"])


def test_models_of_a_dream_must_see_with_the_same_code():
    imagination = make_imagination()
    imagination.models[1].command.mean += 1
    with pytest.raises(ConfigError, match="must share their embedding"):
        Dream(imagination.models, imagination.classifier, imagination.starts, 4)


def test_a_killed_fine_tuning_goes_on_bit_for_bit(tmp_path):
    imagination = make_imagination(drivers=(0, 1))
    policy = make_policy(imagination)
    config = FinetuneConfig(PPO, judge_every=2, judge_episodes=16, report_episodes=16)
    whole, found = finetune(imagination, policy, config, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(metrics):
        if metrics["iteration"] == 4:  # after the state of iteration 3 was saved, so one iteration is done again
            raise Killed

    with pytest.raises(Killed):
        finetune(imagination, policy, config, tmp_path / "cut", kill)
    resumed, again = finetune(imagination, policy, config, tmp_path / "cut")
    assert again == found
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "cut")]
    assert rows[0] == rows[1] and [row["iteration"] for row in rows[0]] == list(range(6))


def test_another_configuration_does_not_continue_a_run(tmp_path):
    imagination = make_imagination()
    config = FinetuneConfig(PPO, judge_every=2, judge_episodes=8, report_episodes=8)
    finetune(imagination, make_policy(imagination), config, tmp_path)
    with pytest.raises(ConfigError, match="judge_every"):
        finetune(imagination, make_policy(imagination), replace(config, judge_every=3), tmp_path)


def test_the_judges_choose_among_all_candidates_and_the_base(tmp_path, monkeypatch):
    imagination = make_imagination()
    policy = make_policy(imagination)
    answers = iter([0.5, 0.4, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])  # base, iterations 2, 4, 6, then the report
    weights = []

    def success(self, judged, *_, **__):
        if judged.finetuned is not None:
            weights.append({name: value.clone() for name, value in judged.finetuned.state_dict().items()})
        return next(answers)

    monkeypatch.setattr(Imagination, "success", success)
    chosen, found = finetune(imagination, policy, FinetuneConfig(PPO, judge_every=2), tmp_path)
    assert found == {"iteration": 4, "imagined_before": 0.1, "judged_before": 0.2, "imagined_after": 0.3, "judged_after": 0.4}
    assert all(torch.equal(value, weights[2][name]) for name, value in chosen.finetuned.state_dict().items())
    answers = iter([0.5, 0.4, 0.3, 0.2, 0, 0, 0, 0])
    unchanged, found = finetune(imagination, policy, FinetuneConfig(PPO, judge_every=2), tmp_path / "harm")
    assert found["iteration"] == 0
    assert all(torch.equal(value, policy.base.state_dict()[name]) for name, value in unchanged.finetuned.state_dict().items())


def test_every_candidate_is_kept_with_what_the_judges_said(tmp_path):
    imagination, kept = make_imagination(), []
    config = FinetuneConfig(PPO, judge_every=4, judge_episodes=16, report_episodes=16)
    policy = make_policy(imagination)

    def keep(candidate, judgement):
        kept.append((judgement, candidate))

    _, found = finetune(imagination, policy, config, tmp_path, keep=keep)
    judged = [json.loads(line).get("judged") for line in (tmp_path / "metrics.jsonl").open()]
    assert [judgement["iteration"] for judgement, _ in kept] == [0, 4, 6]
    assert [judgement["judged"] for judgement, _ in kept][1:] == [judged[3], judged[5]]
    assert found["iteration"] == max(kept, key=lambda pair: (pair[0]["judged"], pair[0]["iteration"]))[0]["iteration"]
    again = len(kept)
    finetune(imagination, policy, config, tmp_path, keep=keep)
    assert len(kept) == again  # a finished run has no further candidates


def test_when_the_time_is_up_the_policy_of_that_moment_is_a_candidate(tmp_path):
    imagination, kept, asked = make_imagination(), [], []
    config = FinetuneConfig(PPO, judge_every=4, judge_episodes=16, report_episodes=16)

    def is_over():
        asked.append(None)
        return len(asked) > 3

    finetune(
        imagination,
        make_policy(imagination),
        config,
        tmp_path,
        is_over=is_over,
        keep=lambda candidate, card: kept.append(card["iteration"]),
    )
    assert kept == [0, 3]


def test_a_run_goes_on_with_what_it_was_begun_with_only(tmp_path):
    imagination = make_imagination()
    config = FinetuneConfig(PPO, judge_every=2, judge_episodes=8, report_episodes=8)
    finetune(imagination, make_policy(imagination), config, tmp_path, made_from={"classifier": "a"})
    with pytest.raises(ConfigError, match=r"made_from.classifier = a, now made_from.classifier = b"):
        finetune(imagination, make_policy(imagination), config, tmp_path, made_from={"classifier": "b"})


def test_autocast_is_for_learning_and_judges_stay_exact(tmp_path, monkeypatch):
    seen = []

    class Watched(Dream):
        def _imagine(self, action):
            seen.append((self.batch, torch.is_autocast_enabled("cpu")))
            super()._imagine(action)

    monkeypatch.setattr("diwa_core.finetune.offline.Dream", Watched)
    imagination = make_imagination()
    config = FinetuneConfig(replace(PPO, iterations=1), judge_episodes=8, report_episodes=8, autocast=True)
    finetune(imagination, make_policy(imagination), config, tmp_path)
    assert set(seen) == {(PPO.batch, True), (8, False)}


def test_the_quality_of_a_choice_by_hand():
    success = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]], bool)
    found = ChoiceQuality.measure("run", "open_drawer", [0, 10, 20], [0.2, 0.6, 0.6], success)
    assert (found.chosen, found.best, found.real) == (2, 1, [0.25, 0.75, 0.5])
    assert found.regret == found.last_regret == 0.25
    # starts 0, 2: rates .5, 1, .5, so candidate 1, on 1, 3: .5 - .5; starts 1, 3: 0, .5, .5, so candidate 1, on 0, 2: 1 - .5
    assert found.fair_regret == 0.25
    assert found.rank_correlation == pytest.approx(np.sqrt(3) / 2)
    assert ChoiceQuality.measure("run", "open_drawer", [0, 10], [0.5, 0.5], success[:2]).rank_correlation is None


def test_candidates_of_runs_are_tried_on_validation_starts_and_not_twice(tmp_path):
    def run(plans, report):
        for plan in plans:
            tried.append(plan)
            report(plan, EpisodeResult(plan.skill, plan.index % 4 < int(Path(plan.policy).name) // 10 + 1, 30, np.zeros(24)))

    tried, policy = [], make_policy(make_imagination())
    for name, judged in (("a", (0.1, 0.2, 0.3)), ("b", (0.3, 0.2, 0.1))):
        for i, value in enumerate(judged):
            torch.manual_seed(i + 10 * len(name))
            candidate = policy.add_finetuned(2)
            torch.nn.init.normal_(next(candidate.finetuned.parameters()))
            card = {"iteration": 10 * i, "judged": value}
            save_policy(candidate_path(tmp_path / name, 10 * i), candidate, Contract(), "open_drawer", "w" * 64, {"run": name}, card)
    runs = [tmp_path / "a", tmp_path / "b"]
    first, second = measure_choice(runs, tmp_path / "journal", run, starts=8)
    assert {(plan.split, plan.skill) for plan in tried} == {("validation", "open_drawer")} and len(tried) == 3 * 8  # equal weights: once
    assert first.real == second.real == [0.25, 0.5, 0.75]
    assert (first.chosen, first.rank_correlation, first.regret) == (2, pytest.approx(1), 0)
    assert (second.chosen, second.rank_correlation, second.regret) == (0, pytest.approx(-1), 0.5)
    assert measure_choice(runs, tmp_path / "journal", run, starts=8) == [first, second] and len(tried) == 3 * 8
    assert "2 runs, rank correlation +0.00 of 2; regret 25.0" in format_choice([first, second])
    with pytest.raises(DataError, match="at least 2 kept candidates, found 0"):
        measure_choice([tmp_path], tmp_path / "journal", run)
    with pytest.raises(ConfigError, match="at least 2 starts"):
        measure_choice(runs, tmp_path / "journal", run, starts=1)


def test_learning_that_breaks_down_keeps_the_last_good_state(tmp_path):
    imagination = make_imagination()
    wild = FinetuneConfig(replace(PPO, actor_rate=1e25), judge_every=1, judge_episodes=8, report_episodes=8)
    with pytest.raises(DiwaError, match=r"not finite.*Lower actor_rate"):
        finetune(imagination, make_policy(imagination), wild, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert rows and all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    assert (tmp_path / "learner.tar").exists()


def test_saved_dreams_of_another_batch_are_refused():
    imagination = make_imagination()
    with pytest.raises(CheckpointError, match="another batch"):
        imagination.dream(4, 0).load_state(imagination.dream(5, 0).state())


def test_no_windows_no_starts():
    with pytest.raises(DataError, match="found none"):
        filter_starts(make_model(0), demonstration_windows([], 4, 0))


@pytest.fixture
def play(tmp_path):
    """Two episodes of play, of which the second is shorter than a warm-up."""
    rng = np.random.default_rng(0)
    store = PlayStore.create(tmp_path / "play", Contract())
    for length in (20, 3):
        images = {name: rng.integers(0, 255, (length, 64, 64, 3), dtype=np.uint8) for name in ("rgb_static", "rgb_gripper")}
        low = {"robot_obs": rng.normal(size=(length, 15)), "target_pose": rng.normal(size=(length, 6)), "actions": np.zeros((length, 7))}
        store.append_episode({**images, **low, "scene_obs": np.zeros((length, 24), np.float32), "skill": np.full(length, -1, np.int8)})
    return store


def test_episodes_of_play_begin_in_starts(play):
    windows = beginning_windows(play, warmup=4)
    assert len(windows) == 1 and np.array_equal(windows[0]["robot_obs"], play.read("robot_obs", 0, 4))
    state = filter_starts(make_model(0), windows)
    assert state.h.shape == (1, 8) and state.z.shape[0] == 1


def test_starts_are_worth_trying_where_the_skill_is_neither_done_nor_out_of_reach():
    model = make_model(0)

    def scenes(*places: float) -> State:
        state = model.rssm.initial(len(places))
        return State(state.h.detach(), torch.tensor(places)[:, None].expand_as(state.z))

    class Distance:  # a success is a way of more than 1
        def __call__(self, now, start):
            return 20 * ((now - start)[:, -1] - 1)

        def success(self, now, start):
            return self(now, start) > 0

    begun, ended = scenes(0.0, 0.1), scenes(1.5, 1.6, 1.7)
    found = worth_trying(model, Distance(), scenes(-1.0, 0.0, 0.4, 0.8, 1.2), begun, ended)
    assert found.tolist() == [True, True, True, False, False]
