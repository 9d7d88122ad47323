"""The only node that talks to a robot: action chunks in, checked commands out, and a record of what was really executed."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from diwa_interfaces.msg import ActionChunk, ControllerStatus, ExecutedAction, Surprise
from std_srvs.srv import Trigger

from diwa_core.contract import hold_action
from diwa_core.control.limits import contract_limits, load_limits
from diwa_core.control.motion import ActionLimiter
from diwa_core.errors import ConfigError, GateError
from diwa_ros.access import CommandSource
from diwa_ros.backends import BACKENDS, Tick
from diwa_ros.contracts import CONTRACT, MODE, read_contract
from diwa_ros.diagnostics import ERROR, OK, WARN
from diwa_ros.franky_backend import FrankyBackend
from diwa_ros.gate import Chunk, ChunkGate, ClockCheck, Command, DroppedChunk, State, Watchdog
from diwa_ros.messages import LATCHED, from_floats, reliable, to_ns, to_time
from diwa_ros.node import DiwaNode, run_node
from diwa_ros.parameters import Parameter
from diwa_ros.surprise import IGNORE, ON_SURPRISE, SLOW, SurpriseRule
from diwa_ros.teleop_stream import OPERATOR

ROBOTS = {**BACKENDS, "franky": FrankyBackend}
WATCH_S = 0.02  # period of the watchdog
MEMORY_TICKS = 8  # commands remembered until the robot says what it executed


class FrankaController(DiwaNode):
    """Sends one checked command per tick while a stream of chunks lasts; silence, stops and faults send nothing and the arm holds."""

    NAME = "franka_controller"
    PARAMETERS = (
        CONTRACT,
        MODE,
        Parameter("backend", "calvin", "Robot: the simulated one behind calvin_bridge, none, or a Franka.", choices=tuple(ROBOTS)),
        Parameter("robot", "robot", "Backend franky: the robot's YAML, a name in config/ or a path."),
        Parameter("start_enabled", True, "Accept chunks without a call of controller/enable."),
        Parameter("hold_after_s", 0.3, "Real time: silence of the policy after which the arm holds.", 0.05, 2.0),
        Parameter("stop_after_s", 1.0, "Real time: silence after which only controller/resume goes on.", 0.1, 10.0),
        Parameter("max_chunk_age_s", 0.5, "Chunks of an older observation are dropped.", 0.05, 5.0),
        Parameter("max_clock_jump_s", 0.5, "Real time: stamps that jump by more than this hold the arm.", 0.05, 10.0),
        Parameter("limits", "simulation", "Limits of motion: simulation, fer, fr3, or a YAML file (docs/safety.md)."),
        Parameter("command_sources", "policy", "Nodes that may publish action_chunk, separated by commas; others hold the arm."),
        Parameter("on_surprise", SLOW, "What a calibrated monitor's alarm does (docs/monitor.md).", choices=ON_SURPRISE),
        Parameter("surprise_speed", 0.3, "slow: share of every motion that is left.", 0.05, 1.0),
        Parameter("surprise_clear_s", 1.0, "How long after the last alarm the surprise is over.", 0.1, 60.0),
        Parameter("robot_timeout_s", 1.0, "Real time: a robot silent for this long is disconnected.", 0.1, 60.0),
    )

    def configure(self) -> None:
        """Connect topics and services to the backend. Raises ConfigError."""
        contract = read_contract(self.parameters["contract"])
        self.lockstep = self.parameters["mode"] == "lockstep"
        self.step_ns = round(1e9 / contract.rate_hz)
        self.gate = ChunkGate(contract.identity, self.step_ns, self.parameters["max_chunk_age_s"])
        self.watchdog = Watchdog(self.parameters["hold_after_s"], self.parameters["stop_after_s"], self.lockstep)
        self.clock = ClockCheck(self.parameters["max_clock_jump_s"])
        self.limits = load_limits(self.parameters["limits"], contract)
        self.enabled = self.parameters["start_enabled"]
        self.surprise = SurpriseRule(*(self.parameters[name] for name in ("on_surprise", "surprise_speed", "surprise_clear_s")))
        self.tick_ns, self.tick_answered, self.tick_s = -1, True, time.monotonic()
        self.sent: dict[int, Command] = {}
        self.commands, self.holds, self.command_age_ms = 0, 0, 0.0
        self.last_status: tuple | None = None
        self.executed_publisher = self.advertise(ExecutedAction, "executed_action", reliable(10))
        self.status_publisher = self.advertise(ControllerStatus, "controller/status", LATCHED)
        chunks = self.listen(ActionChunk, "action_chunk", self.take_chunk, reliable(5))
        sources = tuple(name.strip() for name in self.parameters["command_sources"].split(",") if name.strip())
        if not sources:
            raise ConfigError("parameter 'command_sources': expected the name of a node, as policy, found none.")
        self.listen(Surprise, "world_model/surprise", self.take_surprise, reliable(10))
        self.source = CommandSource(self, chunks.topic_name, sources)
        self.backend = ROBOTS[self.parameters["backend"]](self, contract, self.take_tick)
        self.limiter = ActionLimiter(contract_limits(contract) if self.backend.LIMITS_MOTION else self.limits, contract)
        for name, action in (("enable", self.enable), ("stop", self.stop_arm), ("resume", self.resume)):
            self.serve(Trigger, f"controller/{name}", action)
        self.repeat(WATCH_S, self.watch)
        self.repeat(1.0, self.publish_status)

    def activate(self) -> None:
        """Wait for the robot."""
        self.publish_status()

    def deactivate(self) -> None:
        """Hold: the last message sent is the safe one."""
        self.gate.clear()
        if self.watchdog.may_command and not self.tick_answered:
            self.backend.send(self.tick_ns, Command(hold_action(self.last_gripper), True, 0, "", 0))
        self.watchdog.disconnect("the node was deactivated")
        self.publish_status()

    def cleanup(self) -> None:
        """Let the robot go, and the limiter: its library complains of objects that outlive the interpreter."""
        self.backend.close()
        del self.limiter

    # -- the robot ---------------------------------------------------------------------------------------------------------------------

    def take_tick(self, tick: Tick) -> None:
        """The robot is at a new tick: record what it executed, then answer."""
        self.tick_s = time.monotonic()
        if tick.stamp_ns == self.tick_ns:
            self.repeat_answer(tick)
            return
        self.check_clock(tick)
        if tick.executed_is_hold and self.sent_from(tick.stamp_ns - self.step_ns) is None:
            self.limiter.reset()  # the robot came to rest by itself
        if tick.first_of_episode and tick.stamp_ns > 0:
            self.gate.clear()
            self.limiter.reset()
            self.surprise.forget()
            self.watchdog.hear(self.tick_s, ends=True)
        self.publish_executed(tick)
        self.watchdog.connect()
        self.tick_ns, self.tick_answered, self.last_gripper = tick.stamp_ns, False, float(tick.executed[6])
        self.answer()

    def repeat_answer(self, tick: Tick) -> None:
        """Lock-step: answer a copy of the tick with copies, for a node that had not yet found this one the first time."""
        if not self.lockstep:
            return
        self.publish_executed(tick)
        if self.tick_answered and self.watchdog.may_command:
            self.backend.send(self.tick_ns, self.sent[self.tick_ns])

    def check_clock(self, tick: Tick) -> None:
        """Real time: a plan made by another clock is worth nothing."""
        jump_s = 0.0 if self.lockstep else self.clock.jump_s(tick.stamp_ns, self.tick_s)
        if jump_s:
            self.gate.clear()
            self.sent.clear()
            self.watchdog.hold("the robot's clock jumped")
            self.diagnostics.report("clock", WARN, "the robot's clock jumped", jump_s=f"{jump_s:.2f}")

    def answer(self) -> None:
        """Send the command for the present tick as soon as an accepted chunk covers it; come to rest when there is to be none."""
        if self.tick_answered:
            return
        command = self.gate.command_at(self.tick_ns) if self.watchdog.may_command else self.braking_command()
        if command is None:
            return
        command = self.limit(self.surprise.slow_down(command, time.monotonic()))
        clamps = self.backend.send(self.tick_ns, command)
        if clamps:
            self.gate.clamped += 1
            command = replace(command, clamps=command.clamps | int(clamps))
        self.tick_answered = True
        self.sent[self.tick_ns] = command
        while len(self.sent) > MEMORY_TICKS:
            del self.sent[next(iter(self.sent))]
        self.commands += 1
        self.holds += command.hold
        self.command_age_ms = (time.monotonic() - self.tick_s) * 1e3

    def braking_command(self) -> Command | None:
        """A hold to be limited, while an arm with limits of its own still moves and may not stop within one step."""
        if self.limiter.is_resting or self.watchdog.state in (State.DISCONNECTED, State.CONNECTING):
            return None
        return Command(hold_action(self.last_gripper), True, 0, "", 0)

    def limit(self, command: Command) -> Command:
        """The command within the limits of motion; one that must not be changed passes as it is."""
        wanted = hold_action(command.action[6]) if command.hold else command.action
        action, clamps = self.limiter.limit(wanted)
        if not clamps:
            return command
        self.gate.clamped += 1
        return replace(command, action=action, hold=False, clamps=command.clamps | int(clamps))

    def publish_executed(self, tick: Tick) -> None:
        """Relay what was applied over the step that ended at `tick`, and where it came from."""
        start_ns = tick.stamp_ns - self.step_ns
        message = ExecutedAction(action=tick.executed)
        message.header.stamp = to_time(start_ns)
        command = self.sent_from(start_ns)
        if command is not None and not tick.executed_is_hold and not tick.first_of_episode:
            message.source = source_of(command.checkpoint_id)
            message.observation_stamp, message.clamps = to_time(command.observation_stamp_ns), command.clamps
            message.checkpoint_id = command.checkpoint_id if message.source == ExecutedAction.SOURCE_POLICY else ""
        self.executed_publisher.publish(message)

    def sent_from(self, start_ns: int) -> Command | None:
        """The command of the step that began at `start_ns`, or nearest to that: ticks of a robot come as evenly as its host allows."""
        stamp_ns = min(self.sent, key=lambda sent_ns: abs(sent_ns - start_ns), default=None)
        return self.sent[stamp_ns] if stamp_ns is not None and 2 * abs(stamp_ns - start_ns) < self.step_ns else None

    # -- the policy --------------------------------------------------------------------------------------------------------------------

    def take_chunk(self, message: ActionChunk, info: dict) -> None:
        """Check a chunk and splice it in; a refused one leaves the plan as it was."""
        if not (self.enabled and self.watchdog.accepts_chunks):
            return
        if not self.source.takes(info["publication_sequence_number"]):
            self.gate.drops.foreign += 1
            self.check_source()
            return
        chunk = read_chunk(message)
        try:
            self.gate.accept(chunk, self.tick_ns)
        except DroppedChunk as error:
            if not (chunk.hold and error.reason == "stale"):  # warm-up begins on a frame that may be past already
                self.diagnostics.report("action_chunk", WARN if error.reason == "stale" else ERROR, f"dropped: {error.reason}", last=error)
            return
        self.diagnostics.report("action_chunk", OK, "accepted")
        self.watchdog.hear(time.monotonic(), ends=len(chunk.actions) == 0)
        self.answer()
        self.publish_change()

    def take_surprise(self, message: Surprise) -> None:
        """The verdict of the world-model monitor on a frame. While nothing moves the arm, people may move what they like."""
        rests = self.watchdog.state in (State.IDLE, State.CONNECTING, State.DISCONNECTED)
        self.surprise.hear(message.alarm and not rests, message.worst, time.monotonic())
        self.heed_surprise()

    def heed_surprise(self) -> None:
        """Slow a running policy, or hold it until controller/resume, while the world model is surprised."""
        reason = self.surprise.reason(time.monotonic())
        if self.surprise.reaction == IGNORE:
            return
        self.diagnostics.report("surprise", WARN if reason else OK, reason or "none")
        if self.surprise.reaction == SLOW:
            self.watchdog.warn(reason)
        elif reason and self.watchdog.state in (State.ACTIVE, State.HOLD):
            self.gate.clear()
            self.watchdog.fault(f"{reason}; call controller/resume")
        self.publish_change()

    def check_source(self) -> None:
        """Nobody but the named node may publish commands: while somebody else does, the arm is held until controller/resume."""
        before = self.source.accepted
        verdict = self.source.look()
        if verdict.intruder or (before and before != self.source.accepted):
            self.gate.clear()
        if verdict.intruder and self.watchdog.state in (State.ACTIVE, State.HOLD):
            self.watchdog.fault(f"{verdict.text}; call controller/resume")
        self.diagnostics.report("command source", ERROR if verdict.intruder else OK, verdict.text, **verdict.publishers)

    def watch(self) -> None:
        """Rules of silence, of the policy and of the robot."""
        self.check_source()
        self.heed_surprise()
        if self.obey_robot():
            return
        now_s = time.monotonic()
        silent_s = now_s - self.tick_s
        if self.lockstep:
            waits = self.watchdog.may_command and not self.tick_answered and silent_s > self.watchdog.stop_after_s
            self.diagnostics.report("lockstep", WARN if waits else OK, "waiting for a chunk that covers the tick" if waits else "running")
        elif silent_s > self.parameters["robot_timeout_s"] and self.watchdog.state not in (State.DISCONNECTED, State.CONNECTING):
            self.gate.clear()
            self.watchdog.disconnect("the robot is silent")
        self.watchdog.check(now_s)
        if self.watchdog.state == State.FAULT:
            self.gate.clear()
        self.publish_change()

    def obey_robot(self) -> bool:
        """A state of the robot's own, as a reflex, comes before our rules of silence; whether there is one."""
        condition = self.backend.condition()
        if condition is None:
            self.watchdog.release()
            return False
        self.gate.clear()
        self.tick_s = time.monotonic()  # it asks for no command, but it is not silent
        self.watchdog.impose(*condition)
        self.publish_change()
        return True

    # -- services and status -----------------------------------------------------------------------------------------------------------

    def enable(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Service controller/enable: accept chunks from now on."""
        self.enabled = True
        return self.reply(response, "enabled")

    def stop_arm(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Service controller/stop: hold now, until controller/resume."""
        self.gate.clear()
        self.watchdog.stop()
        self.backend.stop()
        return self.reply(response, "stopped")

    def resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Service controller/resume: leave FAULT or USER_STOPPED."""
        try:
            if self.source.look().intruder:
                raise GateError(f"resume: {self.source.verdict.text}. End it first; one that was killed is forgotten after a while.")
            if self.surprise.holds(time.monotonic()):
                raise GateError(f"resume: {self.surprise.reason(time.monotonic())}. Look what is wrong, or wait until it is over.")
            self.backend.resume()
            self.watchdog.resume()
        except GateError as error:
            response.message = str(error)
            return response
        self.gate.clear()
        return self.reply(response, "resumed")

    def reply(self, response: Trigger.Response, message: str) -> Trigger.Response:
        """Publish the new state and say yes."""
        self.publish_change()
        response.success, response.message = True, message
        return response

    def publish_change(self) -> None:
        """Publish the status, and a diagnostic, when the state has changed."""
        status = (self.watchdog.state, self.watchdog.reason)
        if status == self.last_status:
            return
        self.last_status = status
        level = {State.HOLD: WARN, State.USER_STOPPED: WARN, State.DISCONNECTED: ERROR, State.REFLEX: ERROR, State.FAULT: ERROR}.get(
            status[0], OK
        )
        self.diagnostics.report("state", level, f"{status[0].name}: {status[1]}")
        self.publish_status()

    def publish_status(self) -> None:
        """State and counters."""
        drops = self.gate.drops
        status = ControllerStatus(state=int(self.watchdog.state), state_name=self.watchdog.state.name, reason=self.watchdog.reason)
        status.header.stamp = self.get_clock().now().to_msg()
        status.backend = self.parameters["backend"]
        status.commands, status.holds, status.clamped = self.commands, self.holds, self.gate.clamped
        status.dropped_stale, status.dropped_nonfinite = drops.stale, drops.nonfinite
        status.dropped_shape, status.dropped_foreign = drops.shape, drops.foreign
        status.command_age_ms = self.command_age_ms
        self.status_publisher.publish(status)


def source_of(sender: str) -> int:
    """SOURCE_* of what the stream of `sender` commanded; nobody's is the arm being brought to rest."""
    return {"": ExecutedAction.SOURCE_HOLD, OPERATOR: ExecutedAction.SOURCE_TELEOP}.get(sender, ExecutedAction.SOURCE_POLICY)


def read_chunk(message: ActionChunk) -> Chunk:
    """ActionChunk -> Chunk; a wrong length gives an array the gate refuses by its shape."""
    actions = from_floats(message.actions)
    if message.action_dim and len(actions) == message.horizon * message.action_dim:
        actions = actions.reshape(message.horizon, message.action_dim)
    stamp_ns, step_ns = to_ns(message.header.stamp), to_ns(message.step_period)
    return Chunk(stamp_ns, step_ns, actions, message.hold, message.checkpoint_id, message.contract_id)


def main() -> int:
    """Run the node as a process; returns the exit code."""
    return run_node(FrankaController)


if __name__ == "__main__":
    sys.exit(main())
