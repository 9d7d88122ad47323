"""Schedule and samplers against an outside oracle, what is learned against the truth, chains against hand-computed densities."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diwa_core.contract import Contract
from diwa_core.errors import CheckpointError, ConfigError, DataError
from diwa_core.policy import BCConfig, DiffusionPolicy, PolicyConfig, chunk_targets, load_policy, save_policy, train_policy
from diwa_core.policy.program import compile_sampler
from diwa_core.policy.schedule import NoiseSchedule, cosine_betas, gaussian_log_prob

ORACLE = json.loads((Path(__file__).parent / "data" / "schedule_oracle.json").read_text())
SMALL = PolicyConfig(feature_size=6, hidden=(32, 32, 32))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small_policy(config: PolicyConfig = SMALL, seed: int = 0) -> DiffusionPolicy:
    torch.manual_seed(seed)
    return DiffusionPolicy(config)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- schedule and samplers: the oracle is the diffusers library, see data/make_schedule_oracle.py ---


def oracle_prediction(noisy: torch.Tensor, k: torch.Tensor, embedded: torch.Tensor | None = None) -> torch.Tensor:
    return torch.tanh(0.7 * noisy + k[:, None, None] / 20) * 1.5


def test_schedule_equals_oracle() -> None:
    assert np.allclose(cosine_betas(20), ORACLE["betas"], rtol=1e-6)
    schedule = NoiseSchedule(20)
    assert torch.allclose(schedule.alpha_bar[1:], torch.tensor(ORACLE["alphas_cumprod"]), rtol=1e-5)
    case = {key: torch.tensor(value) for key, value in ORACLE["add_noise"].items()}
    assert torch.allclose(schedule.add_noise(case["clean"], torch.tensor(ORACLE["noise"][0]), case["k"]), case["noisy"], atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim_5_0.0", "ddim_10_0.0", "ddim_20_0.0", "ddim_5_0.6", "ddim_10_1.0"])
def test_sampler_equals_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, *options = name.split("_")
    settings = {"sampler_steps": int(options[0]), "eta": float(options[1])} if options else {}
    policy = small_policy(PolicyConfig(6, horizon=2, action_size=3, sampler=sampler, hidden=(32, 32, 32), **settings))
    monkeypatch.setattr(policy.base, "forward", oracle_prediction)
    noise = torch.tensor(ORACLE["noise"]).transpose(0, 1)
    states = policy.sample(torch.zeros(2, 6), noise=noise, return_chain=True)
    expected = torch.tensor(ORACLE[name]["states"] if options else ORACLE[name]).transpose(0, 1)
    assert states.shape == expected.shape and torch.allclose(states, expected, atol=2e-4)
    if options:
        assert policy.schedule.ddim_steps(policy.config.sampler_steps) == ORACLE[name]["timesteps"]


@given(k=st.integers(0, 19), clean=st.floats(-1, 1), noise=st.floats(-4, 4))
@settings(max_examples=200, deadline=None)
def test_perfect_prediction_walks_to_the_clean_sample(k: int, clean: float, noise: float) -> None:
    """With the true noise, the mean of the last transition from any step is the clean sample."""
    schedule = NoiseSchedule(20)
    step = torch.tensor([k])
    noisy = schedule.add_noise(torch.full((1, 1, 1), clean), torch.full((1, 1, 1), noise), step)
    mean, std = schedule.transition(noisy, torch.full((1, 1, 1), noise), step, torch.tensor([-1]), eta=1.0)
    assert std.item() == 0 and abs(mean.item() - clean) < 2e-3


def test_posterior_is_bayes_rule() -> None:
    """Mean and variance of q(x_{k-1} | x_k, x_0) as the product of two Gaussians, in float64."""
    betas = cosine_betas(20)
    alpha_bar = np.cumprod(1 - betas)
    for k in range(1, 20):
        clean, noisy = 0.4, -0.3
        precision = (1 - betas[k]) / betas[k] + 1 / (1 - alpha_bar[k - 1])
        expected = (math.sqrt(1 - betas[k]) * noisy / betas[k] + math.sqrt(alpha_bar[k - 1]) * clean / (1 - alpha_bar[k - 1])) / precision
        predicted = (noisy - math.sqrt(alpha_bar[k]) * clean) / math.sqrt(1 - alpha_bar[k])
        step = torch.tensor([k])
        mean, std = NoiseSchedule(20).transition(torch.full((1, 1, 1), noisy), torch.full((1, 1, 1), predicted), step, step - 1, eta=1.0)
        assert mean.item() == pytest.approx(expected, abs=2e-4) and std.item() == pytest.approx(precision**-0.5, rel=1e-4)


# --- the policy as a module ---


def test_paper_size() -> None:
    assert sum(p.numel() for p in DiffusionPolicy(PolicyConfig(2048)).parameters()) == 1_612_364
    assert "base 1.61 M" in repr(DiffusionPolicy(PolicyConfig(2048)))


def test_split_first_layer_is_a_linear_layer_on_the_concatenation() -> None:
    base = small_policy().base
    noisy, k, feature = numbers(1, 5, 4, 7), torch.arange(5), numbers(2, 5, 6)
    time = base.time_layers(
        torch.stack([torch.cat([torch.sin(s / 10000 ** (torch.arange(8) / 7)), torch.cos(s / 10000 ** (torch.arange(8) / 7))]) for s in k])
    )
    joint = torch.cat([base.chunk_layer.weight, base.feature_layer.weight], dim=1)
    x = torch.cat([noisy.flatten(1), time, feature], dim=1) @ joint.T + base.feature_layer.bias
    block = base.blocks[0]
    x = x + block.second(torch.nn.Mish()(block.first(torch.nn.Mish()(x))))
    assert torch.allclose(base(noisy, k, base.embed(feature)), base.output_layer(x).view(5, 4, 7), atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, PolicyConfig(6, hidden=(32, 32, 32), sampler="ddim", sampler_steps=7, eta=0.5)])
def test_samples_are_deterministic_bounded_and_independent_of_the_batch(config: PolicyConfig) -> None:
    policy = small_policy(config)
    feature, noise = numbers(3, 16, 6), policy.draw_noise(16, torch.Generator().manual_seed(4))
    together = policy.sample(feature, noise=noise)
    assert torch.equal(together, policy.sample(feature, torch.Generator().manual_seed(4)))
    assert together.shape == (16, 4, 7) and together.abs().max() <= 1
    alone = torch.cat([policy.sample(feature[i : i + 1], noise=noise[i : i + 1]) for i in range(16)])
    assert torch.allclose(together, alone, atol=1e-4)  # rounding; the noisiest step divides by sqrt(alpha_bar) = .0025
    assert not torch.allclose(together, policy.sample(feature, torch.Generator().manual_seed(5)))


def test_standardisation_makes_affine_features_equal() -> None:
    features = numbers(5, 200, 6)
    plain, scaled = small_policy(), small_policy()
    plain.set_feature_statistics(features)
    scaled.set_feature_statistics(features * 30 - 7)
    noise = plain.draw_noise(4, torch.Generator().manual_seed(0))
    assert torch.allclose(plain.sample(features[:4], noise=noise), scaled.sample(features[:4] * 30 - 7, noise=noise), atol=1e-4)
    assert torch.equal(plain.sample(features[:4] + 1e6, noise=noise), plain.sample(features[:4] + 2e6, noise=noise))  # clipped


def test_loss_is_the_error_of_the_predicted_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    monkeypatch.setattr(policy.base, "forward", lambda noisy, k, embedded: torch.zeros_like(noisy))
    loss = policy.loss(torch.zeros(4000, 4, 7), torch.zeros(4000, 6), torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1.0, abs=0.02)  # the noise's own variance
    alpha_bar = policy.schedule.alpha_bar
    monkeypatch.setattr(policy.base, "forward", lambda noisy, k, embedded: noisy / (1 - alpha_bar[k + 1, None, None]).sqrt())
    assert policy.loss(torch.zeros(64, 4, 7), torch.zeros(64, 6)).item() < 1e-8


@pytest.mark.parametrize(
    "changes", [{"sampler": "euler"}, {"sampler_steps": 0}, {"sampler_steps": 21}, {"finetuned_steps": 21}, {"eta": 1.5}]
)
def test_impossible_settings_are_refused(changes: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        PolicyConfig(6, **changes)


# --- chains for fine-tuning ---


def test_chain_log_probabilities_are_gaussian() -> None:
    policy = small_policy().add_finetuned(10)
    torch.nn.init.normal_(policy.finetuned.output_layer.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    feature = numbers(6, 3, 6)
    chain = policy.sample_chain(feature, torch.Generator().manual_seed(7))
    assert chain.states.shape == (3, 21, 4, 7) and chain.log_prob.shape == (3, 20, 4, 7)
    betas, alpha_bar = cosine_betas(20), np.concatenate([[1], np.cumprod(1 - cosine_betas(20))])
    for i, k in enumerate(reversed(range(20))):
        network = policy.finetuned if k < 10 else policy.base
        noisy, cleaner = chain.states[:, i].double().numpy(), chain.states[:, i + 1].double().numpy()
        with torch.no_grad():
            predicted = network(chain.states[:, i], torch.full((3,), k), network.embed(feature)).double().numpy()
        clean = np.clip((noisy - np.sqrt(1 - alpha_bar[k + 1]) * predicted) / np.sqrt(alpha_bar[k + 1]), -1, 1)
        mean = (np.sqrt(alpha_bar[k]) * betas[k] * clean + np.sqrt(1 - betas[k]) * (1 - alpha_bar[k]) * noisy) / (1 - alpha_bar[k + 1])
        std = max(math.sqrt(betas[k] * (1 - alpha_bar[k]) / (1 - alpha_bar[k + 1])), 0.1)
        assert np.allclose(chain.log_prob[:, i], stats.norm(mean, std).logpdf(cleaner), atol=5e-3)
        assert np.abs((cleaner - mean) / std).max() < 3.01


def test_log_prob_of_stored_transitions_equals_the_sampled_one_and_has_gradients() -> None:
    policy = small_policy().add_finetuned(10)
    feature = numbers(8, 5, 6)
    chain = policy.sample_chain(feature, torch.Generator().manual_seed(9))
    other = policy.sample_chain(feature, torch.Generator().manual_seed(10))
    found = policy.chain_log_prob(feature, torch.stack([chain.states[:, -11:], other.states[:, -11:]], 1))
    assert torch.allclose(found[:, 0], chain.log_prob[:, -10:], atol=1e-4)
    assert torch.allclose(found[:, 1], other.log_prob[:, -10:], atol=1e-4)
    found.mean().backward()
    assert policy.finetuned.output_layer.weight.grad.abs().max() > 0 and policy.base.output_layer.weight.grad is None


def test_finetuned_network_starts_equal_and_acts_only_in_the_last_steps() -> None:
    policy = small_policy()
    tuned = policy.add_finetuned(4)
    feature, noise = numbers(10, 3, 6), policy.draw_noise(3, torch.Generator().manual_seed(0))
    assert torch.equal(policy.sample(feature, noise=noise), tuned.sample(feature, noise=noise))
    torch.nn.init.normal_(tuned.finetuned.output_layer.weight)
    before, after = policy.sample(feature, noise=noise, return_chain=True), tuned.sample(feature, noise=noise, return_chain=True)
    assert torch.equal(before[:, :17], after[:, :17]) and not torch.allclose(before[:, 17], after[:, 17])
    frozen, plain = tuned.sample_chain(feature, noise=noise, base_only=True), policy.sample_chain(feature, noise=noise)
    assert torch.equal(frozen.states, plain.states) and torch.equal(frozen.log_prob, plain.log_prob)


def test_gaussian_log_prob() -> None:
    value, mean, std = torch.tensor([0.3, -2.0]), torch.tensor([0.1, 1.0]), torch.tensor([0.5, 0.1])
    assert np.allclose(gaussian_log_prob(value, mean, std), stats.norm([0.1, 1.0], [0.5, 0.1]).logpdf([0.3, -2.0]), rtol=1e-5)


# --- behaviour cloning ---


def test_learns_both_modes_and_nothing_between() -> None:
    """Chunks lie at +-0.6 (std 0.1) on the diagonal; the feature sets the share of the upper mode: .5 or .8."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.where(torch.rand(2048, generator=generator) < 0.5, 0.5, 0.8)
    mode = torch.where(torch.rand(2048, generator=generator) < feature, 0.6, -0.6)
    chunks = (mode[:, None, None] + 0.1 * torch.randn(2048, 2, 2, generator=generator)).clamp(-1, 1)
    config = PolicyConfig(1, horizon=2, action_size=2, hidden=(128, 128, 128))
    policy = train_policy(feature[:, None], chunks, config, BCConfig(updates=2000, lr=3e-3))
    for value in (0.5, 0.8):
        samples = policy.sample(torch.full((1000, 1), value), torch.Generator().manual_seed(1)).flatten(1)
        share = (mode[feature == value] > 0).double().mean().item()
        upper = int((samples.mean(1) > 0).sum())
        assert stats.binomtest(upper, 1000, share).pvalue > 1e-4  # both modes, in the right shares
        off = ((samples.abs() - 0.6).abs().amax(1) > 0.4).sum().item()
        assert off <= 25  # four deviations: nothing between the modes
        assert (samples.sign().sum(1).abs() < 4).sum().item() <= 10  # no chunk mixes them
        spread = samples - 0.6 * samples.mean(1, keepdim=True).sign()
        assert abs(spread.mean()) < 0.02 and 0.07 < spread.std() < 0.13


def test_training_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    features, chunks = numbers(11, 64, 6), numbers(12, 64, 4, 7).clamp(-1, 1)
    state = torch.get_rng_state()
    seen: list[tuple[int, float]] = []
    first = train_policy(features, chunks, SMALL, BCConfig(updates=30, ema_start=5), seed=1, progress=lambda *args: seen.append(args))
    assert torch.equal(torch.get_rng_state(), state) and [update for update, _ in seen] == list(range(1, 31))
    torch.manual_seed(99)
    again = train_policy(features, chunks, SMALL, BCConfig(updates=30, ema_start=5), seed=1)
    other = train_policy(features, chunks, SMALL, BCConfig(updates=30, ema_start=5), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.base.output_layer.weight, other.base.output_layer.weight)
    assert not first.training


def test_returned_weights_are_the_moving_average() -> None:
    features, chunks = numbers(11, 64, 6), numbers(12, 64, 4, 7).clamp(-1, 1)

    def output(**changes) -> torch.Tensor:
        return train_policy(features, chunks, SMALL, BCConfig(updates=20, **changes)).base.output_layer.weight

    last, first = output(ema_start=20), output(ema_start=0, ema_decay=1.0)  # a copy after every update; the untrained weights
    assert torch.allclose(output(ema_start=0, ema_decay=0.0), last, atol=1e-6)
    half = output(ema_start=19, ema_decay=0.5)  # between the last two updates
    assert 0 < (half - last).abs().max() < (first - last).abs().max()
    assert torch.equal(output(ema_start=0, ema_decay=0.5, ema_every=20), 0.5 * (first + output(ema_start=0, ema_decay=0.0, ema_every=20)))


def test_chunks_hold_at_the_end_of_an_episode() -> None:
    actions = np.full((7, 7), 0.5, dtype=np.float32)
    actions[:, 0] = np.arange(7) / 10
    actions[:, 6] = [1, 1, -1, -1, 1, 1, 1]
    chunks = chunk_targets(actions, [(4, 7), (0, 4)])
    assert chunks.shape == (7, 4, 7) and chunks.dtype == np.float32
    assert np.array_equal(chunks[3], actions[:4])  # first frame of the second pair of bounds: no padding
    assert np.array_equal(chunks[4, :3], actions[1:4])
    assert np.array_equal(chunks[4, 3], [0, 0, 0, 0, 0, 0, -1])  # the gripper stays closed
    assert np.array_equal(chunks[2, 1:], np.tile([0, 0, 0, 0, 0, 0, 1], (3, 1)))  # and open in the other episode


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), horizon=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_chunks_never_look_into_another_episode(lengths: list[int], horizon: int) -> None:
    ends = np.cumsum(lengths)
    episode = np.repeat(np.arange(len(lengths)) + 1, lengths) / 10
    actions = np.tile(episode[:, None], (1, 7))
    chunks = chunk_targets(actions, list(zip(ends - lengths, ends, strict=True)), horizon)
    assert chunks.shape == (sum(lengths), horizon, 7)
    assert np.allclose(chunks[:, 0, 0], episode)
    assert all(set(np.unique(chunk[:, 0])) <= {np.float32(0), np.float32(own)} for chunk, own in zip(chunks, episode, strict=True))


def test_bad_training_data_is_refused() -> None:
    features, chunks = numbers(11, 64, 6), numbers(12, 64, 4, 7).clamp(-1, 1)
    for bad_features, bad_chunks, message in (
        (features[:63], chunks[:63], "at least 64 pairs, found 63"),
        (features[:, :5], chunks, "shapes"),
        (features, chunks[:, :3], "shapes"),
        (features, chunks * 2, r"actions in \[-1, 1\]"),
        (features.clone().fill_(math.nan), chunks, "finite"),
    ):
        with pytest.raises(DataError, match=message):
            train_policy(bad_features, bad_chunks, SMALL)
    with pytest.raises(DataError, match=r"found \(3, 9\)"):
        chunk_targets(np.zeros((8, 7)), [(0, 3), (3, 9)])


# --- checkpoints ---


@pytest.mark.parametrize("half", [False, True])
def test_saved_policy_acts_the_same(tmp_path: Path, half: bool) -> None:
    policy = small_policy().add_finetuned(5)
    policy.set_feature_statistics(numbers(13, 50, 6) * 3 + 1)
    torch.nn.init.normal_(policy.finetuned.output_layer.weight, std=0.2)
    identity = save_policy(tmp_path / "p", policy, Contract(), "open_drawer", "abc", {"seed": 1}, half=half)
    loaded, checkpoint = load_policy(tmp_path / "p", Contract(), "abc")
    assert (checkpoint.identity, checkpoint.config["skill"], checkpoint.lineage) == (
        identity,
        "open_drawer",
        {"seed": 1, "world_model": "abc"},
    )
    assert loaded.config == policy.config and not loaded.training
    feature, noise = numbers(14, 4, 6), policy.draw_noise(4, torch.Generator().manual_seed(0))
    difference = (loaded.sample(feature, noise=noise) - policy.sample(feature, noise=noise)).abs().max()
    assert difference <= (0.01 if half else 0)


def test_policy_of_another_world_model_or_shape_is_refused(tmp_path: Path) -> None:
    save_policy(tmp_path / "p", small_policy(), Contract(), "open_drawer", "abc", {})
    with pytest.raises(CheckpointError, match="expected a policy trained on world model 'xyz', found one trained on 'abc'"):
        load_policy(tmp_path / "p", world_model_id="xyz")
    policy = small_policy()
    policy.config = PolicyConfig(7, hidden=(32, 32, 32))
    save_policy(tmp_path / "q", policy, Contract(), "open_drawer", "abc", {})
    with pytest.raises(CheckpointError, match="do not fit their configuration"):
        load_policy(tmp_path / "q")


@pytest.mark.parametrize("changes", [{}, {"finetuned_steps": 10}, {"sampler": "ddim", "sampler_steps": 5}, {"horizon": 6}])
def test_compiled_sampler_draws_the_same_chunks_bit_for_bit_and_keeps_its_own_weights(changes):
    config = PolicyConfig(feature_size=8, hidden=(16, 16, 16), **changes)
    policies = [DiffusionPolicy(config).eval() for _ in range(2)]
    for policy in policies:
        policy.set_feature_statistics(torch.randn(50, 8) * 3)
    programs = [compile_sampler(policy) for policy in policies]
    for policy, program in zip(policies, programs, strict=True):
        for feature in torch.randn(5, 1, 8) * 4:
            noise = policy.draw_noise(1)
            assert torch.equal(program(feature, noise), policy.sample(feature, noise=noise))
    noise, feature = policies[0].draw_noise(1), torch.randn(1, 8)
    before = programs[0](feature, noise)
    torch.nn.init.zeros_(policies[0].base.output_layer.weight)
    assert torch.equal(programs[0](feature, noise), before)
