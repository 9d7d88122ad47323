"""Threads that must be on time."""

from __future__ import annotations

import os


def come_first(priority: int) -> bool:
    """Put the calling thread, and those it starts, before everything that has no real-time priority (SCHED_FIFO, 1 to 99).

    Returns whether the system allows it: `ulimit -r` says up to what.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except PermissionError:
        return False
    return True
