"""The errors a caller can meet. Each knows its HTTP status and OpenAI's four keys; one handler in `app` renders them.

A message is written for the person who can mend the cause: what was wrong, where, and what to do instead.
"""

from __future__ import annotations


class GraftError(Exception):
    """Root of the tree.

    Args:
        message: one or two sentences for the caller.
        code: a stable machine-readable string.
        param: the request field at fault, dotted (`method.supervised.hyperparameters.n_epochs`), or None.
    """

    status_code = 500
    type = "server_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the answer."""
        return {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's envelope; all four keys are always there, because SDKs read them all."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(GraftError):
    """400: a value, a reference or a body that cannot be used."""

    status_code = 400
    type = "invalid_request_error"


class NotAuthenticated(GraftError):
    """401: no key, or one that is wrong, revoked or expired. The text never says which."""

    status_code = 401
    type = "authentication_error"

    def __init__(self) -> None:
        super().__init__(
            "Invalid API key. Send 'Authorization: Bearer <key>'; `graft keys create` makes a key.",
            code="invalid_api_key",
        )

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(GraftError):
    """403: the key is good, the action is not for it."""

    status_code = 403
    type = "permission_error"


class NotFound(GraftError):
    """404: missing, or another project's: the two cannot be told apart."""

    status_code = 404
    type = "invalid_request_error"


class Conflict(GraftError):
    """409: the object's state does not allow it, for good.

    OpenAI's SDKs retry a 409 twice; this one will not change, so the answer says not to.
    """

    status_code = 409
    type = "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class NotYet(Conflict):
    """409: the object's state does not allow it yet; the same request will succeed soon."""

    @property
    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "true", "Retry-After": "2"}


class TooLarge(GraftError):
    """413: the body is over its limit."""

    status_code = 413
    type = "invalid_request_error"


class UnsupportedMediaType(GraftError):
    """415: the body is not of a type this route reads."""

    status_code = 415
    type = "invalid_request_error"


class RangeNotSatisfiable(GraftError):
    """416: the part that was asked for is not in the content."""

    status_code = 416
    type = "invalid_request_error"

    def __init__(self, size: int) -> None:
        super().__init__(f"The range is not within the content's {size} bytes.", code="range_not_satisfiable")
        self.size = size

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Range": f"bytes */{self.size}"}


class IdempotencyMismatch(GraftError):
    """422: an Idempotency-Key was used again with another body."""

    status_code = 422
    type = "idempotency_error"


class Unavailable(GraftError):
    """503: the database, the object store or a tokenizer is away; the same request may succeed later."""

    status_code = 503
    type = "server_error"

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "2"}


class InsufficientStorage(GraftError):
    """507: a disk of the server is full. Trying again does not help until somebody has made room."""

    status_code = 507
    type = "server_error"

    @property
    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class ConfigurationError(GraftError, ValueError):
    """The operator's settings, catalogue or database cannot be used; the command line prints the message and stops."""
