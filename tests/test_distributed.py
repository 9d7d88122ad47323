"""Training shared by two real processes under torchrun: what one process would have learned, and what a lost process leaves behind."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from diwa_core.cli.main import main
from diwa_core.config import to_dict
from diwa_core.contract import Contract
from diwa_core.data.store import PlayStore
from diwa_core.errors import ConfigError
from diwa_core.world_model import distributed
from diwa_core.world_model.distributed import Ranks, RowGenerator, exponential_like, normal_like
from diwa_core.world_model.model import SIZES, WorldModel, WorldModelConfig
from diwa_core.world_model.train import PlayData, TrainConfig, Trainer

CODES = replace(SIZES["small"], code_sizes=(6, 5), deterministic=24, hidden=24)
STREAMS = replace(SIZES["lowdim"], latent="categorical", groups=4, classes=4, deterministic=24, hidden=24)
# float32: bfloat16 would round the gradients of two halves of a batch differently from those of the whole
TRAINING = TrainConfig(
    steps=6, batch=4, prefix=(2, 4), horizon_starts=(0.0, 0.5), horizons=(3, 6), code_updates=3, code_batch=8, log_every=1,
    stream_length=6, learning_rate=0.03, autocast=False,
)  # fmt: skip
CASES = {"streams": (STREAMS, replace(TRAINING, open_loop=False)), "codes": (CODES, TRAINING)}
DIES_AT = 4
LIMIT_S = 300


def make_model(config: WorldModelConfig) -> WorldModel:
    torch.manual_seed(TRAINING.seed)
    return WorldModel(config)


def train_alone(case: str, play: str, run_dir: Path) -> None:
    config, training = CASES[case]
    Trainer(make_model(config), PlayData([PlayStore.open(play)], config), training, run_dir).run()


def train_together(play: str, folder: Path) -> None:
    """What each of two processes does: `diwa world-model train` to the end, and another one in which the second process is killed."""
    update = Trainer.update

    def update_or_die(trainer: Trainer) -> dict[str, float]:
        if (trainer.run_dir.name, trainer.step, trainer.ranks.rank) == ("codes", DIES_AT, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return update(trainer)

    Trainer.update = update_or_die
    with distributed.join_ranks("cpu") as joined:  # a process can join only once
        distributed.join_ranks = lambda device: nullcontext(joined)
        (folder / f"pid{joined[0].rank}").write_text(str(os.getpid()))
        for case in CASES:
            code = main(["world-model", "train", "--play", play, "--run-dir", str(folder / case), "--config", str(folder / f"{case}.yaml")])
        sys.exit(code)


@pytest.fixture(scope="module")
def play(tmp_path_factory) -> str:
    """Two episodes of 30 frames of noise."""
    rng = np.random.default_rng(0)
    store = PlayStore.create(tmp_path_factory.mktemp("play") / "store", Contract())
    for _ in range(2):
        store.append_episode(
            {
                "rgb_static": rng.integers(0, 255, (30, 64, 64, 3), dtype=np.uint8),
                "rgb_gripper": rng.integers(0, 255, (30, 64, 64, 3), dtype=np.uint8),
                "robot_obs": np.cumsum(rng.normal(0, 0.01, (30, 15)), 0),
                "target_pose": np.cumsum(rng.normal(0, 0.01, (30, 6)), 0),
                "actions": rng.uniform(-1, 1, (30, 7)),
                "scene_obs": rng.uniform(0, 0.1, (30, 24)),
                "skill": np.zeros(30, np.int8),
            }
        )
    return str(store.path)


def launch(*arguments: str) -> tuple[int, str]:
    """Exit code and output of two processes under torchrun, ended when the time is up."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        finally:
            process.terminate()  # torchrun passes it on
    return process.returncode, output


def saved_step(run_dir: Path) -> int:
    with safe_open(run_dir / "training.safetensors", "pt") as file:
        return int(file.metadata()["step"])


def assert_equal_up_to_rounding(found: Path, expected: Path, start: WorldModel) -> None:
    """Weights of two runs differ by much less than the training has moved them; the carried state of a stream differs little."""
    one, two = load_file(expected / "training.safetensors"), load_file(found / "training.safetensors")
    assert one.keys() == two.keys()
    for name, parameter in start.named_parameters():
        name = f"model.{name}"
        moved = (one[name] - parameter).norm()
        assert (one[name] - two[name]).norm() <= 1e-3 * moved, name
    for name in (name for name in one if name.startswith("carry.")):
        assert len(two[name]) == TRAINING.batch and torch.allclose(one[name], two[name], atol=1e-3), name


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_two_processes_learn_what_one_would_and_survive_the_loss_of_one(play, tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    for case, (model, training) in CASES.items():
        train_alone(case, play, alone / case)
        overrides = {"model": to_dict(model), "training": to_dict(training)}
        (together / f"{case}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(overrides))))

    code, output = launch(__file__, play, str(together))
    assert code != 0 and "SIGKILL" in output, output
    assert f"another process of this training is lost; the state of step {DIES_AT} is kept" in output, output
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((together / f"pid{rank}").read_text()), 0)
    assert output.count("wrote ") == 1 and (together / "streams" / "checkpoint").exists()
    assert_equal_up_to_rounding(together / "streams", alone / "streams", make_model(STREAMS))

    assert saved_step(together / "codes") == DIES_AT
    train_alone("codes", play, together / "codes")
    assert_equal_up_to_rounding(together / "codes", alone / "codes", make_model(CODES))
    steps = [json.loads(line)["step"] for line in (together / "codes" / "metrics.jsonl").open()]
    assert steps == list(range(1, TRAINING.steps + 1))


@pytest.mark.parametrize("noise_like", [normal_like, exponential_like])
def test_the_rows_of_two_processes_are_the_noise_of_one(noise_like):
    whole = noise_like(torch.zeros(6, 5, 3), torch.Generator().manual_seed(1))
    sources = [Ranks(rank, 2).random_source(torch.Generator().manual_seed(1), 6) for rank in (0, 1)]
    assert all(isinstance(source, RowGenerator) for source in sources)
    assert torch.equal(torch.cat([noise_like(torch.zeros(3, 5, 3), source) for source in sources]), whole)


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(ConfigError, match=r"batch = 64 .* 3 processes"):
        Ranks(0, 3).rows(64)


if __name__ == "__main__":
    train_together(sys.argv[1], Path(sys.argv[2]))
