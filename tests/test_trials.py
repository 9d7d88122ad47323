"""Blinded trials: the plan and its key, what survives an interruption, what is refused, what the report says."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trial_support import FEATURE, SKILLS, KnownBackend, make_candidates, make_judge

from diwa_core.cli.evaluate_robot import read_candidates
from diwa_core.cli.main import main
from diwa_core.contract import Contract
from diwa_core.errors import CheckpointError, ConfigError, DataError
from diwa_core.evaluate.start_overlay import StartRenderer, draw_overlay, start_error, write_picture
from diwa_core.evaluate.trial_analysis import TrialAnalysis, compare_judges, correlate_ranks
from diwa_core.evaluate.trial_journal import CALVIN, ROBOT, SIMULATION, TrialJournal, TrialRow
from diwa_core.evaluate.trial_report import describe_ranks, write_trial_report
from diwa_core.evaluate.trial_run import STRIP_FRAMES, TableBackend, run_trials
from diwa_core.evaluate.trials import JOURNAL, KEY, PLAN, TrialFolder, make_plan
from diwa_core.policy.store import load_policy, save_policy
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.skills import start_state


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_candidates(tmp_path_factory.mktemp("checkpoints"), ("policies", "tuned", "third"))


def candidates(checkpoints: Path) -> dict[str, Path]:
    return {"base": checkpoints / "policies", "tuned": checkpoints / "tuned"}


def begin(checkpoints: Path, folder: Path, **options: object) -> TrialFolder:
    found = TrialFolder(folder)
    found.begin(*make_plan(candidates(checkpoints), checkpoints / "world_model", **{"starts": 3, **options}))
    return found


# -- plan and key ------------------------------------------------------------------------------------------------------------------------


def test_every_candidate_gets_every_start_and_starts_stay_together(checkpoints):
    plan, key = make_plan(candidates(checkpoints), checkpoints / "world_model", starts=3, seed=5, policy_seed=2)
    assert plan.skills == SKILLS and [trial.number for trial in plan.trials] == list(range(1, 13))
    tried = [(trial.skill, trial.index, key.candidate(trial).name) for trial in plan.trials]
    assert sorted(tried) == sorted((skill, index, name) for skill in SKILLS for index in range(3) for name in ("base", "tuned"))
    for first, second in zip(plan.trials[::2], plan.trials[1::2], strict=True):
        assert (first.skill, first.index, first.noise_seed) == (second.skill, second.index, second.noise_seed)


def test_the_order_follows_from_the_seed_and_favours_nobody(checkpoints):
    def order(seed: int) -> tuple:
        plan, key = make_plan(candidates(checkpoints), checkpoints / "world_model", starts=20, seed=seed)
        return plan.trials, key.assigned

    assert order(1) == order(1) != order(2)
    first = sum(who == 0 for who in order(1)[1][::2])  # of 40 starts, how often the first candidate comes first
    assert 8 < first < 32


def test_plan_and_journal_tell_an_operator_nothing(checkpoints, tmp_path):
    folder, told = begin(checkpoints, tmp_path), []
    run_trials(folder, ROBOT, "arm", lambda: KnownBackend(ROBOT, lambda a: True), make_judge(checkpoints), told.append)
    identities = [identity[:12] for candidate in folder.read_key().candidates for identity in candidate.identities.values()]
    secrets = [str(checkpoints), "tuned", "base", *identities]
    for text in ((tmp_path / PLAN).read_text(), (tmp_path / JOURNAL).read_text(), "\n".join(told)):
        assert text and not any(secret in text for secret in secrets)
    assert told[6] == f"robot: trial 7 of 12, {folder.read_plan().trials[6].skill}"


def test_a_changed_or_missing_key_is_refused(checkpoints, tmp_path):
    folder = begin(checkpoints, tmp_path)
    key = json.loads((tmp_path / KEY).read_text())
    key["assigned"][0] = 1 - key["assigned"][0]
    (tmp_path / KEY).write_text(json.dumps(key))
    with pytest.raises(DataError, match="expected the key of plan"):
        folder.read_key()
    (tmp_path / KEY).unlink()
    with pytest.raises(DataError, match=r"key.json: expected a file of `diwa evaluate robot`"):
        folder.read_key()


# -- what is refused ---------------------------------------------------------------------------------------------------------------------


def test_unknown_skills_and_impossible_numbers_are_refused(checkpoints):
    with pytest.raises(ConfigError, match=r"expected one of open_drawer.*found 'open_draw'"):
        make_plan(candidates(checkpoints), checkpoints / "world_model", ["open_draw"])
    with pytest.raises(ConfigError, match="starts and max_steps of at least 1"):
        make_plan(candidates(checkpoints), checkpoints / "world_model", starts=0)
    with pytest.raises(ConfigError, match="split of train"):
        make_plan(candidates(checkpoints), checkpoints / "world_model", split="test")
    with pytest.raises(CheckpointError, match="close_drawer"):
        make_plan(candidates(checkpoints), checkpoints / "world_model", ["close_drawer"])
    with pytest.raises(ConfigError, match="found the same one twice"):
        make_plan({"a": checkpoints / "tuned", "b": checkpoints / "tuned"}, checkpoints / "world_model")


def test_policies_of_another_contract_world_model_or_skill_are_refused(checkpoints, tmp_path):
    policy, checkpoint = load_policy(checkpoints / "tuned" / "open_drawer")
    world_model, pair = checkpoint.lineage["world_model"], {"base": checkpoints / "policies", "other": tmp_path}
    save_policy(tmp_path / "open_drawer", policy, replace(Contract(), rate_hz=15.0), "open_drawer", world_model, {})
    with pytest.raises(CheckpointError, match="rate_hz"):
        make_plan(pair, checkpoints / "world_model", ["open_drawer"])
    shutil.rmtree(tmp_path / "open_drawer")
    save_policy(tmp_path / "open_drawer", policy, Contract(), "open_drawer", "f" * 64, {})
    with pytest.raises(CheckpointError, match="expected a policy of world model"):
        make_plan(pair, checkpoints / "world_model", ["open_drawer"])
    shutil.rmtree(tmp_path / "open_drawer")
    save_policy(tmp_path / "open_drawer", policy, Contract(), "turn_on_led", world_model, {})
    with pytest.raises(CheckpointError, match="expected a policy of 'open_drawer', found one of 'turn_on_led'"):
        make_plan(pair, checkpoints / "world_model", ["open_drawer"])


def test_another_plan_in_the_folder_is_refused_and_names_the_difference(checkpoints, tmp_path):
    begin(checkpoints, tmp_path)
    begin(checkpoints, tmp_path)  # the same again goes on
    with pytest.raises(ConfigError, match="differs in noise_seed, trials"):
        begin(checkpoints, tmp_path, policy_seed=4)


def test_a_journal_of_another_plan_or_robot_is_refused(checkpoints, tmp_path):
    judge = make_judge(checkpoints)
    folder, other = begin(checkpoints, tmp_path / "a"), begin(checkpoints, tmp_path / "b", seed=3)
    run_trials(other, ROBOT, "arm", lambda: KnownBackend(ROBOT, lambda a: True), judge)
    with pytest.raises(ConfigError, match="expected trials on the robot 'other', found some on 'arm'"):
        run_trials(other, ROBOT, "other", lambda: KnownBackend(ROBOT, lambda a: True, robot="other"), judge)
    shutil.copy(tmp_path / "b" / JOURNAL, tmp_path / "a" / JOURNAL)
    with pytest.raises(DataError, match=r"line 1: expected a trial of this plan.*belongs to another plan"):
        run_trials(folder, ROBOT, "arm", lambda: KnownBackend(ROBOT, lambda a: True), judge)


def test_a_trial_nobody_judged_is_not_kept(checkpoints, tmp_path):
    folder, judge = begin(checkpoints, tmp_path), make_judge(checkpoints)
    with pytest.raises(DataError, match=r"trial 1: expected a mark .* found ''.*run it again"):
        run_trials(folder, ROBOT, "arm", lambda: KnownBackend(ROBOT, lambda a: ""), judge)
    assert TrialJournal(tmp_path / JOURNAL, folder.read_plan()).rows == []
    with pytest.raises(DataError, match="expected the oracle's judgement"):
        TrialRow("plan", SIMULATION, 1).validate()


def test_the_command_line_says_what_is_wrong(checkpoints, tmp_path, capsys):
    words = ["evaluate", "robot", "--checkpoint", str(checkpoints), "--out", str(tmp_path), "--candidates", str(checkpoints / "tuned")]
    assert main([*words, "--skills", "dance"]) == 2
    assert "found 'dance'" in capsys.readouterr().err
    assert main([*words, "--open"]) == 2
    assert "expected finished trials, found none" in capsys.readouterr().err
    assert main([*words, "--on", "calvin"]) == 2
    assert "expected --calvin-env" in capsys.readouterr().err
    assert main([*words, "--on", "calvin", "--calvin-env", str(tmp_path)]) == 2
    assert "calvin_env" in capsys.readouterr().err
    assert main(["evaluate", "--policies", str(checkpoints / "tuned")]) == 2
    assert "expected --world-model" in capsys.readouterr().err
    assert read_candidates(["a=x/y", "z/b"]) == {"a": Path("x/y"), "b": Path("z/b")}
    with pytest.raises(ConfigError, match="found 'b' twice"):
        read_candidates(["b=x", "z/b"])


# -- interruption ------------------------------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on_where_it_was(checkpoints, tmp_path):
    folder, judge = begin(checkpoints, tmp_path), make_judge(checkpoints)
    first, second = KnownBackend(ROBOT, lambda a: True, break_at=5), KnownBackend(ROBOT, lambda a: False)
    with pytest.raises(KeyboardInterrupt):
        run_trials(folder, ROBOT, "arm", lambda: first, judge)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"plan": "half a li')  # as a kill leaves it
    assert run_trials(folder, ROBOT, "arm", lambda: second, judge) == 8
    assert [assignment.trial.number for assignment in second.ran] == list(range(5, 13))
    assert [row.mark for row in TrialJournal(tmp_path / JOURNAL, folder.read_plan()).rows] == ["success"] * 4 + ["failure"] * 8

    def refuse() -> KnownBackend:
        raise AssertionError("nothing is missing")

    assert run_trials(folder, ROBOT, "arm", refuse, judge) == 0


def test_the_command_goes_on_and_reports_at_the_end(checkpoints, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of the robot's trials, then the same command again; the backends are known ones."""
    made = []

    def make_opener(args, name, judge, folder, stack):
        def open_backend():
            breaks = 3 if name == ROBOT and not made.count(ROBOT) else 0
            made.append(name)
            return KnownBackend(name, lambda a: True, break_at=breaks, robot=args.robot if name == ROBOT else "")

        return open_backend

    monkeypatch.setattr("diwa_core.cli.evaluate_robot.make_opener", make_opener)
    words = ["evaluate", "robot", "--checkpoint", str(checkpoints), "--out", str(tmp_path), "--starts", "1", "--skills", "open_drawer"]
    words += ["--candidates", *(f"{name}={path}" for name, path in {**candidates(checkpoints), "third": checkpoints / "third"}.items())]
    assert main(words) == 130
    told = capsys.readouterr().out
    assert "robot: stopped; finished trials are kept, and the same command goes on" in told and not (tmp_path / "report.html").exists()
    assert main(words) == 0 and made == [SIMULATION, ROBOT, ROBOT]
    told = capsys.readouterr().out
    assert "robot: trial 3 of 3, open_drawer" in told and "robot: 1 trials run, all 3 finished" in told and "the key is opened" in told
    assert "third − base" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit):
        main(["evaluate", "robot"])


def test_a_discarded_trial_is_repeated_and_counted(checkpoints, tmp_path):
    marks = iter(["success", "discard", "discard", "failure", *["success"] * 10])
    folder = begin(checkpoints, tmp_path)
    assert run_trials(folder, ROBOT, "arm", lambda: KnownBackend(ROBOT, lambda a: next(marks)), make_judge(checkpoints)) == 14
    journal = TrialJournal(tmp_path / JOURNAL, folder.read_plan())
    assert journal.discarded(ROBOT) == 2 and journal.finished(ROBOT)[2].mark == "failure"


def test_a_full_disk_is_one_sentence(checkpoints, tmp_path, monkeypatch):
    folder = begin(checkpoints, tmp_path)
    (tmp_path / "strips").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written.*the same command goes on"):
        run_trials(folder, ROBOT, "arm", lambda: KnownBackend(ROBOT, lambda a: True), make_judge(checkpoints))


# -- backends without ROS ----------------------------------------------------------------------------------------------------------------


def test_a_table_without_ros_runs_trials_as_an_evaluation_does(checkpoints, tmp_path):
    """What stands for the official environment here is the play table behind the same interface."""
    folder = begin(checkpoints, tmp_path, starts=1, max_steps=3, skills=["open_drawer"])
    table = PlayTable()
    assert run_trials(folder, CALVIN, "", lambda: TableBackend(table, checkpoints / "world_model"), make_judge(checkpoints)) == 2
    rows = TrialJournal(tmp_path / JOURNAL, folder.read_plan()).rows
    assert [(row.oracle, row.steps) for row in rows] == [(False, 3)] * 2 and all(0 <= row.classifier <= 1 for row in rows)
    assert (tmp_path / rows[0].strip).stat().st_size > 100
    swapped = folder.read_key().policy(folder.read_plan().trials[0])
    policy, checkpoint = load_policy(swapped)
    (tmp_path / JOURNAL).unlink()
    kept = {path.name: path.read_bytes() for path in swapped.iterdir()}
    try:
        shutil.rmtree(swapped)
        for weight in policy.parameters():
            weight.requires_grad_(False).add_(0.1)
        save_policy(swapped, policy, Contract(), "open_drawer", checkpoint.lineage["world_model"], {})
        with pytest.raises(CheckpointError, match="trial 1: expected the policy that the key names") as error:
            run_trials(folder, CALVIN, "", lambda: TableBackend(table, checkpoints / "world_model"), make_judge(checkpoints))
        assert str(checkpoints) not in str(error.value)
    finally:
        for name, data in kept.items():
            (swapped / name).write_bytes(data)
    table.close()


def test_the_classifier_judges_what_follows_the_warm_up(checkpoints):
    judge = make_judge(checkpoints)
    features = np.random.default_rng(0).normal(size=(judge.warmup_frames + 4, FEATURE)).astype(np.float32)
    best, success = judge.judge("open_drawer", features)
    threshold = float(judge.classifiers["open_drawer"].filtered_threshold)
    assert success == (best > threshold)
    alone = [judge.judge("open_drawer", np.concatenate([features[: judge.warmup_frames], features[i : i + 1]]))[0] for i in range(4, 8)]
    assert best == pytest.approx(max(alone), abs=1e-6)
    assert judge.judge("open_drawer", features[: judge.warmup_frames]) == (None, None) == judge.judge("close_drawer", features)
    with pytest.raises(CheckpointError, match="another world model than the plan's"):
        judge.judge("open_drawer", features[:, 1:])


# -- the start ---------------------------------------------------------------------------------------------------------------------------


def test_the_overlay_shows_the_wanted_start_over_the_camera(tmp_path):
    start = start_state("open_drawer", 0, 0, "evaluation")
    with StartRenderer(64) as renderer:
        wanted = renderer.render(start)
        scene = renderer.table.scene_obs
        error = start_error(start, renderer.table.robot_obs[:6], scene)
    assert error["hand_mm"] < 5 and error["slider_mm"] < 1 and error["led"] == 0
    moved = np.array(scene)
    moved[1] += 0.05
    assert start_error(start, None, moved)["drawer_mm"] == pytest.approx(50, abs=1) and "hand_mm" not in start_error(start, None, moved)
    live = np.full((48, 48, 3), 200, np.uint8)
    picture = draw_overlay(wanted, live, "trial 7: open_drawer", start, error)
    left, middle, right = (picture[40:400, 400 * i : 400 * (i + 1)].astype(int) for i in range(3))
    assert (middle == 200).all() and np.abs(right - (left // 2 + 100)).max() <= 1
    write_picture(tmp_path / "overlay" / "now.png", picture)
    assert (tmp_path / "overlay" / "now.png").read_bytes().startswith(b"\x89PNG")


# -- statistics and report ---------------------------------------------------------------------------------------------------------------


def test_agreement_of_two_judges():
    pairs = [(True, True)] * 20 + [(False, False)] * 15 + [(True, False)] * 5 + [(False, True)] * 10
    found = compare_judges("oracle", "classifier", pairs)
    assert (found.trials, found.only_first, found.only_second) == (50, 5, 10)
    assert found.rate.value == pytest.approx(0.7) and found.kappa == pytest.approx(0.4)  # the textbook example
    assert compare_judges("a", "b", []) is None and compare_judges("a", "b", [(True, True)]).kappa is None


def test_ranks_of_policies_and_pairs_of_one_skill():
    skills = ["x", "x", "y", "y", "z", "z"]
    same = correlate_ranks([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7], skills)
    assert same.tau.value == pytest.approx(1) and (same.same, same.other, same.tied) == (3, 0, 0)
    assert same.p_value == pytest.approx(2 / 720) and same.pair_p == pytest.approx(0.25)
    mixed = correlate_ranks([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.3, 0.2, 0.6, 0.6, 0.4, 0.5], skills)
    assert (mixed.same, mixed.other, mixed.tied) == (1, 1, 1) and mixed.tau.low < mixed.tau.value < mixed.tau.high
    level = correlate_ranks([0.5, 0.5], [0.1, 0.2], ["x", "x"])
    assert level.tau is None and "puts all policies level" in describe_ranks("simulation", level)
    assert correlate_ranks([0.5], [0.5], ["x"]) is None


def test_the_report_opens_the_key(checkpoints, tmp_path):
    """The tuned policies win everywhere in simulation and on drawers on the robot; the page says so, by name."""
    folder, judge = begin(checkpoints, tmp_path), make_judge(checkpoints)
    tuned = {identity for identity in folder.read_key().candidates[1].identities.values()}
    run_trials(folder, SIMULATION, "", lambda: KnownBackend(SIMULATION, lambda a: a.identity in tuned), judge)
    robot = KnownBackend(ROBOT, lambda a: a.identity in tuned and a.trial.skill == "open_drawer")
    run_trials(folder, ROBOT, "arm", lambda: robot, judge)
    analysis = TrialAnalysis(folder)
    base, better = analysis.candidates
    assert analysis.rate(ROBOT, better, "open_drawer").value == 1 and analysis.rate(ROBOT, base, "open_drawer").value == 0
    difference = analysis.difference(ROBOT, better, "open_drawer")
    assert (difference.gained, difference.lost, difference.episodes) == (3, 0, 3)
    assert analysis.gap(better, "turn_on_led", SIMULATION).difference.value == -1
    assert analysis.gap(better, "open_drawer", SIMULATION).difference.value == 0
    assert analysis.imagined() == {(name, skill): value for name, value in (("base", 0.2), ("tuned", 0.7)) for skill in SKILLS}
    ranks = analysis.rank("imagination")
    assert (ranks.policies, ranks.same, ranks.tied) == (4, 1, 1)
    page = write_trial_report(folder, "diwa evaluate robot ...").read_text()
    for words in (
        "base 0 % (0–", "tuned 50 %", "Sim-to-real gap", "oracle and classifier", "operator's mark and classifier", "HOLD 6",
        "Order in simulation → order on the robot", "Order in imagination → order on the robot", "camera → chunk", "50.0 %",
        folder.read_plan().identity, base.identities["open_drawer"][:16], "tuned − base", "<td>12</td>",
    ):  # fmt: skip
        assert words in page, words
    assert page.count("data:image/webp;base64,") == 8 and not re.search(r'(src|href)="(?!data:)http', page) and "<script" not in page
    assert STRIP_FRAMES == 8 and "later ones were not blind" not in page


def test_a_key_that_was_opened_early_is_told(checkpoints, tmp_path):
    folder, judge = begin(checkpoints, tmp_path), make_judge(checkpoints)
    with pytest.raises(KeyboardInterrupt):
        run_trials(folder, ROBOT, "arm", lambda: KnownBackend(ROBOT, lambda a: True, break_at=4), judge)
    assert "robot lacks 9 of 12 trials" in write_trial_report(folder, "x").read_text()
    run_trials(folder, ROBOT, "arm", lambda: KnownBackend(ROBOT, lambda a: True), judge)
    assert "opened after 3 trials on the robot: later ones were not blind" in write_trial_report(folder, "x").read_text()
