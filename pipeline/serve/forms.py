"""Multipart uploads, and no others: a form that is not one is told so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from pipeline.serve.errors import Refusal

PARTS_MAX = 256


class _InMemory(MultiPartParser):
    """The body is in memory already, and bounded: no upload is written to a disk, where others may find it."""

    spool_max_size = 0  # never


@asynccontextmanager
async def read_form(request: Request, part_bytes_max: int) -> AsyncIterator[FormData]:
    """Its files are closed at the end.

    Raises:
        Refusal: 400 broken, 415 not multipart.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise Refusal(415, f"the body is {kind[:60]!r}; expected multipart/form-data, as curl -F sends it")
    parser = _InMemory(
        request.headers, request.stream(), max_files=PARTS_MAX, max_fields=PARTS_MAX, max_part_size=part_bytes_max
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        raise Refusal(400, f"the form cannot be read: {getattr(error, 'message', error)}") from None
    try:
        yield form
    finally:
        await form.close()


async def read_file(form: FormData, name: str) -> bytes | None:
    """The one file of that field, None where there is none.

    Raises:
        Refusal: 400 several, or text in its place.
    """
    given = form.getlist(name)
    if not given:
        return None
    if len(given) > 1 or not isinstance(given[0], UploadFile):
        raise Refusal(400, f"the field {name!r} has to be one file: curl -F {name}=@photo.jpg")
    return await given[0].read()
