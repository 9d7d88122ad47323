"""The one exception family: each message says what was expected, what was found and how to mend it."""


class DiwaError(Exception):
    """Base of every error this project raises on purpose."""


class ContractError(DiwaError):
    """An observation, action or stream does not match the contract."""


class CheckpointError(DiwaError):
    """A checkpoint is missing, damaged, edited or of another kind."""


class DataError(DiwaError):
    """A play store or bag cannot be used as asked."""


class ConfigError(DiwaError):
    """A configuration file has an unknown key or a value out of range."""


class GateError(DiwaError):
    """A command or a swap was refused by a safety gate."""


class SetupError(DiwaError):
    """Something that must be installed or built first is missing."""
