"""The policy node's side of a hot swap: gates in a worker, takeover at a chunk border, probation, rollback, history (docs/swap.md)."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from diwa_interfaces.msg import ControllerStatus, LatentState, PolicyHistory, ShadowReport, SwapEvent
from diwa_interfaces.srv import LoadPolicy, SwapWorldModel
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.task import Future
from std_srvs.srv import Trigger
from torch import Tensor

from diwa_core.checkpoint import Checkpoint
from diwa_core.errors import DiwaError
from diwa_core.policy.diffusion import DiffusionPolicy
from diwa_ros.diagnostics import ERROR, OK, WARN
from diwa_ros.messages import LATCHED, from_floats, reliable, to_ns
from diwa_ros.policy_store import MANIFEST, LoadedPolicy, PolicyStore, Refusal, list_checkpoints
from diwa_ros.shadow import Shadow
from diwa_ros.swap import LatentMemory, Probation, check_actions, check_latency, check_statistics
from diwa_ros.worker import Worker

if TYPE_CHECKING:
    from diwa_ros.policy import Policy

HISTORY = 100
CANDIDATE_FRAMES = 30  # real frames on which a new world model is compared: a second
FRAMES_LIMIT_S = 10.0  # for those frames, and for the first latent after a commit
ENCODER_LIMIT_S = 60.0  # for an answer of the encoder, which may be loading
WATCHDOG_STATES = (ControllerStatus.HOLD, ControllerStatus.REFLEX, ControllerStatus.FAULT)
BUSY = 2.0  # a new policy may take this times as long as the last chunks did: a busy machine is not its fault
NOT_MEASURED = float("nan")


@dataclass
class Exchange:
    """Policies on their way into the node. `loaded`: the one the answer is about; `event` goes to the history when it is done."""

    store: PolicyStore
    loaded: LoadedPolicy
    event: SwapEvent
    done: Future


@dataclass
class Wait:
    """What the swap in progress waits for; `late` is raised at the deadline (seconds, monotonic)."""

    over: Future
    deadline_s: float
    late: Refusal


class Swapper:
    """Exchanges the policies of `node`, one swap at a time. The node tells it of latents, chunk borders, chunks and ends of runs."""

    def __init__(self, node: Policy) -> None:
        """The services answer in every state of the node, so they outlive its configurations."""
        self.node = node
        self.worker = Worker(node)
        group = ReentrantCallbackGroup()  # a swap waits for latents and for the encoder, and these must go on
        node.create_service(LoadPolicy, "policy/load", self.load, callback_group=group)
        node.create_service(Trigger, "policy/rollback", self.roll_back_on_request, callback_group=group)
        self.encoder = node.create_client(SwapWorldModel, "encoder/world_model", callback_group=group)
        self.job = ""  # what is being swapped in, as a sentence says it
        self.wait: Wait | None = None
        self.forget()

    def forget(self) -> None:
        """No memories, no previous policies."""
        self.latents, self.candidate_latents = LatentMemory(), LatentMemory()
        self.frames_heard = Future()
        self.armed: Exchange | None = None
        self.previous: PolicyStore | None = None
        self.probation: Probation | None = None
        self.shadow: Shadow | None = None
        self.history: deque[SwapEvent] = deque(maxlen=HISTORY)
        self.controller_state: int | None = None

    def configure(self) -> None:
        """Topics of one configuration of the node."""
        self.forget()
        self.history_publisher = self.node.advertise(PolicyHistory, "policy/history", LATCHED)
        self.shadow_publisher = self.node.advertise(ShadowReport, "policy/shadow", reliable(10))
        self.node.listen(LatentState, "latent/candidate", self.take_candidate_latent, reliable(10))
        self.node.listen(ControllerStatus, "controller/status", self.take_controller_status, LATCHED)
        self.node.repeat(0.1, self.watch)

    # -- the swap ----------------------------------------------------------------------------------------------------------------------

    async def load(self, request: LoadPolicy.Request, response: LoadPolicy.Response) -> LoadPolicy.Response:
        """Service policy/load: answers when the new policy has taken over, or with the gate that refused it; then nothing has changed."""
        event = SwapEvent(path=request.path, skill=request.skill, latency_ms=NOT_MEASURED, action_difference=NOT_MEASURED)
        try:
            self.check_free(request)
            self.job = job = f"checkpoint '{request.path}'"
            try:
                response.message = await self.swap(request, event)
            finally:
                if self.job is job:  # a rollback may have taken its place
                    self.job, self.wait = "", None
        except Refusal as refusal:
            response.gate, response.expected, response.found = refusal.gate, refusal.expected, refusal.found
            response.message, event.event, event.gate, event.reason = str(refusal), SwapEvent.REFUSED, refusal.gate, str(refusal)
            self.node.diagnostics.report("policy/load", ERROR, response.message)
            self.record(event)
        else:
            response.success = True
            self.node.diagnostics.report("policy/load", OK, response.message)
        running = self.find_running(event.skill or (self.node.running.skill if self.node.active and self.node.running else ""))
        response.checkpoint_id = running.identity if running else ""
        response.latency_ms, response.action_difference = event.latency_ms, event.action_difference
        if self.node.configured:
            self.node.publish_status()
        return response

    def check_free(self, request: LoadPolicy.Request) -> None:
        """Raises Refusal unless the node is active, nothing else is being swapped and the request makes sense."""
        if not self.node.active:
            raise Refusal("state", "an active policy node", "it inactive", "Activate it first.")
        if self.job:
            raise Refusal("busy", "no other swap in progress", f"that of {self.job}", "Try again when it has ended.")
        if not 0.0 <= request.max_action_difference <= 2.0:
            found = f"{request.max_action_difference:g}"
            raise Refusal("actions", "max_action_difference of 0 (the node's parameter) to 2", found, "Ask for one in this range.")

    async def swap(self, request: LoadPolicy.Request, event: SwapEvent) -> str:
        """All gates in order, then the takeover or the shadow; what is measured goes into `event`. Raises Refusal."""
        if request.shadow and not request.path:
            return self.end_shadow("asked to")
        self.has_prepared = False
        try:
            store, loaded = await self.pass_gates(request, event)
            if request.shadow:
                return self.begin_shadow(loaded, event)
            return await self.take_over(Exchange(store, loaded, event, Future()))
        except Refusal:
            if self.has_prepared:
                self.restore_encoder()
            raise

    async def pass_gates(self, request: LoadPolicy.Request, event: SwapEvent) -> tuple[PolicyStore, LoadedPolicy]:
        """The store that may become the node's, and the policy of it that matters now."""
        node, running_store = self.node, self.node.store
        read = await self.until(self.worker.submit(read_checkpoints, running_store, request.path))
        gates = running_store
        if request.world_model:
            self.has_prepared = True
            answer = await self.ask_encoder(SwapWorldModel.Request.PREPARE, path=str(Path(request.world_model).absolute()))
            gates = PolicyStore(running_store.contract, answer.world_model_id, answer.feature_size)
        admitted = await self.until(self.worker.submit(lambda: [gates.admit(*one, request.skill) for one in read]))
        store = PolicyStore() if gates.world_model_id != running_store.world_model_id else running_store
        for one in admitted:
            store = store.replaced(one)
        loaded = self.choose(store, admitted)
        event.skill, event.checkpoint_id = loaded.skill, loaded.identity
        latents = self.latents
        if self.changes_both(store):
            await self.hear_candidate(store.world_model_id)
            latents = self.candidate_latents
        limit = 2.0 if request.shadow else request.max_action_difference or node.parameters["max_action_difference"]
        compared = [(one, running_store.policies.get(one.skill)) for one in admitted]
        job = self.worker.submit(measure, compared, *latents.choose(self.latents), self.budget_ms(), limit)
        event.latency_ms, event.action_difference = await self.until(job)
        return store, loaded

    def choose(self, store: PolicyStore, admitted: list[LoadedPolicy]) -> LoadedPolicy:
        """Of several new policies that of the running skill. Raises Refusal when that skill would be left without one."""
        running = self.node.running.skill if self.node.running is not None else ""
        if running and running not in store.policies:
            found = ", ".join(store.skills)
            raise Refusal("skill", f"a policy of '{running}', which is running", found, "Swap a folder that has one, or end the run.")
        return next((one for one in admitted if one.skill == running), admitted[0])

    async def take_over(self, exchange: Exchange) -> str:
        """Wait for the moment: the next chunk border of the skill, or the first latent of the new world model. Raises Refusal."""
        node, changes_both = self.node, self.changes_both(exchange.store)
        self.choose(exchange.store, [exchange.loaded])  # a run may have begun meanwhile
        self.armed, is_cold = exchange, node.running is None
        try:
            if changes_both:
                await self.ask_encoder(SwapWorldModel.Request.COMMIT, world_model_id=exchange.store.world_model_id, cold=is_cold)
            runs_it = node.running is not None and (changes_both or node.running.skill == exchange.loaded.skill)
            if not runs_it and not exchange.done.done():
                self.carry_out(exchange)
            late = Refusal("world_model", f"a latent of it within {FRAMES_LIMIT_S:g} s", "none", "/diagnostics of the encoder says why.")
            await self.until(exchange.done, FRAMES_LIMIT_S if changes_both else math.inf, late)
        finally:
            if self.armed is exchange:
                self.armed = None
        skills = f"; skills are now {', '.join(exchange.store.skills)}" if changes_both else ""
        return f"'{exchange.loaded.skill}' now runs {exchange.loaded.identity[:12]}{skills}"

    def carry_out(self, exchange: Exchange, latent: LatentState | None = None) -> None:
        """Make its store the node's. What ran before is kept for a rollback; `latent`: the first one that the new policy may answer."""
        node, event = self.node, exchange.event
        before = node.store.policies.get(exchange.loaded.skill)
        event.previous_id = before.identity if before else ""
        if self.changes_both(exchange.store):
            self.latents, self.candidate_latents = self.candidate_latents, self.latents
        is_rollback = event.event == SwapEvent.ROLLED_BACK
        self.previous, self.armed = None if is_rollback else node.store, None
        new = {one.identity for one in exchange.store.policies.values()} - {one.identity for one in node.store.policies.values()}
        length_s = node.parameters["probation_s"]
        budget_ms = max(self.budget_ms(), BUSY * float(np.median(node.inference_ms)) if node.inference_ms else 0.0)
        self.probation = Probation(frozenset(new), length_s, budget_ms) if new and length_s and not is_rollback else None
        node.store = exchange.store
        event.event = event.event or SwapEvent.TOOK_OVER
        self.record(event, latent)
        if self.shadow is not None and self.shadow.loaded.identity in new:
            self.end_shadow("it runs now")
        if node.running is not None and node.running.skill not in node.store.policies:
            node.finish(False, f"no policy of '{node.run.skill}' is left")
        if not exchange.done.done():
            exchange.done.set_result(None)

    # -- what the node tells -----------------------------------------------------------------------------------------------------------

    def hear_latent(self, message: LatentState) -> None:
        """Remember a warm latent; the first one of a new world model is the takeover of its policies."""
        armed = self.armed
        if armed is not None and self.changes_both(armed.store) and message.world_model_id == armed.store.world_model_id:
            self.carry_out(armed, message)
        if message.frames_since_reset >= message.warmup_frames and message.world_model_id == self.node.store.world_model_id:
            self.latents.add(message.world_model_id, to_ns(message.header.stamp), from_floats(message.feature).copy())

    def reach_border(self, message: LatentState) -> None:
        """The chunk is used up: an armed policy of the running skill takes over now."""
        armed = self.armed
        if armed is not None and not self.changes_both(armed.store) and armed.loaded.skill == self.node.run.skill:
            self.carry_out(armed, message)

    def end_run(self) -> None:
        """No chunk border will come any more."""
        if self.armed is not None and not self.changes_both(self.armed.store):
            self.carry_out(self.armed)

    def judge_chunk(self, loaded: LoadedPolicy, actions: np.ndarray, inference_ms: float) -> bool:
        """Whether this chunk, not yet published, ends the probation of its policy in a rollback."""
        if self.probation is None:
            return False
        reason = self.probation.judge_chunk(loaded.identity, actions, inference_ms, time.monotonic())
        return reason is not None and self.roll_back(reason)

    def compare(self, latent: LatentState, loaded: LoadedPolicy, actions: np.ndarray, noise: Tensor) -> None:
        """Show a published chunk to the shadow of its skill."""
        if self.shadow is not None and self.shadow.loaded.skill == loaded.skill:
            self.shadow.ask(latent, actions, noise, loaded.identity)

    def deactivate(self) -> None:
        """Give up what is under way; its caller learns why."""
        self.cancel(Refusal("state", "an active policy node", "that it was deactivated meanwhile", "Activate it and ask again."))

    def cleanup(self) -> None:
        """Let go of every model."""
        self.end_shadow("the node was cleaned up")
        self.forget()

    # -- waiting -----------------------------------------------------------------------------------------------------------------------

    async def until(self, future: Future, limit_s: float = math.inf, late: Refusal | None = None) -> object:
        """The result of `future`. Raises Refusal when it took too long (`late`) or the swap was cancelled, and what a job raised."""
        self.wait = Wait(Future(executor=self.node.executor), time.monotonic() + limit_s, late)
        over = self.wait.over
        future.add_done_callback(lambda done: over.done() or over.set_result(done.exception()))
        await over
        try:
            return future.result()
        except Refusal:
            raise
        except Exception as error:  # a strange checkpoint can make any library raise; the running policy must not suffer
            raise Refusal(
                "files", "a checkpoint that can be loaded and run", f"{type(error).__name__}: {error}", "Make it anew."
            ) from error

    def cancel(self, refusal: Refusal) -> None:
        """Give the swap in progress up, whatever it waits for."""
        self.armed = None
        if self.wait is not None and not self.wait.over.done():
            self.wait.over.set_exception(refusal)

    def watch(self) -> None:
        """Deadlines of the swap in progress and the end of a probation."""
        if self.wait is not None and time.monotonic() > self.wait.deadline_s:
            self.cancel(self.wait.late)
        if self.probation is not None and self.probation.is_over(time.monotonic()):
            self.probation = None
            self.node.publish_status()
            if self.previous is not None and self.changes_both(self.previous) and not self.job and self.shadow is None:
                self.tell_encoder(SwapWorldModel.Request.RELEASE)

    def budget_ms(self) -> float:
        """A lock-step world waits for every chunk."""
        return math.inf if self.node.parameters["mode"] == "lockstep" else self.node.parameters["latency_budget_ms"]

    # -- the encoder -------------------------------------------------------------------------------------------------------------------

    def changes_both(self, store: PolicyStore) -> bool:
        """Whether `store` needs another world model than the running one."""
        return store.world_model_id != self.node.store.world_model_id

    async def ask_encoder(self, operation: int, **fields: object) -> SwapWorldModel.Response:
        """Call the encoder. Its refusal, and its silence, are a Refusal here."""
        if not self.encoder.service_is_ready():
            raise Refusal("world_model", "the service encoder/world_model", "none", "Start the encoder.")
        if operation == SwapWorldModel.Request.PREPARE:
            self.candidate_latents.clear()
            if self.shadow is not None and self.shadow.loaded.world_model_id != self.node.store.world_model_id:
                self.end_shadow("another world model is prepared")
        late = Refusal("world_model", f"an answer of encoder/world_model within {ENCODER_LIMIT_S:g} s", "none", "Is the encoder alive?")
        call = self.encoder.call_async(SwapWorldModel.Request(operation=operation, **fields))
        answer = await self.until(call, ENCODER_LIMIT_S, late)
        if not answer.success:
            raise Refusal(answer.gate, answer.expected, answer.found, answer.message)
        return answer

    def tell_encoder(self, operation: int, **fields: object) -> None:
        """Call the encoder without waiting for what it says."""
        if self.encoder.service_is_ready():
            self.encoder.call_async(SwapWorldModel.Request(operation=operation, **fields))

    def restore_encoder(self) -> None:
        """A swap of both was refused, perhaps between the two commits: the encoder goes on with, or back to, what the policies read."""
        self.tell_encoder(SwapWorldModel.Request.COMMIT, world_model_id=self.node.store.world_model_id, cold=True)
        self.tell_encoder(SwapWorldModel.Request.RELEASE)

    async def hear_candidate(self, world_model_id: str) -> None:
        """Wait until the prepared world model has filtered real frames; a lock-step world at rest has none. Raises Refusal."""
        if self.node.parameters["mode"] == "lockstep" and self.node.running is None:
            return
        self.frames_heard = Future()
        expected = f"{CANDIDATE_FRAMES} frames filtered by {world_model_id[:16]} within {FRAMES_LIMIT_S:g} s"
        late = Refusal("world_model", expected, "fewer", "/diagnostics of the encoder says why.")
        await self.until(self.frames_heard, FRAMES_LIMIT_S, late)

    def take_candidate_latent(self, message: LatentState) -> None:
        """What the other world model believes about a frame."""
        if message.frames_since_reset < message.warmup_frames:
            return
        self.candidate_latents.add(message.world_model_id, to_ns(message.header.stamp), from_floats(message.feature).copy())
        if len(self.candidate_latents.features) >= CANDIDATE_FRAMES and not self.frames_heard.done():
            self.frames_heard.set_result(None)
        if self.shadow is not None:
            self.shadow.answer(message)

    # -- rollback ----------------------------------------------------------------------------------------------------------------------

    def take_controller_status(self, message: ControllerStatus) -> None:
        """A watchdog event during the probation rolls back; a state that was there before it is no event."""
        last, self.controller_state = self.controller_state, message.state
        begins = message.state in WATCHDOG_STATES and last not in (None, *WATCHDOG_STATES)
        probation = self.probation
        if begins and probation is not None and probation.begin_s is not None and not probation.is_over(time.monotonic()):
            self.roll_back(f"controller {message.state_name}: {message.reason}")

    def roll_back(self, reason: str) -> bool:
        """Put the previous policies back: now if the world model stayed, else as soon as the encoder follows. False: not possible now."""
        previous, node = self.previous, self.node
        if previous is None or (self.armed is not None and self.changes_both(self.armed.store)):
            return False
        self.cancel(Refusal("superseded", "no rollback meanwhile", f"one: {reason}", "Ask again."))
        self.probation = None
        changed = [one for skill, one in previous.policies.items() if node.store.policies.get(skill) is not one]
        running = node.running.skill if node.running is not None else ""
        loaded = next((one for one in changed if one.skill == running), (changed or list(previous.policies.values()))[0])
        event = SwapEvent(event=SwapEvent.ROLLED_BACK, skill=loaded.skill, checkpoint_id=loaded.identity, reason=reason)
        event.latency_ms = event.action_difference = NOT_MEASURED
        exchange = Exchange(previous, loaded, event, Future())
        if self.changes_both(previous):
            self.job = "a rollback"
            node.executor.create_task(self.roll_back_both, exchange, self.job)
            return False  # for now the chunk that was judged is the best there is
        self.carry_out(exchange)
        if node.run is not None:
            node.run.chunk_ns = None  # the previous policy answers the next latent, not the next border
        node.diagnostics.report("policy/load", WARN, f"rolled back: {reason}")
        node.publish_status()
        return True

    async def roll_back_both(self, exchange: Exchange, job: str) -> None:
        """Encoder and policy go back together. What cannot be undone ends the run, so that the arm holds."""
        try:
            await self.ask_encoder(SwapWorldModel.Request.PREPARE, world_model_id=exchange.store.world_model_id)
            await self.take_over(exchange)
            self.node.diagnostics.report("policy/load", WARN, f"rolled back: {exchange.event.reason}")
        except Refusal as refusal:
            self.node.diagnostics.report("policy/load", ERROR, f"cannot roll back: {refusal}")
            self.node.finish(False, f"{exchange.event.reason}; cannot roll back: {refusal}")
        finally:
            if self.job is job:
                self.job, self.wait = "", None
        self.node.publish_status()

    def roll_back_on_request(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Service policy/rollback: undo the last swap."""
        if not self.node.active or self.previous is None:
            response.message = "policy/rollback: expected an active node and a swap to undo, found none."
            return response
        identity, both = self.previous.world_model_id, self.changes_both(self.previous)
        if self.armed is not None and self.changes_both(self.armed.store):
            response.message = "policy/rollback: expected no exchange of world models under way, found one. Ask again in a moment."
            return response
        self.roll_back("policy/rollback was called")
        response.success = True
        response.message = f"going back to world model {identity[:12]} and its policies" if both else "rolled back"
        return response

    # -- shadow, history ---------------------------------------------------------------------------------------------------------------

    def begin_shadow(self, loaded: LoadedPolicy, event: SwapEvent) -> str:
        """Let `loaded` compute beside the running policy of its skill."""
        self.end_shadow("another one begins")
        self.shadow = Shadow(loaded, self.worker, self.shadow_publisher)
        event.event = SwapEvent.SHADOW_BEGAN
        self.record(event)
        return f"{loaded.identity[:12]} shadows '{loaded.skill}': topic policy/shadow"

    def end_shadow(self, why: str) -> str:
        """Forget the shadow, if there is one."""
        shadow, self.shadow = self.shadow, None
        if shadow is None:
            return "there was no shadow"
        shadow.ended = True
        if shadow.loaded.world_model_id != self.node.store.world_model_id:
            self.tell_encoder(SwapWorldModel.Request.RELEASE)
        event = SwapEvent(event=SwapEvent.SHADOW_ENDED, skill=shadow.loaded.skill, checkpoint_id=shadow.loaded.identity)
        event.latency_ms, event.action_difference = NOT_MEASURED, shadow.sum / shadow.chunks if shadow.chunks else NOT_MEASURED
        event.reason = f"{why}; {shadow.summarise()}"
        self.record(event)
        return event.reason

    def record(self, event: SwapEvent, latent: LatentState | None = None) -> None:
        """Add to the history, publish it."""
        if not self.node.configured:
            return
        event.header.stamp = latent.header.stamp if latent is not None else self.node.get_clock().now().to_msg()
        event.world_model_id = self.node.store.world_model_id
        running = self.find_running(event.skill)
        if event.event != SwapEvent.TOOK_OVER and event.event != SwapEvent.ROLLED_BACK:
            event.previous_id = running.identity if running else ""
        self.history.append(event)
        history = PolicyHistory(events=list(self.history))
        history.header.stamp = event.header.stamp
        self.history_publisher.publish(history)

    def find_running(self, skill: str) -> LoadedPolicy | None:
        """The node's policy of a skill."""
        return self.node.store.policies.get(skill) if self.node.configured else None


def read_checkpoints(store: PolicyStore, path: str) -> list[tuple[DiffusionPolicy, Checkpoint]]:
    """Gates `files` and `contract` on one checkpoint, or on every one in a folder. Raises Refusal."""
    folder = Path(path)
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return [store.read(path)]
    try:
        paths = list_checkpoints(folder)
    except DiwaError as error:
        raise Refusal("files", "a policy checkpoint, or a folder of them", str(error), "") from error
    return [store.read(one) for one in paths]


def measure(
    compared: list[tuple[LoadedPolicy, LoadedPolicy | None]], features: Tensor, running_features: Tensor, budget_ms: float, limit: float
) -> tuple[float, float]:
    """The gates on real latents, for pairs of a new policy and the running one of its skill; the worst latency and difference."""
    for new, _ in compared:
        check_statistics(new.policy, features)
    latency_ms = max(check_latency(new, budget_ms) for new, _ in compared)
    differences = [check_actions(running, new, running_features, features, limit) for new, running in compared if running is not None]
    return latency_ms, max(differences, default=NOT_MEASURED)
