"""The loop in small: demonstrations through the graph into a bag, retrained while the robot works, swapped while it moves, measured."""

import json
import os

import pytest
import torch
import yaml
from ros_support import private_environment
from test_finetune_node import RECIPE, TINY

from diwa_core.checkpoint import load_checkpoint
from diwa_core.cli.main import main
from diwa_core.contract import Contract
from diwa_core.evaluate.comparison import Comparison
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier
from diwa_core.reward.store import save_classifier
from diwa_core.world_model.filter import save_world_model
from diwa_core.world_model.model import WorldModel

SKILL = "turn_on_led"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_loop_closes(tmp_path, monkeypatch):
    """Lock-step: what counts here is that every part takes what the one before made."""
    torch.manual_seed(0)
    model, contract, checkpoints = WorldModel(TINY).eval(), Contract(), tmp_path / "checkpoints"
    identity = save_world_model(checkpoints / "world_model", model, contract, {})
    config = PolicyConfig(feature_size=model.feature_size, hidden=(16, 16, 16), denoising_steps=4, sampler_steps=4)
    base = DiffusionPolicy(config)
    base_identity = save_policy(checkpoints / "policies" / SKILL, base, contract, SKILL, identity, {"episodes": 1})
    classifier = SuccessClassifier(ClassifierConfig(model.rssm.latent.size, hidden=8, embedding=4))
    save_classifier(checkpoints / "classifiers" / SKILL, classifier, contract, SKILL, identity, {})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for name, value in private_environment().items():
        monkeypatch.setenv(name, value)
    words = ["loop", "--lockstep", "--skill", SKILL, "--checkpoint", str(checkpoints), "--recipe", str(tmp_path / "recipe.yaml")]
    words += ["--demonstrations", "4", "--noise", "0", "--play-ticks", "30", "--iterations", "2", "--minutes", "0", "--episodes", "2"]
    words += ["--fair-share", "--workers", "1", "--out", str(tmp_path / "out"), "--folder", str(tmp_path / "runs")]
    assert main(words) == 0
    told = json.loads((tmp_path / "out" / "loop.json").read_text())
    assert (told["successes"], told["retrained"]["attempts"], told["retrained"]["base"]) == (4, {SKILL: 4}, base_identity)
    assert load_checkpoint(told["checkpoint"], "policy").identity == told["checkpoint_id"]
    (row,) = Comparison.read(tmp_path / "out" / "comparison.json").skills
    assert (row.seeds[0].base.identity, row.seeds[0].finetuned.identity) == (base_identity, told["checkpoint_id"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Data used" in page and "4 successes in 4 attempts" in page and "The robot meanwhile" in page
    assert os.listdir(tmp_path / "runs" / "bags") == [told["bag"].rsplit("/", 1)[1]]
