"""Become a command that receives SIGTERM when its parent dies: `python -S -E tether.py PARENT_PID COMMAND...` (Linux).

A process of its own between fork and exec, because Python code run there by `preexec_fn` can deadlock in a threaded parent.
With BACKGROUND set in the environment the command, and all it tethers itself, gets what others leave of the processor.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
BACKGROUND = "DIWA_BACKGROUND"  # environment variable
NICEST = 19


def main() -> None:
    """Ask the kernel for the signal, undo ignored signals inherited from a background shell, and exec."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the parent ended before the child began")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if BACKGROUND in os.environ:
        step_aside()
    os.execvp(command[0], command)


def step_aside() -> None:
    """Run only when nothing else wants the processor: a control loop on the same cores must not notice.

    Where the kernel groups processes by session (autogroup), niceness counts within a group only, so the group steps aside as well.
    """
    os.nice(NICEST)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        with open("/proc/self/autogroup", "w") as group:
            group.write(str(NICEST))
    except OSError:
        pass  # a kernel without such groups


if __name__ == "__main__":
    main()
