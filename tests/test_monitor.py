"""The world-model monitor: predictions against a loop written out, tails against their distribution, and refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diwa_core.cli.main import main
from diwa_core.contract import FIRST_ACTION, Contract, Observation
from diwa_core.data.store import FIELDS, PlayStore
from diwa_core.errors import CheckpointError, ConfigError, DataError
from diwa_core.world_model.filter import LatentFilter, save_world_model
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_core.world_model.monitor import (
    HORIZONS,
    Calibration,
    Monitor,
    Tail,
    calibrate,
    compare_sequences,
    debounce,
    find_peaks,
    fit_tail,
    group_errors,
    judge,
    list_groups,
)
from diwa_core.world_model.monitor_data import measure_play
from diwa_core.world_model.rssm import State

TINY = replace(SIZES["small"], code_sizes=(6, 5), deterministic=24, hidden=24)
WARM = TINY.warmup_frames
EPISODE = 60


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return WorldModel(TINY).eval().requires_grad_(False)


@pytest.fixture
def play(model):
    """Sequences that the model itself dreamt, plus noise: embeddings [4, T, E] and the actions [4, T, A] that led into each frame."""
    generator = torch.Generator().manual_seed(1)
    actions = torch.rand(4, EPISODE, 7, generator=generator) * 2 - 1
    state, embeddings = model.rssm.initial(4), []
    for t in range(EPISODE):
        state = model.rssm.imagine(state, actions[:, t])
        embeddings.append(state.z + 0.05 * torch.randn(state.z.shape, generator=generator))
    return torch.stack(embeddings, 1), actions


def make_calibration(model, identity="a" * 64, limit=3.0, deviation=0.05, frames=3):
    size, groups = model.embedding_size, tuple(list_groups(model))
    row = ((limit,) * len(groups),) * len(HORIZONS)
    return Calibration(identity, HORIZONS, groups, ((deviation,) * size,) * len(HORIZONS), row, frames, 1.0)


def test_every_horizon_is_the_open_loop_from_so_many_frames_ago(model, play):
    embeddings, actions = play
    residuals = compare_sequences(model, embeddings, actions)
    state, beliefs = model.rssm.initial(4), []
    for t in range(EPISODE):
        state = model.rssm.observe(state, actions[:, t], embeddings[:, t])
        beliefs.append(State(state.h, embeddings[:, t]))
    for t in (WARM - 1, WARM, WARM + 11, 40):
        for k, horizon in enumerate(HORIZONS):
            if t - horizon < WARM - 1:
                assert np.isnan(residuals[:, t, k]).all()
                continue
            dream = beliefs[t - horizon]
            for step in range(t - horizon + 1, t + 1):
                dream = model.rssm.imagine(dream, actions[:, step])
            np.testing.assert_allclose(residuals[:, t, k], (embeddings[:, t] - dream.z).numpy(), atol=1e-5)


def test_the_running_monitor_sees_what_the_calibration_saw(model, play):
    embeddings, actions = play
    monitor = Monitor(model, make_calibration(model))
    expected = group_errors(compare_sequences(model, embeddings, actions)[2], list_groups(model), 0.05)
    for _ in range(2):  # a reset forgets everything
        monitor.reset()
        state = model.rssm.initial(1)
        for t in range(EPISODE):
            state = model.rssm.observe(state, actions[2:3, t], embeddings[2:3, t])
            verdict = monitor.update(actions[2:3, t], embeddings[2:3, t], state)
            np.testing.assert_allclose(verdict.errors, expected[t], rtol=1e-3)
            assert not verdict.alarm


@pytest.mark.parametrize(("group", "frames"), [("rgb_static", 3), ("arm", 1)])
def test_an_alarm_needs_its_frames_in_a_row_and_names_the_group(model, play, group, frames):
    embeddings, actions = play
    embeddings = embeddings[:1].clone()
    embeddings[:, 30, list_groups(model)[group]] += 2.0  # for one frame: no debounced alarm
    embeddings[:, 45:, list_groups(model)[group]] += 2.0
    monitor, state, alarms = Monitor(model, make_calibration(model, limit=12.0, frames=frames)), model.rssm.initial(1), []
    for t in range(EPISODE):
        state = model.rssm.observe(state, actions[:1, t], embeddings[:, t])
        verdict = monitor.update(actions[:1, t], embeddings[:, t], state)
        if verdict.alarm:
            alarms.append(t)
            assert verdict.worst.startswith(group) and verdict.score > 1
    assert alarms[0] == (30 if frames == 1 else 45 + frames - 1)
    recorded = judge(compare_sequences(model, embeddings, actions[:1])[0], model, monitor.calibration)
    assert np.flatnonzero(recorded.any(1)).tolist() == alarms


def test_an_error_that_is_not_finite_is_an_alarm_at_once(model, play):
    embeddings, actions = play
    monitor, state = Monitor(model, make_calibration(model)), model.rssm.initial(1)
    for t in range(10):
        state = model.rssm.observe(state, actions[:1, t], embeddings[:1, t])
        assert not monitor.update(actions[:1, t], embeddings[:1, t], state).alarm
    verdict = monitor.update(actions[:1, 10], embeddings[:1, 10] * np.nan, state)
    assert verdict.alarm and verdict.score == np.inf


def test_without_a_calibration_errors_are_measured_and_nothing_is_judged(model, play):
    embeddings, actions = play
    monitor, state = Monitor(model), model.rssm.initial(1)
    for t in range(20):
        state = model.rssm.observe(state, actions[:1, t], 9.0 * embeddings[:1, t])
        verdict = monitor.update(actions[:1, t], 9.0 * embeddings[:1, t], state)
    assert np.isfinite(verdict.errors).all() and (verdict.alarm, verdict.score) == (False, 0.0)


def test_a_model_that_predicts_pixels_cannot_be_watched():
    with pytest.raises(ConfigError, match="frozen image codes, found 'paper'"):
        list_groups(WorldModel(replace(SIZES["paper"], cnn_width=2, groups=4, classes=4, deterministic=24, hidden=24)))


def test_the_filter_hands_over_what_it_saw(model, tmp_path):
    rng = np.random.default_rng(0)
    latent_filter = LatentFilter(model, Contract(), "x")
    images = {view: rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for view in TINY.views}
    latent_filter.update(Observation(images, np.zeros(15), np.zeros(6)), None)
    np.testing.assert_array_equal(latent_filter.action.numpy(), FIRST_ACTION[None])
    torch.testing.assert_close(latent_filter.state.z, latent_filter.embedding)  # a fresh posterior believes all of it


# -- thresholds ------------------------------------------------------------------------------------------------------------------------


def test_debounce_and_peaks():
    scores = np.array([np.nan, 5, 5, 0, 5, 6, 7, 0])
    np.testing.assert_array_equal(debounce(scores, 3), [0, 0, 0, 0, 0, 0, 5, 0])
    np.testing.assert_array_equal(debounce(scores, 1), np.nan_to_num(scores))
    assert find_peaks(np.array([0, 3, 0, 4, 0, 0, 0, 0, 2.0]), 1.0, apart=3) == [4.0, 2.0]


@pytest.mark.parametrize("shape", [0.0, 0.25])
def test_the_tail_tells_what_is_passed_so_many_times_an_hour(shape):
    """Peaks of a known generalised Pareto tail, one a second: the level for 36 an hour is passed by one in a hundred."""
    from scipy import stats

    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, 40 * 3000)
    scores[20::40] = scores[21::40] = 1 + stats.genpareto.rvs(shape, scale=0.5, size=3000, random_state=rng)
    hours = 3000 / 3600
    tail = fit_tail([scores], hours)
    truth = 1 + stats.genpareto.ppf(0.99, shape, scale=0.5)
    assert tail.level(36.0) == pytest.approx(truth, rel=0.1)
    assert tail.level(1e9) == tail.base  # never below where the tail begins


def test_levels_of_a_tail_grow_as_fewer_alarms_are_allowed():
    tail = Tail(1.0, 0.0, 0.5, 400.0, 50)
    assert tail.level(1.0) == pytest.approx(1 + 0.5 * np.log(400))
    assert tail.level(0.1) > tail.level(1.0) > tail.level(10.0)


def make_residuals(model, episodes=20, length=600, seed=0):
    """Independent errors with now and then an event of a second."""
    rng = np.random.default_rng(seed)
    residuals = rng.normal(0, 0.1, (episodes, length, len(HORIZONS), model.embedding_size))
    for episode in residuals:
        for start in rng.integers(30, length - 30, 6):
            episode[start : start + 10] *= rng.uniform(1.5, 3)
    return list(residuals.astype(np.float32))


def test_clean_data_of_the_same_kind_keeps_the_stated_rate(model):
    calibration, tails = calibrate(make_residuals(model), model, "a" * 64, 30.0, false_alarms_per_hour=30.0)
    assert set(tails) == set(list_groups(model)) and all(tail.peaks >= 20 for tail in tails.values())
    alarms, episodes = 0, make_residuals(model, seed=1)
    for part in episodes:
        ratios = group_errors(part, list_groups(model), np.array(calibration.deviations)) / np.array(calibration.limits)
        over = np.stack([debounce(ratios[:, k, g], 3) for k in range(3) for g in range(4)]).max(0)
        alarms += len(find_peaks(over, 1.0))
    hours = sum(map(len, episodes)) / 30 / 3600
    assert alarms / hours < 100  # 30 wanted; 3.3 are expected here, and ten times as many events happen


def test_too_little_or_bad_data_is_refused(model):
    with pytest.raises(DataError, match=r"at least 20 separate peaks .* found .* Calibrate on more"):
        calibrate(make_residuals(model, 1, 300), model, "a" * 64, 30.0)
    with pytest.raises(DataError, match="longer than 16 frames"):
        calibrate([np.zeros((10, 3, model.embedding_size))], model, "a" * 64, 30.0)
    for values in ({"false_alarms_per_hour": 0.0}, {"false_alarms_per_hour": float("nan")}, {"debounce_frames": 0}):
        with pytest.raises(ConfigError, match="more than 0 false alarms"):
            calibrate(make_residuals(model, 1, 300), model, "a" * 64, 30.0, **values)
    bad = make_residuals(model, 3, 400)
    bad[1][200, 1, 4] = np.inf
    with pytest.raises(DataError, match="finite prediction errors, found others in episode 1"):
        calibrate(bad, model, "a" * 64, 30.0)


# -- the file --------------------------------------------------------------------------------------------------------------------------


def test_a_calibration_is_read_back_and_refused_for_another_world_model(model, tmp_path):
    calibration = make_calibration(model)
    calibration.save(tmp_path / "monitor.json")
    assert Calibration.load(tmp_path / "monitor.json", model, "a" * 64) == calibration
    with pytest.raises(CheckpointError, match=r"calibration of world model bbbb.*, found one of aaaa.*monitor calibrate"):
        Calibration.load(tmp_path / "monitor.json", model, "b" * 64)
    with pytest.raises(CheckpointError, match="expected groups"):
        Calibration.load(tmp_path / "monitor.json", WorldModel(replace(TINY, code_sizes=(6, 4))), "a" * 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: "no json", "cannot be read"),
        (lambda v: {"format": "other"}, "expected a diwa_monitor file"),
        (lambda v: {**v, "version": 9}, "of version 1"),
        (lambda v: {**v, "calibration": {**v["calibration"], "limit": 1}}, "Did you mean 'limits'"),
        (lambda v: {**v, "calibration": {**v["calibration"], "limits": [[1.0]]}}, "every horizon and group"),
        (lambda v: {**v, "calibration": {**v["calibration"], "limits": [[np.nan] * 4] * 3}}, "finite, positive limits"),
        (lambda v: {**v, "calibration": {**v["calibration"], "deviations": [[0.0] * 38] * 3}}, "finite, positive deviations"),
        (lambda v: {**v, "calibration": {**v["calibration"], "debounce_frames": 0}}, "at least 1"),
        (lambda v: {**v, "calibration": {**v["calibration"], "horizons": [0, 4, 12]}}, "expected 1 to 120 frames"),
        (lambda v: {**v, "calibration": None}, "expected a mapping"),
        (lambda v: None, "No such file"),
    ],
)
def test_a_damaged_calibration_is_refused(model, tmp_path, change, words):
    path = tmp_path / "monitor.json"
    make_calibration(model).save(path)
    values = change(json.loads(path.read_text()))
    path.unlink() if values is None else path.write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(CheckpointError, match=words):
        Calibration.load(path, model, "a" * 64)


@pytest.fixture
def store(tmp_path):
    """Play that stands still most of the time, two of its episodes the same."""
    fields = tuple(name for name, kind in FIELDS.items() if not kind.optional)
    store = PlayStore.create(tmp_path / "play", Contract(), fields=fields)
    for episode in (*range(10), 9):
        rng = np.random.default_rng(episode)
        picture = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        images = np.repeat(picture[None], 200, 0)
        for start in rng.integers(30, 180, 5):
            images[start : start + 5, :32] //= 2
        actions = rng.uniform(-1, 1, (200, 7))
        target = np.concatenate([np.zeros((1, 6)), np.cumsum(0.002 * actions[:-1, :6], 0)])
        robot = np.cumsum(rng.normal(0, 0.002, (200, 15)), 0)
        store.append_episode({"rgb_static": images, "rgb_gripper": images, "robot_obs": robot, "target_pose": target, "actions": actions})
    return store


def test_episodes_recorded_twice_count_once(model, store):
    residuals = measure_play(model, [store])
    assert len(residuals) == 10 and all(part.shape == (200, 3, model.embedding_size) for part in residuals)


def test_the_command_writes_a_calibration_that_loads(model, store, tmp_path, capsys):
    checkpoint, out = tmp_path / "world_model", tmp_path / "out" / "monitor.json"
    identity = save_world_model(checkpoint, model, Contract(), {"play": ["other"]})
    words = ["world-model", "monitor", "calibrate", "--world-model", str(checkpoint), "--out", str(out), "--false-alarms", "60"]
    assert main([*words, "--validation", str(store.path)]) == 0
    calibration = Calibration.load(out, model, identity)
    assert calibration.stores == (store.content_hash,) and calibration.false_alarms_per_hour == 60
    assert "rgb_static" in capsys.readouterr().out
    save_world_model(checkpoint, model, Contract(), {"play": [store.content_hash]})
    assert main([*words, "--validation", str(store.path)]) == 2
    assert "held-out play" in capsys.readouterr().err
