"""The routes: what a request must be, and what it is answered with."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, MutableMapping
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import vitrail
from vitrail.errors import UserError
from vitrail.jobs.serve import DecodedPicture, ExplainRequest, Served
from vitrail.serve import body, open_inference, schema, settings
from vitrail.serve.admission import Ticket
from vitrail.serve.backend import Backend, Version
from vitrail.serve.gate import Gate, refuse
from vitrail.serve.metrics import Metrics
from vitrail.serve.refusals import Refusal

PAGE_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
PAGE_NAME = re.compile(r"[a-z][a-z0-9-]{0,40}\.(html|css|js|svg)")


def make_app(backend: Backend, metrics: Metrics, token: str = "", hosts: tuple[str, ...] = ()) -> Gate:
    """The application over a backend, behind its gate."""
    app = FastAPI(
        title="vitrail",
        version=vitrail.__version__,
        description=schema.ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    handlers = Handlers(backend)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(Exception, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    add = app.add_api_route
    add("/health", handlers.ready, response_class=Response, include_in_schema=False)  # where many look first
    add("/health/live", handlers.live, response_class=Response, **schema.LIVE)
    add("/health/ready", handlers.ready, response_class=Response, **schema.READY)
    add(
        "/metrics", lambda: Response(metrics.text(), media_type="text/plain; version=0.0.4"), **schema.METRICS
    )
    add("/models", handlers.models, response_class=Response, **schema.MODELS)
    add("/predict", handlers.predict, methods=["POST"], response_class=Response, **schema.PREDICT)
    if backend.run.explain:
        add("/explain", handlers.explain, methods=["POST"], response_class=Response, **schema.EXPLAIN)
        add("/story", handlers.story, methods=["POST"], response_class=Response, **schema.STORY)
    open_inference.add_routes(app, handlers)
    if backend.run.page:
        add("/", lambda: _static("index.html"), include_in_schema=False)
    add("/page/{name}", _static, include_in_schema=False)
    add("/docs", lambda: _static("docs.html"), include_in_schema=False)
    return Gate(app, metrics, token, hosts, lambda: backend.draining, handlers.early)


class Handlers:
    """What the routes do."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def early(self, scope: MutableMapping[str, Any]) -> None:
        """Refuse the commonest request before anything is done for it. Raises Refusal."""
        if (
            scope["path"] == "/predict"
            and scope["method"] == "POST"
            and b"model" not in scope["query_string"]
        ):
            scope["state"]["route"] = "/predict"
            declared = body.declared_length(
                scope["state"]["headers"], self.backend.run.body_megabytes * 2**20
            )
            self.backend.slot(None).admission.room(1, declared or 0)

    async def live(self) -> Response:
        """Whether the process makes progress."""
        if not self.backend.alive():
            raise Refusal("not_ready", retry_after=5)
        return answer({"live": True})

    async def ready(self) -> Response:
        """Whether requests are taken: every model is loaded and warm, and the service is not stopping."""
        if self.backend.draining or not self.backend.ready:
            raise Refusal("draining" if self.backend.draining else "not_ready", retry_after=5)
        return answer({"ready": True})

    async def models(self) -> Response:
        """The models that answer, and how many pictures are with each."""
        about = [
            {**slot.version.served.about(), "inside": slot.admission.images}
            for slot in self.backend.slots.values()
        ]
        return answer({"models": about, "explain": self.backend.run.explain})

    async def predict(self, request: Request) -> Response:
        """What is in the pictures of a request."""
        query = request.query_params
        top_k = number(query, "top_k", 5, 1, settings.MOST_TOP_K)
        mask = flag(query, "mask")
        deadline = self.deadline(query)

        async def work(version: Version, pictures: list[tuple[str, bytes]]) -> dict[str, Any]:
            found = await self.look(version, pictures, deadline)
            served = version.served
            good = [(name, row) for (name, _), row in zip(pictures, found, strict=True) if _is_row(row)]
            records = iter(
                served.records([row for _, row in good], [name for name, _ in good], top_k, mask)
                if good
                else []
            )
            results = []
            for (name, _), row in zip(pictures, found, strict=True):
                outcome = row.code if isinstance(row, Refusal) else "answered"
                self.backend.metrics.images.labels(served.name, outcome).inc()
                results.append(next(records) if _is_row(row) else failed(served, name, row))
            if not good:
                raise next(row for row in found if isinstance(row, Refusal))
            return {"model": served.name, "version": served.version, "results": results}

        return await self.with_pictures(request, work)

    async def explain(self, request: Request) -> Response:
        """Where the model looked, by one method and for one class."""
        query = request.query_params
        asked = ExplainRequest(
            method=word(query, "method") or "auto",
            target=target(query),
            score=flag(query, "score"),
            options=options(query),
        )

        async def work(version: Version, pictures: list[tuple[str, bytes]]) -> dict[str, Any]:
            seen = await self.seen(version, pictures[0], self.deadline(query))
            try:
                found = await self.backend.explain(lambda: version.served.explain(seen, asked))
            except UserError:
                raise Refusal("cannot_explain") from None
            return {**found, "model": version.served.name, "version": version.served.version}

        return await self.with_pictures(request, work, most=1)

    async def story(self, request: Request) -> Response:
        """Everything that the page shows of one picture's way through the network."""
        query = request.query_params
        top_k = number(query, "top_k", 5, 1, 100)

        async def work(version: Version, pictures: list[tuple[str, bytes]]) -> dict[str, Any]:
            seen = await self.seen(version, pictures[0], self.deadline(query))
            try:
                found: dict[str, Any] = await self.backend.explain(lambda: version.served.story(seen, top_k))
            except UserError:
                raise Refusal("cannot_explain") from None
            return found

        return await self.with_pictures(request, work, most=1)

    def deadline(self, query: Mapping[str, str]) -> float:
        """When the request's time is up, by the monotonic clock; clients may shorten it."""
        most = self.backend.run.deadline
        wanted = number(query, "deadline_ms", round(1000 * most), 1, 10**9)
        return time.monotonic() + min(most, wanted / 1000)

    async def with_pictures(
        self,
        request: Request,
        work: Any,
        most: int | None = None,
    ) -> Response:
        """Let a request in, read its pictures, and answer with what `work` makes of them."""
        headers = request.scope["state"]["headers"]
        slot = self.backend.slot(request.query_params.get("model"))
        largest = self.backend.run.body_megabytes * 2**20
        declared = body.declared_length(headers, largest)
        ticket = slot.admission.enter(1, declared or 0)
        state = request.scope["state"]
        state.update(admitted=True, model=slot.name)
        self.backend.metrics.admitted.inc()
        try:
            data = await body.read(request.receive, largest, declared, ticket)
            pictures = await self.pictures_in(headers, data, ticket)
            if len(pictures) > min(most or settings.MOST_PARTS, slot.admission.most_images):
                raise Refusal("too_many_pictures")
            size = max(len(data), sum(len(picture) for _, picture in pictures))
            ticket.resize(len(pictures), size)
            state.update(images=len(pictures), bytes=size)
            with slot.version as version:
                state.update(version=version.served.version)
                found = await body.unless_left(request.receive, work(version, pictures))
                return answer(found, version)
        finally:
            ticket.release()

    async def pictures_in(
        self, headers: Mapping[str, str], data: bytes, ticket: Ticket
    ) -> list[tuple[str, bytes]]:
        """Names and bytes of the pictures of a request, those fetched for it among them."""
        fetcher = self.backend.fetcher
        if body.media_type(headers)[0] != "application/json" or body.looks_like_picture(data):
            return pictures_in(headers, data)
        urls = urls_in(data)
        if not fetcher.allowed:
            raise Refusal("not_fetching")
        ticket.resize(len(urls), len(data))
        most = self.backend.run.body_megabytes * 2**20
        found: list[tuple[str, bytes]] = []
        held = 0

        def grown(size: int) -> None:
            ticket.resize(len(urls), held + size)

        begun = time.monotonic()
        try:
            async with asyncio.timeout(settings.FETCH_SECONDS):
                for url in urls:  # one after the other, and all together no larger than one body
                    picture = await fetcher.fetch(url, most - held, grown)
                    held += len(picture)
                    found.append((body.plain_name(url), picture))
        except TimeoutError:
            raise Refusal("not_fetched") from None
        self.backend.metrics.observe("fetch", time.monotonic() - begun)
        return found

    async def look(self, version: Version, pictures: list[tuple[str, bytes]], deadline: float) -> list[Any]:
        """What the model computes of every picture, or the Refusal that says why it does not."""

        async def one(name: str, data: bytes) -> Any:
            try:
                seen = await self.decoded(version, name, data, deadline)
                if version.served.too_large(seen.size):
                    raise Refusal("picture_too_large")
                return await version.batcher.submit(seen, deadline)
            except Refusal as refusal:
                return refusal

        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                if len(pictures) == 1:
                    return [await one(*pictures[0])]
                return await asyncio.gather(*(one(name, data) for name, data in pictures))
        except TimeoutError:
            raise Refusal("deadline") from None

    async def decoded(
        self, version: Version, name: str, data: bytes, deadline: float, shown: bool = False
    ) -> DecodedPicture:
        """One picture as the network sees it."""
        if not data:
            raise Refusal("no_picture")
        if not body.looks_like_picture(data):
            raise Refusal("wrong_format")
        return await self.backend.decoders.decode(
            data, version.served.preprocessing, name=name, deadline=deadline, shown=shown
        )

    async def seen(self, version: Version, picture: tuple[str, bytes], deadline: float) -> DecodedPicture:
        """One picture for an explanation: as the network sees it, and to draw on."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await self.decoded(version, *picture, deadline, shown=True)
        except TimeoutError:
            raise Refusal("deadline") from None


def pictures_in(headers: Mapping[str, str], data: bytes) -> list[tuple[str, bytes]]:
    """Names and bytes of the pictures in a body: the body itself, or the files and `image` fields of a form."""
    kind, boundary = body.media_type(headers)
    if kind != "multipart/form-data":
        if not data:
            raise Refusal("no_picture")
        return [("image 0", data)]
    parts = [part for part in body.multipart(data, boundary) if part.filename or part.field == "image"]
    if not parts:
        raise Refusal("no_picture")
    return [(part.filename or f"image {place}", part.data) for place, part in enumerate(parts)]


def urls_in(data: bytes) -> list[str]:
    """The URLs of a JSON body: {"url": TEXT} or {"urls": [TEXT, ...]}. Raises Refusal."""
    order = body.read_json(data)
    urls = [order["url"]] if isinstance(order, dict) and "url" in order else []
    if isinstance(order, dict) and isinstance(order.get("urls"), list):
        urls += order["urls"]
    if not urls or not all(isinstance(url, str) for url in urls):
        raise Refusal("bad_json")
    if len(urls) > settings.MOST_URLS:
        raise Refusal("too_many_pictures")
    return urls


def answer(value: Any, version: Version | None = None, status: int = 200) -> Response:
    """A value as JSON, with the version of the model that it comes from."""
    headers = {"cache-control": "no-store"}
    if version is not None:
        headers |= {"x-model": version.served.name, "x-model-version": version.served.version}
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, status, headers, media_type="application/json")


def failed(served: Served, name: str, refusal: Any) -> dict[str, Any]:
    """The record of a picture that could not be answered, among others that could."""
    return {**served.failure(name, refusal.text), "code": refusal.code}


def number(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query. Raises Refusal where it is none, or out of range."""
    text = query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,12}", text) or not low <= int(text) <= high:
        raise Refusal("bad_parameter")
    return int(text)


def word(query: Mapping[str, str], name: str) -> str | None:
    """A short text of the query, or None."""
    text = query.get(name)
    if text is not None and (len(text) > settings.NAME_LENGTH or not text.isprintable()):
        raise Refusal("bad_parameter")
    return text or None


def flag(query: Mapping[str, str], name: str) -> bool:
    """Yes or no."""
    text = query.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise Refusal("bad_parameter")
    return text in ("true", "1")


def target(query: Mapping[str, str]) -> str | int | None:
    """The class that a query asks about: `index`, its number, or `class`, a name first and else a number; or None."""
    if "index" not in query:
        return word(query, "class")
    if "class" in query:
        raise Refusal("bad_parameter")
    return number(query, "index", 0, 0, 10**6)


def options(query: Mapping[str, str]) -> dict[str, Any]:
    """The options of a method that the query names."""
    found: dict[str, Any] = {}
    for name, low, high in (("layer", -1000, 1000), ("head", 0, 1000), ("steps", 1, 128), ("box", 0, 1000)):
        if name in query:
            found[name] = number(query, name, 0, low, high)
    token = word(query, "token")
    return found if token is None else {**found, "token": token}


def _is_row(row: Any) -> bool:
    return not isinstance(row, Refusal)


def _static(name: str) -> Response:
    """A file of the page."""
    if not PAGE_NAME.fullmatch(name):
        raise Refusal("no_such_route")
    file = resources.files("vitrail.serve").joinpath("page", name)
    if not file.is_file():
        raise Refusal("no_such_route")
    kind = PAGE_TYPES[name.rpartition(".")[2]]
    return Response(file.read_bytes(), headers={"cache-control": "no-cache"}, media_type=kind)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, body.Left):
        raise error  # nobody is there to be answered; the gate counts it
    return _Refused(error if isinstance(error, Refusal) else Refusal("failed"))


async def _http(request: Request, error: Exception) -> Response:
    status, headers = getattr(error, "status_code", 400), getattr(error, "headers", None) or {}
    methods = set(headers.get("Allow", "").replace(",", " ").split())
    methods |= {"HEAD"} if "GET" in methods else set()
    code = {404: "no_such_route", 405: "wrong_method"}.get(status, "bad_request")
    return _Refused(Refusal(code, allow=", ".join(sorted(methods))))


async def _invalid(request: Request, error: Exception) -> Response:
    return _Refused(Refusal("bad_parameter"))


class _Refused(Response):
    """A refusal as a response; one place writes them all."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(status_code=refusal.status)
        self.refusal = refusal

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await refuse(receive, send, self.refusal, scope["state"])
