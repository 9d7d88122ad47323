"""World model: latents and unrolling against oracles, training that resumes exactly, a filter equal to the batch path."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diwa_core.contract import Contract, Observation, proprio_vector
from diwa_core.data.sequences import StreamSampler, WindowSampler
from diwa_core.data.store import PlayStore
from diwa_core.errors import CheckpointError, ConfigError, ContractError, DataError, DiwaError
from diwa_core.policy.demonstrations import demonstration_pairs, filter_episode
from diwa_core.sim.play_table import LEASH_M, PlayTable
from diwa_core.sim.state import SceneState
from diwa_core.world_model.command import CommandedPose, from_lag, to_lag
from diwa_core.world_model.filter import LatentFilter, load_world_model, save_world_model
from diwa_core.world_model.model import SIZES, WorldModel, WorldModelConfig
from diwa_core.world_model.rssm import CategoricalLatent, State
from diwa_core.world_model.train import PlayData, TrainConfig, Trainer
from diwa_core.world_model.vision import independent_components

TINY = replace(SIZES["small"], code_sizes=(6, 5), deterministic=24, hidden=24)
TINY_PAPER = replace(SIZES["paper"], cnn_width=2, groups=4, classes=4, deterministic=24, hidden=24)
TRAINING = TrainConfig(
    steps=6, batch=4, prefix=(2, 4), horizon_starts=(0.0, 0.5), horizons=(3, 6), code_updates=3, code_batch=8, log_every=1, stream_length=6
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Random images; a target pose that follows the actions. 3 episodes, 40 frames each."""
    rng = np.random.default_rng(0)
    store = PlayStore.create(tmp_path_factory.mktemp("play") / "store", Contract())
    for _ in range(3):
        actions = rng.uniform(-1, 1, (40, 7))
        target_pose = np.concatenate([np.zeros((1, 6)), np.cumsum(0.02 * actions[:-1, :6], 0)])
        store.append_episode(
            {
                "rgb_static": rng.integers(0, 255, (40, 64, 64, 3), dtype=np.uint8),
                "rgb_gripper": rng.integers(0, 255, (40, 64, 64, 3), dtype=np.uint8),
                "robot_obs": np.cumsum(rng.normal(0, 0.01, (40, 15)), 0),
                "target_pose": target_pose,
                "actions": actions,
                "scene_obs": rng.uniform(0, 0.1, (40, 24)),
                "skill": np.zeros(40, np.int8),
            }
        )
    return store


def make_model(config: WorldModelConfig, seed: int = 0) -> WorldModel:
    torch.manual_seed(seed)
    return WorldModel(config)


def test_paper_size_has_the_papers_parameters():
    count = sum(p.numel() for p in WorldModel(SIZES["paper"]).parameters())
    assert 39.8e6 < count < 40.0e6
    assert WorldModel(SIZES["paper"]).feature_size == 2048


def test_categorical_divergence_equals_torch_distributions():
    latent = CategoricalLatent(8, 8, 8, groups=3, classes=5)
    torch.manual_seed(0)
    p, q = torch.randn(2, 7, 15)
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.OneHotCategorical(logits=x.unflatten(-1, (3, 5))) for x in (p, q))
    ).sum(-1)
    for balance in (0.0, 0.8, 1.0):
        assert torch.allclose(latent.divergence(p, q, balance), expected, atol=1e-5)


def test_kl_balance_shares_the_gradient_between_prior_and_posterior():
    latent = CategoricalLatent(8, 8, 8, groups=3, classes=5)
    p, q = torch.randn(2, 15).requires_grad_(), torch.randn(2, 15).requires_grad_()
    latent.divergence(p, q, 1.0).sum().backward()
    assert p.grad is None or p.grad.abs().max() == 0
    assert q.grad.abs().max() > 0


def test_categorical_samples_follow_their_probabilities():
    latent = CategoricalLatent(4, 4, 4, groups=1, classes=3)
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    sample = latent.sample(logits, torch.Generator().manual_seed(0))
    assert set(sample.round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(sample.mean(0), torch.tensor([0.5, 0.3, 0.2]), atol=0.015)


@pytest.mark.parametrize("config", [TINY, replace(TINY, stochastic=True), TINY_PAPER], ids=["residual", "stochastic", "categorical"])
def test_unroll_equals_single_steps_and_resets(config):
    model = make_model(config)
    batch, time = 3, 5
    actions, embeddings = torch.randn(batch, time, 7), torch.randn(batch, time, model.embedding_size)
    first = torch.zeros(batch, time, dtype=torch.bool)
    first[1, 3] = True
    observed = torch.ones(batch, time, dtype=torch.bool)
    observed[:, 4] = False
    start = State(torch.randn(batch, config.deterministic), torch.randn(batch, model.rssm.latent.size))
    states, _, _ = model.rssm.unroll(start, actions, embeddings, first, observed, torch.Generator().manual_seed(1))
    generator, state = torch.Generator().manual_seed(1), start
    for t in range(4):
        state = model.rssm.initial(batch).where(first[:, t], state)
        state = model.rssm.observe(state, actions[:, t], embeddings[:, t], generator)
        assert torch.allclose(state.feature, states[:, t].feature, atol=1e-6)
    assert torch.allclose(model.rssm.advance(state, actions[:, 4]), states.h[:, 4], atol=1e-6)
    if not config.stochastic and config.latent == "residual":
        assert torch.allclose(model.rssm.imagine(state, actions[:, 4]).z, states.z[:, 4], atol=1e-6)


def test_an_open_loop_prediction_does_not_see_the_future():
    model = make_model(TINY)
    actions, embeddings = torch.randn(2, 8, 7), torch.randn(2, 8, model.embedding_size)
    first, observed = torch.zeros(2, 8, dtype=torch.bool), torch.arange(8).expand(2, 8) < 3
    run = lambda e: model.rssm.unroll(model.rssm.initial(2), actions, e, first, observed)[0].feature  # noqa: E731
    changed = embeddings.clone()
    changed[:, 3:] += 1
    assert torch.equal(run(embeddings), run(changed))
    changed[:, 2] += 1
    assert not torch.allclose(run(embeddings)[:, -1], run(changed)[:, -1])


def test_windows_stay_inside_episodes_and_repeat_from_the_seed():
    sampler = WindowSampler([(0, 40), (40, 45), (45, 90)], 256, 12, (2, 5), 3)
    index = sampler.sample(7)
    assert np.array_equal(index.frames, sampler.sample(7).frames) and not np.array_equal(index.frames, sampler.sample(8).frames)
    assert (np.diff(index.frames, axis=1) == 1).all()
    assert set(np.unique(np.digitize(index.frames, [40, 45]))) == {0, 2}  # never in the short episode
    assert all(len(set(row)) == 1 for row in np.digitize(index.frames, [40, 45]))
    prefixes = index.observed.sum(1)
    assert prefixes.min() == 2 and prefixes.max() == 5
    every_start = set(index.frames[:, 0]) | set(sampler.sample(9).frames[:, 0])
    assert {0, 28, 45, 78} <= every_start


def test_event_windows_hold_their_event_behind_the_prefix():
    events = np.zeros(1000)
    events[[130, 777]] = 1.0, 3.0
    sampler = WindowSampler([(0, 200), (200, 210), (210, 1000)], 64, 40, (4, 8), 0, events, event_share=1.0)
    index = sampler.sample(3)
    position = np.where((index.frames == 130) | (index.frames == 777), np.arange(40), 0).max(1)
    assert (position >= 8).all() and len(set(position)) > 8
    assert 0.5 < (index.frames == 777).any(1).mean() < 0.95
    assert all((row[0] < 200) == (row[-1] < 200) for row in index.frames)
    some = WindowSampler([(0, 1000)], 2000, 40, (4, 8), 0, events, event_share=0.3).sample(0)
    assert 0.3 < ((some.frames == 130) | (some.frames == 777)).any(1).mean() < 0.45
    short = np.zeros(1000)
    short[205] = 1.0  # in an episode without windows: as if there were no events
    assert WindowSampler([(0, 200), (200, 210)], 8, 40, (4, 8), 0, short, 1.0).sample(0).frames.max() < 200


def test_independent_components_find_a_light_and_a_drawer_in_a_mixture():
    generator = torch.Generator().manual_seed(0)
    light = (torch.rand(4000, generator=generator) < 0.5).double()
    drawer = torch.rand(4000, generator=generator).mul(8).sub(3.5).clamp(0, 1).double()
    sources = torch.cat([torch.stack([light, drawer], 1), torch.randn(4000, 4, generator=generator, dtype=torch.double)], 1)
    white = (sources - sources.mean(0)) @ torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.double))[0]
    variances, axes = torch.linalg.eigh(torch.cov(white.T))
    white = white @ (axes / variances.sqrt())
    components = white @ independent_components(white)
    correlation = torch.corrcoef(torch.cat([components, sources[:, :2]], 1).T)[:6, 6:].abs()
    assert (correlation.max(0).values > 0.98).all() and correlation.argmax(0).unique().numel() == 2


def test_windows_longer_than_every_episode_are_refused():
    with pytest.raises(DataError, match="longest episode has 40"):
        WindowSampler([(0, 40)], 2, 41, (2, 5), 0)


def test_streams_continue_and_reset_at_episode_starts():
    sampler = StreamSampler([(0, 30), (30, 70)], 4, 10, 0.0, 0)
    a, b = sampler.sample(0), sampler.sample(1)
    assert ((a.frames[:, -1] + 1) % 70 == b.frames[:, 0]).all()
    assert a.first[:, 0].all()
    assert (b.first == np.isin(b.frames, [0, 30])).all()


@pytest.mark.parametrize("config", [TINY, TINY_PAPER, replace(SIZES["lowdim"], deterministic=16, hidden=16)], ids=lambda c: c.name)
def test_a_killed_training_goes_on_with_the_same_loss(store, tmp_path, config):
    training = TRAINING if config.latent == "residual" else replace(TRAINING, open_loop=False)
    data = PlayData([store], config)
    whole = Trainer(make_model(config), data, training, tmp_path / "whole")
    expected = whole.run()
    killed = Trainer(make_model(config), PlayData([store], config), training, tmp_path / "killed")
    update, killed.update = killed.update, None

    def update_then_die():
        if killed.step == 3:
            killed.save()
            raise KeyboardInterrupt
        return update()

    killed.update = update_then_die
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = Trainer(make_model(config, seed=99), PlayData([store], config), training, tmp_path / "killed")
    found = resumed.run()
    assert found["loss"] == expected["loss"]
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_resume_with_another_configuration_is_refused(store, tmp_path):
    Trainer(make_model(TINY), PlayData([store], TINY), TRAINING, tmp_path)
    with pytest.raises(ConfigError, match=r"now training\.batch = 8"):
        Trainer(make_model(TINY), PlayData([store], TINY), replace(TRAINING, batch=8), tmp_path)


def test_a_second_model_can_share_the_frozen_codes(store, tmp_path):
    first, second = WorldModel(TINY), WorldModel(TINY)
    data = PlayData([store], TINY)
    Trainer(first, data, TRAINING, tmp_path / "first").run()
    trainer = Trainer(second, PlayData([store], TINY), replace(TRAINING, seed=2), tmp_path / "second", codes_from=first)
    trainer.run()
    assert torch.equal(trainer.data.embeddings, data.embeddings)
    assert not torch.equal(second.rssm.first_h, first.rssm.first_h)
    with pytest.raises(ConfigError, match="equal views"):
        second.take_observation(WorldModel(replace(TINY, code_sizes=(6, 4))))


def test_nan_stops_training_keeps_the_batch_and_the_last_good_state(store, tmp_path):
    trainer = Trainer(make_model(TINY), PlayData([store], TINY), TRAINING, tmp_path)
    trainer._prepare(lambda stage, done: None)
    trainer.data.embeddings[10:20] = float("nan")
    with pytest.raises(DiwaError, match="nan_batch"):
        for _ in range(6):
            trainer.update()
    assert list(tmp_path.glob("nan_batch_*.safetensors"))
    assert all(torch.isfinite(v).all() for v in trainer.model.state_dict().values())


def test_training_learns_how_the_target_follows_the_actions(store, tmp_path):
    config = replace(SIZES["lowdim"], scene_size=0, deterministic=32, hidden=32)
    training = replace(TRAINING, steps=150, batch=32, horizon_starts=(0.0,), horizons=(6,), learning_rate=1e-2)
    trainer = Trainer(make_model(config), PlayData([store], config), training, tmp_path)
    trainer.run()
    rows = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 150
    model, data = trainer.model.eval(), trainer.data
    actions = torch.from_numpy(data.actions[:40])
    state = model.rssm.initial(1)
    for t in range(4):
        action = torch.tensor([[0, 0, 0, 0, 0, 0, 1.0]]) if t == 0 else actions[None, t - 1]
        state = model.rssm.observe(state, action, data.embeddings[None, t])
    for t in range(4, 10):
        state = model.rssm.imagine(state, actions[None, t - 1])
    predicted, real = model.decode_low(state)[0, 18:21], data.low[9, 18:21]
    assert (predicted - real).norm() < 0.35 * (data.low[3, 18:21] - real).norm()


def episode_arrays(store) -> dict:
    return {name: store.read(name, 0, 40) for name in store.fields}


def observations(arrays: dict) -> list[Observation]:
    views = ("rgb_static", "rgb_gripper")
    return [Observation({v: arrays[v][t] for v in views}, arrays["robot_obs"][t], arrays["target_pose"][t]) for t in range(40)]


@pytest.mark.parametrize("config", [TINY, TINY_PAPER], ids=["small", "paper"])
def test_serving_equals_training_frame_by_frame(store, tmp_path, config):
    model = make_model(config)
    save_world_model(tmp_path / "wm", model, Contract(), {})
    latent_filter = LatentFilter.load(tmp_path / "wm")
    arrays = episode_arrays(store)
    expected = filter_episode(model, arrays).feature.numpy()
    for t, observation in enumerate(observations(arrays)):
        feature = latent_filter.update(observation, None if t == 0 else arrays["actions"][t - 1])
        assert np.allclose(feature, expected[t], atol=1e-5), t
    features, chunks = demonstration_pairs(model, [arrays])
    assert np.allclose(features[0], expected[config.warmup_frames - 1], atol=1e-5)
    assert np.allclose(chunks[0], arrays["actions"][3:7], atol=1e-6)


def test_the_filter_refuses_bad_input_and_keeps_its_state(store, tmp_path):
    save_world_model(tmp_path / "wm", make_model(TINY), Contract(), {})
    latent_filter = LatentFilter.load(tmp_path / "wm")
    arrays = episode_arrays(store)
    first, second = observations(arrays)[:2]
    latent_filter.update(first, None)
    state = latent_filter.state
    bad = Observation(second.images, np.full(15, np.nan), second.target_pose)
    for observation, action in ((bad, arrays["actions"][0]), (second, None), (second, np.full(7, np.inf))):
        with pytest.raises(ContractError):
            latent_filter.update(observation, action)
    assert latent_filter.state is state and latent_filter.frames == 1


def test_half_precision_checkpoints_keep_the_features(store, tmp_path):
    model = make_model(TINY)
    save_world_model(tmp_path / "wm", model, Contract(), {}, half=True)
    loaded, _ = load_world_model(tmp_path / "wm")
    arrays = episode_arrays(store)
    assert torch.allclose(filter_episode(model, arrays).feature, filter_episode(loaded, arrays).feature, atol=3e-2)


def test_a_checkpoint_of_another_kind_or_contract_is_refused(tmp_path):
    save_world_model(tmp_path / "wm", make_model(TINY), Contract(rate_hz=15.0), {})
    with pytest.raises(CheckpointError, match=r"rate_hz.*30\.0.*15\.0"):
        load_world_model(tmp_path / "wm", Contract())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latent": "gaussian"}, "residual"),
        ({"vision": "vit"}, "cnn"),
        ({"vision": "cnn"}, "frozen"),
        ({"code_sizes": (48,)}, "one size for each"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SIZES["small"], **change)


def test_the_commanded_pose_moves_as_in_the_simulator():
    table = PlayTable(image_size=None)
    rng = np.random.default_rng(0)
    low, actions = [], []
    table.reset(options={"state": SceneState()})
    for _ in range(60):
        action = rng.uniform(-1, 1, 7) + np.array([0, 0, -0.4, 0, 0, 0, 0])  # into the table, so that the leash is felt
        low.append(proprio_vector(table.robot_obs, table.target_pose))
        actions.append(np.clip(action, -1, 1))
        table.apply(action)
    table.close()
    low, actions = torch.from_numpy(np.stack(low)), torch.from_numpy(np.stack(actions)).float()
    command = CommandedPose(0.02, 0.05, LEASH_M, 27)
    command.measure(to_lag(low))
    predicted, held = command(command.standardise(to_lag(low[:-1])), actions[:-1])
    expected = command.standardise(to_lag(low[1:]))[:, 18:27]
    assert (low[:, 18:21] - low[:, :3]).norm(dim=1).max() > 0.95 * LEASH_M
    assert torch.allclose(predicted * command.std[18:27], expected * command.std[18:27], atol=2e-5)
    stayed = command.restore(torch.cat([held, torch.zeros(len(held), 18)], -1))[:, :3]
    assert torch.allclose(stayed, low[:-1, :3] - low[1:, 18:21], atol=2e-5)  # where the arm was, seen from the new target
    arrived = command.close(held, torch.ones(9))
    assert torch.allclose(arrived * command.std[:9] + command.mean[:9], torch.zeros(9), atol=1e-5)
    assert torch.allclose(from_lag(to_lag(low)), low, atol=1e-6)
