"""Requests that wait for a slot: first come, first served; preempted ones go back to the front."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from trivium.scheduler.request import Request


class RequestQueue:
    """Owner: the Scheduler. Every operation is O(1), also removal from the middle."""

    def __init__(self) -> None:
        self._requests: OrderedDict[int, Request] = OrderedDict()  # key -> Request

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def __contains__(self, request: Request) -> bool:
        return request.key in self._requests

    def push(self, request: Request) -> None:
        self._requests[request.key] = request

    def push_front(self, request: Request) -> None:
        self._requests[request.key] = request
        self._requests.move_to_end(request.key, last=False)

    def peek(self) -> Request:
        """The request that is next; the queue must not be empty."""
        return next(iter(self._requests.values()))

    def remove(self, request: Request) -> None:
        del self._requests[request.key]
