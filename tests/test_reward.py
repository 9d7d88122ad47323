"""Success classifiers: windows and labels, what imagined frames may teach, calibration on episodes, the command line and its refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from diwa_core.cli.main import main
from diwa_core.contract import Contract
from diwa_core.data.store import FIELDS, PlayStore
from diwa_core.errors import CheckpointError, ConfigError, DataError
from diwa_core.evaluate.rollout import AFTER_SUCCESS
from diwa_core.policy.demonstrations import filter_episode
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier, contrastive_loss
from diwa_core.reward.quality import _platt, calibrate, choose_threshold, compare, count_events, measure_quality, reliability
from diwa_core.reward.store import load_classifier, save_classifier
from diwa_core.reward.train import _draw, _pools, check_successes, train_classifier, trusted_frames
from diwa_core.reward.windows import (
    HORIZON,
    Windows,
    collect_rollouts,
    collect_windows,
    embed_selected,
    load_labelled,
    read_encoded,
    read_windows,
    select_windows,
    split_episodes,
)
from diwa_core.sim.skills import DRAWER, LED, SKILLS
from diwa_core.world_model.filter import save_world_model
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_core.world_model.train import PlayData

LOWDIM = replace(SIZES["lowdim"], deterministic=8, hidden=8)
TINY = replace(SIZES["small"], code_sizes=(6, 5), deterministic=12, hidden=12)
TINY_PAPER = replace(SIZES["paper"], cnn_width=2, groups=4, classes=4, deterministic=12, hidden=12)
WARMUP = LOWDIM.warmup_frames


def play_episode(seed: int, length: int = 300, skill: int = -1, goals: tuple[float, ...] = (0.0, 0.08, 0.16, 0.24)) -> dict:
    """A hand that drags the drawer to one of `goals` (m) after the other, with pauses; the light stays on."""
    rng = np.random.default_rng(seed)
    drawer = [0.0]
    while len(drawer) < length:
        goal = rng.choice(goals)
        drawer += list(np.arange(drawer[-1], goal, 0.02 if goal > drawer[-1] else -0.02)) + [goal] * int(rng.integers(5, 20))
    robot_obs = rng.normal(0, 0.01, (length, 15))
    robot_obs[:, 1] -= drawer[:length]
    scene = np.zeros((length, 24))
    scene[:, DRAWER], scene[:, LED] = drawer[:length], 1
    return {
        "rgb_static": rng.integers(0, 255, (length, 1, 1, 3), dtype=np.uint8).repeat(64, 1).repeat(64, 2),
        "rgb_gripper": rng.integers(0, 255, (length, 1, 1, 3), dtype=np.uint8).repeat(64, 1).repeat(64, 2),
        "robot_obs": robot_obs,
        "target_pose": robot_obs[:, :6] + rng.normal(0, 0.005, (length, 6)),
        "actions": rng.uniform(-1, 1, (length, 7)),
        "scene_obs": scene,
        "skill": np.full(length, skill, np.int8),
    }


def make_store(path, episodes: list[dict], fields: tuple[str, ...] = tuple(FIELDS), contract: Contract | None = None) -> PlayStore:
    store = PlayStore.create(path, contract or Contract(), fields=fields)
    for episode in episodes:
        store.append_episode({name: episode[name] for name in fields})
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> PlayStore:
    return make_store(tmp_path_factory.mktemp("reward") / "play", [play_episode(i) for i in range(4)])


def make_model(config=LOWDIM, seed: int = 0, data: PlayData | None = None) -> WorldModel:
    """An untrained model; with residual latents it imagines that nothing moves but the arm."""
    torch.manual_seed(seed)
    model = WorldModel(config).eval().requires_grad_(False)
    if data is not None:
        model.measure_low(data.low)
    if config.latent == "residual":
        torch.nn.init.zeros_(model.rssm.latent.prior_head[-1].weight)
    return model


@pytest.fixture(scope="module")
def still_model(store) -> WorldModel:
    return make_model(data=PlayData([store], LOWDIM))


# ---- windows --------------------------------------------------------------------------------------------------------------------------


def test_half_of_the_windows_hold_a_success_and_a_quarter_are_near_misses(store):
    data = PlayData([store], LOWDIM)
    selection = select_windows(data, ["open_drawer", "close_drawer"], 40, WARMUP, np.random.default_rng(0))
    again = select_windows(data, ["open_drawer", "close_drawer"], 40, WARMUP, np.random.default_rng(0))
    assert np.array_equal(selection.frames, again.frames) and selection.frames.shape == (80, WARMUP + HORIZON)
    drawer = data.labels["scene_obs"][selection.frames, DRAWER]
    moved = np.where(selection.valid, drawer[:, WARMUP:] - drawer[:, WARMUP - 1, None], 0)
    for skill, way in (("open_drawer", moved), ("close_drawer", -moved)):
        best = way[selection.skill == SKILLS.index(skill)].max(1)
        assert (best > 0.12).sum() == 20 and ((best > 0.06) & (best <= 0.12)).sum() == 10
    ends = np.array([end for _, end in data.episodes])
    assert (np.searchsorted(ends, selection.frames[:, 0], "right") == np.searchsorted(ends, selection.frames[:, -1], "right")).all()
    assert (np.diff(selection.frames[:, WARMUP - 1 :], axis=1) == selection.valid).all()


def test_a_failed_attempt_counts_as_a_near_miss(tmp_path):
    attempt, idle = SKILLS.index("turn_off_led"), -1
    store = make_store(tmp_path / "play", [play_episode(0, 200, idle), play_episode(1, 200, attempt)])
    data = PlayData([store], LOWDIM)
    selection = select_windows(data, ["turn_off_led"], 40, WARMUP, np.random.default_rng(0))
    tried = data.labels["skill"][selection.frames[:, -1]] == attempt
    assert len(tried) == 20 and tried.sum() == 10  # no success to be had


def test_labels_come_from_one_replaceable_function(store, still_model):
    data = load_labelled(still_model, store)

    def marks(data, skill, start, frames):
        return 2.0 * (frames % 100 == 50)

    selection = select_windows(data, ["turn_off_led"], 20, WARMUP, np.random.default_rng(0), marks)
    assert (selection.frames[:10, WARMUP:] % 100 == 50).any(1).all()
    embed_selected(still_model, data, store, [selection])
    windows = read_windows([still_model], data, selection, ["turn_off_led"], marks)
    assert torch.equal(windows.success("turn_off_led"), torch.from_numpy(selection.frames[:, WARMUP:] % 100 == 50))


def replace_gain(model: WorldModel, gain: float) -> WorldModel:
    """A copy with another gain of the filter."""
    copy = WorldModel(replace(model.config, observation_gain=gain)).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("config", [LOWDIM, TINY, TINY_PAPER], ids=["lowdim", "small", "paper"])
def test_windows_are_what_a_filter_and_a_dream_would_see(store, config):
    model = make_model(config, data=PlayData([store], config, 300))
    data = load_labelled(model, store)
    selection = select_windows(data, ["open_drawer"], 5, WARMUP, np.random.default_rng(1))
    embed_selected(model, data, store, [selection])
    windows = read_windows([model], data, selection, ["open_drawer"])
    frames = selection.frames[0]
    arrays = {name: store.read(name, int(frames[0]), int(frames[-1]) + 1) for name in store.fields}
    if config.latent == "categorical":  # posteriors are sampled: only shapes and labels can be compared
        assert windows.filtered.shape == windows.imagined.shape == (5, HORIZON, model.feature_size)
    else:
        states = filter_episode(model, arrays)
        length = len(states.z) - WARMUP
        seen = filter_episode(replace_gain(model, 1.0), arrays).z  # every frame believed: no label comes before what it tells of
        assert torch.allclose(windows.start[0], seen[WARMUP - 1], atol=1e-5)
        assert torch.allclose(windows.filtered[0, :length], seen[WARMUP:], atol=1e-5)
        state = states[WARMUP - 1 : WARMUP]
        for t in range(length):
            state = model.rssm.imagine(state, torch.from_numpy(arrays["actions"][None, WARMUP - 1 + t]))
            assert torch.allclose(windows.imagined[0, t], state.z[0], atol=1e-4), t
    drawer = arrays["scene_obs"][:, DRAWER]
    real = torch.from_numpy(drawer[WARMUP:] - drawer[WARMUP - 1] > 0.12)
    assert torch.equal(windows.success("open_drawer")[0][windows.valid[0]], real)


def test_every_model_imagines_its_share_of_the_windows(store):
    data = PlayData([store], LOWDIM)
    models = [make_model(seed=seed, data=data) for seed in (0, 1)]
    torch.nn.init.normal_(models[1].rssm.latent.prior_head[-1].bias)
    selection = select_windows(data, ["open_drawer"], 12, WARMUP, np.random.default_rng(1))
    embed_selected(models[0], data, store, [selection])
    alone = [read_windows([model], data, selection, []).imagined for model in models]
    both = read_windows(models, data, selection, []).imagined
    by = [(both == imagined).all(-1).all(-1) for imagined in alone]
    assert (by[0] ^ by[1]).all() and by[0].sum() == 6
    with pytest.raises(ConfigError, match="share their codes"):
        collect_windows([models[0], make_model(seed=2)], [store], ["open_drawer"], 8, 0)


def test_parts_share_no_frame_and_stores_give_by_their_length(store, tmp_path, still_model):
    short = make_store(tmp_path / "short", [play_episode(9, 400)])
    first, second = collect_windows([still_model], [store, short], ["open_drawer"], 32, 0, parts=2)
    seen = [{int(f) + t for f, v in zip(w.frame, w.valid, strict=True) for t in range(-WARMUP, int(v.sum()))} for w in (first, second)]
    assert len(first) == 24 + 8 and seen[0].isdisjoint(seen[1])
    assert split_episodes([(0, 10), (10, 13), (20, 27)], 2) == [[(0, 10)], [(10, 13), (20, 27)]]
    assert split_episodes([(5, 16)], 3) == [[(5, 9)], [(9, 13)], [(13, 16)]]


def test_play_that_is_encoded_already_gives_the_same_windows(store, tmp_path):
    model = make_model(TINY, data=PlayData([store], TINY, 300))
    play = PlayData([store], TINY)
    play.embed(model)
    path = tmp_path / "embeddings.safetensors"
    save_file({"embeddings": play.embeddings}, path)
    encoded = read_encoded(path, [store])
    anew, kept = (collect_windows([model], [store], ["open_drawer"], 16, 0, encoded=given)[0] for given in (None, encoded))
    for name in ("start", "filtered", "imagined"):
        assert torch.allclose(getattr(anew, name), getattr(kept, name), atol=1e-4)
    with pytest.raises(DataError, match="of another world model"):
        collect_windows([model], [store], ["open_drawer"], 16, 0, encoded=[encoded[0] + 1])
    with pytest.raises(DataError, match="give the stores the world model was trained on"):
        read_encoded(path, [store, store])
    path.write_bytes(b"torn")
    with pytest.raises(DataError, match="expected the embeddings"):
        read_encoded(path, [store])


def test_rollouts_are_whole_episodes_of_their_skill(tmp_path, still_model):
    lengths = {"open_drawer": (30, 80), "turn_on_led": (50,)}
    episodes = [play_episode(i, n, SKILLS.index(skill)) for skill, some in lengths.items() for i, n in enumerate(some)]
    windows = collect_rollouts([still_model], [make_store(tmp_path / "rollouts", episodes)], ["open_drawer", "close_drawer"])
    tried = windows.episodes_of("open_drawer")
    assert windows.valid.sum(1).tolist() == [30 - WARMUP, 80 - WARMUP, 50 - WARMUP] and len(tried) == 2
    assert len(windows.episodes_of("close_drawer")) == 0


# ---- learning -------------------------------------------------------------------------------------------------------------------------


def test_contrastive_loss_equals_its_definition():
    torch.manual_seed(0)
    embedding, label = torch.randn(6, 4), torch.tensor([0.0, 0, 1, 1, 1, 0])
    unit = torch.nn.functional.normalize(embedding, dim=-1).numpy()
    total = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        denominator = sum(np.exp(unit[i] @ unit[j] / 0.5) for j in others)
        positives = [j for j in others if label[j] == label[i]]
        total.append(-np.mean([np.log(np.exp(unit[i] @ unit[j] / 0.5) / denominator) for j in positives]))
    assert np.isclose(contrastive_loss(embedding, label, 0.5).item(), np.mean(total), atol=1e-5)


def make_windows(success: list[list[bool]], imagined: torch.Tensor | None = None, filtered: torch.Tensor | None = None) -> Windows:
    """Windows of open_drawer with the given labels; read-outs of one number."""
    labels = torch.tensor(success)
    zeros = torch.zeros(*labels.shape, 1)
    filtered, imagined = (zeros if x is None else x for x in (filtered, imagined))
    count = len(labels)
    frame = 200 * torch.arange(count)
    skill = torch.full((count,), SKILLS.index("open_drawer"))
    start = torch.zeros(count, filtered.shape[-1])
    return Windows(start, filtered, imagined, torch.ones_like(labels), {"open_drawer": 2.0 * labels}, skill, frame)


class Reader(SuccessClassifier):
    """Says success where the read-out's last number is 1."""

    def forward(self, now, start):
        return 20 * (now[..., -1] - 0.5)


def test_imagined_frames_are_taught_only_where_the_dream_can_be_trusted():
    real = [False, False, False, True, True, True, True, False]
    dream = torch.tensor([0.0, 1, 0, 1, 0, 1, 1, 0])[None, :, None]
    windows = make_windows([real], dream)
    teacher = Reader(ClassifierConfig(1))

    def taught(**options) -> list[int]:
        config = ClassifierConfig(1, **{"settle_frames": 0, **options})
        return trusted_frames(windows, "open_drawer", config, None if config.consistency == "off" else teacher)[0].nonzero()[:, 0].tolist()

    assert taught(consistency="off") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert taught(consistency="positives") == [0, 1, 2, 3, 5, 6, 7]  # frame 4: a real success that the dream does not show
    assert taught(consistency="both") == [0, 2, 3, 5, 6, 7]  # frame 1: a dreamt success that did not happen
    assert taught(consistency="off", settle_frames=1) == [0, 1, 4, 5]  # not 2, 3 and 6, 7, around the changes
    assert taught(consistency="off", imagined_frames=3) == [0, 1, 2]
    windows.valid[0, 6:] = False
    assert taught(consistency="off") == [0, 1, 2, 3, 4, 5]


def scenes_and_arms(count: int, dream_fails: float) -> Windows:
    """Read-outs [arm, drawer]: both move when the skill succeeds, but in a share of the dreams only the arm does."""
    generator = torch.Generator().manual_seed(0)
    success = (torch.rand(count, 20, generator=generator) < 0.3).cummax(1).values & (torch.arange(count) % 2 == 0)[:, None]
    noise = 0.1 * torch.randn(2, count, 20, 2, generator=generator)
    filtered = success.float()[..., None].expand(-1, -1, 2)
    imagined = filtered.clone()
    imagined[: int(count * dream_fails), :, 1] = 0
    return make_windows(success.tolist(), imagined + noise[0], filtered + noise[1])


def test_a_dream_that_failed_is_not_a_success_whatever_the_arm_did():
    windows = scenes_and_arms(100, dream_fails=0.8)
    quick = ClassifierConfig(2, 1, updates=100, teacher_updates=60, learning_rate=1e-2, batch=64, hidden=16, embedding=16)
    real = windows.filtered[windows.success("open_drawer")]
    fired = []  # at a scene that shows no success, with the arm as after one
    for changes in ({}, {"consistency": "off"}, {"arm_dropout": 0.0}):
        classifier = train_classifier(windows, "open_drawer", replace(quick, **changes))
        assert (classifier(real, torch.zeros_like(real)) > 0).float().mean() > 0.95
        fired.append(classifier(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)).sigmoid().item())
    assert fired[0] < 0.1 < min(fired[1:])


def test_an_episode_ends_a_few_frames_after_its_success():
    late = [False] * 3 + [True] + [False] * 16
    windows = make_windows([late, [False] * 20])
    cut = windows.episodes_of("open_drawer")
    assert cut.valid.sum(1).tolist() == [3 + 1 + AFTER_SUCCESS, 20] and windows.valid.all()


def test_close_calls_are_a_kind_of_their_own():
    windows = make_windows([[False] * 5 + [True] * 5], filtered=torch.arange(10.0).reshape(1, 10, 1))
    windows.progress["open_drawer"] = torch.tensor([[0.0, 0.4, 0.6, 0.8, 0.95, 1.05, 1.2, 1.4, 2.0, 2.0]])
    negatives, positives = _pools(windows, "open_drawer", torch.zeros(1, 10, dtype=torch.bool), margin=0.0)
    assert [rows.tolist() for _, rows in negatives] == [[3, 4], [0, 1, 2]]
    assert [rows.tolist() for _, rows in positives] == [[5, 6], [7, 8, 9]]
    drawn, rows = _draw(negatives, 40)
    assert (rows >= 3).sum() == 20 and torch.equal(drawn[:, 0], rows.float())
    negatives, positives = _pools(windows, "open_drawer", torch.zeros(1, 10, dtype=torch.bool), margin=0.15)
    assert [rows.tolist() for _, rows in negatives] == [[3, 4], [0, 1, 2]]  # 1.05 is a success, but nothing to aim at
    assert [rows.tolist() for _, rows in positives] == [[6], [7, 8, 9]]


def test_thresholds_stay_at_even_odds_unless_false_alarms_ask_for_more():
    real = np.arange(100) < 50
    clear = np.where(real, 0.9, 0.1)
    assert np.isclose(choose_threshold(clear, real), 0.5)
    alarmed = np.where(np.arange(100) >= 80, 0.8, clear)  # 20 false alarms
    assert 0.8 - 1e-9 <= choose_threshold(alarmed, real) < 0.9
    assert choose_threshold(np.full(100, 0.3), real) > 0.29  # what tells nothing is no reward
    alarmed[:10] = 0.7  # shutting them out costs 10 successes: they are worth less
    assert 0.8 - 1e-9 <= choose_threshold(alarmed, real) < 0.9


def test_filtered_and_imagined_frames_have_thresholds_of_their_own():
    real = torch.arange(80) % 2 == 0
    done = real.float()[:, None, None].expand(-1, 3, -1)
    seen = 0.8 * done
    dream = torch.where((torch.arange(80) % 4 == 1)[:, None, None], torch.tensor(0.9), done)  # nearly a success where there was none
    windows, reader = make_windows([[bool(r)] * 3 for r in real], dream, seen), Reader(ClassifierConfig(1))
    reader.forward = lambda now, start: reader.scale * 4 * (now[..., -1] - 0.5) + reader.shift
    calibrate(reader, windows, "open_drawer")
    assert reader.threshold > reader.filtered_threshold
    nearly, start = torch.tensor([[0.9]]), torch.zeros(1, 1)
    assert not reader.success(nearly, start) and reader.success(torch.ones(1, 1), start)
    figures = measure_quality(reader, windows, "open_drawer")
    assert figures["filtered"]["episodes"]["precision"] == figures["imagined"]["episodes"]["precision"] == 1.0


def test_training_repeats_from_its_seed():
    windows = scenes_and_arms(40, 0.5)
    config = ClassifierConfig(2, updates=5, teacher_updates=3, batch=16, hidden=8)
    same, again, other = (train_classifier(windows, "open_drawer", config, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["classify.0.weight"], other["classify.0.weight"])


def test_an_unknown_consistency_is_refused():
    with pytest.raises(ConfigError, match="positives, both, off, filtered; found 'none'"):
        ClassifierConfig(3, consistency="none")


# ---- calibration ----------------------------------------------------------------------------------------------------------------------


def test_platt_scaling_undoes_a_known_distortion():
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 40_000)
    real = rng.random(40_000) < 1 / (1 + np.exp(-logit))
    scale, shift = _platt(4 * logit - 3, real)
    assert np.isclose(scale, 0.25, rtol=0.05) and np.isclose(shift, 0.75, rtol=0.05)
    honest = reliability(1 / (1 + np.exp(-(scale * (4 * logit - 3) + shift))), real)
    assert honest["expected_error"] < 0.02 < reliability(1 / (1 + np.exp(3 - 4 * logit)), real)["expected_error"]


def test_the_figures_of_a_hand_computed_table():
    probability = np.array([0.05, 0.15, 0.15, 0.95, 0.85, 1.0])
    real = np.array([False, False, True, True, False, True])
    figures = compare(probability, real, 0.5)
    assert (figures["precision"], figures["recall"], figures["count"], figures["successes"]) == (2 / 3, 2 / 3, 6, 3)
    curve = figures["reliability"]
    assert curve["count"] == [1, 2, 0, 0, 0, 0, 0, 0, 1, 2] and curve["observed"][1] == 0.5 and curve["probability"][5] is None
    assert np.isclose(curve["expected_error"], (0.05 + 2 * abs(0.15 - 0.5) + 0.85 + 2 * (1 - 0.975)) / 6)
    assert compare(probability, real, 1.0)["precision"] is None and compare(probability, np.zeros(6, bool), 0.5)["recall"] is None


def test_an_episode_is_judged_by_its_best_valid_frame():
    real = [[False, True, True], [False, False, False], [False, False, False], [False, True, False]]
    seen = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]])[..., None]
    windows = make_windows(real, seen, seen)
    windows.valid[1, 2] = False  # the false alarm comes after the episode's end
    figures = measure_quality(Reader(ClassifierConfig(1)), windows, "open_drawer")
    episodes, frames = figures["filtered"]["episodes"], figures["filtered"]["frames"]
    assert (episodes["precision"], episodes["recall"]) == (1.0, 0.5) and (frames["precision"], frames["recall"]) == (1.0, 1 / 3)
    assert figures["events"] == 2


def test_overlapping_windows_show_the_same_event():
    windows = make_windows([[False] * 4 + [True], [False] * 2 + [True] * 3, [True] * 5])
    windows.frame = torch.tensor([100, 102, 300])
    assert count_events(windows, "open_drawer") == 2
    assert count_events(make_windows([[False]]), "open_drawer") == 0


# ---- checkpoints and the command line -------------------------------------------------------------------------------------------------


def test_a_classifier_comes_back_and_is_refused_elsewhere(tmp_path):
    classifier = SuccessClassifier(ClassifierConfig(3, hidden=8)).eval()
    classifier.threshold.fill_(0.25)
    classifier.scale.fill_(2.0)
    save_classifier(tmp_path / "c", classifier, Contract(), "open_drawer", "w" * 64, {})
    loaded, checkpoint = load_classifier(tmp_path / "c", "w" * 64, "open_drawer")
    now, start = torch.randn(2, 5, 3)
    assert loaded.threshold == 0.25 and torch.allclose(loaded(now, start), classifier(now, start), atol=1e-2)
    assert checkpoint.config["skill"] == "open_drawer"
    with pytest.raises(CheckpointError, match="world model 'vvvvvvvvvvvvvvvv', found one of 'wwwwwwwwwwwwwwww'"):
        load_classifier(tmp_path / "c", "v" * 64)
    with pytest.raises(CheckpointError, match="expected a classifier of 'turn_on_led', found one of 'open_drawer'"):
        load_classifier(tmp_path / "c", skill="turn_on_led")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, store, still_model):
    """Folder with a world model, play, validation, demonstrations, rollouts, and the options of a quick training."""
    folder = tmp_path_factory.mktemp("recorded")
    save_world_model(folder / "wm", still_model, Contract(), {})
    make_store(folder / "validation", [play_episode(seed, 400) for seed in (20, 21)])
    opening = SKILLS.index("open_drawer")
    make_store(folder / "rollouts", [play_episode(i, 60, opening) for i in range(4)])
    make_store(folder / "idle", [play_episode(i, 300, goals=(0.0, 0.08)) for i in range(2)])
    (folder / "quick.yaml").write_text(yaml.safe_dump({"classifier": {"updates": 150, "teacher_updates": 80, "batch": 128, "hidden": 64}}))
    return folder


def train_words(recorded, store, **changes) -> list[str]:
    options = {
        "world-model": recorded / "wm", "play": store.path, "validation": recorded / "validation", "skills": "open_drawer",
        "windows": 80, "config": recorded / "quick.yaml", "out": recorded / "classifiers", **changes,
    }  # fmt: skip
    return ["classifier", "train", *(str(word) for name, value in options.items() for word in (f"--{name}", *np.atleast_1d(value)))]


def test_train_and_report(recorded, store, still_model, capsys):
    words = train_words(
        recorded, store, skills=["open_drawer", "close_drawer"], demos=recorded / "rollouts", rollouts=recorded / "rollouts"
    )
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert main(["classifier", "report", str(recorded / "classifiers")]) == 0
    assert capsys.readouterr().out.strip() in printed and "policy rollouts" in printed
    _, checkpoint = load_classifier(recorded / "classifiers" / "open_drawer", skill="open_drawer")
    card = checkpoint.card
    seen, dreamt = (card[latents]["episodes"] for latents in ("filtered", "imagined"))
    assert min(seen["precision"], seen["recall"]) > 0.8 and card["events"] > 1
    assert dreamt["recall"] < 0.2  # nothing ever moves in this model's dreams, so nothing may be rewarded
    assert card["rollouts"]["filtered"]["episodes"]["count"] == 4 and sum(seen["reliability"]["count"]) == seen["count"]
    assert checkpoint.lineage["play"] == [store.content_hash] and len(checkpoint.lineage["demos"]) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"skills": "turn_on_led"}, "skill 'turn_on_led': --play needs successes and failures, found 0 of"),
        ({"validation": "idle"}, "skill 'open_drawer': the first half of --validation needs successes"),
        ({"play": "unlabelled"}, "expected the labels scene_obs and skill"),
        ({"play": "slow"}, "contract field 'rate_hz': expected 30.0, found 15.0"),
        ({"validation": "nowhere"}, "expected a play store"),
        ({"skills": "open_door"}, "found 'open_door'"),
        ({"more-models": "other_wm"}, "must share their codes"),
    ],
    ids=lambda value: next(iter(value.items()))[1] if isinstance(value, dict) else "",
)
def test_what_cannot_be_learned_from_is_refused(recorded, store, capsys, changes, message):
    if not (recorded / "unlabelled").exists():
        episodes = [play_episode(0, 200)]
        make_store(recorded / "unlabelled", episodes, tuple(name for name in FIELDS if name != "scene_obs"))
        make_store(recorded / "slow", episodes, contract=Contract(rate_hz=15.0))
        save_world_model(recorded / "other_wm", make_model(seed=5), Contract(), {})
    paths = {name: recorded / value if name != "skills" else value for name, value in changes.items()}
    assert main(train_words(recorded, store, out=recorded / "refused", **paths)) == 2
    assert message in capsys.readouterr().err and not (recorded / "refused").exists()


def test_checks_name_the_skill_that_lacks_failures():
    with pytest.raises(DataError, match="skill 'open_drawer': here needs successes and failures, found 2 of 2 windows"):
        check_successes(make_windows([[True], [True]]), ["open_drawer"], "here")


def test_a_report_without_classifiers_is_refused(tmp_path, capsys):
    assert main(["classifier", "report", str(tmp_path)]) == 2
    assert "expected classifiers in folders named after skills" in capsys.readouterr().err
