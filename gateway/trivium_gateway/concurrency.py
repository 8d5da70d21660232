"""Running the parts of one request side by side, so that the first failure ends all of them and is raised as itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def run_all(
    parts: Iterable[Coroutine[Any, Any, T]], *, beside: Iterable[Coroutine[Any, Any, None]] = ()
) -> list[T]:
    """Results of `parts`, in their order.

    `beside` are watchers: they run meanwhile and are cancelled when all parts are done. If a part or a watcher
    raises, the others are cancelled and awaited first.
    """
    try:
        async with asyncio.TaskGroup() as group:
            watchers = [group.create_task(watcher) for watcher in beside]
            tasks = [group.create_task(part) for part in parts]
            for task in tasks:
                await task
            for watcher in watchers:
                watcher.cancel()
    except BaseExceptionGroup as failures:
        raise _first_leaf(failures) from None
    return [task.result() for task in tasks]


def _first_leaf(failure: BaseException) -> BaseException:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
