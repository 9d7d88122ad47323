"""The `contract` parameter that bridge and controller share."""

from __future__ import annotations

from diwa_core.config import load_yaml
from diwa_core.contract import Contract
from diwa_ros.parameters import Parameter

CONTRACT = Parameter("contract", "", "YAML file of the contract; empty: the play table's.")
MODE = Parameter(
    "mode",
    "real_time",
    "real_time: the world runs on the clock; lockstep: it waits for the command of every tick.",
    choices=("real_time", "lockstep"),
)


def read_contract(path: str) -> Contract:
    """The contract in the YAML file at `path`, or the default one. Raises ConfigError."""
    return load_yaml(Contract, path) if path else Contract()
