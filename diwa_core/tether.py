"""Become a command that receives SIGTERM when its parent dies: `python -S -E tether.py PARENT_PID COMMAND...` (Linux).

A process of its own between fork and exec, because Python code run there by `preexec_fn` can deadlock in a threaded parent.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for the signal, undo ignored signals inherited from a background shell, and exec."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the parent ended before the child began")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
