"""Serves the action run_skill: latents in, diffusion action chunks out, by the rules of an episode (docs/architecture.md)."""

from __future__ import annotations

import sys
import time
from collections import deque

import numpy as np
import torch
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ActionChunk, LatentState, PolicyStatus
from diwa_interfaces.srv import LoadPolicy
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.parameter import Parameter as RosParameter
from rclpy.task import Future
from std_srvs.srv import Trigger

from diwa_core.contract import hold_action
from diwa_core.errors import ConfigError
from diwa_core.finetune.ppo import PPOConfig
from diwa_core.policy.program import prepare_samplers
from diwa_ros.contracts import MODE
from diwa_ros.diagnostics import ERROR, OK
from diwa_ros.messages import LATCHED, from_floats, reliable, to_duration, to_float32, to_ns
from diwa_ros.node import DiwaNode, run_node
from diwa_ros.parameters import Parameter
from diwa_ros.policy_store import LoadedPolicy, PolicyStore
from diwa_ros.skill_run import Move, SkillRun
from diwa_ros.swap import blend_chunk
from diwa_ros.swapper import Swapper

MAX_STEPS = 100_000
ENCODER_WAIT_S = 5.0
ASK_AGAIN_FRAMES = 15  # latents in a row that do not begin the run: the first ones after the reset were missed


class Policy(DiwaNode):
    """Runs one skill at a time. A goal for an unknown skill, or while another runs, is refused with a reason in the log and the status."""

    NAME = "policy"
    PARAMETERS = (
        MODE,
        Parameter("policies", "", "Folder with one policy checkpoint per skill."),
        Parameter("checkpoint", "", "Policy to load on top of `policies`; set while the node is active it is swapped in.", live=True),
        Parameter("threads", 1, "Threads of torch in this process.", 1, 64),
        Parameter("latent_timeout_s", 5.0, "A run without a latent for this long is given up.", 0.1, 600.0),
        Parameter("latency_budget_ms", 20.0, "Real time: a new policy must draw a chunk in this time.", 0.1, 1000.0),
        Parameter("max_action_difference", 0.3, "Mean difference to the running policy that a new one may have; 2 is anything.", 0.0, 2.0),
        Parameter("probation_s", 10.0, "A watchdog event within this time of a swap's first chunk rolls it back; 0: never.", 0.0, 600.0),
    )

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.swapper = Swapper(self)
        self.add_post_set_parameters_callback(self.take_parameters)

    def configure(self) -> None:
        """Load all policies. Raises ConfigError, CheckpointError or GateError."""
        if not self.parameters["policies"]:
            raise ConfigError("parameter 'policies': expected a folder of checkpoints, found nothing. Set it in the launch file.")
        torch.set_num_threads(self.parameters["threads"])
        self.store = PolicyStore()
        self.store.load_folder(self.parameters["policies"])
        if self.parameters["checkpoint"]:
            self.store.put(self.store.check(self.parameters["checkpoint"]))
        for config in {loaded.policy.config for loaded in self.store.policies.values()}:
            prepare_samplers(config, PPOConfig().finetuned_steps)
        self.step_ns = round(1e9 / self.store.contract.rate_hz)
        self.run: SkillRun | None = None
        self.last_latent: LatentState | None = None
        self.generator = torch.Generator()
        self.finished: Future | None = None
        self.goal: ServerGoalHandle | None = None
        self.detail, self.reset_requested = "ready", False
        self.streaming_id = ""  # checkpoint of the chunks the controller holds
        self.ran_id = ""  # the last one that the present or last run used
        self.last_chunk: ActionChunk | None = None  # of the running stream,
        self.answered: tuple[int, int] | None = None  # and the stamp and frame number of the latent it answers
        self.chunks = 0
        self.inference_ms: deque[float] = deque(maxlen=300)
        self.chunk_publisher = self.advertise(ActionChunk, "action_chunk", reliable(5))
        self.status_publisher = self.advertise(PolicyStatus, "policy/status", LATCHED)
        self.listen(LatentState, "latent", self.take_latent, reliable(1))
        self.swapper.configure()
        self.reset_client = self.create_client(Trigger, "encoder/reset")
        self.action_server = ActionServer(
            self, RunSkill, "run_skill", self.execute, goal_callback=self.judge_goal, cancel_callback=self.cancel
        )
        self.repeat(1.0, self.publish_status)
        self.repeat(0.1, self.watch)

    def activate(self) -> None:
        """Say what can be run."""
        self.publish_status()

    def deactivate(self) -> None:
        """End the stream, so that the controller does not have to find out."""
        self.finish(False, "the policy node was deactivated")
        self.swapper.deactivate()

    def cleanup(self) -> None:
        """Withdraw the action and the client."""
        self.action_server.destroy()
        self.destroy_client(self.reset_client)
        self.swapper.cleanup()

    @property
    def running(self) -> SkillRun | None:
        """The run in progress, unless its end is only waiting to be told."""
        return self.run if self.run is not None and not self.finished.done() else None

    # -- the action --------------------------------------------------------------------------------------------------------------------

    def judge_goal(self, goal: RunSkill.Goal) -> GoalResponse:
        """Accept a goal for a known skill when nothing runs."""
        refusal = ""
        if not self.active:
            refusal = "run_skill: expected an active policy node, found it inactive."
        elif goal.skill not in self.store.policies:
            refusal = f"run_skill: expected one of {', '.join(self.store.skills)}; found '{goal.skill}'."
        elif self.run is not None:
            refusal = f"run_skill: expected no run in progress, found '{self.run.skill}' running. Cancel it first."
        elif not 1 <= goal.max_steps <= MAX_STEPS:
            refusal = f"run_skill: expected max_steps of 1 to {MAX_STEPS}, found {goal.max_steps}."
        if refusal:
            self.detail = refusal
            self.diagnostics.report("run_skill", ERROR, refusal)
            self.publish_status()
            return GoalResponse.REJECT
        self.diagnostics.report("run_skill", OK, "goal accepted")
        loaded = self.store.policies[goal.skill]
        self.run, self.ran_id = SkillRun(goal.skill, goal.max_steps, self.step_ns, loaded.policy.config.horizon), loaded.identity
        if self.last_latent is not None:
            self.run.seen_frames, self.run.seen_ns = self.last_latent.frames_since_reset, to_ns(self.last_latent.header.stamp)
        self.generator.manual_seed(goal.seed)
        self.finished = Future(executor=self.executor)
        self.heard_s = time.monotonic()
        return GoalResponse.ACCEPT

    def cancel(self, goal: ServerGoalHandle) -> CancelResponse:
        """Stop at once: the controller is told before the caller is."""
        self.finish(False, "cancelled")
        return CancelResponse.ACCEPT

    async def execute(self, goal: ServerGoalHandle) -> RunSkill.Result:
        """Reset the encoder and wait; `take_latent` does the work."""
        self.goal, run = goal, self.run
        self.detail = f"running {run.skill}"
        self.publish_status()
        self.reset_requested, self.ignored = False, 0
        self.request_reset()
        completed, message = await self.finished
        self.goal, self.run = None, None
        if goal.is_cancel_requested:
            goal.canceled()
        elif completed:
            goal.succeed()
        else:
            goal.abort()
            self.diagnostics.report("run_skill", ERROR, message)
        self.detail = message
        self.publish_status()
        return RunSkill.Result(completed=completed, message=message, steps=run.steps, chunks=run.chunks, checkpoint_id=self.ran_id)

    def request_reset(self) -> None:
        """Ask the encoder to begin anew, as soon as its service is found; its next first frame begins the run."""
        if self.finished.done() or self.reset_requested:
            return
        if self.reset_client.service_is_ready():
            if not self.ignored:
                self.heard_s = time.monotonic()
            self.reset_requested, self.ignored = True, 0
            self.reset_client.call_async(Trigger.Request()).add_done_callback(self.check_reset)
        elif time.monotonic() - self.heard_s > ENCODER_WAIT_S:
            self.finish(False, f"encoder/reset: expected the encoder's service within {ENCODER_WAIT_S:g} s, found none. Start the encoder.")

    def check_reset(self, future: Future) -> None:
        """Give up when the encoder refuses."""
        if not future.result().success:
            self.finish(False, future.result().message)

    def finish(self, completed: bool, message: str) -> None:
        """End the stream of chunks and let the action return."""
        if self.run is None or self.finished.done():
            return
        self.end_stream()
        self.finished.set_result((completed, message))
        self.swapper.end_run()
        if self.executor is not None:  # None once the process stops spinning
            self.executor.wake()

    # -- chunks ------------------------------------------------------------------------------------------------------------------------

    def take_latent(self, message: LatentState) -> None:
        """Answer one latent of the running skill."""
        run, self.last_latent = self.run, message
        self.swapper.hear_latent(message)
        if run is None or self.goal is None or self.finished.done():
            return
        if (to_ns(message.header.stamp), message.frames_since_reset) == self.answered:
            self.chunk_publisher.publish(self.last_chunk)  # a copy is answered with a copy: the controller may have missed the first
            return
        loaded = self.store.policies[run.skill]
        refusal = explain_mismatch(message, loaded)
        if refusal:
            self.finish(False, refusal)
            return
        move = run.decide(to_ns(message.header.stamp), message.frames_since_reset, message.warmup_frames)
        if move != Move.IGNORE:
            self.heard_s = time.monotonic()
        elif self.reset_requested:
            self.ignored += 1
            if self.ignored == ASK_AGAIN_FRAMES:  # this node heard the encoder too late, as both were starting
                self.reset_requested = False
                self.request_reset()
        if move == Move.HOLD:
            self.publish_chunk(message, loaded, hold_action(message.gripper)[None], hold=True, inference_ms=0.0)
        elif move == Move.SAMPLE:
            self.sample(message)
        elif move == Move.FINISH:
            self.finish(True, f"{run.max_steps} steps done")

    def sample(self, message: LatentState) -> None:
        """Draw the next chunk and publish it. This is the chunk border at which another policy may take over."""
        self.swapper.reach_border(message)
        actions, noise, inference_ms = self.draw(message)
        if self.swapper.judge_chunk(self.store.policies[self.run.skill], actions, inference_ms):
            actions, noise, inference_ms = self.draw(message)
            self.run.chunk_ns = to_ns(message.header.stamp)
        loaded = self.store.policies[self.run.skill]
        self.run.horizon = loaded.policy.config.horizon
        self.inference_ms.append(inference_ms)
        drawn = actions
        if self.streaming_id not in ("", loaded.identity) and not self.last_chunk.hold:
            actions = blend_chunk(self.find_last_action(message), actions)
        self.publish_chunk(message, loaded, actions, hold=False, inference_ms=inference_ms)
        self.goal.publish_feedback(RunSkill.Feedback(step=self.run.steps, inference_ms=inference_ms))
        self.swapper.compare(message, loaded, drawn, noise)

    def draw(self, message: LatentState) -> tuple[np.ndarray, torch.Tensor, float]:
        """A chunk [H, A] of the skill's policy, its noise, and the milliseconds it took."""
        loaded = self.store.policies[self.run.skill]
        begin_s = time.monotonic()
        feature = torch.from_numpy(from_floats(message.feature).copy())[None]
        noise = loaded.policy.draw_noise(1, self.generator)
        actions = loaded.sample(feature, noise)[0].numpy()
        return actions, noise, (time.monotonic() - begin_s) * 1e3

    def find_last_action(self, message: LatentState) -> np.ndarray:
        """What the arm does in the step before `message` [A]: the action of the last chunk, or nothing if that did not reach so far."""
        actions = from_floats(self.last_chunk.actions).reshape(self.last_chunk.horizon, self.last_chunk.action_dim)
        index = round((to_ns(message.header.stamp) - to_ns(self.last_chunk.header.stamp)) / self.step_ns) - 1
        return actions[max(index, 0)].clip(-1, 1) if index < len(actions) else hold_action(actions[-1, 6])

    def publish_chunk(self, latent: LatentState, loaded: LoadedPolicy, actions: np.ndarray, hold: bool, inference_ms: float) -> None:
        """Send actions [H, A] for the frame of `latent`. The stream of another checkpoint is ended first."""
        if self.streaming_id not in ("", loaded.identity):
            self.end_stream()
        chunk = ActionChunk(checkpoint_id=loaded.identity, world_model_id=loaded.world_model_id, contract_id=loaded.contract.identity)
        chunk.header.stamp = latent.header.stamp
        chunk.skill, chunk.step_period, chunk.hold = loaded.skill, to_duration(self.step_ns), hold
        chunk.horizon, chunk.action_dim = actions.shape
        chunk.actions, chunk.inference_ms = to_float32(actions), inference_ms
        self.chunk_publisher.publish(chunk)
        self.streaming_id = self.ran_id = loaded.identity
        self.last_chunk = chunk
        self.answered = (to_ns(latent.header.stamp), latent.frames_since_reset)
        self.chunks += 1

    def end_stream(self) -> None:
        """Send the empty chunk that tells the controller to go idle."""
        if not self.streaming_id:
            return
        chunk = ActionChunk(checkpoint_id=self.streaming_id, contract_id=self.store.contract.identity)
        chunk.header.stamp = self.get_clock().now().to_msg()
        self.chunk_publisher.publish(chunk)
        self.streaming_id, self.last_chunk, self.answered = "", None, None

    def watch(self) -> None:
        """Go on looking for the encoder; give up a run whose latents have stopped."""
        if self.goal is None:
            return
        self.request_reset()
        limit_s = self.parameters["latent_timeout_s"]
        if self.reset_requested and time.monotonic() - self.heard_s > limit_s:
            self.finish(False, f"latent: expected one within {limit_s:g} s, found none. /diagnostics of the encoder says why.")

    # -- loading and status ------------------------------------------------------------------------------------------------------------

    def take_parameters(self, parameters: list[RosParameter]) -> None:
        """Parameter `checkpoint` set on an active node: swap it in. /diagnostics and policy/history say what became of it."""
        path = next((parameter.value for parameter in parameters if parameter.name == "checkpoint"), "")
        if path and self.active and self.executor is not None:
            self.executor.create_task(self.swapper.load, LoadPolicy.Request(path=path), LoadPolicy.Response())

    def publish_status(self) -> None:
        """State, skills and inference times."""
        status = PolicyStatus(state=self.name_state(), skills=self.store.skills, world_model_id=self.store.world_model_id)
        status.header.stamp = self.get_clock().now().to_msg()
        if self.run is not None:
            status.skill, status.checkpoint_id = self.run.skill, self.ran_id
        shadow = self.swapper.shadow
        status.shadow_id, status.on_probation = shadow.loaded.identity if shadow else "", self.swapper.probation is not None
        if self.inference_ms:
            p50, p99 = np.percentile(self.inference_ms, (50, 99))
            status.inference_ms_p50, status.inference_ms_p99 = float(p50), float(p99)
        status.chunks, status.detail = self.chunks, self.detail
        self.status_publisher.publish(status)

    def name_state(self) -> str:
        """One of PolicyStatus.STATE_*."""
        if self.run is None:
            return PolicyStatus.STATE_IDLE if self.active else PolicyStatus.STATE_FAULT
        return PolicyStatus.STATE_WARMING_UP if self.run.first_ns is None else PolicyStatus.STATE_RUNNING


def explain_mismatch(message: LatentState, loaded: LoadedPolicy) -> str | None:
    """Why `loaded` must not read this latent, or None."""
    if message.world_model_id != loaded.world_model_id:
        return (
            f"latent: expected world model {loaded.world_model_id[:16]}, that of the policy, found {message.world_model_id[:16]}. "
            "Start both with checkpoints of one training run."
        )
    if len(message.feature) != loaded.policy.config.feature_size:
        return f"latent: expected a feature of {loaded.policy.config.feature_size} values, found {len(message.feature)}."
    return None


def main() -> int:
    """Run the node as a process; returns the exit code."""
    return run_node(Policy)


if __name__ == "__main__":
    sys.exit(main())
