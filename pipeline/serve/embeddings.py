"""/v1/embeddings, as OpenAI's clients ask it: texts, and pictures as data URLs, objects or files of a form.

{"input": ["a red bird", "data:image/jpeg;base64,...", {"image": "<base64>"}, {"text": "a heron"}]}
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NamedTuple

import numpy as np
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pipeline.serve.decoders import Decoders
from pipeline.serve.errors import Refusal
from pipeline.serve.forms import read_form
from pipeline.serve.parameters import TEXT_CHARACTERS_MAX
from pipeline.serve.shown import Following, Model

INPUTS_MAX = 256
FORMATS = ("float", "base64")


class Input(NamedTuple):
    text: str | None
    picture: bytes | None


class Embeddings:
    def __init__(self, following: Following, decoders: Decoders, upload_bytes: int) -> None:
        self._following, self._decoders, self._upload_bytes = following, decoders, upload_bytes

    async def create(self, request: Request) -> Response:
        """One row for each input, in their order."""
        model = self._following.now.model
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            inputs, body = await self._from_form(request), dict[str, Any]()
        else:
            body = _read_json(await request.body())
            inputs = _inputs(body.get("input"))
        encoding = _given(body, "encoding_format", "float")
        if encoding not in FORMATS:
            raise Refusal(400, f"encoding_format is {_short(encoding)}; expected float or base64")
        dim = model.artifact.spec.dim
        if (dimensions := _given(body, "dimensions", dim)) != dim:
            raise Refusal(400, f"dimensions is {_short(dimensions)}; this model makes {dim}, leave it out")
        request.state.charge(len(inputs) - 1)
        rows = await self._embed(model, inputs)
        tokens = sum(len(one.text.split()) for one in inputs if one.text is not None)
        return JSONResponse(
            {
                "object": "list", "model": model.artifact.spec.model.rstrip("/").rpartition("/")[2],
                "data": [
                    {"object": "embedding", "index": place, "embedding": _encoded(row_d, encoding)}
                    for place, row_d in enumerate(rows)
                ],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )  # fmt: skip

    async def _embed(self, model: Model, inputs: list[Input]) -> list[Any]:
        texts = [one.text for one in inputs if one.text is not None]
        pictures = [one.picture for one in inputs if one.picture is not None]
        text_rows = iter(await model.texts(texts) if texts else ())
        picture_rows = iter(await model.pictures(self._decoders, pictures))
        return [next(text_rows if one.picture is None else picture_rows) for one in inputs]

    async def _from_form(self, request: Request) -> list[Input]:
        async with read_form(request, self._upload_bytes) as form:
            inputs = []
            for name, value in form.multi_items():
                if name == "picture" and isinstance(value, UploadFile):
                    inputs.append(Input(None, await value.read()))
                elif name == "text" and isinstance(value, str):
                    inputs.append(_text(value))
                else:
                    raise Refusal(
                        400, f"the field {_short(name)} is unknown; expected files 'picture' and texts 'text'"
                    )
        return _counted(inputs)


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise Refusal(400, 'the body is no JSON object; expected {"input": ["a red bird"]}')
    return content


def _given(body: dict[str, Any], name: str, default: Any) -> Any:
    """Some clients send null for what they leave out."""
    value = body.get(name)
    return default if value is None else value


def _inputs(given: Any) -> list[Input]:
    if isinstance(given, str | dict):
        given = [given]
    if not isinstance(given, list):
        raise Refusal(400, f"input is {_short(given)}; expected a text, or a list of texts and pictures")
    return _counted([_input(one) for one in given])


def _counted(inputs: list[Input]) -> list[Input]:
    if not 1 <= len(inputs) <= INPUTS_MAX:
        raise Refusal(400, f"{len(inputs)} inputs; expected 1 to {INPUTS_MAX} in one request")
    return inputs


def _input(given: Any) -> Input:
    match given:
        case str() if given.startswith("data:image/"):
            return Input(None, _decoded(given))
        case str():
            return _text(given)
        case {"text": str(text)} if len(given) == 1:
            return _text(text)
        case {"image": str(image)} if len(given) == 1:
            return Input(None, _decoded(image))
    raise Refusal(
        400, f'an input is {_short(given)}; expected a text, {{"text": ...}} or {{"image": base64}}, no tokens'
    )


def _text(text: str) -> Input:
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" in JSON is half a character, which no tokenizer takes
        raise Refusal(400, f"the text {_short(text)} has half of a character; expected whole ones") from None
    if not text.strip() or len(text) > TEXT_CHARACTERS_MAX:
        raise Refusal(
            400, f"a text has {len(text)} characters; expected 1 to {TEXT_CHARACTERS_MAX}, not all of them blank"
        )
    return Input(text, None)


def _decoded(image: str) -> bytes:
    """Of base64 or a data URL. Addresses are not fetched: a client must not send this host to others."""
    head, comma, rest = image.partition(",")
    if comma and not (head.startswith("data:image/") and head.endswith(";base64")):
        raise Refusal(400, f"a picture begins with {_short(head)}; expected base64, or data:image/...;base64,")
    try:
        return base64.b64decode(rest if comma else image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"a picture is no base64 ({error}); addresses are not fetched, send the bytes") from None


def _encoded(row_d: Any, encoding: str) -> Any:
    row = np.asarray(row_d, "<f4")
    return base64.b64encode(row.tobytes()).decode() if encoding == "base64" else [round(x, 6) for x in row.tolist()]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
