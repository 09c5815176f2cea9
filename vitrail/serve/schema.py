"""What the OpenAPI file says of each route: parameters, bodies, answers."""

from __future__ import annotations

from typing import Any

from vitrail.serve.refusals import TABLE

ABOUT = (
    "Vision Transformers, served as they were saved. Pictures are JPEG, PNG or WebP, as the body itself or as the"
    " files of a multipart form, whose other fields are passed over. Every refusal is JSON with a constant text and a"
    " code. HEAD is answered wherever GET is."
)

PICTURE = {"schema": {"type": "string", "format": "binary"}}


def _body(most: dict[str, int]) -> dict[str, Any]:
    """Pictures as the body itself, by URL, or as a form with at most so many (`maxItems`)."""
    return {
        "required": True,
        "content": {
            "image/jpeg": PICTURE,
            "image/png": PICTURE,
            "image/webp": PICTURE,
            "application/json": {
                "schema": {
                    "type": "object",
                    "description": "Only where the service was told to fetch from those hosts (--fetch-from).",
                    "properties": {
                        "url": {"type": "string"},
                        "urls": {"type": "array", "items": {"type": "string"}, **most},
                    },
                }
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, **most}
                    },
                    "required": ["image"],
                }
            },
        },
    }


NUMBER = {"type": ["number", "null"]}
RECORD = {
    "type": "object",
    "required": ["source", "error"],
    "description": "predictions of a classifier, detections of a detector, classes of a segmenter",
    "properties": {
        "source": {"type": "string"},
        "label": {"type": ["string", "null"]},
        "index": {"type": ["integer", "null"]},
        "score": NUMBER,
        "predictions": {"type": "array", "items": {"type": "object"}},
        "detections": {"type": "array", "items": {"type": "object"}},
        "classes": {"type": "array", "items": {"type": "object"}},
        "height": {"type": ["integer", "null"]},
        "width": {"type": ["integer", "null"]},
        "mask": {"type": "string", "description": "PNG of class numbers, base64"},
        "error": {"type": ["string", "null"]},
        "code": {"type": "string"},
    },
}
ERROR = {
    "type": "object",
    "required": ["error", "code"],
    "properties": {"error": {"type": "string"}, "code": {"type": "string"}},
}


def _query(name: str, about: str, **kind: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": about, "schema": kind}


MODEL = _query("model", "Name of a model; the first one by default.", type="string", maxLength=200)
DEADLINE = _query("deadline_ms", "Milliseconds until a 504.", type="integer", minimum=1, maximum=10**9)


def _json(about: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, with their codes."""
    told = {}
    for status in sorted({400, 401, 403, 405, 431, *statuses}):
        codes = ", ".join(code for code, (number, _) in TABLE.items() if number == status)
        told[status] = _json(codes, ERROR)
    return told  # type: ignore[return-value]


def _route(
    name: str,
    summary: str,
    schema: dict[str, Any],
    *,
    parameters: list[dict[str, Any]] | None = None,
    body: dict[str, Any] | None = None,
    refusals: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Keywords of FastAPI's add_api_route."""
    extra: dict[str, Any] = {"security": [{}, {"bearer": []}]}
    if parameters:
        extra["parameters"] = parameters
    if body:
        extra["requestBody"] = body
    return {
        "name": name,
        "operation_id": name,
        "summary": summary,
        "openapi_extra": extra,
        "responses": {200: _json("An answer.", schema), **_refusals(*refusals)},
    }


OBJECT = {"type": "object"}
IN_PICTURES = (404, 408, 413, 415, 422, 503, 504)

LIVE = _route("live", "Whether the process makes progress", OBJECT, refusals=(503,))
READY = _route("ready", "Whether requests are taken", OBJECT, refusals=(503,))
MODELS = _route("models", "The models, their classes and inputs", OBJECT)
METRICS = _route("metrics", "Counts and times for Prometheus", OBJECT)
METRICS["responses"][200] = {
    "description": "Text.",
    "content": {"text/plain": {"schema": {"type": "string"}}},
}

PREDICT = _route(
    "predict",
    "What is in pictures",
    {
        "type": "object",
        "required": ["model", "version", "results"],
        "properties": {
            "model": {"type": "string"},
            "version": {"type": "string"},
            "results": {"type": "array", "items": RECORD},
        },
    },
    parameters=[
        MODEL,
        _query("top_k", "Classes for each picture.", type="integer", minimum=1, maximum=1000, default=5),
        _query("mask", "Add the mask of a segmentation.", type="boolean", default=False),
        DEADLINE,
    ],
    body=_body({}),
    refusals=IN_PICTURES,
)

EXPLAIN = _route(
    "explain",
    "Where the model looked, and how far to trust that",
    OBJECT,
    parameters=[
        MODEL,
        _query("method", "auto, or one of the model's methods.", type="string", maxLength=200),
        _query(
            "class",
            "Class by name, or by number where no class has that name; the predicted one by default.",
            type="string",
            maxLength=200,
        ),
        _query(
            "index", "Class by number alone, in place of class.", type="integer", minimum=0, maximum=10**6
        ),
        _query("score", "Measure deletion and insertion.", type="boolean", default=False),
        _query("layer", "Layer of attention or gradcam.", type="integer", minimum=-1000, maximum=1000),
        _query("head", "Head of attention.", type="integer", minimum=0, maximum=1000),
        _query("steps", "Steps of integrated gradients.", type="integer", minimum=1, maximum=128),
        _query("box", "Box of a detector, counted from the surest.", type="integer", minimum=0, maximum=1000),
        _query("token", "Token whose attention is shown.", type="string", maxLength=200),
        DEADLINE,
    ],
    body=_body({"maxItems": 1}),
    refusals=IN_PICTURES,
)

STORY = _route(
    "story",
    "Every step from the picture to the prediction, as the page shows it",
    OBJECT,
    parameters=[
        MODEL,
        _query("top_k", "Classes at the end.", type="integer", minimum=1, maximum=100, default=5),
        DEADLINE,
    ],
    body=_body({"maxItems": 1}),
    refusals=IN_PICTURES,
)

TENSORS = {
    "required": True,
    "content": {"application/json": {"schema": OBJECT}, "application/octet-stream": PICTURE},
}


def open_inference(name: str, summary: str, *, infer: bool = False) -> dict[str, Any]:
    """A route of the Open Inference Protocol."""
    return _route(
        name,
        summary,
        OBJECT,
        body=TENSORS if infer else None,
        refusals=IN_PICTURES if infer else (404, 503),
    )
