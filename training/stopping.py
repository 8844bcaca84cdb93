"""A polite end: the first SIGTERM or SIGINT asks the run to stop, the second ends it at once."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, `received` is the number of the signal that came, or None."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            signal.raise_signal(number)
        self.received = number

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
