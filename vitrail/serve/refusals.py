"""Everything that the service may say instead of an answer: constant texts, each with a code and a status.

Nothing that a library, a path or a memory address could have written is ever in an answer; the log has it.
"""

from __future__ import annotations

from typing import Any

TABLE: dict[str, tuple[int, str]] = {
    "bad_request": (400, "The request is not what this route takes; see /docs."),
    "bad_json": (400, "The body is not JSON of the form that this route takes; see /docs."),
    "bad_multipart": (400, "The multipart body is damaged, or has more parts or headers than are taken."),
    "bad_parameter": (400, "A parameter has a value that is not legal; see /docs."),
    "bad_tensor": (
        400,
        "The tensors are not those of this model: see its metadata for names, types and shapes.",
    ),
    "unauthorized": (401, "This service wants its bearer token."),
    "foreign_host": (403, "This service is not called by that name here."),
    "foreign_origin": (403, "Pages of other origins may not call this service."),
    "url_not_allowed": (403, "This service fetches no such URL."),
    "not_fetching": (
        403,
        "This service fetches no pictures by URL: send the picture itself, or have the service started with"
        " --fetch-from and the host that may be asked.",
    ),
    "no_such_route": (404, "There is no such route; see /docs."),
    "no_such_model": (404, "There is no model of that name; see /models."),
    "wrong_method": (405, "This route does not take that method; see /docs."),
    "slow_body": (408, "The body did not arrive in time."),
    "body_too_large": (413, "The body is larger than this service takes."),
    "picture_too_large": (413, "The picture has more pixels than this service decodes."),
    "too_many_pictures": (
        413,
        "There are more pictures in the request than one batch of this service holds.",
    ),
    "wrong_format": (415, "The picture is not JPEG, PNG or WebP."),
    "wrong_encoding": (415, "Compressed bodies are not taken."),
    "undecodable": (422, "The picture is damaged or cut off."),
    "costly": (422, "The picture takes more memory or time to decode than this service gives."),
    "not_fetched": (422, "The picture could not be fetched."),
    "no_picture": (
        422,
        "There is no picture in the request; in a form it is a file, or a field called image.",
    ),
    "cannot_explain": (422, "This model or class cannot be explained in that way; see /models for what can."),
    "header_too_large": (431, "The head of the request is larger than this service takes."),
    "failed": (500, "The service failed; its log says why."),
    "full": (503, "The service is full; try again later."),
    "draining": (503, "The service is stopping; try again later."),
    "decoder_lost": (503, "The process that decoded the picture was lost; try again."),
    "not_ready": (503, "The service is not ready."),
    "deadline": (504, "The request's time was up before it was answered."),
}
"""Code -> HTTP status and text."""


class Refusal(Exception):
    """One of TABLE, raised anywhere on the way and answered at the door."""

    def __init__(
        self, code: str, *, retry_after: int | None = None, close: bool = False, allow: str = ""
    ) -> None:
        self.code = code
        self.status, self.text = TABLE[code]
        self.retry_after = max(1, retry_after or 1) if self.status == 503 else None
        self.close = close
        """Whether the connection is of no use afterwards: the rest of the body is not worth reading."""
        self.allow = allow
        """The methods that the route takes, where the one that came is none of them."""
        super().__init__(code)

    def body(self) -> dict[str, Any]:
        """What the client is told."""
        return {"error": self.text, "code": self.code}
