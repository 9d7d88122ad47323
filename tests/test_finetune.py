"""Dream MDP and denoising PPO against hand-computed tables and independent calculations."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diwa_core.finetune.ppo import DenoisingPPO, PPOConfig, RewardScale, Rollout, advantages, clip_schedule, policy_loss
from diwa_core.imagination.dream import Dream, DreamStep, executable
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_core.world_model.rssm import State


def rollout(rewards, values, terminated, truncated, final_values, last_value) -> Rollout:
    column = lambda x, kind=torch.float32: torch.tensor(x, dtype=kind)[:, None]  # noqa: E731
    empty = torch.zeros(len(rewards), 1)
    return Rollout(
        empty, empty, empty, column(rewards), column(terminated, torch.bool), column(truncated, torch.bool), column(final_values),
        column(values), torch.tensor([last_value]),
    )  # fmt: skip


def test_advantages_of_a_hand_computed_table():
    # gamma 0.5, lambda 0.5; t=1 terminates (reward 1), t=2 is truncated in a state worth 0.8, t=3 goes on to a state worth 0.4
    table = rollout([0, 1, 0, 0], [0.2, 0.6, 0.5, 0.3], [0, 1, 0, 0], [0, 0, 1, 0], [9, 9, 0.8, 9], 0.4)
    found, returns = advantages(table, 0.5, 0.5)
    a3 = 0 + 0.5 * 0.4 - 0.3
    a2 = 0 + 0.5 * 0.8 - 0.5
    a1 = 1 - 0.6
    a0 = 0 + 0.5 * 0.6 - 0.2 + 0.25 * a1
    assert torch.allclose(found[:, 0], torch.tensor([a0, a1, a2, a3]), atol=1e-6)
    assert torch.allclose(returns[:, 0], found[:, 0] + table.values[:, 0])


def test_clip_grows_exponentially_from_noisiest_to_last():
    config = PPOConfig(finetuned_steps=10, clip_first=0.001, clip_last=0.01, clip_growth=3.0)
    clips = clip_schedule(config, torch.arange(10)).numpy()
    expected = [0.001 + 0.009 * (np.exp(3 * t / 9) - 1) / (np.exp(3) - 1) for t in range(10)]
    assert np.allclose(clips, expected, atol=1e-7)


def test_policy_loss_equals_an_independent_calculation():
    config = PPOConfig(finetuned_steps=3, denoising_discount=0.9, clip_first=0.1, clip_last=0.3)
    rng = np.random.default_rng(0)
    new, old, advantage = rng.normal(size=(3, 50)) * 0.3
    k = rng.integers(3, size=50)
    loss, kl = policy_loss(torch.tensor(new), torch.tensor(old), torch.tensor(advantage), torch.tensor(k), config)
    clips = {0: 0.3, 1: 0.1 + 0.2 * (np.exp(1.5) - 1) / (np.exp(3) - 1), 2: 0.1}
    terms = []
    for n, o, a, step in zip(new, old, advantage, k, strict=True):
        ratio, scaled = np.exp(n - o), a * 0.9**step
        terms.append(min(ratio * scaled, np.clip(ratio, 1 - clips[step], 1 + clips[step]) * scaled))
    assert np.isclose(loss.item(), -np.mean(terms), atol=1e-6)
    assert np.isclose(kl.item(), np.mean(np.exp(new - old) - 1 - (new - old)), atol=1e-6)


def test_reward_scale_is_the_deviation_of_discounted_returns():
    scale, gamma = RewardScale(0.9), 0.9
    rng = np.random.default_rng(0)
    returns, seen = np.zeros(500), []
    for t in range(60):
        rewards, done = rng.normal(size=500), rng.random(500) < 0.1
        scaled = scale(torch.tensor(rewards), torch.tensor(done))
        returns = gamma * returns + rewards if t else rewards
        seen.append(returns.copy())
        returns = np.where(done, 0, returns)
    assert np.allclose(scaled.numpy(), rewards / np.std(seen), rtol=1e-3)


class CountingModel(WorldModel):
    """A low-dimensional model whose latent counts the steps taken, to test the environment around it."""

    def __init__(self) -> None:
        super().__init__(replace(SIZES["lowdim"], deterministic=2, hidden=2))
        self.rssm.imagine = lambda state, action, generator=None: State(state.h, state.z + action[:, :1])


class ThresholdClassifier(SuccessClassifier):
    """Success once the latent grew by 8 since the start."""

    def success(self, now, start):
        return now[:, 0] - start[:, 0] >= 8


def make_dream(batch: int, max_chunks: int = 3) -> Dream:
    model = CountingModel()
    starts = State(torch.zeros(5, 2), torch.arange(5.0)[:, None].expand(5, model.rssm.latent.size).clone())
    return Dream([model], ThresholdClassifier(ClassifierConfig(model.rssm.latent.size)), [starts], batch, max_chunks)


def test_dream_rewards_terminates_truncates_and_restarts():
    dream = make_dream(2)
    chunk = torch.zeros(2, 4, 7)
    chunk[0, :, 0] = 1.0  # four steps of 1: success after the second chunk; the second episode never moves
    first = dream.step(chunk)
    assert first.reward.tolist() == [0, 0] and not first.terminated.any() and not first.truncated.any()
    second = dream.step(chunk)
    assert second.reward.tolist() == [1, 0] and second.terminated.tolist() == [True, False]
    assert second.final_feature[0, 2] - 8 in range(5) and second.feature[0, 2] in range(5)  # ended at start + 8, began anew at a start
    third = dream.step(chunk)
    assert third.truncated.tolist() == [False, True] and third.reward.tolist() == [0, 0]
    assert dream.chunks.tolist() == [1, 0]


def test_success_in_the_last_chunk_is_not_a_truncation():
    dream = make_dream(1, max_chunks=2)
    chunk = torch.zeros(1, 4, 7)
    chunk[0, :, 0] = 1.0
    dream.step(chunk)
    last = dream.step(chunk)
    assert last.terminated.item() and not last.truncated.item()


def test_executable_actions_are_clipped_and_the_gripper_is_binary():
    action = torch.tensor([[2.0, -2, 0.5, 0, 0, 0, 0.1], [0, 0, 0, 0, 0, 0, -0.1]])
    assert executable(action).tolist() == [[1, -1, 0.5, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, -1]]


class LineWorld:
    """The feature tells the wanted first action; reward when the chunk's mean is within 0.3 of it."""

    def __init__(self, batch: int) -> None:
        self.batch, self.generator = batch, torch.Generator().manual_seed(0)

    def reset(self):
        self.feature = torch.rand(self.batch, 3, generator=self.generator) * 2 - 1
        return self.feature

    def step(self, chunk):
        hit = (chunk[:, :, 0].mean(1) - 0.8 * self.feature[:, 0]).abs() < 0.3
        before = self.feature
        done = torch.ones(self.batch, dtype=torch.bool)
        return DreamStep(self.reset(), before, hit.float(), hit, done & ~hit)


@pytest.mark.timeout(120)
def test_denoising_ppo_improves_a_policy_and_leaves_the_base_alone():
    torch.manual_seed(0)
    small = PolicyConfig(feature_size=3, hidden=(64, 64, 64), denoising_steps=5, sampler_steps=5)
    policy = DiffusionPolicy(small).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    config = PPOConfig(batch=128, chunks=4, finetuned_steps=3, epochs=4, minibatch=128, actor_rate=1e-3, bc_scale=0.0, critic_warmup=1)
    learner = DenoisingPPO(policy, LineWorld(128), config)
    history = [learner.iterate()["success"] for _ in range(30)]
    assert np.mean(history[-3:]) > np.mean(history[:3]) + 0.1
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    base = {name: value for name, value in learner.policy.state_dict().items() if name.startswith("base.")}
    assert all(torch.equal(before[name], value) for name, value in base.items())


def test_learning_in_bfloat16_begins_at_a_ratio_of_one_and_learns():
    torch.manual_seed(0)
    policy = (
        DiffusionPolicy(PolicyConfig(feature_size=3, hidden=(64, 64, 64), denoising_steps=5, sampler_steps=5)).eval().requires_grad_(False)
    )
    config = PPOConfig(batch=128, chunks=4, finetuned_steps=3, epochs=4, minibatch=128, actor_rate=1e-3, bc_scale=0.0, critic_warmup=1)
    learner = DenoisingPPO(policy, LineWorld(128), config, autocast=True)
    rollout, _ = learner.collect()
    features, chains, old = rollout.features.flatten(0, 1), rollout.chains.flatten(0, 1), rollout.log_probs.flatten(0, 1)
    assert chains.dtype == old.dtype == torch.float32
    assert (learner._log_prob(features, chains) - old).abs().max() < 0.3 * config.clip_first
    history = [learner.iterate()["success"] for _ in range(30)]
    assert np.mean(history[-3:]) > np.mean(history[:3]) + 0.1
