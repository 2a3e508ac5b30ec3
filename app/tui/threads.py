"""Threads that read for the screens, and that nobody waits for when the app is left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Readers(ThreadPoolExecutor):
    """One thread a task, which ends with the process.

    asyncio and the interpreter wait at their end for the threads of an ordinary pool: whoever has
    just asked for the state of the machine, which takes seconds, would wait for it after `q`.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in a thread of its own."""
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001  (whoever waits for the future gets it)
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=work, name="reader", daemon=True).start()
        return future

    def shutdown(self, *arguments: Any, **options: Any) -> None:
        """Leave the threads alone."""
