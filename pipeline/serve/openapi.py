"""/openapi.json, from the same table of parameters that requests are read with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.serve.embeddings import FORMATS, INPUTS_MAX
from pipeline.serve.parameters import SEARCH, SIMILAR, SIZE, Parameter

ERRORS = {
    400: "a parameter or body that is not as expected", 401: "a token is needed", 404: "no such picture",
    411: "a body without its length", 413: "too many bytes or pixels", 415: "not a picture or form that is read",
    421: "this name of the service is unknown to it", 422: "a picture that cannot be decoded",
    429: "more questions than one client may ask; see Retry-After", 503: "busy, or no answer in time; see Retry-After",
}  # fmt: skip
ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "integer"},
    "description": "of a hit; it stays the same in later generations",
}
DEADLINE = {
    "name": "X-Timeout-Ms",
    "in": "header",
    "schema": {"type": "integer"},
    "description": "how long the client will wait; work for it ends then",
}
TEXT, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
BYTES = {"type": "string", "format": "binary"}
HIT = {
    "id": INTEGER, "key": TEXT, "score": {**NUMBER, "description": "cosine"},
    "relevance": {**NUMBER, "description": "0 to 1: how far it stands out from the rest of the index"}, "mark": TEXT,
    "source": INTEGER, "metadata": {"type": "object"},
    "copies": {"type": "array", "items": INTEGER, "description": "with `group`: ids of its near-duplicates"},
}  # fmt: skip
PAGE = {
    "generation": INTEGER, "query": TEXT, "total": INTEGER, "offset": INTEGER, "took_ms": NUMBER,
    "hits": {"type": "array", "items": {"type": "object", "properties": HIT}},
    "note": {**TEXT, "description": "why there are no hits: a name that no picture has, and the nearest ones"},
    "facets": {"type": "object", "description": "where asked for: per field pairs of value and count"},
}  # fmt: skip
INPUT = {"oneOf": [TEXT, {"type": "object", "properties": {"text": TEXT, "image": {**TEXT, "description": "base64"}}}]}
EMBEDDINGS = {
    "input": {"oneOf": [INPUT, {"type": "array", "items": INPUT, "maxItems": INPUTS_MAX}]}, "model": TEXT,
    "encoding_format": {"type": "string", "enum": list(FORMATS)},
}  # fmt: skip


def document() -> dict[str, Any]:
    search = [_parameter(one) for one in SEARCH]
    picture = {"multipart/form-data": {"schema": _object({"picture": BYTES}, "picture")}}
    embed = {
        "application/json": {"schema": _object(EMBEDDINGS, "input")},
        "multipart/form-data": {"schema": _object({"picture": BYTES, "text": TEXT})},
    }
    similar = [ID, *(_parameter(one) for one in SIMILAR)]
    shown = {kind: {"schema": BYTES} for kind in ("image/jpeg", "image/webp")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Nightjar", "version": "1", "description": "Questions to a collection of pictures."},
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}, {}],
        "paths": {
            "/api/search": {
                "get": _call("Pictures that fit words", search, _json(PAGE)),
                "post": _call("Pictures like an uploaded one", search, _json(PAGE), picture),
            },
            "/api/similar/{id}": {"get": _call("Pictures like one of the index", similar, _json(PAGE))},
            "/api/about": {"get": _call("What is searched", [], _json({}))},
            "/v1/embeddings": {"post": _call("Vectors of texts and pictures", [], _json({}), embed)},
            "/thumb/{id}": {"get": _call("A small picture", [ID, _parameter(SIZE)], shown)},
            "/picture/{id}": {"get": _call("A picture, at most 2048 pixels wide and high", [ID], shown)},
            "/healthz": {"get": _call("Embeds and searches; 200 or 503", [], _json({"status": TEXT}))},
            "/metrics": {"get": _call("For Prometheus", [], {"text/plain": {"schema": TEXT}})},
        },
    }


def _call(
    words: str,
    parameters: Sequence[Mapping[str, Any]],
    content: Mapping[str, Any],
    body: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    refusal = _json({"error": TEXT})
    call: dict[str, Any] = {
        "summary": words,
        "parameters": [*parameters, DEADLINE],
        "responses": {
            "200": {"description": "the answer", "content": content},
            **{str(status): {"description": why, "content": refusal} for status, why in ERRORS.items()},
        },
    }
    return call if body is None else {**call, "requestBody": {"required": True, "content": body}}


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {"name": parameter.name, "in": "query", "schema": dict(parameter.schema), "description": parameter.words}


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _json(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": _object(properties)}}
