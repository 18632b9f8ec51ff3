"""Ctrl-C ends the process within two seconds, whatever native code runs; a second one at once.

Rows are on the disk as soon as they are finished and whole files are replaced atomically, so ending
the process never costs a finished row. What this does not do: save the batch in progress.
"""

import contextlib
import os
import signal
import socket
import sys
import threading

PATIENCE_SECONDS = 1.5  # for Python to come back from a library call
MESSAGE = "\nInterrupted. Finished rows are saved; run the same command again to resume."


def watch() -> None:
    """Raise KeyboardInterrupt on Ctrl-C, and end the process if that does not get through."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def count_interrupts() -> None:
        """Wait for Ctrl-C: the first starts a timer, the second ends the process."""
        interrupts = 0
        while interrupts < 2:
            interrupts += reader.recv(16).count(signal.SIGINT)
            if interrupts == 1:
                threading.Timer(PATIENCE_SECONDS, leave).start()
        leave()

    # The signal's number is written to the socket by C, so no library call can delay it.
    # detach() leaves the socket open for the life of the process.
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    threading.Thread(target=count_interrupts, name="interrupts", daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def leave() -> None:
    """Print how to go on, and end with 130 without waiting for libraries to tidy up."""
    print(MESSAGE, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(130)
