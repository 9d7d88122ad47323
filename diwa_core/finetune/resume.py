"""The state of a fine-tuning run on disk: a killed run continues bit for bit, offline and online.

Beside the learner's own tensors it holds the environment's, so an environment that is to be resumed has
`state() -> dict[str, Tensor]` and `load_state(tensors)`, the latter raising CheckpointError on what it cannot take up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diwa_core.checkpoint_files import read_files, write_files
from diwa_core.errors import CheckpointError
from diwa_core.finetune.ppo import DenoisingPPO
from diwa_core.run_folder import replace_text

TENSORS, META = "learner.safetensors", "meta.json"


def save_learner(path: str | Path, learner: DenoisingPPO, meta: dict[str, Any]) -> None:
    """Write all that `learner` and its environment need to go on, and `meta` (plain JSON), to the file `path` (ends in .tar).

    A kill leaves either the old or the new file. Raises CheckpointError when it cannot be written; the old file is then intact.
    """
    if Path(path).suffix != ".tar":
        raise CheckpointError(f"{path}: expected a name ending in .tar, which is replaced in one step on every file system.")
    parts = {
        "policy": learner.policy.finetuned.state_dict(),
        "critic": learner.critic.state_dict(),
        "actor_optimizer": _flatten(learner.actor_optimizer),
        "critic_optimizer": _flatten(learner.critic_optimizer),
        "env": learner.env.state(),
        "learner": {"generator": learner.generator.get_state(), "feature": learner.feature},
    }
    scale = learner.reward_scale
    if scale.returns is not None:
        parts["learner"]["returns"] = scale.returns
    tensors = {f"{part}.{name}": _to_disk(value) for part, values in parts.items() for name, value in values.items()}
    counters = {"iteration": learner.iteration, "reward_scale": [scale.count, scale.mean, scale.m2]}
    text = json.dumps({"learner": counters, "meta": meta}, indent=1)
    write_files(Path(path), {TENSORS: safetensors.torch.save(tensors), META: text.encode()})


def load_learner(path: str | Path, learner: DenoisingPPO) -> dict[str, Any]:
    """Bring `learner`, made with the same policy, configuration and environment, into the saved state; returns the saved `meta`.

    Raises CheckpointError when the file is missing, damaged or of another learner; discard the learner then.
    """
    files = read_files(Path(path))
    try:
        stored = json.loads(files[META])
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in safetensors.torch.load(files[TENSORS]).items():
            part, name = key.split(".", 1)
            parts.setdefault(part, {})[name] = value
        own, counters = parts["learner"], stored["learner"]
        device = learner.feature.device
        learner.policy.finetuned.load_state_dict(parts["policy"])
        learner.critic.load_state_dict(parts["critic"])
        _restore(learner.actor_optimizer, parts.get("actor_optimizer", {}))
        _restore(learner.critic_optimizer, parts.get("critic_optimizer", {}))
        learner.generator.set_state(own["generator"])
        learner.env.load_state({name: value.to(device) for name, value in parts.get("env", {}).items()})
        learner.feature = own["feature"].to(device)
        scale = learner.reward_scale
        scale.returns = own["returns"].to(device) if "returns" in own else None
        scale.count, scale.mean, scale.m2 = counters["reward_scale"]
        learner.iteration = counters["iteration"]
        return stored["meta"]
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: expected the state of a learner like this one: {error}. Use another run folder, or remove the file to begin anew."
        ) from error


def open_metrics(run_dir: str | Path, iteration: int) -> TextIO:
    """run_dir/metrics.jsonl for appending, without the rows of iterations from `iteration` on, which will be run again."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
    replace_text(path, "".join(line for line in whole if json.loads(line)["iteration"] < iteration))
    return path.open("a")


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{i}.{name}": value for i, moments in optimizer.state_dict()["state"].items() for name, value in moments.items()}


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _to_disk(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()
