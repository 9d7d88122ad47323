"""Hot swap without ROS: every gate on real features, blending, probation; the nodes are in test_ros_swap.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from diwa_core.contract import Contract
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.program import compile_sampler
from diwa_core.policy.store import save_policy
from diwa_ros.policy_store import LoadedPolicy, PolicyStore, Refusal, list_checkpoints
from diwa_ros.swap import (
    LatentMemory,
    Probation,
    blend_chunk,
    check_actions,
    check_latency,
    check_statistics,
    fit_noise,
    measure_difference,
)

CONFIG = PolicyConfig(feature_size=8, hidden=(16, 16, 16))


def make_policy(seed, **changes):
    torch.manual_seed(seed)
    return DiffusionPolicy(PolicyConfig(**{"feature_size": 8, "hidden": (16, 16, 16)} | changes)).eval().requires_grad_(False)


def make_loaded(seed, **changes):
    policy = make_policy(seed, **changes)
    return LoadedPolicy("open_drawer", policy, compile_sampler(policy), f"policy {seed}", "world model", Contract())


def test_statistics_gate_wants_real_latents_where_the_policy_expects_them():
    policy, features = make_policy(0), torch.randn(30, 8)
    check_statistics(policy, features)
    check_statistics(policy, torch.zeros(0, 0))
    with pytest.raises(Refusal, match="gate 'statistics': expected at most 10% of the last latents beyond 5 deviations, found 100%"):
        check_statistics(policy, features + 50)


def test_latency_gate_measures_and_names_the_budget():
    policy = make_loaded(0)
    assert 0 < check_latency(policy, math.inf) < 10_000
    with pytest.raises(Refusal, match="gate 'latency': expected at most 1e-06 ms for a chunk, found"):
        check_latency(policy, 1e-6)


def test_action_gate_compares_on_the_same_frames_and_noise():
    policy, other, features = make_loaded(0), make_loaded(1), torch.randn(30, 8)
    assert check_actions(policy, policy, features, features, 0.0) == 0.0
    assert math.isnan(check_actions(policy, other, torch.zeros(0, 0), torch.zeros(0, 0), 0.0))
    difference = check_actions(policy, other, features, features, 2.0)
    assert 0 < difference < 2
    with pytest.raises(Refusal, match=r"gate 'actions'.*at most 0.001 to the running policy, found") as refused:
        check_actions(policy, other, features, features, 0.001)
    assert refused.value.gate == "actions"


def test_policies_of_other_horizons_and_samplers_are_compared_over_what_they_share():
    policy, longer = make_loaded(0), make_loaded(1, horizon=6)
    assert fit_noise(longer.policy, policy.policy.draw_noise(5)).shape == (5, 21, 6, 7)
    assert 0 < check_actions(policy, longer, torch.randn(5, 8), torch.randn(5, 8), 2.0) < 2
    assert measure_difference(np.full((4, 7), 3.0), np.full((2, 7), 1.0)) == 0.0, "both are executed as 1"


def test_latent_memory_pairs_frames_of_two_world_models_and_forgets_the_past_of_another():
    running, candidate = LatentMemory(), LatentMemory()
    for stamp in range(200):
        running.add("a", stamp, np.full(3, stamp, np.float32))
    for stamp in range(195, 210):
        candidate.add("b", stamp, np.full(2, -stamp, np.float32))
    new, old = candidate.choose(running)
    assert new[:, 0].tolist() == [-195, -196, -197, -198, -199] and old[:, 0].tolist() == [195, 196, 197, 198, 199]
    same, again = running.choose()
    assert len(same) == 15 and torch.equal(same, again) and same[0, 0] == 110 and same[-1, 0] == 199
    running.add("b", 300, np.zeros(2, np.float32))
    running.add("b", 300, np.ones(2, np.float32))
    assert len(running.features) == 1


@given(
    arrays.arrays(np.float32, (4, 7), elements=st.floats(-3, 3, width=32)),
    arrays.arrays(np.float32, 7, elements=st.floats(-1, 1, width=32)),
)
def test_blending_bounds_the_first_step_and_ends_in_the_new_policy(actions, last):
    given_actions = actions.copy()
    blended = blend_chunk(last, actions)
    np.testing.assert_array_equal(actions, given_actions)
    clipped = actions.clip(-1, 1)
    np.testing.assert_array_equal(blended[-1], clipped[-1])
    np.testing.assert_array_equal(blended[:, 6], clipped[:, 6])
    assert (np.abs(blended[0, :6] - last[:6]) <= np.abs(clipped[0, :6] - last[:6]) / 4 + 1e-6).all()


def test_probation_begins_with_the_first_chunk_and_ends():
    probation, chunk = Probation(frozenset({"new"}), length_s=10, budget_ms=20), np.zeros((4, 7))
    assert not probation.is_over(1e9), "it has not run yet"
    assert probation.judge_chunk("old", np.full((4, 7), np.nan), 99, 0.0) is None
    assert probation.judge_chunk("new", chunk, 99, 100.0) is None
    assert not probation.is_over(109.0) and probation.is_over(111.0)


def test_probation_ends_on_lasting_slowness_and_at_once_on_nonsense():
    chunk = np.zeros((4, 7))
    probation = Probation(frozenset({"new"}), length_s=10, budget_ms=20)
    verdicts = [probation.judge_chunk("new", chunk, ms, 0.0) for ms in (30, 30, 10, 30, 30, 30)]
    assert verdicts[:5] == [None] * 5 and "3 chunks in a row took longer than 20 ms" in verdicts[5]
    assert "not finite" in Probation(frozenset({"new"}), 10, 20).judge_chunk("new", np.full((4, 7), np.nan), 1, 0.0)


def test_a_store_is_exchanged_as_a_whole(tmp_path):
    for skill, seed in (("open_drawer", 0), ("turn_on_led", 1), (".close_drawer.new", 2)):
        save_policy(tmp_path / skill, make_policy(seed), Contract(), skill, "w" * 64, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["open_drawer", "turn_on_led"], "half written ones are hidden"
    store = PolicyStore()
    store.load_folder(tmp_path)
    save_policy(tmp_path / "new", make_policy(5), Contract(), "open_drawer", "w" * 64, {})
    loaded = store.check(tmp_path / "new")
    new = store.replaced(loaded)
    assert new.policies == {**store.policies, "open_drawer": loaded} and store.policies["open_drawer"] is not loaded


def test_statistics_without_spread_are_refused(tmp_path):
    policy = make_policy(0)
    policy.feature_std[3] = 0.0
    save_policy(tmp_path / "flat", policy, Contract(), "open_drawer", "w" * 64, {})
    with pytest.raises(Refusal, match="gate 'statistics': expected deviations of features above 0, found 1"):
        PolicyStore().check(tmp_path / "flat")
