"""Ctrl-C and SIGTERM: whatever is begun is cleaned up, once, however often they come."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
ECHO_SECONDS = 0.5  # in which a second signal is the first one's: to a process, then to its group
CLEANING_SECONDS = 3.0  # in which no other signal disturbs the cleaning up after the first


class Interrupt:
    """Handler of both signals: KeyboardInterrupt, but not again while the first is cleaned up."""

    last = -math.inf  # moment of the first one, of the whole process

    def __call__(self, *_: Any) -> None:
        if time.monotonic() - Interrupt.last > CLEANING_SECONDS:
            Interrupt.last = time.monotonic()
            raise KeyboardInterrupt


def set_handlers(handler: Any) -> dict[signal.Signals, Any]:
    """Let both signals call `handler`; returns those before, for `restore_handlers`.

    Outside the main thread nothing is set, nor for Ctrl-C where the shell switched it off.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    kinds = [kind for kind in USUAL if signal.getsignal(kind) is not signal.SIG_IGN]
    return {kind: signal.signal(kind, handler) for kind in kinds}


def restore_handlers(before: dict[signal.Signals, Any]) -> None:
    """Undo `set_handlers`."""
    for kind, handler in before.items():
        signal.signal(kind, handler)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Both do nothing; a process that is started in here ignores them from its first moment."""
    before = set_handlers(signal.SIG_IGN)
    try:
        yield
    finally:
        restore_handlers(before)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Both raise KeyboardInterrupt, once; what follows it is left alone, to the program's end."""
    before: dict[signal.Signals, Any] = set_handlers(Interrupt())
    atexit.register(set_handlers, signal.SIG_IGN)  # Python's own end would die of the next one
    try:
        yield
    except KeyboardInterrupt:
        before = {}
        raise
    finally:
        restore_handlers({k: USUAL[k] if h is leave_unbegun else h for k, h in before.items()})


def leave_unbegun(*_: Any) -> None:
    """Handler while a script loads its libraries: there is nothing to clean up."""
    told = "interrupted before anything was begun; run the same command again\n"
    with contextlib.suppress(OSError):
        os.write(2, (b"\r" if os.isatty(2) else b"") + told.encode())  # over the bar
    os._exit(130)


@contextlib.contextmanager
def delayed_interrupt(usual: bool = False) -> Iterator[Callable[[], bool]]:
    """Both only raise a flag, so that the step under way is finished; yields its reader.

    The first one is told at once, the second one ends the process at once: by a thread, because
    Python's own handlers wait for a step's long calls into torch. Outside the main thread, or
    with `usual`, both keep their meaning.
    """
    if usual or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    read_end, write_end = socket.socketpair()
    write_end.setblocking(False)
    before = set_handlers(lambda *_: asked.set())
    wakeup = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch_signals, args=(read_end, tuple(before)), daemon=True)
    watcher.start()
    try:
        yield asked.is_set
    finally:
        if asked.is_set():
            Interrupt.last = time.monotonic()
        signal.set_wakeup_fd(wakeup)
        restore_handlers(before)
        write_end.close()  # ends the watcher
        watcher.join()
        read_end.close()


def _watch_signals(stream: socket.socket, numbers: tuple[int, ...]) -> None:
    """Tell of the first interrupt as it comes, end the process at the second."""
    first = None
    while received := stream.recv(1):
        if received[0] not in numbers:
            continue
        if first is None:
            first = time.monotonic()
            _tell("\nfinishing this step; Ctrl-C again stops at once")
        elif time.monotonic() - first > ECHO_SECONDS:
            _tell("stopped at once; run again with --resume")
            os._exit(130)


def _tell(line: str) -> None:
    """A line on standard error, if anybody still reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
