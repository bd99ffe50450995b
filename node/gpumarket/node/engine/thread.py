"""The thread that owns a model. The event loop posts commands to it; it reports back by calling functions on the loop.

Invariant: commands run on the thread, in order, between two pieces of work; what `tell` is given runs on the loop, in order.
A piece of work must be bounded (one pass over the model): commands, cancellations among them, wait for it.
An exception that gets here is a bug; it ends the thread, and whoever waits for it is told.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

IDLE_SECONDS: Final = 30.0


class ModelThread:
    """`work` does one piece and says whether more is left; `idle` runs after half a minute without any.

    `broken` runs on the loop when either, or a command, raised: no further work will be done.
    """

    def __init__(self, name: str, work: Callable[[], bool], idle: Callable[[], None], broken: Callable[[Exception], None]) -> None:
        self._work, self._idle, self._broken = work, idle, broken
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        # A daemon thread: an interpreter that ends must not wait for a model.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether posted commands will run."""
        return self._thread.is_alive() and not self._closing

    def post(self, command: Callable[[], None]) -> None:
        """Run a command on the thread, before its next piece of work."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def tell(self, function: Callable[..., None], *arguments: object) -> None:
        """From the thread: run a function on the loop. A loop that was closed under us has nobody left to tell."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    async def stop(self) -> None:
        """End the thread after its present piece of work."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        busy = False
        try:
            while self._apply_commands(busy):
                busy = self._work()
        except Exception as error:
            self._closing = True
            self.tell(self._broken, error)
            raise

    def _apply_commands(self, busy: bool) -> bool:
        """Run what was posted; wait when there is neither work nor command. False once closing."""
        with self._changed:
            while not (self._closing or busy or self._commands):
                if not self._changed.wait(IDLE_SECONDS):
                    self._idle()
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()
        return not self._closing
