"""Exceptions that cross a seam, and the one table that maps them to gRPC, HTTP and the OpenAI error body.

Owns the vocabulary of failure. Knows nothing of any transport: `status` is the *name* of a gRPC status code, so that
this module imports the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, TypeVar


class TriviumError(Exception):
    """Base of every error that a client may see.

    `message` is shown to clients as it is: it never holds paths, addresses or stack traces.
    `param` names the offending request field, `code` is the machine-readable reason.
    """

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    error_type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error body."""
        return {"error": {"message": self.message, "type": self.error_type, "param": self.param, "code": self.code}}


class InvalidRequestError(TriviumError, ValueError):
    """The request can never succeed as it is written; `param` and the value are in the message."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    error_type = "invalid_request_error"
    default_code = "invalid_value"


InvalidT = TypeVar("InvalidT", bound=InvalidRequestError)


def rename_params(error: InvalidT, names: Mapping[str, str]) -> InvalidT:
    """`error` in the words of the user: `names` has, for our names of parameters, those that were given."""
    if not names:
        return error
    message = re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[0]], error.message)
    param = names.get(error.param or "", error.param)
    return type(error)(message, param=param, code=error.code)


class ContextLengthError(InvalidRequestError):
    """Prompt and requested output do not fit the model's context."""

    grpc_status = "OUT_OF_RANGE"
    default_code = "context_length_exceeded"


class AuthenticationError(TriviumError):
    """The API key is missing or wrong."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    error_type = "authentication_error"
    default_code = "invalid_api_key"


class ModelNotFoundError(TriviumError):
    """No served model has the requested name."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    error_type = "invalid_request_error"
    default_code = "model_not_found"


class OverloadedError(TriviumError):
    """A bounded queue is full; the client may retry."""

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    error_type = "rate_limit_error"
    default_code = "queue_full"


class EngineUnavailableError(TriviumError):
    """A service behind the gateway is starting, draining or gone; the client may retry."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    error_type = "server_error"
    default_code = "engine_unavailable"


class InternalError(TriviumError):
    """A bug or a lost device. The text says that it failed, the log says why."""


class ConfigurationError(TriviumError, ValueError):
    """The server cannot start with these settings: one clear line for the operator, never sent to a client."""

    default_code = "configuration_error"


CLIENT_ERRORS: tuple[type[TriviumError], ...] = (
    InvalidRequestError,
    ContextLengthError,
    AuthenticationError,
    ModelNotFoundError,
    OverloadedError,
    EngineUnavailableError,
    InternalError,
)

# gRPC status name -> the class that a receiving process raises again
_BY_GRPC_STATUS: dict[str, type[TriviumError]] = {cls.grpc_status: cls for cls in CLIENT_ERRORS}


def error_from_status(status: str, message: str, *, param: str | None = None, code: str | None = None) -> TriviumError:
    """The exception that stands for a gRPC status received from another service."""
    cls = _BY_GRPC_STATUS.get(status, InternalError)
    return cls(message, param=param, code=code)
