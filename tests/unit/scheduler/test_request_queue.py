from toy import make_request
from trivium.scheduler.request import Request
from trivium.scheduler.request_queue import RequestQueue


def request(key: int, *, tenant: str = "", priority: int = 0, max_tokens: int = 10) -> Request:
    made = make_request(key, max_tokens=max_tokens)
    made.tenant, made.priority = tenant, priority
    return made


def drain(queue: RequestQueue) -> list[int]:
    keys = []
    while queue:
        queue.check_invariants()
        taken = queue.peek()
        queue.take(taken)
        keys.append(taken.key)
    return keys


def filled(*requests: Request) -> RequestQueue:
    queue = RequestQueue()
    for item in requests:
        queue.push(item)
    return queue


def test_one_tenant_is_served_first_come_first_served() -> None:
    assert drain(filled(*(request(key, max_tokens=100 - key) for key in range(1, 9)))) == list(range(1, 9))


def test_a_lower_priority_number_goes_first() -> None:
    assert drain(filled(request(1), request(2, priority=5), request(3, priority=-1), request(4))) == [3, 1, 4, 2]


def test_a_tenant_with_many_requests_does_not_hold_up_another() -> None:
    many = [request(key, tenant="a") for key in range(1, 11)]
    few = [request(key, tenant="b") for key in (11, 12)]
    order = drain(filled(*many, *few))
    assert order.index(11) <= 2 and order.index(12) <= 4


def test_tenants_share_by_tokens_not_by_requests() -> None:
    large = [request(key, tenant="a", max_tokens=97) for key in range(1, 5)]  # 100 tokens each
    small = [request(key, tenant="b", max_tokens=17) for key in range(5, 25)]  # 20 tokens each
    first = drain(filled(*large, *small))[:12]
    assert sum(key >= 5 for key in first) == 10


def test_a_tenant_cannot_save_up_a_right_to_go_first() -> None:
    queue = filled(*(request(key, tenant="a") for key in range(1, 6)))
    for _ in range(4):
        queue.take(queue.peek())
    queue.push(request(9, tenant="late"))
    queue.push(request(10, tenant="late"))
    assert drain(queue)[0] in (5, 9)


def test_a_preempted_request_goes_back_to_its_place() -> None:
    first, second, third = request(1), request(2), request(3)
    queue = filled(first, second, third)
    queue.take(first)
    queue.push(first)
    assert drain(queue) == [1, 2, 3]


def test_a_removed_request_is_not_served() -> None:
    first, second = request(1), request(2)
    queue = filled(first, second)
    queue.remove(first)
    queue.forget(first)
    assert drain(queue) == [2]


def test_siblings_go_right_behind_their_leader() -> None:
    leader, other, sibling = request(1), request(2), request(3)
    queue = filled(leader, other)
    queue.take(leader)
    queue.push(sibling, place_of=leader)
    assert drain(queue) == [3, 2]
