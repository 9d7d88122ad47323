"""One thread per process: the tests' processes share two cores, and threads that wait for each other there wait long."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and inherited by every process a test starts
