"""Policies as checkpoints: the skill in the config, the world model it was trained on in the lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diwa_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from diwa_core.config import from_dict, to_dict
from diwa_core.contract import Contract
from diwa_core.errors import CheckpointError, ConfigError
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig

KIND = "policy"


def save_policy(
    path: str | Path,
    policy: DiffusionPolicy,
    contract: Contract,
    skill: str,
    world_model_id: str,
    lineage: dict[str, Any],
    card: dict[str, Any] | None = None,
    half: bool = False,
) -> str:
    """Write `policy` and return the identity of the checkpoint. Raises CheckpointError as `save_checkpoint` does."""
    config = {"skill": skill, "policy": to_dict(policy.config)}
    return save_checkpoint(path, KIND, policy.state_dict(), config, contract, {**lineage, "world_model": world_model_id}, card, half)


def load_policy(
    path: str | Path, contract: Contract | None = None, world_model_id: str | None = None
) -> tuple[DiffusionPolicy, Checkpoint]:
    """Read a policy, on the CPU and in evaluation mode. Its skill is `checkpoint.config["skill"]`.

    Raises CheckpointError as `load_checkpoint` does, and on another world model than `world_model_id` or weights of other shapes.
    """
    checkpoint = load_checkpoint(path, KIND, contract)
    found = checkpoint.lineage.get("world_model")
    if world_model_id is not None and found != world_model_id:
        raise CheckpointError(
            f"{path}: expected a policy trained on world model '{world_model_id[:16]}', found one trained on {str(found)[:16]!r}. "
            "Load both of one training run, or train the policy again on this world model."
        )
    try:
        config = from_dict(PolicyConfig, checkpoint.config.get("policy"), "policy")
        policy = DiffusionPolicy(config)
        policy.load_state_dict(checkpoint.tensors)
    except (ConfigError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the weights do not fit their configuration: {error}. Train the policy again with this version."
        ) from error
    return policy.eval().requires_grad_(False), checkpoint
