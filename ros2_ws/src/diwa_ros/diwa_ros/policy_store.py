"""The policies a node can run, one per skill, and the gates that need nothing but the checkpoint; no ROS in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diwa_core.checkpoint import Checkpoint
from diwa_core.contract import ACTION_SIZE, Contract
from diwa_core.errors import CheckpointError, DiwaError, GateError
from diwa_core.policy.diffusion import DiffusionPolicy
from diwa_core.policy.program import compile_sampler
from diwa_core.policy.store import load_policy

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class LoadedPolicy:
    """A verified policy of one skill."""

    skill: str
    policy: DiffusionPolicy
    sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # its `sample` for one feature and noise, compiled
    identity: str
    world_model_id: str
    contract: Contract


class Refusal(GateError):
    """A policy did not pass a gate; says which one, what it expected and what it found."""

    def __init__(self, gate: str, expected: str, found: str, mend: str) -> None:
        super().__init__(f"gate '{gate}': expected {expected}, found {found}. {mend}".rstrip())
        self.gate, self.expected, self.found = gate, expected, found


class PolicyStore:
    """Policies by skill. All belong to one contract and one world model; None as long as there is no policy."""

    def __init__(self, contract: Contract | None = None, world_model_id: str | None = None, feature_size: int | None = None) -> None:
        self.policies: dict[str, LoadedPolicy] = {}
        self.contract, self.world_model_id, self.feature_size = contract, world_model_id, feature_size

    @property
    def skills(self) -> list[str]:
        """The skills that can be run."""
        return sorted(self.policies)

    def load_folder(self, folder: str | Path) -> None:
        """Load every checkpoint in `folder`. Raises CheckpointError when there is none, Refusal when they do not belong together."""
        for path in list_checkpoints(folder):
            self.put(self.check(path))

    def check(self, path: str | Path, skill: str = "") -> LoadedPolicy:
        """Load a checkpoint and pass it through every gate here. `skill` empty: the one it was made for. Raises Refusal."""
        return self.admit(*self.read(path), skill)

    def read(self, path: str | Path) -> tuple[DiffusionPolicy, Checkpoint]:
        """Gates `files` and `contract`. Raises Refusal."""
        try:
            policy, checkpoint = load_policy(path)
        except DiwaError as error:
            raise Refusal("files", "a whole, unaltered policy checkpoint", str(error), "") from error
        if self.contract is not None and self.contract != checkpoint.contract:
            difference = self.contract.difference(checkpoint.contract)
            found = f"{checkpoint.contract.identity} ({difference})"
            raise Refusal("contract", self.contract.identity, found, "Use a policy trained under the running contract.")
        return policy, checkpoint

    def admit(self, policy: DiffusionPolicy, checkpoint: Checkpoint, skill: str = "") -> LoadedPolicy:
        """Gates `world_model`, `skill`, `shapes` and `statistics` on what `read` gave. Raises Refusal."""
        world_model_id = str(checkpoint.lineage.get("world_model", ""))
        if self.world_model_id not in (None, world_model_id):
            mend = "Use a policy trained on the running world model, or swap both together (diwa swap --world-model)."
            raise Refusal("world_model", self.world_model_id, world_model_id or "none", mend)
        made_for = str(checkpoint.config.get("skill", ""))
        if not made_for or skill not in ("", made_for):
            raise Refusal("skill", skill or "the name of a skill", made_for or "none", "Load it under its own skill.")
        self._check_shapes(policy)
        return LoadedPolicy(made_for, policy, compile_sampler(policy), checkpoint.identity, world_model_id, checkpoint.contract)

    def put(self, loaded: LoadedPolicy) -> None:
        """Make a checked policy the one of its skill."""
        self.policies[loaded.skill] = loaded
        self.contract, self.world_model_id = loaded.contract, loaded.world_model_id
        self.feature_size = loaded.policy.config.feature_size

    def replaced(self, loaded: LoadedPolicy) -> PolicyStore:
        """A store like this one in which `loaded` has taken its place: what a swap exchanges and a rollback exchanges back."""
        store = PolicyStore(self.contract, self.world_model_id, self.feature_size)
        store.policies = dict(self.policies)
        store.put(loaded)
        return store

    def _check_shapes(self, policy: DiffusionPolicy) -> None:
        config = policy.config
        expected = (ACTION_SIZE, self.feature_size or config.feature_size)
        if (config.action_size, config.feature_size) != expected:
            sizes = f"action and feature sizes {expected[0]} and {expected[1]}"
            raise Refusal("shapes", sizes, f"{config.action_size} and {config.feature_size}", "Train it on the running world model.")
        if not (policy.feature_std > 0).all():
            found = f"{int((policy.feature_std <= 0).sum())} that are 0 or less"
            raise Refusal("statistics", "deviations of features above 0", found, "Train it again: its statistics are part of it.")
        chunk = policy.sample(torch.zeros(1, config.feature_size), generator=torch.Generator().manual_seed(0))
        if not torch.isfinite(chunk).all():
            raise Refusal("shapes", "finite actions for a zero feature", "NaN or infinity", "Train it again.")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints in `folder`, one per skill, without those half written (hidden). Raises CheckpointError when there is none."""
    folder = Path(folder)
    entries = sorted(folder.glob("[!.]*")) if folder.is_dir() else []
    paths = [path for path in entries if (path / MANIFEST).exists() or path.suffix == ".tar"]
    if not paths:
        raise CheckpointError(f"policies: expected a folder of checkpoints, one per skill, found none in '{folder}'. Train some.")
    return paths
