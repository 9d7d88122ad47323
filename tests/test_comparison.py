"""Base beside fine-tuned: the same starts and noise, interrupted runs that go on, what the JSON and the page say, the paper's table."""

import importlib.util
import json
import re
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_report import parse

from diwa_core.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint, update_card
from diwa_core.cli.main import main
from diwa_core.contract import Contract
from diwa_core.errors import CheckpointError, ConfigError, DataError
from diwa_core.evaluate.comparison import Comparison, compare_policies
from diwa_core.evaluate.comparison_report import build_comparison_report
from diwa_core.evaluate.evaluation import EpisodePlan
from diwa_core.evaluate.statistics import compare_paired, gain_over_seeds, pool_mean, success_rate
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.world_model.filter import save_world_model
from diwa_core.world_model.model import WorldModel, WorldModelConfig

ROOT = Path(__file__).parents[1]
SKILLS = ("open_drawer", "turn_on_led")
STARTS = 12


def save_pair(folder: Path, seed: int, world_model: str = "w" * 64, skills: tuple[str, ...] = SKILLS, size: int = 3) -> tuple[Path, Path]:
    """Random base policies of one training seed, and their fine-tuned copies."""
    torch.manual_seed(seed)
    for skill in skills:
        base = DiffusionPolicy(PolicyConfig(feature_size=size, hidden=(8,), denoising_steps=2, sampler_steps=2))
        identity = save_policy(folder / "policies" / skill, base, Contract(), skill, world_model, {"seed": seed, "episodes": 4})
        tuned = base.add_finetuned(1)
        card = {"imagined_before": 0.5, "imagined_after": 0.5 + 0.1 * seed, "starts": "beginnings of 40 demonstrations"}
        lineage = {"base": identity, "environment_steps": 0}
        save_policy(folder / "finetuned" / skill, tuned, Contract(), skill, world_model, lineage, card)
    return folder / "policies", folder / "finetuned"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[tuple[Path, Path]]:
    """Three training seeds."""
    return [save_pair(tmp_path_factory.mktemp(f"seed{seed}"), seed) for seed in (1, 2, 3)]


class FakeRunner:
    """Outcomes from a rule; stops like Ctrl-C before episode number `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.ran: list[EpisodePlan] = []
        self.stop = stop

    def __call__(self, plans, report) -> None:
        for plan in plans:
            if len(self.ran) == self.stop:
                raise KeyboardInterrupt
            self.ran.append(plan)
            success = rule(plan.skill, "finetuned" in plan.policy, plan.index)
            report(plan, SimpleNamespace(success=success, steps=30 + plan.index if success else 72))


def rule(skill: str, finetuned: bool, index: int) -> bool:
    """open_drawer 4 of 12 -> 9 of 12, turn_on_led 6 of 12 -> 12 of 12."""
    return (index % 4 != 3 if finetuned else index % 3 == 0) if skill == "open_drawer" else finetuned or index % 2 == 0


def test_both_sides_get_the_same_starts_and_noise(pairs, tmp_path):
    runner = FakeRunner()
    compare_policies(pairs, tmp_path / "journal", runner, starts=STARTS, noise_seed=7)
    seen = {}
    for plan in runner.ran:
        seen.setdefault(plan.policy, []).append((plan.skill, plan.split, plan.list_seed, plan.index, plan.noise_seed, plan.max_steps))
    assert len(runner.ran) == 2 * 2 * 3 * STARTS and len(seen) == 12
    for base, finetuned in pairs:
        for skill in SKILLS:
            assert seen[str(base / skill)] == seen[str(finetuned / skill)]
            assert len({row[4] for row in seen[str(base / skill)]}) == STARTS and seen[str(base / skill)][0][-1] == 72


def test_an_interrupted_comparison_goes_on_where_it_was(pairs, tmp_path):
    whole = compare_policies(pairs, tmp_path / "whole", FakeRunner(), starts=STARTS)
    first, second = FakeRunner(stop=29), FakeRunner()
    with pytest.raises(KeyboardInterrupt):
        compare_policies(pairs, tmp_path / "journal", first, starts=STARTS)
    with (tmp_path / "journal").open("a") as file:
        file.write('{"world_model": "ww')  # killed in the middle of a line
    progress = []
    found = compare_policies(pairs, tmp_path / "journal", second, starts=STARTS, progress=lambda *state: progress.append(state))
    assert found == whole
    assert len(first.ran) == 29 and not set(first.ran) & set(second.ran) and len(second.ran) == 144 - 29
    assert progress[0] == (30, 144) and progress[-1] == (144, 144)
    third = FakeRunner()
    assert compare_policies(pairs, tmp_path / "journal", third, starts=STARTS) == whole and not third.ran
    longer = compare_policies(pairs[:1], tmp_path / "journal", third, starts=STARTS + 1)
    assert len(third.ran) == 4 and longer.starts == STARTS + 1


def test_another_policy_under_the_same_name_runs_anew(tmp_path):
    pair = save_pair(tmp_path / "run", 1)
    compare_policies([pair], tmp_path / "journal", FakeRunner(), starts=2)
    save_pair(tmp_path / "run", 2)
    runner = FakeRunner()
    compare_policies([pair], tmp_path / "journal", runner, starts=2)
    assert len(runner.ran) == 8
    moved = FakeRunner()
    compare_policies([pair], tmp_path / "journal", moved, starts=2, noise_seed=1)
    assert len(moved.ran) == 8


def test_figures_are_those_of_the_statistics(pairs, tmp_path):
    comparison = compare_policies(pairs, tmp_path / "journal", FakeRunner(), starts=STARTS)
    outcomes = {side: np.array([[rule("open_drawer", side, i) for i in range(STARTS)]] * 3) for side in (False, True)}
    drawer = comparison.find("open_drawer")
    assert drawer.gain == gain_over_seeds(outcomes[False], outcomes[True])
    assert (drawer.base.value, drawer.finetuned.value) == pytest.approx((4 / 12, 9 / 12))
    assert drawer.gain.low == pytest.approx(compare_paired(outcomes[False][0], outcomes[True][0]).difference.low)  # seeds repeat each other
    assert comparison.gain == pool_mean({row.skill: row.gain for row in comparison.skills})
    assert drawer.environment_steps == 0 and drawer.start_bank == "beginnings of 40 demonstrations"
    assert [seed.training_seed for seed in drawer.seeds] == [1, 2, 3] and all(seed.descends for seed in drawer.seeds)
    assert drawer.imagined("after") == pytest.approx(0.7)
    assert drawer.imagined_error("after") == pytest.approx(np.mean([0.15, 0.05, 0.05])) and drawer.imagined_error(
        "before"
    ) == pytest.approx(1 / 6)


def test_json_is_read_back_and_states_what_follows(pairs, tmp_path):
    comparison = compare_policies(pairs, tmp_path / "journal", FakeRunner(), starts=STARTS)
    path = tmp_path / "new" / "comparison.json"
    comparison.write(path)
    assert Comparison.read(path) == comparison
    values = json.loads(path.read_text())
    assert values["summary"]["mean"]["gain"]["value"] == comparison.gain.value
    assert values["summary"]["skills"]["turn_on_led"]["imagined_error_after"] == comparison.find("turn_on_led").imagined_error("after")
    values["skills"][0]["seeds"][1]["base"]["success"].pop()
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"expected 12 outcomes and steps of .*, found 11"):
        Comparison.read(path)
    for text in ("", "[]", '{"format": 2}', json.dumps({"format": 1, "episodes": []})):
        path.write_text(text)
        with pytest.raises(DataError, match="expected a comparison of `diwa evaluate --pair`"):
            Comparison.read(path)


def test_page_shows_skills_seeds_imagination_and_doubts(pairs, tmp_path):
    comparison = compare_policies(pairs, tmp_path / "journal", FakeRunner(), starts=STARTS)
    comparison.skills[1].seeds[0].descends, comparison.skills[1].seeds[0].environment_steps = False, None
    page = build_comparison_report(comparison, "diwa evaluate <&>")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", page)
    text = " ".join(" ".join(parse(page).text).split())
    single = compare_paired(comparison.skills[0].seeds[0].base.success, comparison.skills[0].seeds[0].finetuned.success)
    rate = success_rate(9, 12)
    for part in (
        "41.7 % → 87.5 %",
        f"75 % {100 * rate.low:.0f}–{100 * rate.high:.0f} 33 %",
        f"{single.gained} / {single.lost} {single.p_value:.2g}",
        "open_drawer 50 33 17 70 75 8 beginnings of 40 demonstrations",
        "Not fine-tuned from the base beside it: turn_on_led (seed 1).",
        "not stated by the checkpoints of turn_on_led",
        "diwa evaluate <&>",
        "3 training seeds, 12 starts of the evaluation split",
    ):
        assert part in text, part


def test_what_cannot_be_compared_is_refused(pairs, tmp_path):
    other = save_pair(tmp_path / "other", 4, world_model="v" * 64)
    (mislabelled := tmp_path / "mislabelled").mkdir()
    (mislabelled / "turn_on_led").symlink_to(pairs[0][1] / "open_drawer")
    for wrong, skills, error, message in (
        ([], (), ConfigError, "at least one pair"),
        ([(tmp_path, tmp_path)], (), CheckpointError, "expected folders named after skills"),
        ([pairs[0]], ("close_drawer",), CheckpointError, "close_drawer"),
        ([pairs[0]], ("open_door",), ConfigError, "found 'open_door'"),
        ([pairs[0], other], (), CheckpointError, "expected a policy of world model wwwwwwwwwwwwwwww"),
        ([pairs[0], pairs[1], pairs[0]], (), ConfigError, "found the same policies twice"),
        ([(pairs[0][0], mislabelled)], (), CheckpointError, "expected a policy of 'turn_on_led', found one of 'open_drawer'"),
    ):
        with pytest.raises(error, match=message):
            compare_policies(wrong, tmp_path / "journal", FakeRunner(), skills)
    (tmp_path / "journal").write_text('{"some": "thing"}\n')
    with pytest.raises(DataError, match="line 1: expected an episode"):
        compare_policies([pairs[0]], tmp_path / "journal", FakeRunner())


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_command_compares_real_episodes(tmp_path, capsys):
    """Random policies on two starts: equal sides must give equal episodes, because starts and noise are equal."""
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig(name="tiny", code_sizes=(8, 6), deterministic=32, hidden=32))
    identity = save_world_model(tmp_path / "world_model", model, Contract(), {})
    base, tuned = save_pair(tmp_path, 1, identity, ("open_drawer",), model.feature_size)
    out = tmp_path / "out"
    words = ["evaluate", "--world-model", str(tmp_path / "world_model"), "--pair", str(base), str(tuned), "--episodes", "2"]
    assert main([*words, "--workers", "1", "--out", str(out), "--write-card"]) == 0
    printed = capsys.readouterr().out
    assert "gain  +0.0 [" in printed and "0 environment steps" in printed
    seed = Comparison.read(out / "comparison.json").find("open_drawer").seeds[0]
    assert (seed.base.success, seed.base.steps) == (seed.finetuned.success, seed.finetuned.steps) and len(seed.base.steps) == 2
    assert load_checkpoint(tuned / "open_drawer").card["success_evaluation"]["episodes"] == 2
    assert "How to repeat it" in (out / "report.html").read_text() and len((out / "episodes.jsonl").read_text().splitlines()) == 4
    assert main([*words, "--world-model", "none", "--out", str(out)]) == 0  # nothing left to run


class DyingPool:
    """A process pool whose workers end before the second episode."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> "DyingPool":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, function, plans):
        yield SimpleNamespace(success=True, steps=3)
        raise BrokenProcessPool("a process was terminated abruptly")


def test_a_dead_worker_is_one_sentence_and_its_finished_episodes_are_kept(tmp_path, monkeypatch, capsys):
    world_model = save_checkpoint(tmp_path / "world_model", "world_model", {"weight": torch.zeros(1)}, {}, Contract(), {})
    base, tuned = save_pair(tmp_path, 1, world_model, ("open_drawer",))
    monkeypatch.setattr("diwa_core.evaluate.evaluation.ProcessPoolExecutor", DyingPool)
    words = ["evaluate", "--pair", str(base), str(tuned), "--out", str(tmp_path / "out"), "--world-model"]
    assert main([*words, str(tmp_path / "world_model")]) == 2
    assert "found one that ended after 1 episodes (a process was terminated abruptly)" in capsys.readouterr().err
    assert len((tmp_path / "out" / "episodes.jsonl").read_text().splitlines()) == 1
    assert main([*words, str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'}: " in capsys.readouterr().err


def test_command_refuses_what_does_not_fit_together(tmp_path, capsys):
    assert main(["evaluate", "--world-model", "w", "--pair", "a", "b", "--record", "c"]) == 2
    assert "--record: expected with --policies" in capsys.readouterr().err
    assert main(["evaluate", "--world-model", "w"]) == 2
    assert "one of --policies, --pair and --candidates" in capsys.readouterr().err


# -- benchmarks/diwa.py ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    specification = importlib.util.spec_from_file_location("diwa_benchmark", ROOT / "benchmarks" / "diwa.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def side(count: int) -> dict:
    return {"policy": "p", "identity": "i", "success": [True] * count + [False] * (10 - count), "steps": [30] * 10}


@pytest.fixture
def figures(tmp_path) -> Path:
    """A comparison of two seeds on two skills."""
    seeds = [{"training_seed": k, "base": side(4), "finetuned": side(9), "environment_steps": 0} for k in (1, 2)]
    skills = [
        {"skill": "open_drawer", "seeds": seeds},
        {"skill": "turn_on_led", "seeds": [{**seeds[0], "environment_steps": 1500}, seeds[1]]},
    ]
    values = {"format": 1, "world_model": "w" * 64, "split": "evaluation", "noise_seed": 0, "starts": 10, "max_steps": 72, "skills": skills}
    (tmp_path / "comparison.json").write_text(json.dumps(values))
    return tmp_path / "comparison.json"


def read_rows(printed: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def write_run(path: Path, rates: list[float]) -> None:
    """A DPPO run evaluated at every second of its rows, 1,000 environment steps apart."""
    path.mkdir(parents=True)
    rows = [{"iteration": i - 1, "env_steps": 1000 * i, "success": 0.5} for i in range(2 * len(rates))]
    for row, rate in zip(rows[::2], rates, strict=True):
        row["validation"] = {"episodes": 50, "value": rate, "low": 0.0, "high": 1.0}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_table_puts_ours_beside_the_papers(benchmark, figures, tmp_path, capsys):
    write_run(tmp_path / "dppo" / "open_drawer", [0.4, 0.7, 0.9, 0.8])
    write_run(tmp_path / "dppo" / "seed2" / "open_drawer", [0.3, 0.5])
    benchmark.main(["--comparison", str(figures), "--dppo", str(tmp_path / "dppo")])
    printed = capsys.readouterr().out
    rows = read_rows(printed)
    comparison = Comparison.read(figures)
    gain = comparison.find("open_drawer").gain
    assert rows["open_drawer"][:4] == ["57.8", "74.4 ± 1.9", "+16.6", "118 k"]
    assert rows["open_drawer"][4].startswith("40.0 [") and rows["open_drawer"][5].startswith("90.0 [")
    assert rows["open_drawer"][6] == f"+50.0 [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    assert rows["open_drawer"][7:] == ["0", "4,000, > 2,000 (best 50 %)"]
    assert rows["turn_on_led"][7:] == ["1,500", "not run"] and rows["close_drawer"][4:] == ["not run"] * 5
    assert rows["mean"][:4] == ["55.2", "83.7", "+28.5", "sum 2,387 k"]
    assert rows["mean"][6] == f"+50.0 [{100 * comparison.gain.low:+.1f}, {100 * comparison.gain.high:+.1f}]"
    assert str(figures) in printed and "open_drawer/metrics.jsonl" in printed and "arXiv 2508.03645" in printed
    assert "means are over 2 skills only: not run are close_drawer" in printed and "training seeds 1, 2" in printed


def test_refits_stand_beside_the_offline_figures_with_what_they_cost(benchmark, figures, tmp_path, capsys):
    values = json.loads(figures.read_text())
    refit = tmp_path / "refit1" / "report" / "comparison.json"
    refit.parent.mkdir(parents=True)
    for seed in values["skills"][0]["seeds"]:
        seed |= {"finetuned": side(10), "environment_steps": 4321}
    refit.write_text(json.dumps(values | {"skills": values["skills"][:1]}))
    benchmark.main(["--comparison", str(figures), "--refits", str(refit)])
    rows = read_rows(capsys.readouterr().out.split("| skill |")[-1])
    offline, refitted, steps = rows["open_drawer"]
    assert offline.startswith("90.0 [") and refitted.startswith("100.0 [") and steps == "4,321"
    assert rows["turn_on_led"][1:] == ["not run", "not run"]
    refit.write_text(json.dumps(values | {"split": "validation"}))
    with pytest.raises(DataError, match="10 evaluation starts"):
        benchmark.main(["--comparison", str(figures), "--refits", str(refit)])


def test_table_says_what_was_not_run(benchmark, figures, tmp_path, capsys):
    benchmark.main(["--comparison", str(tmp_path / "none.json")])
    printed = capsys.readouterr().out
    assert all(row[4:9] == ["not run"] * 5 for name, row in read_rows(printed).items() if name in benchmark.PAPER)
    assert "diwa evaluate --world-model W --pair BASE FINETUNED" in printed
    benchmark.main(["--comparison", str(figures)])
    assert "DPPO: not run (no folder was given" in capsys.readouterr().out
    with pytest.raises(DataError, match="expected a folder with runs"):
        benchmark.main(["--comparison", str(figures), "--dppo", str(tmp_path / "none")])
    (tmp_path / "open_drawer").mkdir()
    (tmp_path / "open_drawer" / "metrics.jsonl").write_text('{"validation": {}}\n')
    with pytest.raises(DataError, match="line 1: expected a row of `diwa dppo`"):
        benchmark.main(["--comparison", str(figures), "--dppo", str(tmp_path / "open_drawer")])


# -- diwa card ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path) -> Path:
    """A world model, base and fine-tuned policies, a classifier, and a comparison of them."""
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig(name="tiny", code_sizes=(8, 6), deterministic=32, hidden=32))
    lineage = {"frames": 100, "play": ["abc"], "training": {"seed": 1, "steps": 10}, "seconds": 60.0, "device": "cpu"}
    identity = save_world_model(tmp_path / "world_model", model, Contract(), lineage)
    pair = save_pair(tmp_path, 1, identity)
    for skill in SKILLS:
        update_card(pair[1] / skill, {"success_evaluation": {"success": 0.9, "low": 0.8, "high": 0.95, "episodes": 100, "seed": 0}})
    figures = {"precision": 0.97, "recall": 0.5}
    card = {"events": 7, "filtered": {"frames": figures, "episodes": figures}, "imagined": {"frames": figures}}
    card["rollouts"] = {"events": 9, "filtered": {"episodes": {"precision": None, "recall": 1.0}}}
    threshold, origin = {"threshold": torch.tensor(0.75)}, {"world_model": identity}
    save_checkpoint(tmp_path / "classifiers" / "open_drawer", "classifier", threshold, {}, Contract(), origin, card)
    compare_policies([pair], tmp_path / "journal", FakeRunner(), starts=STARTS).write(tmp_path / "comparison.json")
    return tmp_path


def test_card_shows_base_beside_finetuned_and_classifiers(shipped, capsys):
    assert main(["card", str(shipped), "--comparison", str(shipped / "comparison.json")]) == 0
    page = capsys.readouterr().out
    drawer = Comparison.read(shipped / "comparison.json").find("open_drawer")
    bounds = [f"[{100 * rate.low:.0f}, {100 * rate.high:.0f}]" for rate in (drawer.base, drawer.finetuned)]
    assert f"| open_drawer | 33 {bounds[0]} | 75 {bounds[1]} | +42 [{100 * drawer.gain.low:+.0f}, " in page
    assert "| 0 | 50 → 60 | 17, 15 |" in page and "Imagined from: beginnings of 40 demonstrations" in page and "| mean | 42 [" in page
    tuned, base = (load_checkpoint(shipped / part / "open_drawer").identity[:12] for part in ("finetuned", "policies"))
    assert f"| open_drawer | `{tuned}` | `{base}` | 50 → 60 | 90 % [80, 95] | 100, 0 |" in page
    assert "| 0.75 | play | 0.97 / 0.50 | 0.97 / 0.50 | 0.97 / 0.50 | - / - | 7 |" in page
    assert "| 0.75 | rollouts | - / - | - / 1.00 | - / - | - / - | 9 |" in page
    assert "!" not in page


def test_card_tells_what_does_not_belong_together(shipped, capsys):
    save_pair(shipped, 2, load_checkpoint(shipped / "world_model").identity, ("open_drawer",))
    save_pair(shipped / "other", 3, "v" * 64, ("turn_on_led",))
    copy_checkpoint(shipped / "other" / "policies" / "turn_on_led", shipped / "policies" / "turn_on_led")
    assert main(["card", str(shipped), "--comparison", str(shipped / "comparison.json")]) == 0
    page = capsys.readouterr().out
    assert "3 of the 4 policies below are not among those that were compared!" in page
    assert page.count("(another world model!)") == 1 and page.count("(not the one above!)") == 1
