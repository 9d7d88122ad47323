"""The stream of action chunks of an operator, a person or a script: one step for the present tick, an empty chunk to let go."""

from __future__ import annotations

import numpy as np
from diwa_interfaces.msg import ActionChunk
from rclpy.publisher import Publisher

from diwa_core.contract import Contract
from diwa_ros.messages import to_duration, to_float32, to_time

OPERATOR = "teleop"  # in place of a checkpoint's identity: the controller keeps operator and policy apart by it


class OperatorStream:
    """Publishes on action_chunk. The controller lets only one sender command at a time: a policy's stream must have ended."""

    def __init__(self, publisher: Publisher, contract: Contract) -> None:
        self.publisher, self.contract = publisher, contract
        self.step_ns = round(1e9 / contract.rate_hz)
        self.open = False
        self.stamp_ns = -1  # of the last tick that was answered

    def send(self, stamp_ns: int, action: np.ndarray, skill: str = "") -> None:
        """Command `action` [7], or [H, 7] from there on, for the tick at `stamp_ns`. skill: what is attempted, for whoever records."""
        chunk, actions = self._chunk(stamp_ns, skill), np.atleast_2d(action)
        (chunk.horizon, chunk.action_dim), chunk.actions = actions.shape, to_float32(actions)
        self.publisher.publish(chunk)
        self.open, self.stamp_ns = True, stamp_ns

    def end(self) -> None:
        """Let go: the arm holds at once and the controller goes idle. Does nothing when the stream has ended already."""
        if self.open:
            self.publisher.publish(self._chunk(self.stamp_ns, ""))
            self.open = False

    def _chunk(self, stamp_ns: int, skill: str) -> ActionChunk:
        chunk = ActionChunk(checkpoint_id=OPERATOR, contract_id=self.contract.identity, skill=skill)
        chunk.header.stamp, chunk.step_period = to_time(stamp_ns), to_duration(self.step_ns)
        return chunk
