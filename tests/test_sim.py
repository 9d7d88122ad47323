"""The play table: interface, rules, determinism, oracle, starts, experts, recorded play."""

import itertools
import pickle

import gymnasium
import numpy as np
import pybullet
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from diwa_core.contract import Contract
from diwa_core.data.store import PlayStore
from diwa_core.errors import ConfigError, ContractError, DataError, SetupError
from diwa_core.sim import demos, play
from diwa_core.sim.calvin_adapter import CalvinTable
from diwa_core.sim.experts import Expert, Style
from diwa_core.sim.play_table import LEASH_M, WORKSPACE_LOWER, WORKSPACE_UPPER, PlayTable
from diwa_core.sim.skills import BULB, BUTTON, DRAWER, LED, SKILLS, SLIDER, SPLITS, SWITCH, SkillOracle, draw_state, start_states
from diwa_core.sim.state import NEUTRAL_POSE, SceneState, wrap_angle
from diwa_core.sim.vector import VectorPlayTable

HOLD_OPEN = np.array([0, 0, 0, 0, 0, 0, 1.0])


@pytest.fixture(scope="module")
def table():
    made = PlayTable(image_size=None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def seeing_table():
    made = PlayTable()
    yield made
    made.close()


def play_random(table: PlayTable, seed: int, steps: int) -> list[dict[str, np.ndarray]]:
    """A rough ride down into the table, so that there is contact."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (steps, 7)) + np.array([0, 0.3, -0.5, 0, 0, 0, 0])
    return [table.step(action)[0] for action in actions]


def equal(a: list[dict], b: list[dict]) -> bool:
    return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


# -- interface ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*infinity.*")
def test_gymnasium_accepts_the_environment():
    made = PlayTable()
    check_env(made, skip_render_check=True)
    assert isinstance(made, gymnasium.Env) and made.render().shape == (200, 200, 3)
    made.close()
    made.close()


def test_observation_fits_the_contract(seeing_table):
    seeing_table.reset(seed=0)
    seeing_table.observation().validate(Contract())


def test_neutral_start_is_the_documented_one(table):
    table.reset(options={"state": SceneState()})
    np.testing.assert_allclose(table.robot_obs[:6], NEUTRAL_POSE, atol=2e-4)
    assert table.robot_obs[6] == pytest.approx(0.08) and table.robot_obs[14] == 1
    np.testing.assert_allclose(table.target_pose, table.robot_obs[:6])


@pytest.mark.parametrize("action", [np.zeros(6), np.zeros((1, 7)), [np.nan] * 7, [0, 0, 0, 0, 0, np.inf, 1]])
def test_bad_actions_are_refused_and_move_nothing(table, action):
    table.reset(seed=1)
    before = table.robot_obs
    with pytest.raises(ContractError, match="action"):
        table.step(np.asarray(action))
    np.testing.assert_array_equal(table.robot_obs, before)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"state": SceneState(drawer=0.3)}, ContractError),
        ({"state": SceneState(slider=np.nan)}, ContractError),
        ({"state": SceneState(blocks=np.zeros((2, 6)))}, ContractError),
        ({"state": SceneState(gripper=0.0)}, ContractError),
        ({"skill": "open_window"}, ConfigError),
        ({"sklil": "open_drawer"}, ContractError),
    ],
)
def test_bad_reset_options_are_refused(table, options, error):
    with pytest.raises(error):
        table.reset(options=options)


def test_unknown_view_is_refused():
    with pytest.raises(ContractError, match="rgb_side"):
        PlayTable(views=("rgb_side",))


# -- motion ------------------------------------------------------------------------------------------------------------------------


def test_relative_actions_integrate_on_the_target(table):
    table.reset(options={"state": SceneState()})
    start = table.target_pose
    for _ in range(4):
        table.apply([-0.5, -0.25, 1, 0, 0, 0.4, 1])
    np.testing.assert_allclose(table.target_pose[:3] - start[:3], [-0.04, -0.02, 0.08], atol=1e-9)
    np.testing.assert_allclose(wrap_angle(table.target_pose[3:] - start[3:]), [0, 0, 0.08], atol=1e-9)
    for _ in range(30):
        table.apply(HOLD_OPEN)
    np.testing.assert_allclose(table.robot_obs[:3], table.target_pose[:3], atol=0.004)
    np.testing.assert_allclose(wrap_angle(table.robot_obs[3:6] - table.target_pose[3:]), 0, atol=0.02)


def test_gripper_is_thresholded(table):
    table.reset(options={"state": SceneState()})
    for _ in range(20):
        table.apply([0, 0, 0, 0, 0, 0, -0.01])
    assert table.robot_obs[6] < 0.005 and table.robot_obs[14] == -1
    for _ in range(40):
        table.apply([0, 0, 0, 0, 0, 0, 0.0])
    assert table.robot_obs[6] > 0.07 and table.robot_obs[14] == 1


@settings(max_examples=8, deadline=None)
@given(direction=st.tuples(*[st.floats(-1, 1) for _ in range(6)]))
def test_target_stays_on_its_leash_and_in_the_workspace(table, direction):
    table.reset(options={"state": SceneState()})
    for _ in range(60):
        before = table.robot_obs
        table.apply([*direction, -1])
        lead = np.linalg.norm(table.target_pose[:3] - before[:3])
        assert lead <= LEASH_M + 1e-9
    outside = np.maximum(WORKSPACE_LOWER - table.target_pose[:3], table.target_pose[:3] - WORKSPACE_UPPER)
    # the leash holds it to the measured pose, which swings a little past a border
    assert outside.max() < 0.04 and np.isfinite(table.scene_obs).all()


# -- rules -------------------------------------------------------------------------------------------------------------------------


def set_joint(table: PlayTable, name: str, value: float) -> None:
    pybullet.resetJointState(table.scene.table, table.scene.joints[name], value, physicsClientId=table.client)


def test_bulb_follows_the_switch(table):
    table.reset(options={"state": SceneState(switch=0.03)})
    seen = []
    for value in (0.03, 0.05, 0.08, 0.05, 0.04, 0.0):
        set_joint(table, "switch", value)
        table.apply(HOLD_OPEN)
        seen.append((table.scene_obs[SWITCH] > 0.044, table.scene_obs[BULB]))
    assert [bulb for _, bulb in seen] == [0, 1, 1, 1, 0, 0]
    assert all(high == bool(bulb) for high, bulb in seen)


def hold_button(table: PlayTable, pressed: bool) -> None:
    """Hold the button down with a strong motor for a few steps, or let the scene's own spring bring it up."""
    position, force = (0.02, 40.0) if pressed else (0.0, 4.0)
    index, mode = table.scene.joints["button"], pybullet.POSITION_CONTROL
    pybullet.setJointMotorControl2(table.scene.table, index, mode, position, force=force, physicsClientId=table.client)
    for _ in range(25):
        table.apply(HOLD_OPEN)
    assert (table.scene_obs[BUTTON] > 0.01) == pressed


def test_every_press_toggles_the_led_once(table):
    table.reset(options={"state": SceneState(led=False)})
    leds = []
    for pressed in (False, True, True, False, False, True, False, True):
        hold_button(table, pressed)
        leds.append(int(table.scene_obs[LED]))
    assert leds == [0, 1, 1, 1, 1, 0, 0, 1]


def test_lights_show_in_the_picture(seeing_table):
    pictures = {}
    for led, switch in itertools.product((False, True), (0.0, 0.088)):
        observation, _ = seeing_table.reset(options={"state": SceneState(led=led, switch=switch)})
        pictures[led, switch > 0] = observation["rgb_static"].astype(int)
    green = pictures[True, False] - pictures[False, False]
    assert green[:8, :, 1].max() > 80  # at the upper edge of the view
    yellow = pictures[False, True] - pictures[False, False]
    assert yellow[:8, 40:, 2].min() < -80


# -- determinism -------------------------------------------------------------------------------------------------------------------


def test_replay_is_bit_identical_after_other_episodes_and_in_another_table(seeing_table):
    seeing_table.reset(seed=5)
    first = play_random(seeing_table, 1, 50)
    seeing_table.reset(seed=6)
    play_random(seeing_table, 2, 30)
    seeing_table.reset(seed=5)
    assert equal(first, play_random(seeing_table, 1, 50))
    other = PlayTable()
    other.reset(seed=5)
    assert equal(first, play_random(other, 1, 50))
    other.close()


@pytest.mark.parametrize("steps", [0, 17, 60])
def test_restore_carries_on_bit_identically(table, steps):
    table.reset(seed=7)
    play_random(table, 3, steps)
    snapshot = pickle.loads(pickle.dumps(table.save_state()))
    expected = play_random(table, 4, 30)
    table.restore_state(snapshot)
    assert equal(expected, play_random(table, 4, 30))
    table.reset(seed=8)
    table.restore_state(snapshot)
    assert equal(expected, play_random(table, 4, 30))


def test_snapshot_that_does_not_replay_is_refused(table):
    table.reset(seed=7)
    play_random(table, 3, 5)
    snapshot = table.save_state()
    snapshot.actions[2, 0] *= -1
    with pytest.raises(DataError, match="snapshot"):
        table.restore_state(snapshot)


# -- skills ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skill", "index", "start", "miss", "hit"),
    [
        ("open_drawer", DRAWER, 0.03, 0.149, 0.151),
        ("close_drawer", DRAWER, 0.20, 0.081, 0.079),
        ("move_slider_left", SLIDER, 0.05, 0.199, 0.201),
        ("move_slider_right", SLIDER, 0.25, 0.101, 0.099),
        ("turn_on_lightbulb", BULB, 0, 0, 1),
        ("turn_off_lightbulb", BULB, 1, 1, 0),
        ("turn_on_led", LED, 0, 0, 1),
        ("turn_off_led", LED, 1, 1, 0),
    ],
)
def test_oracle_judges_the_change_since_the_start(skill, index, start, miss, hit):
    scene = np.zeros(24)
    scene[index] = start
    oracle = SkillOracle(skill, scene)
    for value, expected in ((start, False), (miss, False), (hit, True)):
        scene[index] = value
        assert oracle.success(scene) is expected
    scene[:] = 0
    with pytest.raises(ContractError):
        oracle.success(scene[:6])
    with pytest.raises(ConfigError, match="found 'fly'"):
        SkillOracle("fly", scene)


def flat(state: SceneState) -> tuple:
    return (*state.tcp_pose, state.gripper, state.slider, state.drawer, state.switch, state.led, *state.blocks.ravel())


def test_start_lists_are_reproducible_and_disjoint():
    lists = {split: [flat(s) for s in start_states("close_drawer", 40, 0, split)] for split in SPLITS}
    again = [flat(s) for s in start_states("close_drawer", 10, 0, "train")]
    assert again == lists["train"][:10]
    everything = [state for states in lists.values() for state in states] + [flat(s) for s in start_states("close_drawer", 40, 1, "train")]
    assert len(set(everything)) == 160
    with pytest.raises(ConfigError, match="split"):
        start_states("close_drawer", 1, 0, "test")


@pytest.mark.parametrize("skill", SKILLS)
def test_starts_are_possible_and_not_done(table, skill):
    index, change = {"drawer": (DRAWER, 0.12), "slider": (SLIDER, 0.15), "lightbulb": (BULB, 1), "led": (LED, 1)}[
        next(part for part in ("drawer", "slider", "lightbulb", "led") if part in skill)
    ]
    upper = {DRAWER: 0.22, SLIDER: 0.28}.get(index, 1)
    sign = 1 if skill in ("open_drawer", "move_slider_left") or "turn_on" in skill else -1
    poses = []
    for state in start_states(skill, 12, 3):
        table.reset(options={"state": state})
        scene = table.scene_obs
        assert 0 <= scene[index] + sign * change <= upper
        assert bool(scene[BULB]) == (scene[SWITCH] > 0.044) == state.bulb
        np.testing.assert_allclose(table.robot_obs[:3], state.tcp_pose[:3], atol=0.005)
        poses.append(state.tcp_pose)
    assert (np.ptp(poses, axis=0)[:3] > [0.12, 0.08, 0.06]).all()


@pytest.mark.parametrize("skill", SKILLS)
def test_experts_succeed(table, skill):
    for number, state in enumerate(start_states(skill, 5, 11)):
        table.reset(options={"state": state})
        oracle = SkillOracle(skill, table.scene_obs)
        expert = Expert(skill, np.random.default_rng(number))
        expert.start(table.robot_obs, table.scene_obs)
        for _ in range(72):
            table.apply(expert.act(table.robot_obs, table.target_pose))
            if oracle.success(table.scene_obs):
                break
        assert oracle.success(table.scene_obs), f"start {number}"


def test_style_makes_an_expert_noisier(table):
    def roughness(style: Style) -> float:
        table.reset(options={"state": SceneState()})
        expert = Expert("open_drawer", np.random.default_rng(0), style)
        expert.start(table.robot_obs, table.scene_obs)
        actions = []
        for _ in range(30):
            actions.append(expert.act(table.robot_obs, table.target_pose))
            table.apply(actions[-1])
        assert np.abs(actions).max() <= 1
        return float(np.abs(np.diff(actions, axis=0)).mean())

    assert roughness(Style(action_noise=0.4)) > 2 * roughness(Style())


# -- recording ---------------------------------------------------------------------------------------------------------------------


def test_play_does_not_depend_on_the_number_of_workers(tmp_path):
    short = play.PlaySettings(episode_frames=40)
    one = play.generate_play(tmp_path / "one", 80, 3, 1, short)
    two = play.generate_play(tmp_path / "two", 80, 3, 2, short)
    assert one.episodes == [(0, 40), (40, 80)]
    assert one.content_hash == two.content_hash != play.generate_play(tmp_path / "other", 80, 4, 1, short).content_hash
    assert PlayStore.open(tmp_path / "one").settings["seed"] == 3


def test_a_cut_off_store_is_continued_and_equals_one_made_at_once(tmp_path, monkeypatch):
    short, made = play.PlaySettings(episode_frames=40), play.play_episode

    def cut_off(seed, number, settings):
        if number == 1:
            raise KeyboardInterrupt
        return made(seed, number, settings)

    whole = play.generate_play(tmp_path / "whole", 80, 3, 1, short)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(play, "play_episode", cut_off)
        play.generate_play(tmp_path / "cut", 80, 3, 1, short)
    assert PlayStore.open(tmp_path / "cut").episodes == [(0, 40)]
    assert play.generate_play(tmp_path / "cut", 80, 3, 1, short).content_hash == whole.content_hash
    with pytest.raises(DataError, match="at most the 1 episodes asked for, found 2"):
        play.generate_play(tmp_path / "cut", 40, 3, 1, short)


def test_recorded_actions_lead_from_frame_to_frame(table):
    episode = play.play_episode(5, 0, play.PlaySettings(episode_frames=60))
    table.reset(options={"state": draw_state(None, np.random.default_rng([5, 0]))})
    for t in range(60):
        np.testing.assert_array_equal(table.robot_obs, episode["robot_obs"][t])
        np.testing.assert_array_equal(table.scene_obs, episode["scene_obs"][t])
        np.testing.assert_array_equal(table.target_pose, episode["target_pose"][t])
        table.apply(episode["actions"][t])
    assert set(np.unique(episode["actions"][:, 6])) <= {-1.0, 1.0}


def test_demonstrations_warm_up_and_end_with_success():
    (episode,) = demos.collect_demonstrations("turn_on_led", 1, 2)
    held = demos.WARM_UP_FRAMES - 1
    assert np.all(episode["actions"][:held, :6] == 0)
    assert np.any(episode["actions"][held:, :6] != 0)
    oracle = SkillOracle("turn_on_led", episode["scene_obs"][0])
    assert [oracle.success(scene) for scene in episode["scene_obs"]] == [False] * (len(episode["actions"]) - 1) + [True]
    assert set(episode["skill"]) == {SKILLS.index("turn_on_led")}


def test_a_store_of_one_skills_demonstrations_holds_the_same_as_one_of_many(tmp_path):
    both = demos.generate_demonstrations(tmp_path / "both", 1, 2, workers=1, skills=("turn_on_led", "open_drawer"))
    one = demos.generate_demonstrations(tmp_path / "one", 1, 2, workers=1, skills=("open_drawer",))
    start, end = both.episodes[1]
    np.testing.assert_array_equal(both.read("robot_obs", start, end), one.load(("robot_obs",))["robot_obs"])


def test_vector_of_play_tables_equals_single_ones(table):
    states = start_states("open_drawer", 2, 0)
    vector = VectorPlayTable(2, image_size=None)
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 2, 7)).astype(np.float32)
    vector.reset_to(states)
    for pair in actions:
        observation = vector.step(pair)[0]
    with pytest.raises(ConfigError):
        vector.reset_to(states[:1])
    vector.close()
    for number, state in enumerate(states):
        table.reset(options={"state": state})
        for pair in actions:
            table.apply(pair[number])
        np.testing.assert_array_equal(observation["robot_obs"][number], table.robot_obs)


def test_absent_calvin_env_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"Clone it"):
        CalvinTable(tmp_path / "nowhere")
    for name in ("calvin_env/envs/play_table_env.py", "conf/config_data_collection.yaml", "conf/scene/calvin_scene_D.yaml", "data/none"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import a_package_that_is_not_there\n")
    with pytest.raises(SetupError, match=r"pip install"):
        CalvinTable(tmp_path)
