"""DICOMweb (PS3.18): QIDO-RS to find, WADO-RS to fetch; one instance a request, streamed to the shelf."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.message import Message
from typing import Any, Self

import httpx
from pydicom.datadict import tag_for_keyword

from client.pacs.pull import Away
from client.pacs.query import Level
from client.pacs.settings import LOGIN, TOKEN, Pacs
from client.pacs.shelf import Instance, Other, Shelf
from conf.exits import Exit, Stop

_PAGE = 200  # results of one query request
_CONNECT_S = 10.0
_LARGEST = 2**26  # bytes of one page of results
_HEADERS = 2**16  # bytes of a part's headers
_PATHS: Mapping[Level, str] = {
    "STUDY": "studies",
    "SERIES": "studies/{StudyInstanceUID}/series",
    "IMAGE": "studies/{StudyInstanceUID}/series/{SeriesInstanceUID}/instances",
}


class Web:
    """A DICOMweb server."""

    at_once = 1

    def __init__(self, source: Pacs) -> None:
        self._source = source
        given = source.authorization()
        headers = {"accept-encoding": "identity"}
        auth = None
        if given and given[0] == "bearer":
            headers["authorization"] = f"Bearer {given[1]}"
        elif given:
            user, _, password = given[1].partition(":")
            auth = httpx.BasicAuth(user, password)
        # no redirects: they would carry the credentials elsewhere
        self._client = httpx.Client(
            base_url=source.source.rstrip("/") + "/",
            headers=headers,
            auth=auth,
            timeout=httpx.Timeout(source.timeout_s, connect=min(_CONNECT_S, source.timeout_s)),
            verify=trust(source),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def find(self, level: Level, keys: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
        """QIDO-RS, page by page."""
        path = _PATHS[level].format(**keys)
        in_path = [key for key in keys if f"{{{key}}}" in _PATHS[level]]
        asked: list[tuple[str, str | int | float | bool | None]]
        asked = [(k, v) for k, v in keys.items() if v and k not in in_path]
        asked += [("includefield", f"{tag_for_keyword(k):08X}") for k in keys if k not in in_path]
        seen: set[str] = set()
        while True:
            page = [("limit", str(_PAGE)), ("offset", str(len(seen)))]
            with self._get(path, [*asked, *page], "application/dicom+json") as response:
                results = _results(response)
            fresh = [r for r in results if json.dumps(r, sort_keys=True) not in seen]
            seen |= {json.dumps(r, sort_keys=True) for r in fresh}
            yield from ({**{k: keys[k] for k in in_path}, **_plain(r, keys)} for r in fresh)
            if len(results) < _PAGE or not fresh:  # an archive may ignore limit and offset
                return

    def fetch(self, instances: Sequence[Instance], shelf: Shelf) -> None:
        """WADO-RS, each in the transfer syntax that it is kept in."""
        for one in instances:
            path = f"studies/{one.study}/series/{one.series}/instances/{one.uid}"
            try:
                with self._get(path, [], _PART10) as response:
                    shelf.land(one, _file(response))
            except (_Gone, Other):
                continue

    @contextmanager
    def _get(
        self, path: str, query: list[tuple[str, str | int | float | bool | None]], accept: str
    ) -> Iterator[httpx.Response]:
        try:
            with self._client.stream(
                "GET", path, params=query or None, headers={"accept": accept}
            ) as response:
                self._check(response, wado=accept == _PART10)
                yield response
        except httpx.HTTPError as error:
            if "CERTIFICATE" in str(error).upper():
                text = f"{self._source.source} has a certificate that is not trusted: set pacs.authority"
                raise Stop(Exit.PACS_AUTH, f"{text} ({error})") from None
            raise Away(f"does not answer ({type(error).__name__}: {error})") from None

    def _check(self, response: httpx.Response, *, wado: bool) -> None:
        status, where = response.status_code, self._source.source
        if status in (200, 204, 206):
            return
        if status in (401, 403):
            wanted = f"give token_file, login_file, {TOKEN} or {LOGIN}"
            raise Stop(Exit.PACS_AUTH, f"{where} wants other credentials (HTTP {status}): {wanted}")
        if status >= 500 or status in (408, 425, 429):
            raise Away(f"answers HTTP {status}")
        if wado:
            raise _Gone
        raise Stop(Exit.PACS_REFUSED, f"{where} answers HTTP {status}: is this the address of its DICOMweb?")


class _Gone(Exception):
    """The archive does not give this one instance."""


_PART10 = 'multipart/related; type="application/dicom"; transfer-syntax=*'


def trust(source: Pacs) -> ssl.SSLContext:
    """What TLS connections to the archive trust and show.

    Raises:
        Stop: (`PACS_AUTH`) a certificate or key cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=source.authority)
        if source.certificate is not None:
            context.load_cert_chain(source.certificate, source.key)
    except (OSError, ssl.SSLError) as error:
        raise Stop(Exit.PACS_AUTH, f"pacs.authority, certificate or key cannot be read ({error})") from None
    return context


def _results(response: httpx.Response) -> list[dict[str, Any]]:
    if response.status_code == 204:
        return []
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) > _LARGEST:
            raise Stop(Exit.PACS_REFUSED, f"the archive answers a query with more than {_LARGEST >> 20} MiB")
    try:
        results = json.loads(body or b"[]")
        if not all(isinstance(result, dict) for result in results):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        text = "the archive answers a query with no DICOM JSON: is this the address of its DICOMweb?"
        raise Stop(Exit.PACS_REFUSED, text) from None
    return list(results)


def _plain(result: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """The first value of each attribute that was asked for (PS3.18 F.2), by keyword; no value is empty."""
    plain = {}
    found = {tag.upper(): attribute for tag, attribute in result.items()}
    for key in keys:
        attribute = found.get(f"{tag_for_keyword(key):08X}")
        values = attribute.get("Value") if isinstance(attribute, dict) else None
        value = values[0] if isinstance(values, list) and values else ""
        if attribute is not None and isinstance(value, (str, int, float)):
            plain[key] = str(value)
    return plain


def _file(response: httpx.Response) -> Iterator[bytes]:
    """The DICOM file in a response: the first part, or all of it."""
    head = Message()
    head["content-type"] = response.headers.get("content-type", "")
    boundary = head.get_param("boundary")
    if isinstance(boundary, str) and head.get_content_maintype() == "multipart":
        return first_part(response.iter_bytes(), boundary.encode())
    return response.iter_bytes()


def first_part(pieces: Iterable[bytes], boundary: bytes) -> Iterator[bytes]:
    """The body of the first part of a multipart message (RFC 2046 5.1), piece by piece.

    Raises:
        Away: the message ends before the part does.
    """
    stream = iter(pieces)
    buffer = b""
    while (end := buffer.find(b"\r\n\r\n")) < 0:
        piece = next(stream, b"")
        if not piece or len(buffer) > _HEADERS:
            raise Away("sends an answer without a part")
        buffer += piece
    buffer = buffer[end + 4 :]
    closing = b"\r\n--" + boundary
    while (end := buffer.find(closing)) < 0:
        piece = next(stream, b"")
        if not piece:
            raise Away("ends an answer early")
        ready = max(len(buffer) - len(closing), 0)  # the rest may be the beginning of a boundary
        yield buffer[:ready]
        buffer = buffer[ready:] + piece
    yield buffer[:end]
