"""Success from an operator's marks: which frames a mark tells of, classifiers that learn from marked bags, and what is refused."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bag_support import FakeBag
from test_reward import TINY, make_model

from diwa_core.cli.finetune import start_banks
from diwa_core.cli.main import main
from diwa_core.cli.policy import demonstrations
from diwa_core.contract import Contract
from diwa_core.data.attempts import find_attempts, find_beginnings, gather_attempts
from diwa_core.data.bag_import import ImportSettings, import_bags
from diwa_core.data.marks import is_motion, marked_episodes, marked_frames
from diwa_core.data.sequences import WindowSampler
from diwa_core.data.store import FAILURE, FIELDS, SUCCESS, UNMARKED, PlayStore
from diwa_core.errors import DataError
from diwa_core.reward.classifier import ClassifierConfig
from diwa_core.reward.store import load_classifier
from diwa_core.reward.train import _pools, trusted_frames
from diwa_core.reward.windows import collect_windows, label_source, load_labelled, marked_progress, oracle_progress
from diwa_core.sim.skills import SKILLS
from diwa_core.world_model import report
from diwa_core.world_model.filter import load_world_model, save_world_model

OPEN, LED = SKILLS.index("open_drawer"), SKILLS.index("turn_on_led")
PLAIN_FIELDS = tuple(name for name in FIELDS if name != "scene_obs")
TAKE, REST = 56, 10  # ticks of an attempt, and of the rest before its mark


def record(path: Path, takes: list[tuple[str, str]], play: int = 0) -> Path:
    """A bag of attempts (outcome, skill), "" without a mark, behind `play` ticks without one. Each rests at its end.

    A success lights up the picture from half a second before the rest on, and something else moves all the time.
    """

    def picture(n: int, size: int) -> np.ndarray:
        image, (take, tick) = np.full((size, size, 3), 60, np.uint8), divmod(n - play, TAKE)
        image[n % size, 0] = 250
        if 0 <= take < len(takes) and takes[take][0] == "success" and tick >= TAKE - REST - 15:
            image[:, size // 2 :] = 250
        return image

    def moves(n: int) -> bool:  # the action into tick n
        return (n - play) % TAKE <= TAKE - REST

    marks = {play + TAKE * (number + 1) - 1: take for number, take in enumerate(takes) if take[0]}
    return FakeBag(play + TAKE * len(takes), image=picture, moves=moves, marks=marks).write(path)


def import_marked(path: Path, takes: list[tuple[str, str]], play: int = 0) -> PlayStore:
    imported = import_bags([record(path / "bag", takes, play)], path / "store", settings=ImportSettings(frozen_motion_m=0.0))
    assert not imported.refused
    return imported.store


def make_store(path: Path, attempts: list[tuple[int, int, str]], fields: tuple[str, ...] = PLAIN_FIELDS) -> PlayStore:
    """Episodes of 60 frames: skill, mark, and for each frame of its end 'm' for a motion or '.' for rest; before it all move."""
    store = PlayStore.create(path, Contract(), {}, fields)
    for skill, mark, end in attempts:
        arrays = {name: np.zeros((60, *FIELDS[name].shape), FIELDS[name].dtype) for name in fields}
        arrays["actions"][:, 0] = [letter == "m" for letter in end.rjust(60, "m")]
        arrays["skill"][:] = skill
        store.append_episode(arrays, mark)
    return store


# -- what a mark tells of ---------------------------------------------------------------------------------------------------------------


def test_a_mark_tells_of_the_rest_before_it_and_of_no_motion(tmp_path):
    store = make_store(
        tmp_path / "store", [(OPEN, SUCCESS, "....m"), (OPEN, SUCCESS, "m"), (OPEN, FAILURE, "..."), (LED, UNMARKED, ""), (-1, SUCCESS, "")]
    )
    skill, success, attempts = marked_frames(store)
    assert skill[::60].tolist() == [OPEN, OPEN, OPEN, -1, -1]
    one, late, failed, unmarked, nameless = success.reshape(5, 60)
    assert one[55:].tolist() == [1] * 5 and np.isnan(one[25:55]).all() and (one[:25] == 0).all()
    assert late[59] == 1 and np.isnan(late[29:59]).all() and (late[:29] == 0).all()
    assert (failed == 0).all() and np.isnan(unmarked).all() and np.isnan(nameless).all()
    assert sorted(attempts) == [(0, 60), (60, 120), (120, 180)]


def test_the_gripper_moves_too():
    actions = np.zeros((3, 7))
    actions[:, 6], actions[1, 2] = [1, 1, -1], 0.5
    assert is_motion(actions, np.ones(3)).tolist() == [False, True, True]


def test_only_the_attempt_that_the_mark_ends_is_judged(tmp_path):
    """A label that changes inside an episode, as in a store that was cut by other means."""
    store = make_store(tmp_path / "store", [(OPEN, SUCCESS, "..")])
    store.group["skill"][:20] = LED
    assert marked_episodes(store) == [(20, 60, OPEN, SUCCESS)]
    assert marked_frames(store)[0].tolist() == [-1] * 20 + [OPEN] * 40


def test_half_of_the_attempts_hold_half_of_every_kind(tmp_path):
    kinds = [(OPEN, SUCCESS, "..")] * 4 + [(OPEN, FAILURE, "")] * 2 + [(LED, SUCCESS, "..")] * 2
    attempts = marked_frames(make_store(tmp_path / "store", kinds))[2]
    numbers = [start // 60 for start, _ in attempts]
    assert sorted(numbers) == list(range(8)) and sorted(numbers[:4]) == [0, 1, 4, 6]


def test_progress_is_of_the_attempted_skill_and_of_what_was_not_done_before(tmp_path):
    store = make_store(tmp_path / "store", [(OPEN, SUCCESS, "....m"), (OPEN, FAILURE, ""), (-1, UNMARKED, "")])
    data = load_labelled(make_model(TINY), store, marked_progress)
    start, frames = np.array([3, 56, 40, 63, 123]), np.array([[10, 40, 57], [57, 58, 59], [41, 56, 59], [70, 80, 119], [130, 140, 150]])
    nan = np.nan
    own = [[0, nan, 2], [0, 0, 0], [nan, nan, nan], [0, 0, 0], [nan, nan, nan]]
    np.testing.assert_array_equal(marked_progress(data, "open_drawer", start, frames), own)
    other = marked_progress(data, "turn_on_led", start, frames)
    assert (other[:4] == 0).all() and np.isnan(other[4]).all()


# -- what is learned from ---------------------------------------------------------------------------------------------------------------


def test_frames_of_which_nobody_knows_teach_nothing(tmp_path):
    attempts = [(OPEN, SUCCESS, "....m"), (OPEN, FAILURE, ""), (OPEN, UNMARKED, ""), (-1, UNMARKED, "")] * 3
    store = make_store(tmp_path / "store", attempts)
    windows = collect_windows([make_model(TINY)], [store], ["open_drawer", "turn_on_led"], 24, 0)[0]
    for skill in ("open_drawer", "turn_on_led"):
        known, success = windows.known(skill), windows.success(skill)
        assert known.any(1)[windows.skill == SKILLS.index(skill)].all() and not (success & ~known).any()
    assert ((windows.frame // 60) % 4 <= 1).all(), "no window of play, or of an attempt without a mark"
    own = windows.episodes_of("open_drawer")
    assert own.success("open_drawer").any(1).sum() == 12 and not own.valid[own.progress["open_drawer"].isnan()].any()
    imagined = trusted_frames(windows, "open_drawer", ClassifierConfig(1, consistency="off"), None)
    assert not (imagined & ~windows.known("open_drawer")).any() and (imagined & windows.success("open_drawer")).any()
    negatives, positives = _pools(windows, "open_drawer", imagined, 0.15)
    known, success = (x.flatten() for x in (windows.known("open_drawer"), windows.success("open_drawer")))
    for pools, wanted in ((negatives, ~success), (positives, success)):
        rows = torch.cat([rows for _, rows in pools])
        assert len(rows) and (known & wanted)[rows].all()


def test_the_scene_rules_where_there_is_one_unless_marks_are_asked_for(tmp_path):
    seen = make_store(tmp_path / "seen", [(OPEN, SUCCESS, "..")], tuple(FIELDS))
    blind = make_store(tmp_path / "blind", [(OPEN, SUCCESS, "..")])
    assert label_source(seen) is oracle_progress and label_source(blind) is marked_progress
    assert label_source(seen, "marks") is marked_progress
    with pytest.raises(DataError, match=r"expected the labels scene_obs and skill, or .* found \['skill'\] and marks \(--labels scene\)"):
        label_source(blind, "scene")
    with pytest.raises(DataError, match=r"and no marks .*gather the attempts again"):
        label_source(make_store(tmp_path / "old", [(OPEN, UNMARKED, "..")]))


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Path:
    """A folder as a robot's cell leaves it: stores of marked bags, a world model, the options of a quick training."""
    folder = tmp_path_factory.mktemp("cell")
    takes = [("success", "open_drawer"), ("failure", "open_drawer"), ("success", "turn_on_led"), ("", "open_drawer")]
    import_marked(folder / "play", takes[:3] * 2 + takes[3:], play=40)
    import_marked(folder / "held_out", takes[:2] * 2 + takes[3:])
    save_world_model(folder / "wm", make_model(TINY), Contract(), {})
    (folder / "quick.yaml").write_text(yaml.safe_dump({"classifier": {"updates": 150, "teacher_updates": 80, "batch": 128, "hidden": 64}}))
    return folder


@pytest.fixture(scope="module")
def useless(tmp_path_factory) -> Path:
    """Stores whose marks teach nothing."""
    folder = tmp_path_factory.mktemp("useless")
    make_store(folder / "failed", [(OPEN, FAILURE, "..")] * 3)
    make_store(folder / "nameless", [(-1, SUCCESS, ".."), (-1, FAILURE, "")])
    make_store(folder / "good", [(OPEN, SUCCESS, ".."), (OPEN, FAILURE, "")] * 2)
    save_world_model(folder / "wm", make_model(TINY), Contract(), {})
    return folder


def train_words(cell: Path, **changes) -> list[str]:
    options = {"world-model": cell / "wm", "skills": "open_drawer", "windows": 60, "out": cell / "classifiers", **changes}
    return ["classifier", "train", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


@pytest.mark.timeout(900)
def test_a_robot_s_marked_bags_train_a_classifier_from_end_to_end(cell):
    play = PlayStore.open(cell / "play/store")
    assert "scene_obs" not in play.fields
    counts = gather_attempts([str(play.path)], str(cell / "demos"))
    assert counts == {"open_drawer": 2, "turn_on_led": 2}
    held_out = cell / "held_out/store"
    assert main(train_words(cell, play=play.path, validation=held_out, rollouts=held_out, config=cell / "quick.yaml")) == 0
    classifier, checkpoint = load_classifier(cell / "classifiers" / "open_drawer", skill="open_drawer")
    seen = checkpoint.card["filtered"]["episodes"]
    assert seen["successes"] > 5 and seen["count"] > seen["successes"]
    assert min(seen["precision"], seen["recall"]) > 0.8, "the light in the picture tells them apart"
    tried = checkpoint.card["rollouts"]["filtered"]["episodes"]
    assert (tried["count"], tried["successes"]) == (4, 2), "the attempts without a mark are not measured on"
    model, _ = load_world_model(cell / "wm")
    (starts,), (judge_starts,) = start_banks([model], classifier, Namespace(demos=cell / "demos", play=[], seed=1), "open_drawer", 1)
    assert len(judge_starts.h) == 1 and len(starts.h) > 0, "fine-tuning finds its starts"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"play": "failed"}, "skill 'open_drawer': --play needs successes and failures, found 0 of"),
        ({"play": "nameless"}, "expected attempts at skills that an operator marked, found 2 marks, none of them with a skill"),
        ({"validation": "failed"}, "the first half of --validation needs successes and failures, found 0 of"),
    ],
    ids=["only failures", "no skill", "nothing to calibrate on"],
)
def test_marks_that_teach_nothing_are_refused(useless, capsys, changes, message):
    paths = {name: useless / value for name, value in ({"play": "good", "validation": "good"} | changes).items()}
    assert main(train_words(useless, **paths)) == 2
    assert message in capsys.readouterr().err and not (useless / "classifiers").exists()


# -- what else reads labels --------------------------------------------------------------------------------------------------------------


def test_marks_of_unknown_skills_are_told_by_the_import(tmp_path):
    bag = record(tmp_path / "bag", [("success", "wash_dishes")])
    (audit,) = import_bags([bag], tmp_path / "store", settings=ImportSettings(frozen_motion_m=0.0)).audits
    assert any("'success' names the skill 'wash_dishes', none of open_drawer" in note for note in audit.notes)


def test_failed_attempts_are_starts_and_no_demonstrations(tmp_path):
    store = make_store(tmp_path / "store", [(OPEN, SUCCESS, ".."), (OPEN, FAILURE, ""), (OPEN, UNMARKED, ""), (-1, UNMARKED, "")])
    assert find_attempts(store) == [(OPEN, 0, 60)]
    assert [start for _, start, _ in find_beginnings(store)] == [60, 180]
    gather_attempts([str(store.path)], str(tmp_path / "demos"))
    demos = PlayStore.open(tmp_path / "demos")
    assert demos.marks == [SUCCESS, UNMARKED, UNMARKED] and find_attempts(demos) == [(OPEN, 0, 60)]
    assert [len(demonstrations(store, number, None)) for number in (OPEN, -1)] == [2, 1]


def test_the_report_of_a_world_model_does_without_the_scene(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "WindowSampler", lambda episodes, windows, *rest: WindowSampler(episodes, 4, *rest))  # windows cost time
    arrays = {name: np.zeros((90, *FIELDS[name].shape), FIELDS[name].dtype) for name in PLAIN_FIELDS}
    store = PlayStore.create(tmp_path / "play", Contract(), {}, PLAIN_FIELDS)
    store.append_episode(arrays)
    save_world_model(tmp_path / "wm", make_model(TINY), Contract(), {})
    words = ["world-model", "report", "--checkpoint", tmp_path / "wm", "--play", store.path, "--validation", store.path]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 0
    assert "no simulated scene: pictures only" in capsys.readouterr().out and (tmp_path / "out" / "open_loop_rgb_static.png").exists()
    assert main([*map(str, words), "--out", str(tmp_path / "more"), "--rollouts", str(store.path)]) == 2
    assert "expected the simulator's labels scene_obs and skill" in capsys.readouterr().err
