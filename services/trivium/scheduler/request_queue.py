"""Requests that wait for a slot, in the order in which they get one.

Order: priority (lower first), then fair among tenants, then arrival. Fairness is start-time fair queueing (Goyal,
Vin and Cheng 1996): a request's tag is its tenant's last tag, or the tag of what was last taken if that is later,
plus its tokens. One tenant alone is served first come, first served. A preempted request keeps its place.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from trivium.scheduler.request import Request


@dataclass(frozen=True, slots=True, order=True)
class QueuePlace:
    """Where a request stands among all others; smaller goes first. No two are equal: they could preempt each other."""

    priority: int
    tag: int
    arrival: int
    key: int  # of the request: the choices of one arrive together


class RequestQueue:
    """Owner: the Scheduler. `push` and `take` are O(log n), `remove` leaves its heap entry behind and is O(1)."""

    def __init__(self) -> None:
        self._heap: list[tuple[QueuePlace, int]] = []  # (place, request key)
        self._waiting: dict[int, Request] = {}  # key -> Request
        self._places: dict[int, QueuePlace] = {}  # key -> place, from the first push to `forget`
        self._last_tags: dict[str, int] = {}  # tenant -> tag of its last request, where that is later than `_now`
        self._now = 0  # tag of the request that was taken last
        self._num_arrived = 0
        self.num_tokens = 0  # prompt tokens of all waiting requests

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting.values())

    def __contains__(self, request: Request) -> bool:
        return request.key in self._waiting

    def push(self, request: Request, *, place_of: Request | None = None) -> None:
        """Queue `request`: at the place that it had before, else at its own, else right behind `place_of`."""
        place = self._places.get(request.key)
        if place is None:
            place = self._new_place(request, place_of)
            self._places[request.key] = place
        self._waiting[request.key] = request
        self.num_tokens += len(request.prompt_token_ids)
        heapq.heappush(self._heap, (place, request.key))

    def peek(self) -> Request:
        """The request that is next; the queue must not be empty."""
        while self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
        return self._waiting[self._heap[0][1]]

    def take(self, request: Request) -> None:
        """Remove the request that `peek` gave: it runs."""
        self.remove(request)
        heapq.heappop(self._heap)
        self._now = max(self._now, self._places[request.key].tag)

    def remove(self, request: Request) -> None:
        del self._waiting[request.key]
        self.num_tokens -= len(request.prompt_token_ids)

    def place(self, request: Request) -> QueuePlace:
        """The place of a request that waits or runs."""
        return self._places[request.key]

    def forget(self, request: Request) -> None:
        """The request has ended and will not come back."""
        self._places.pop(request.key, None)
        if not self._places:  # idle: tags of long ago mean nothing
            self._heap.clear()
            self._last_tags.clear()
            self._now = 0

    def check_invariants(self) -> None:
        in_heap = {key for _, key in self._heap}
        assert self._waiting.keys() <= in_heap, "a waiting request is not in the heap"
        assert self._waiting.keys() <= self._places.keys(), "a waiting request has no place"
        total = sum(len(request.prompt_token_ids) for request in self._waiting.values())
        assert self.num_tokens == total, f"{self.num_tokens} tokens counted, {total} wait"

    def _new_place(self, request: Request, place_of: Request | None) -> QueuePlace:
        self._num_arrived += 1
        if place_of is not None and place_of.key in self._places:
            ahead = self._places[place_of.key]
            return QueuePlace(ahead.priority, ahead.tag, ahead.arrival, request.key)
        start = max(self._now, self._last_tags.get(request.tenant, 0))
        tag = start + len(request.prompt_token_ids) + len(request.encoder_token_ids) + request.max_tokens
        self._last_tags[request.tenant] = tag
        return QueuePlace(request.priority, tag, self._num_arrived, request.key)
