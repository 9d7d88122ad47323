"""One thread beside a node's executor, for work that must not delay the node: loading, warm-up, comparing."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from rclpy.node import Node
from rclpy.task import Future

from diwa_core.realtime import come_first

NICENESS = 10


def step_back() -> None:
    """Leave the cores to the graph: this holds for the calling thread alone.

    Beside a node with a real-time priority it keeps the lowest of those: while it holds Python's lock, the node waits for it.
    """
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        come_first(1)
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


class Worker:
    """Runs jobs one after the other. Their futures are resolved in the executor's thread, so that callbacks need no locks.

    One thread for the whole life of the node: memory that it frees is reused by its next job.
    """

    def __init__(self, node: Node) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="worker", initializer=step_back)
        self.finished: SimpleQueue = SimpleQueue()
        self.guard = node.create_guard_condition(self._deliver)

    def submit(self, job: Callable, *arguments: object) -> Future:
        """Begin `job` as soon as the thread is free. A future that is already done when the job ends stays as it is."""
        future = Future()
        self.pool.submit(self._work, future, job, arguments)
        return future

    def close(self) -> None:
        """Forget jobs that have not begun; the one under way ends by itself."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _work(self, future: Future, job: Callable, arguments: tuple) -> None:
        try:
            self.finished.put((future.set_result, future, job(*arguments)))
        except Exception as error:  # whatever a strange checkpoint makes a library raise belongs to whoever awaits the job
            self.finished.put((future.set_exception, future, error))
        self.guard.trigger()

    def _deliver(self) -> None:
        while not self.finished.empty():
            resolve, future, outcome = self.finished.get()
            if not future.done():
                resolve(outcome)
