"""Ctrl-C that ends within two seconds, whatever native code is running; a second one ends at once.

Rows are on the disk as soon as they are finished and whole files are replaced atomically, so ending
the process never costs a finished row. What this does not do: save the batch under way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading

PATIENCE_SECONDS = 1.5  # for Python to come back from a library call
MESSAGE = "\nInterrupted. Every finished row is on the disk; run the same command again to go on."


def watch() -> None:
    """Start the watch: KeyboardInterrupt is raised as usual, and the process ends if that does not get through."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(
        writer.fileno(), warn_on_full_buffer=False
    )  # written by C, so no library call can delay it

    def guard() -> None:
        """Count the Ctrl-C that arrive: the first starts a timer, the second ends the process."""
        hits = 0
        while hits < 2:
            hits += reader.recv(16).count(signal.SIGINT)
            if hits == 1:
                threading.Timer(PATIENCE_SECONDS, leave).start()
        leave()

    threading.Thread(target=guard, name="interrupts", daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watch.sockets = (reader, writer)  # type: ignore[attr-defined]  # kept open for the process's life


def leave() -> None:
    """Say how to go on, and end with 130 without waiting for libraries to tidy up."""
    print(MESSAGE, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(130)
