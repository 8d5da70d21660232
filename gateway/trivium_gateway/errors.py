"""What a failure looks like on the wire: exception -> status, headers, OpenAI error body.

Owns the failures that only HTTP knows (size, media type, path, method) and the headers that tell a client whether to
try again. The classes that cross process borders, with their statuses and codes, live in `trivium.errors`.
"""

from __future__ import annotations

import msgspec

from trivium.errors import (
    ConfigurationError,
    EngineUnavailableError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    TriviumError,
)

Header = tuple[bytes, bytes]

RETRY_AFTER_S = 1
DRAINING = "draining"

_REASONS = {
    "suffix": "no model here fills gaps; what comes before the gap is the prompt",
    "functions": "use tools",
    "function_call": "use tools",
    "logits_processors": "use logit_bias or bad_words",
    "vllm_xargs": "nothing reads them",
}


class ContentTooLargeError(InvalidRequestError):
    """The request body is over the limit."""

    http_status = 413
    default_code = "content_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is not plain JSON."""

    http_status = 415
    default_code = "unsupported_media_type"


class NotFoundError(InvalidRequestError):
    """No such path."""

    http_status = 404
    default_code = "not_found"


class MethodNotAllowedError(InvalidRequestError):
    """The path exists, but not with this method. `allow` lists those it has."""

    http_status = 405
    default_code = "method_not_allowed"

    def __init__(self, *, allow: str) -> None:
        super().__init__(f"this path takes only {allow}")
        self.allow = allow


class RequestTimeoutError(InvalidRequestError):
    """The client took too long to send its request."""

    http_status = 408
    default_code = "request_timeout"


class RateLimitedError(OverloadedError):
    """The caller has sent more requests than it may; it may send the next one after `retry_after_s`."""

    default_code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClientDisconnectedError(Exception):
    """The client is gone: nobody is left to answer. Never leaves the gateway."""


def draining_error() -> EngineUnavailableError:
    """The answer to a request that arrives while the server finishes its last ones."""
    return EngineUnavailableError("the server is shutting down", code=DRAINING)


def shutdown_error() -> EngineUnavailableError:
    """The end of a request that ran longer than the server could wait for it."""
    return EngineUnavailableError("the server was shut down before the response was complete", code="server_shutdown")


def unsupported_parameter(param: str) -> InvalidRequestError:
    """A field that the protocol has and this server does not: refused, never ignored."""
    reason = _REASONS.get(param)
    text = f"{param} is not supported" + (f": {reason}" if reason else "")
    return InvalidRequestError(text, param=param, code="unsupported_parameter")


def client_error(error: Exception) -> TriviumError:
    """`error` if a client may see it, else an InternalError that says nothing."""
    if isinstance(error, TriviumError) and not isinstance(error, ConfigurationError):
        return error
    return InternalError("the server failed to process the request")


def error_body(error: TriviumError) -> bytes:
    """The OpenAI error body as JSON."""
    return msgspec.json.encode(error.body())


def error_headers(error: TriviumError) -> list[Header]:
    """Headers beside the body: authentication scheme, allowed methods, whether and when to try again.

    A 500 is not to be repeated: a request that broke the server once would break it three times, since the OpenAI
    clients repeat every 5xx unless told otherwise.
    """
    headers: list[Header] = []
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", error.allow.encode()))
    if error.http_status in (429, 503):
        seconds = error.retry_after_s if isinstance(error, RateLimitedError) else RETRY_AFTER_S
        headers.append((b"retry-after", str(seconds).encode()))
    if error.http_status == 500:
        headers.append((b"x-should-retry", b"false"))
    if error.code == DRAINING:
        headers.append((b"connection", b"close"))
    return headers


def relocated(error: InvalidRequestError, *, part: str, to: str) -> InvalidRequestError:
    """`error` with `part` at the start of its `param` (and in its message) replaced by `to`.

    The layers below speak of "prompt"; the client sent "prompt[3]" or "messages".
    """
    if error.param is None or not error.param.startswith(part) or error.param[len(part) :][:1] not in ("", "["):
        return error
    param = to + error.param[len(part) :]
    return type(error)(error.message.replace(error.param, param, 1), param=param, code=error.code)
