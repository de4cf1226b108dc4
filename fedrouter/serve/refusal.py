"""What the hook says no with: one error, in OpenAI's shape, on every path."""

from fedrouter.serve.paths import MESSAGES

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


class Refusal(Exception):  # noqa: N818 - an answer, not a failure
    """A request that is answered here with an error.

    Parameters
    ----------
    code : the status by default.
    retry_s : seconds after which the client may try again, where that makes sense.
    headers : more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ):
        super().__init__(message)
        self.status = status
        self.headers = [*headers, *([] if retry_s is None else [(b"retry-after", str(retry_s).encode())])]
        kind = ERROR_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        self._error = {"message": message, "type": kind, "param": param, "code": code or status}

    def payload(self, path: str = "") -> dict[str, object]:
        """Return the answer's body; on Anthropic's paths its clients can read it too."""
        return {**({"type": "error"} if path.startswith(MESSAGES) else {}), "error": self._error}
