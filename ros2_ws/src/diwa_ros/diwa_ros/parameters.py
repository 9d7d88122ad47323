"""Parameters of a node as one declarative table: type, default, range and meaning, checked before they reach the node."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter as RosParameter

from diwa_core.errors import ConfigError

Value = bool | int | float | str


@dataclass(frozen=True)
class Parameter:
    """One parameter. `minimum` and `maximum` are inclusive; `choices` lists all allowed strings; `live` ones may change while active."""

    name: str
    default: Value
    description: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    live: bool = False

    @property
    def descriptor(self) -> ParameterDescriptor:
        """What `ros2 param describe` shows."""
        descriptor = ParameterDescriptor(description=self.description)
        if self.choices:
            descriptor.additional_constraints = f"one of: {', '.join(self.choices)}"
        if self.minimum is not None or self.maximum is not None:
            if isinstance(self.default, float):
                low = -math.inf if self.minimum is None else float(self.minimum)
                high = math.inf if self.maximum is None else float(self.maximum)
                descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
            else:
                low = -(2**63) if self.minimum is None else int(self.minimum)
                high = 2**63 - 1 if self.maximum is None else int(self.maximum)
                descriptor.integer_range = [IntegerRange(from_value=low, to_value=high)]
        return descriptor

    def explain_refusal(self, value: object) -> str | None:
        """One sentence saying why `value` is refused, or None if it is allowed."""
        if type(value) is not type(self.default):
            return f"parameter '{self.name}': expected {type(self.default).__name__}, found {value!r} ({type(value).__name__})."
        if self.choices and value not in self.choices:
            close = difflib.get_close_matches(str(value), self.choices, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            return f"parameter '{self.name}': expected one of {', '.join(self.choices)}, found '{value}'.{hint}"
        below = self.minimum is not None and not value >= self.minimum
        above = self.maximum is not None and not value <= self.maximum
        if below or above:
            low = "-inf" if self.minimum is None else f"{self.minimum:g}"
            high = "inf" if self.maximum is None else f"{self.maximum:g}"
            return f"parameter '{self.name}': expected {low} to {high}, found {value}. {self.description}"
        return None


class ParameterTable:
    """Declares the parameters of a node and keeps every later change inside the table. Indexing reads the current value."""

    def __init__(self, node: Node, parameters: tuple[Parameter, ...], is_configured: callable) -> None:
        """Declare `parameters` on `node`. Raises ConfigError when a value given at start is of a wrong type or out of range."""
        self.node = node
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.is_configured = is_configured
        for parameter in parameters:
            self._declare(parameter)
        node.add_on_set_parameters_callback(self._check_change)

    def __getitem__(self, name: str) -> Value:
        return self.node.get_parameter(name).value

    def _declare(self, parameter: Parameter) -> None:
        given = self.node._parameter_overrides.get(parameter.name)
        refusal = None if given is None else parameter.explain_refusal(given.value)
        if refusal:
            raise ConfigError(refusal)
        try:
            self.node.declare_parameter(parameter.name, parameter.default, parameter.descriptor)
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise ConfigError(f"parameter '{parameter.name}': {error}") from error

    def _check_change(self, changes: list[RosParameter]) -> SetParametersResult:
        for change in changes:
            parameter = self.parameters.get(change.name)
            if parameter is None:
                continue
            refusal = parameter.explain_refusal(change.value)
            if refusal is None and not parameter.live and self.is_configured():
                refusal = f"parameter '{change.name}' is read when the node is configured: clean the node up, set it, configure again."
            if refusal:
                return SetParametersResult(successful=False, reason=refusal)
        return SetParametersResult(successful=True)
