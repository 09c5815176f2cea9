"""Bounds of the service that no flag changes."""

from __future__ import annotations

MOST_PARTS = 64
"""Parts of a multipart body."""

MOST_PART_HEADERS = 8
"""Headers of one part."""

MOST_PART_HEAD = 2048
"""Bytes of one part's headers."""

MOST_PIECES, PIECES_PER = 20_000, 16 * 2**20
"""Pieces in which a body may arrive, for every so many bytes that it may have."""

MOST_HEAD = 32 * 1024
"""Bytes of a request's line and headers."""

MOST_HEADERS = 128
"""Headers of a request."""

HEAD_SECONDS = 5.0
"""Time for the head of a request, from its first byte or the connection's opening."""

BODY_SECONDS = 20.0
"""Time for a request's body."""

DISCARD_SECONDS = 1.0
"""Time in which the rest of a refused body is read and thrown away, so that its client hears the refusal."""

MOST_DISCARDED = 256 * 2**20
"""Bytes of such a body."""

LINGER_SECONDS = 2.0
"""Time that a client may leave its answer unread when the service stops."""

MOST_CONNECTIONS = 2048
"""Open connections; one more is closed at once."""

MOST_JSON_DEPTH = 16
"""Brackets within brackets."""

MOST_JSON_BRACKETS = 100_000
"""Brackets in one body."""

EXPLANATIONS_WAITING = 8
"""Explanations that wait for the one being computed."""

MOST_TOP_K = 1000
"""Classes that an answer may list for one picture."""

NAME_LENGTH = 200
"""Letters of a picture's name that are kept."""

MOST_URL = 2000
"""Letters of a URL that is fetched."""

MOST_URLS = 16
"""URLs of one request."""

FETCH_SECONDS = 10.0
"""Time for the URLs of one request, from the first look-up to the last byte."""
