"""A fine-tuning run that is killed goes on as if it had not been."""

import json
from pathlib import Path

import pytest
import torch

from diwa_core.errors import CheckpointError, ConfigError
from diwa_core.finetune.ppo import DenoisingPPO, PPOConfig
from diwa_core.finetune.resume import load_learner, open_metrics, save_learner
from diwa_core.imagination.dream import DreamStep
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.run_folder import guard_run

CONFIG = PPOConfig(batch=8, chunks=3, finetuned_steps=2, epochs=2, minibatch=16, actor_rate=1e-3, critic_warmup=1)


class WalkWorld:
    """The feature is a position that the chunk moves; success beyond 1, truncated after two chunks."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def reset(self):
        self.position, self.chunks = torch.rand(CONFIG.batch, 3, generator=self.generator), torch.zeros(CONFIG.batch)
        return self.position

    def step(self, chunk):
        final = self.position + 0.2 * chunk[..., :3].clamp(-1, 1).sum(1)
        self.chunks += 1
        success = final[:, 0] > 1
        done = success | (self.chunks >= 2)
        self.position = torch.where(done[:, None], torch.rand(CONFIG.batch, 3, generator=self.generator), final)
        self.chunks = torch.where(done, 0.0, self.chunks)
        return DreamStep(self.position, final, success.float(), success, done & ~success)

    def state(self):
        return {"position": self.position, "chunks": self.chunks, "generator": self.generator.get_state()}

    def load_state(self, tensors):
        self.position, self.chunks = tensors["position"], tensors["chunks"]
        self.generator.set_state(tensors["generator"])


def make_learner(hidden: int = 16) -> DenoisingPPO:
    torch.manual_seed(0)
    policy = DiffusionPolicy(PolicyConfig(3, hidden=(hidden,) * 3, denoising_steps=4, sampler_steps=4)).eval().requires_grad_(False)
    return DenoisingPPO(policy, WalkWorld(), CONFIG, seed=3)


@pytest.mark.parametrize("killed_after", [0, 1, 3])  # before anything was learned, after the critic's warm-up, in the middle
def test_a_resumed_learner_goes_on_bit_for_bit(tmp_path: Path, killed_after: int) -> None:
    whole = make_learner()
    expected = [whole.iterate() for _ in range(5)]
    killed = make_learner()
    metrics = [killed.iterate() for _ in range(killed_after)]
    save_learner(tmp_path / "learner.tar", killed, {"env_steps": 7})
    resumed = make_learner()
    resumed.iterate()  # whatever it did before is forgotten
    assert load_learner(tmp_path / "learner.tar", resumed) == {"env_steps": 7}
    assert resumed.iteration == killed_after
    metrics += [resumed.iterate() for _ in range(5 - killed_after)]
    assert metrics == expected
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name
    for name, value in whole.critic.state_dict().items():
        assert torch.equal(value, resumed.critic.state_dict()[name]), name


def test_states_that_do_not_fit_are_refused_and_a_failed_write_keeps_the_old_one(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "learner.tar"
    learner = make_learner()
    save_learner(path, learner, {})
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_learner(path, make_learner(hidden=8))
    with pytest.raises(CheckpointError, match=r"ending in \.tar"):
        save_learner(tmp_path / "folder", learner, {})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diwa_core.checkpoint_files.os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save_learner(path, learner, {"later": True})
    assert path.read_bytes() == before and load_learner(path, make_learner()) == {}
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(CheckpointError, match=r"learner\.tar"):
        load_learner(path, make_learner())


def test_a_run_folder_keeps_its_configuration_and_drops_rows_that_will_be_repeated(tmp_path: Path) -> None:
    wanted = {"seed": 1, "ppo": {"batch": 2, "range": (1, 2)}}
    guard_run(tmp_path / "run", wanted)
    guard_run(tmp_path / "run", wanted)
    with pytest.raises(ConfigError, match=r"started with seed = 1, ppo\.batch = 2, now seed = 2, ppo\.batch = 3\."):
        guard_run(tmp_path / "run", {"seed": 2, "ppo": {"batch": 3, "range": (1, 2)}})
    rows = "".join(json.dumps({"iteration": i}) + "\n" for i in range(4)) + '{"iteration": 4, "succ'
    (tmp_path / "run" / "metrics.jsonl").write_text(rows)
    with open_metrics(tmp_path / "run", 3) as log:
        log.write('{"iteration": 3, "again": true}\n')
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found == [{"iteration": 0}, {"iteration": 1}, {"iteration": 2}, {"iteration": 3, "again": True}]
