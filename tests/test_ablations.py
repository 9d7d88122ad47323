"""benchmarks/ablations.py: one row per variant, resumed, skipped where there is nothing to switch."""

import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from test_refit import TINY, random_play, random_rollouts, train

from diwa_core.errors import ConfigError, DataError
from diwa_core.world_model.train import Trainer


@pytest.fixture
def benchmark(monkeypatch):
    path = Path(__file__).parents[1] / "benchmarks" / "ablations.py"
    specification = importlib.util.spec_from_file_location("diwa_ablations", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "diwa_ablations", module)  # dataclasses look their module up
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "PAPER_TRAINING", replace(module.PAPER_TRAINING, stream_length=4))
    monkeypatch.setattr(module, "train_probe", partial(module.train_probe, windows=4, steps=2))
    return module


@pytest.fixture
def words(tmp_path) -> list[str]:
    play, held_out = random_play(tmp_path / "play", 90), random_play(tmp_path / "held_out", 90, seed=1)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    folders = {"--play": play, "--validation": held_out, "--config": tmp_path / "tiny.yaml", "--run-dir": tmp_path / "run"}
    folders |= {"--out": tmp_path / "rows.jsonl", "--steps": 2, "--windows": 4}
    return [str(word) for pair in folders.items() for word in pair]


def table(printed: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[1:]}


@pytest.mark.timeout(900)  # seconds of work, which a busy machine may stretch
def test_rows_are_made_once_one_at_a_time_and_share_their_codes(benchmark, words, tmp_path, capsys, monkeypatch):
    rollouts = random_rollouts(tmp_path / "rollouts")
    variants = ["--variants", "full", "static view only", "chunk steps", "end-to-end"]
    trained = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, *rest: (trained.append(self.run_dir.name), run(self, *rest))[1])
    assert benchmark.main([*words, "--rollouts", str(rollouts.path), *variants[:2]]) == 0
    assert trained == ["codes", "full_seed1"] and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"variant": "static')  # killed in the middle of a line
    assert benchmark.main([*words, "--rollouts", str(rollouts.path), *variants]) == 0
    assert trained[2:] == ["codes", "static_view_only_seed1", "trial", "end-to-end_seed1"]  # codes: only read
    rows = {row["variant"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").open())}
    assert list(rows) == ["full", "static view only", "end-to-end"]
    assert [rows[name]["steps"] for name in list(rows)[:2]] == [2, 2] and rows["end-to-end"]["steps"] >= 1
    assert all(row["n"] == 4 and len(row["open_loop"]) == 3 and row["replay"][0]["episodes"] == 2 for row in rows.values())
    shown = table(capsys.readouterr().out.split("|---")[-1])
    assert shown["chunk steps"][1] == "skipped: WorldModelConfig has no 'chunk_steps'" and len(shown) == 4 - 1
    before = list(trained)
    assert benchmark.main([*words, "--rollouts", str(rollouts.path), *variants]) == 0 and trained == before
    assert benchmark.main(["--out", str(tmp_path / "rows.jsonl")]) == 0
    assert "| static view only | 1 | 4 | 2 |" in capsys.readouterr().out


def test_a_switch_that_changes_nothing_is_skipped_and_an_unknown_variant_refused(benchmark, words, tmp_path, capsys):
    config = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    config["training"] |= {"event_share": 0.0}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert benchmark.main([*words, "--variants", "no event windows"]) == 0
    assert "skipped: the full model is like that already" in capsys.readouterr().out and not (tmp_path / "rows.jsonl").exists()
    with pytest.raises(ConfigError, match="found 'fulll'"):
        benchmark.main([*words, "--variants", "fulll"])
    (tmp_path / "rows.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(DataError, match="line 1: expected a row of the ablations"):
        benchmark.main(["--out", str(tmp_path / "rows.jsonl")])


def test_without_play_it_says_what_was_not_run(benchmark, tmp_path, capsys):
    assert benchmark.main(["--out", str(tmp_path / "none.jsonl")]) == 0
    assert "not run" in capsys.readouterr().out


@pytest.mark.timeout(900)
def test_the_codes_of_a_world_model_are_shared_and_no_time_is_claimed_for_them(benchmark, words, tmp_path, capsys):
    assert train(tmp_path, "model", "--play", tmp_path / "play", "--steps", "1") == 0
    given = [*words, "--codes", str(tmp_path / "model")]
    assert benchmark.main([*given, "--variants", "full"]) == 0
    assert not (tmp_path / "run" / "codes").exists() and "| full | 1 | 4 | 2 |" in capsys.readouterr().out
    assert "codes" in json.loads((tmp_path / "rows.jsonl").read_text())["study"]
    with pytest.raises(ConfigError, match="how long the codes took"):
        benchmark.main([*given, "--variants", "end-to-end"])
