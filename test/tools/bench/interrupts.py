"""SIGINT and SIGTERM, which must not leave a process behind."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Turns the first signal into a KeyboardInterrupt, but not at any moment.

    One that comes between a process's start and the note that it has to be ended
    would leave it running.
    """

    def __init__(self) -> None:
        self._held = 0
        self._come = False

    def install(self) -> None:
        """Be the handler of the signals, also where a shell has them ignored."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Put off a KeyboardInterrupt until the end of this."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._come:
                self._raise()

    def _handle(self, _number: int, _frame: object) -> None:
        # The way out is short, and nothing may cut it shorter.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._come = True
        self._raise()

    def _raise(self) -> None:
        if not self._held:
            self._come = False
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()
