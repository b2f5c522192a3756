"""Ctrl-C between two steps instead of within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While entered, the first Ctrl-C is only noted in `asked`; a second one interrupts at once.

    Outside of the main thread, where Python allows no signal handlers, it does nothing; neither
    where the handler is that of a program around Python, which Python could not put back.
    """

    def __init__(self, enabled: bool) -> None:
        self.asked = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if self._enabled:
            self._before = signal.getsignal(signal.SIGINT)
        if self._before is not None:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
