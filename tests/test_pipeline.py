"""Stages run only when what they are made from changed, go on where they were cut off, and leave no process behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from diwa_core.cli.main import main
from diwa_core.cli.pipeline import RECIPE, check_command
from diwa_core.cli.progress import PROGRESS_FILE, stage_progress, stop_between_updates
from diwa_core.data.store import PlayStore
from diwa_core.errors import ConfigError, DataError, DiwaError
from diwa_core.evaluate.comparison import Comparison
from diwa_core.pipeline import runner as runner_module
from diwa_core.pipeline.recipe import SIZES, Builder, load_recipe
from diwa_core.pipeline.runner import Runner, StageFailed, plan, show_seconds
from diwa_core.pipeline.sources import digest_sources
from diwa_core.pipeline.stage import Action, At, Pipeline, Stage
from diwa_core.sim.play import PlaySettings, generate_play

JOIN = """
import sys
from pathlib import Path
*parts, out = map(Path, sys.argv[2:])
out.write_text("".join(part.read_text() for part in parts) + sys.argv[1])
with out.with_suffix(".runs").open("a") as runs:
    runs.write("x")
"""


@contextmanager
def process(words: list) -> Iterator[subprocess.Popen]:
    """A process that has ended when the test has, also when that failed or took too long."""
    running = subprocess.Popen(words)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def join(name: str, text: str, *inputs: str, **options) -> Stage:
    """A stage that writes what it reads, then `text`; <name>.runs has one letter per run."""
    paths = tuple(At(f"{path}.txt") for path in inputs)
    out = At(f"{name}.txt")
    return Stage(name, ("python", "-c", JOIN, text, *paths, out), paths, (out,), **options)


def pipeline(root: Path, first: str = "a", third: str = "c", **options) -> Pipeline:
    """one -> two -> three, and alone."""
    stages = [join("one", first), join("two", "b", "one"), join("three", third, "two"), join("alone", "z")]
    return Pipeline(root, stages, **options)


def bring_up_to_date(made: Pipeline, workers: int = 1, stages: list[Stage] | None = None) -> list[str]:
    """Run; the lines it showed."""
    lines: list[str] = []
    assert Runner(made, workers, lines.append).run(made.stages if stages is None else stages)
    return lines


def runs(root: Path) -> dict[str, int]:
    """How often each stage has run."""
    return {path.stem: len(path.read_text()) for path in root.glob("*.runs")}


def actions(made: Pipeline) -> dict[str, str]:
    return {stage.name: decision.action.value for stage, decision in plan(made, made.stages)}


# -- stamps ------------------------------------------------------------------------------------------------------------------------


def test_a_second_run_skips_everything(tmp_path):
    bring_up_to_date(pipeline(tmp_path), workers=2)
    assert (tmp_path / "three.txt").read_text() == "abc"
    lines = bring_up_to_date(pipeline(tmp_path))
    assert runs(tmp_path) == {"one": 1, "two": 1, "three": 1, "alone": 1}
    assert lines == [f"[{i}/4] {name}: skip, unchanged" for i, name in enumerate(("one", "two", "three", "alone"), 1)]


def test_a_changed_command_runs_again_what_depends_on_it_and_nothing_else(tmp_path):
    bring_up_to_date(pipeline(tmp_path))
    changed = pipeline(tmp_path, first="A")
    assert actions(changed) == {"one": "run", "two": "after", "three": "after", "alone": "skip"}
    bring_up_to_date(changed)
    assert (tmp_path / "three.txt").read_text() == "Abc"
    assert runs(tmp_path) == {"one": 2, "two": 2, "three": 2, "alone": 1}


def test_what_comes_out_the_same_runs_nothing_after_it(tmp_path):
    bring_up_to_date(pipeline(tmp_path))
    same = [join("one", "a", speed=("--fast",)), *pipeline(tmp_path).stages[1:]]
    assert set(actions(Pipeline(tmp_path, same)).values()) == {"skip"}  # speed does not count
    (tmp_path / "stamps" / "one.json").unlink()
    (tmp_path / "one.txt").unlink()
    bring_up_to_date(pipeline(tmp_path))
    assert runs(tmp_path) == {"one": 2, "two": 1, "three": 1, "alone": 1}


@pytest.mark.parametrize(("edit", "reason"), [(lambda path: path.write_text("?"), "changed by something"), (Path.unlink, "gone")])
def test_outputs_that_were_changed_or_removed_are_made_again(tmp_path, edit, reason):
    bring_up_to_date(pipeline(tmp_path))
    edit(tmp_path / "two.txt")
    decision = dict((stage.name, decision) for stage, decision in plan(pipeline(tmp_path), pipeline(tmp_path).stages))["two"]
    assert decision.action is Action.START and reason in decision.reason
    bring_up_to_date(pipeline(tmp_path))
    assert (tmp_path / "three.txt").read_text() == "abc" and runs(tmp_path) == {"one": 1, "two": 2, "three": 1, "alone": 1}


def test_the_root_may_move(tmp_path):
    bring_up_to_date(pipeline(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert set(actions(pipeline(tmp_path / "there")).values()) == {"skip"}


def test_changed_code_counts_only_when_asked(tmp_path, monkeypatch):
    bring_up_to_date(pipeline(tmp_path))
    monkeypatch.setattr("diwa_core.pipeline.stage.digest_sources", lambda module: "other")
    assert set(actions(pipeline(tmp_path)).values()) == {"skip"}
    assert "code was changed since" in plan(pipeline(tmp_path), pipeline(tmp_path).stages)[0][1].reason
    assert actions(pipeline(tmp_path, strict=True))["one"] == "run"


def test_the_sources_of_a_stage_are_those_it_imports(monkeypatch):
    from diwa_core.pipeline import sources

    def digests() -> list[str]:
        digest_sources.cache_clear()
        return [digest_sources(module) for module in ("diwa_core.sim.play", "diwa_core.cli.finetune")]

    before, read = digests(), sources._read
    for changed, same in (("diwa_core.finetune.ppo", [True, False]), ("diwa_core.errors", [False, False])):
        with monkeypatch.context() as patch:
            patch.setattr(sources, "_read", lambda name, changed=changed: (read(name)[0] + "#" * (name == changed), read(name)[1]))
            assert [a == b for a, b in zip(before, digests(), strict=True)] == same, changed
    assert digests() == before


def test_files_of_somebody_else_are_left_alone(tmp_path):
    (tmp_path / "one.txt").write_text("mine")
    with pytest.raises(DataError, match="without its stamp"):
        bring_up_to_date(pipeline(tmp_path))
    assert (tmp_path / "one.txt").read_text() == "mine"


def test_a_stage_that_checks_itself_takes_up_what_is_there(tmp_path):
    (tmp_path / "one.txt").write_text("mine")
    made = Pipeline(tmp_path, [join("one", "a", keeps=(At("one.txt"),), checks_itself=True)])
    assert plan(made, made.stages)[0][1].action is Action.RESUME


def test_a_new_start_removes_what_another_run_kept_and_a_resumed_one_does_not(tmp_path):
    stage = lambda text: join("one", text, keeps=(At("state"),), resumes=True)  # noqa: E731
    made = Pipeline(tmp_path, [stage("a")])
    made.begin(made.stages[0], made.decide(made.stages[0]))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "step").write_text("7")
    decision = made.decide(made.stages[0])
    assert decision.action is Action.RESUME and decision.reason == "was cut off"
    made.begin(made.stages[0], decision)
    assert (tmp_path / "state" / "step").exists()
    other = Pipeline(tmp_path, [stage("A")])
    decision = other.decide(other.stages[0])
    assert decision.action is Action.START and "'a'" not in decision.reason and "a became A" in decision.reason
    other.begin(other.stages[0], decision)
    assert not (tmp_path / "state").exists()


def test_a_checkpoint_counts_by_its_identity(tmp_path):
    from diwa_core.pipeline.stage import identify

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"identity": "f" * 64, "card": {}}))
    before = identify(folder)
    (folder / "manifest.json").write_text(json.dumps({"identity": "f" * 64, "card": {"success": 1}}))
    assert identify(folder) == before == "f" * 16
    (folder / "manifest.json").write_text("{")
    assert identify(folder) not in (None, before)
    assert identify(tmp_path / "nothing") is None


def test_a_stage_without_its_output_is_not_finished(tmp_path):
    made = Pipeline(tmp_path, [Stage("one", ("python", "-c", "pass"), (), (At("one.txt"),))])
    with pytest.raises(DataError, match="not there"):
        bring_up_to_date(made)
    assert not json.loads((tmp_path / "stamps" / "one.json").read_text())["finished"]


def test_impossible_pipelines_are_refused(tmp_path):
    for stages in ([join("two", "b", "one"), join("one", "a")], [join("one", "a"), join("one", "b")]):
        with pytest.raises(ConfigError, match="taken already, or nothing before it writes"):
            Pipeline(tmp_path, stages)


def test_a_stage_alone_needs_the_others_up_to_date(tmp_path):
    made = pipeline(tmp_path)
    with pytest.raises(DiwaError, match=r"stage 'one' is needed.*never ran"):
        plan(made, [made.stages[2]])
    bring_up_to_date(made)
    changed = pipeline(tmp_path, first="A", third="C")
    with pytest.raises(DiwaError, match="stage 'one' is needed"):  # not only what it reads itself
        plan(changed, [changed.stages[2]])
    alone = pipeline(tmp_path, third="C")
    bring_up_to_date(alone, stages=[alone.stages[2]])
    assert runs(tmp_path) == {"one": 1, "two": 1, "three": 2, "alone": 1}


# -- the recipe --------------------------------------------------------------------------------------------------------------------


def write_recipe(path: Path, **changes) -> Path:
    """The shipped recipe with changes."""
    path.write_text(yaml.safe_dump(yaml.safe_load(RECIPE.read_text()) | changes, sort_keys=False))
    return path


def make_stages(path: Path, size: str = "small", seeds: tuple[int, ...] = (1, 2), **options) -> dict[str, Stage]:
    builder = Builder(load_recipe(path, size), size, ("open_drawer", "turn_on_led"), seeds, **options)
    return {stage.name: stage for stage in Pipeline("root", builder.stages()).stages}


def test_every_command_of_the_shipped_recipe_is_one_its_tool_takes():
    for size in SIZES:
        for stage in make_stages(RECIPE, size, device="cpu").values():
            check_command(stage.words(Path("root")), "recipe")


def test_a_change_of_one_part_of_the_recipe_changes_the_stages_of_that_part_only(tmp_path):
    before = make_stages(RECIPE)
    change = {"finetune": {"iterations": 7}, "more_models": {"judge": {"seed": 2}}}
    for part, groups in (("finetune", {"finetune"}), ("more_models", {"more_models", "classifiers", "finetune"})):
        after = make_stages(write_recipe(tmp_path / "recipe.yaml", **{part: change[part]}))
        changed = {stage.group for name, stage in after.items() if name not in before or stage.command != before[name].command}
        assert changed == groups
    words = after["finetune/seed2/open_drawer"].words(Path("root"))
    assert words[words.index("--more-models") + 1] == "root/more_models/judge"
    assert all(stage.command == before[name].command for name, stage in make_stages(RECIPE, workers=7, device="cuda").items())


def test_a_mapping_becomes_a_file_and_a_size_has_its_own_options(tmp_path):
    options = {"training": {"steps": 5}}
    path = write_recipe(tmp_path / "recipe.yaml", sizes={"paper": {"world_model": {"config": options}, "policy": {"updates": 9}}})
    stage = make_stages(path, "paper")["world_model"]
    assert stage.files == {At("runs/options/world_model.config.yaml"): options}
    assert str(stage.command[stage.command.index("--config") + 1]) == "runs/options/world_model.config.yaml"
    assert "--updates" in make_stages(path, "paper")["policies/seed1/open_drawer"].command
    assert "--updates" not in make_stages(path, "small")["policies/seed1/open_drawer"].command


def test_refits_follow_the_offline_stages_and_change_none_of_them(tmp_path):
    models = {"more_models": {"judge": {"seed": 2}}}
    before = make_stages(write_recipe(tmp_path / "recipe.yaml", **models))
    flags = {"rounds": 2, "rollouts": {"episodes": 9}, "world_model": {"steps": 7}}
    after = make_stages(write_recipe(tmp_path / "recipe.yaml", **models, refit=flags))
    assert all(after[name].command == stage.command for name, stage in before.items())
    new = [name for name in after if name not in before]
    assert all(name.startswith(("refit1/", "refit2/")) for name in new) and list(after)[-len(new) :] == new
    words = {name: stage.show(Path("")) for name, stage in after.items()}
    record = words["refit2/rollouts"]
    assert "--policies refit1/seed1/finetuned --skills open_drawer turn_on_led --record data/refit2 --split train --episodes 9" in record
    stores = "data/play data/play_scenes data/play_contacts data/play_misses data/refit1 data/refit2"
    assert f"--play {stores} --init refit1/more_models/judge" in words["refit2/more_models/judge"]
    assert words["refit2/more_models/judge"].endswith("--seed 2 --steps 7") and "--size" not in words["refit1/world_model"]
    assert "--world-model refit2/world_model --more-models refit2/more_models/judge" in words["refit2/finetune/seed2/turn_on_led"]
    assert "--rollouts data/rollouts" in words["refit1/report"]  # measured on what it never learned from
    assert after["refit1/finetune/seed1/open_drawer"].group == "finetune"
    for stage in after.values():
        check_command(stage.words(Path("root")), "recipe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune": {}}, "unknown key 'fine_tune'. Did you mean 'finetune'?"),
        ({"play": {"play": {"frames": 10, "sed": 1}}}, "Did you mean 'seed'?"),
        ({"play": {}}, "at least one store"),
        ({"validation": {"play": {"frames": 10, "seed": 1}}}, "found 'play' in both"),
        ({"demos": {"per_skill": 4, "noise": 0.5}}, "seed"),
        ({"sizes": {"large": {}}}, "found 'large'"),
        ({"policy": {"seed": 3}}, "the pipeline gives --seed itself"),
        ({"refit": {"rounds": -1}}, "refit.rounds: expected 0 (none) or more, found -1"),
        ({"refit": {"round": 1}}, "Did you mean 'rounds'?"),
        ({"refit": {"rounds": 1, "rollouts": {"split": "evaluation"}}}, "the pipeline gives --split itself"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        make_stages(write_recipe(tmp_path / "recipe.yaml", **changes))
    assert message in str(caught.value)


def test_options_a_verb_does_not_know_are_refused_before_anything_runs(tmp_path, capsys):
    path = write_recipe(tmp_path / "recipe.yaml", finetune={"itterations": 3})
    assert main(["pipeline", "--recipe", str(path), "--out", str(tmp_path / "made"), "--skills", "open_drawer"]) == 2
    assert "`diwa finetune --world-model` does not take these options" in (complaint := capsys.readouterr().err)
    assert "unrecognized arguments: --itterations 3" in complaint
    assert not (tmp_path / "made").exists()


def test_a_dry_run_prints_the_commands_and_makes_nothing(tmp_path, capsys):
    words = ["pipeline", "--out", str(tmp_path / "made"), "--skills", "open_drawer", "--seeds", "4", "--workers", "3", "--dry-run"]
    assert main([*words, "--until", "policies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "play/play: run, never ran",
        f"    python -m diwa_core.sim.play --out {tmp_path}/made/data/play --frames 120000 --seed 1 --workers 3",
    ]
    assert lines[-2] == "policies/seed4/open_drawer: after world_model, demos"
    assert not (tmp_path / "made").exists()
    assert main([*words, "--only", "fintune"]) == 2 and "found 'fintune'" in capsys.readouterr().err


def test_a_play_store_that_was_cut_off_is_continued(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", play={"play": {"frames": 60, "seed": 1, "episode_frames": 30}})
    words = ["pipeline", "--recipe", str(recipe), "--out", str(tmp_path / "made"), "--workers", "1", "--only", "play/play"]
    builder = Builder(load_recipe(recipe, "small"), "small", ("open_drawer",), (1,), 1)
    made = Pipeline(tmp_path / "made", builder.stages())
    made.begin(made.stages[0], made.decide(made.stages[0]))
    store = generate_play(tmp_path / "made" / "data" / "play", 30, 1, 1, PlaySettings(30))  # as if killed after the first of two
    (store.path / "mark").write_text("kept")
    assert main(words) == 0
    assert "play/play: resume, was cut off" in capsys.readouterr().out
    assert len(PlayStore.open(store.path).episodes) == 2 and (store.path / "mark").exists()
    assert main(words) == 0 and "skip, unchanged" in capsys.readouterr().out


def test_time_that_is_up_and_a_stage_that_fails_have_their_exit_codes(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", play={"play": {"frames": 60, "seed": -1}})
    words = ["pipeline", "--recipe", str(recipe), "--out", str(tmp_path / "made"), "--workers", "1", "--only", "play/play"]
    assert main([*words, "--max-minutes", "0"]) == 3
    assert "the same `diwa pipeline` goes on" in capsys.readouterr().out and not (tmp_path / "made" / "stamps").exists()
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "stage 'play/play' ended with exit code 1" in shown and "ValueError: expected non-negative integer" in shown
    assert f"python -m diwa_core.sim.play --out {tmp_path}/made/data/play --frames 60 --seed -1 --workers 1" in shown


# -- stopping a training -----------------------------------------------------------------------------------------------------------


def test_a_training_asked_to_stop_ends_after_the_update_it_is_in():
    updates, saved, handler = [], [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_between_updates(lambda stage, done: None, lambda: saved.append(len(updates))) as report:
        for update in range(10):
            if update == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            updates.append(update)  # what is between the signal and the report still happens
            report("training", update / 10)
    assert updates == [0, 1, 2, 3] and saved == [4]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_progress_is_written_for_whoever_waits(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress"))
    with stage_progress() as report:
        report("training", 0.25)
    assert json.loads((tmp_path / "progress").read_text()) == {"stage": "training", "done": 0.25}


# -- processes ---------------------------------------------------------------------------------------------------------------------

WAIT = """
import signal, sys, time
from pathlib import Path
out = Path(sys.argv[1])
state = out.with_suffix(".state")
def save(number, frame):
    state.write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
resumed = state.exists()
out.with_suffix(".started").write_text("x")
while not resumed:
    time.sleep(0.01)
out.write_text("resumed")
"""


def waiting(name: str = "one", script: str = WAIT) -> Stage:
    """A stage that ends only when it finds the state it saved when it was interrupted."""
    out = At(f"{name}.txt")
    return Stage(name, ("python", "-c", script, out), (), (out,), keeps=(At(f"{name}.state"),), resumes=True)


def test_stopping_lets_stages_save_and_the_next_run_resumes_them(tmp_path):
    made, lines = Pipeline(tmp_path, [waiting("one"), waiting("two"), join("after", "!", "one")]), []
    both = [tmp_path / f"{name}.started" for name in ("one", "two")]
    assert not Runner(made, 2, lines.append, should_stop=lambda: all(path.exists() for path in both)).run(made.stages)
    assert "stopping one, two (SIGINT)" in lines and (tmp_path / "one.state").read_text() == "saved"
    assert actions(made) == {"one": "resume", "two": "resume", "after": "after"}
    bring_up_to_date(made, workers=2)
    assert (tmp_path / "after.txt").read_text() == "resumed!"


def test_a_failed_stage_stops_the_others_and_shows_its_last_lines_and_command(tmp_path):
    failing = Stage("bad", ("python", "-c", "import sys; print('before'); sys.exit('no disk left')", At("x y")), (), (At("bad.txt"),))
    made = Pipeline(tmp_path, [waiting(), failing, join("after", "!")])
    with pytest.raises(StageFailed) as caught:
        Runner(made, 2, lambda line: None).run(made.stages)
    message = str(caught.value)
    assert "stage 'bad' ended with exit code 1" in message and "    before\n    no disk left" in message
    assert f"'{tmp_path}/x y'" in message  # quoted for a shell
    assert not (tmp_path / "after.txt").exists()
    assert (tmp_path / "one.state").exists() or not (tmp_path / "one.started").exists()


def test_a_stage_that_does_not_obey_is_killed_with_its_helpers(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "STOP_STEPS", ((signal.SIGINT, 0.2), (signal.SIGKILL, 10.0)))
    script = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1] + '.pid', 'w').write(str(helper.pid)); open(sys.argv[1] + '.started', 'w').write('x'); time.sleep(600)"
    )
    made, started = Pipeline(tmp_path, [waiting(script=script)]), tmp_path / "one.txt.started"
    assert not Runner(made, 1, lambda line: None, should_stop=started.exists).run(made.stages)
    helper = Path("/proc") / (tmp_path / "one.txt.pid").read_text() / "stat"
    deadline = time.monotonic() + 60
    while helper.exists() and helper.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not helper.exists() or helper.read_text().split()[2] == "Z"


def test_stages_that_want_all_cores_run_alone(tmp_path):
    busy = "import os, sys, time\nfrom pathlib import Path\nout = Path(sys.argv[1])\nout.write_text('x')\ntime.sleep(0.3)\n"
    check = "assert len(list(out.parent.glob('*.txt'))) == 1"
    stages = [
        Stage("big", ("python", "-c", busy + check, At("big.txt")), (), (At("big.txt"),), cores=2),
        Stage("small", ("python", "-c", busy, At("small.txt")), (), (At("small.txt"),)),
    ]
    bring_up_to_date(Pipeline(tmp_path, stages), workers=2)


def test_two_pipelines_do_not_share_a_root(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "LOCK_WAIT_S", 0.1)
    made, refused = Pipeline(tmp_path, [waiting()]), []

    def stop() -> bool:
        if (tmp_path / "one.started").exists() and not refused:
            with pytest.raises(DiwaError, match="another `diwa pipeline`"):
                Runner(made, 1, lambda line: None).run(made.stages)
            refused.append(True)
        return bool(refused)

    assert not Runner(made, 1, lambda line: None, should_stop=stop).run(made.stages)
    bring_up_to_date(made)


@pytest.mark.timeout(900)  # imports that a busy machine may stretch
def test_stages_end_with_a_killed_pipeline_and_the_next_one_goes_on(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from test_pipeline import *\n"
        "made = Pipeline(sys.argv[1], [waiting()]); Runner(made, 1, print).run(made.stages)"
    )
    with process([sys.executable, "-c", code, tmp_path, Path(__file__).parent]) as killed:
        while not (tmp_path / "one.started").exists():
            assert killed.poll() is None
            time.sleep(0.02)
        os.kill(killed.pid, signal.SIGKILL)
    (tmp_path / "one.state").write_text("as if saved")
    assert actions(Pipeline(tmp_path, [waiting()])) == {"one": "resume"}
    bring_up_to_date(Pipeline(tmp_path, [waiting()]))  # waits until the old stage is gone


def test_time_left_is_measured_on_the_stages_so_far(tmp_path):
    stages = [join(f"kind/{i}", "a") for i in range(4)] + [join("other", "a", cores=2)]
    made = Pipeline(tmp_path, [Stage(s.name, s.command, s.inputs, (At(f"{i}.txt"),), cores=s.cores) for i, s in enumerate(stages)])
    runner = Runner(made, 2, print, pending=list(made.stages[1:]))
    assert runner.seconds_left() == (0.0, ["kind", "other"])
    assert runner.describe() == "time left unknown, not timed yet: kind, other"
    for stage, seconds in ((made.stages[0], 40), (made.stages[1], 60)):
        made.begin(stage, made.decide(stage))
        (made.root / stage.outputs[0]).write_text("a")
        made.finish(stage, seconds)
    runner.pending = list(made.stages[2:])
    assert runner.seconds_left() == (50.0, ["other"])  # two of 50 s on two cores
    assert runner.describe() == "at least 50 s left, not timed yet: other"
    assert [show_seconds(s) for s in (5, 100, 6000)] == ["5 s", "2 min", "1 h 40 min"]


# -- all of it ---------------------------------------------------------------------------------------------------------------------

TINY = """
training_seeds: [1]
play: {play: {frames: 160, seed: 12, episode_frames: 160}}  # the switch is moved up in it, and in both halves of the held-out play
validation: {held_out: {frames: 160, seed: 15, episode_frames: 160}}
demos: {per_skill: 3, seed: 3, noise: 0.5, skills: [turn_on_lightbulb]}
world_model:
  config:
    model: {deterministic: 32, hidden: 32}
    training: {steps: 80, batch: 8, horizons: [8], horizon_starts: [0.0], prefix: [4, 8], save_every_s: 0.0, autocast: false}
policy: {per_skill: 2, updates: 20, hidden: 32}
classifier: {windows: 40, config: {classifier: {updates: 30, teacher_updates: 10}}}
finetune: {iterations: 2, batch: 16, judge_episodes: 16, report_episodes: 16, keep_candidates: true}
evaluate: {episodes: 1}
rollouts: {episodes: 1, split: validation}
report: {windows: 20}
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # about a minute, nearly all of it imports of ten processes; a busy machine may give them a small share
def test_from_play_to_a_comparison_with_a_stop_on_the_way(tmp_path, capsys):
    recipe, root = tmp_path / "recipe.yaml", tmp_path / "made"
    recipe.write_text(TINY)
    words = ["pipeline", "--recipe", str(recipe), "--out", str(root), "--size", "lowdim", "--skills", "turn_on_lightbulb", "--workers", "2"]
    words += ["--until", "evaluate"]

    with process([sys.executable, "-m", "diwa_core.cli.main", *words, "--device", "cpu"]) as first:
        while not (root / "runs" / "world_model" / "training.safetensors").exists():
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        assert first.wait() == 130
    assert not json.loads((root / "stamps" / "world_model.json").read_text())["finished"]

    assert main(words) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    assert "play/play: skip, unchanged" in shown and "world_model: resume, was cut off" in shown
    assert f"resumed {root}/runs/world_model at step" in (root / "logs" / "world_model.log").read_text()
    comparison = Comparison.read(root / "report" / "comparison.json")
    assert [row.skill for row in comparison.skills] == ["turn_on_lightbulb"] and comparison.starts == 1

    assert main(words) == 0
    assert {line.split(": ")[1] for line in capsys.readouterr().out.splitlines()[:-1]} == {"skip, unchanged"}

    run_dir, world_model = root / "runs" / "seed1" / "finetune" / "turn_on_lightbulb", root / "world_model"
    assert sorted(path.name for path in (run_dir / "candidates").iterdir()) == ["00000", "00002"]
    choice = ["evaluate", "--world-model", str(world_model), "--candidates", str(run_dir), "--episodes", "2", "--workers", "2"]
    assert main([*choice, "--out", str(tmp_path / "choice")]) == 0
    found = json.loads((tmp_path / "choice" / "choice.json").read_text())
    assert found["split"] == "validation" and found["runs"][0]["iterations"] == [0, 2] and len(found["runs"][0]["real"]) == 2
    assert "2 candidates, rank correlation" in capsys.readouterr().out
    assert main([*choice, "--split", "evaluation"]) == 2 and "validation starts" in capsys.readouterr().err

    recipe.write_text(TINY.replace("windows: 40", "windows: 50"))  # of the classifier
    assert main([*words, "--dry-run"]) == 0
    plan = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if line[0] != " ")
    assert plan.pop("classifiers/seed1") == "run, its command changed: 40 became 50"
    assert plan.pop("finetune/seed1/turn_on_lightbulb") == "after classifiers/seed1"
    assert plan.pop("evaluate") == "after finetune/seed1/turn_on_lightbulb"
    assert set(plan.values()) == {"skip, unchanged"} and len(plan) == 6
