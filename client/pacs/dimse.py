"""DIMSE (PS3.4 annex C, PS3.7): C-FIND to find, C-GET or C-MOVE to fetch; one association at a time.

pynetdicom writes an arriving data set to a temporary file as it comes; that file is in the shelf's spool,
and is taken over when it is whole.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from pydicom.dataset import Dataset
from pydicom.uid import UID, AllTransferSyntaxes, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import (
    AE,
    AllStoragePresentationContexts,
    StoragePresentationContexts,
    _config,
    build_context,
    build_role,
    evt,
)
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from client.pacs.pull import Away
from client.pacs.query import Level
from client.pacs.settings import Pacs
from client.pacs.shelf import Instance, Shelf
from client.pacs.web import trust
from conf.exits import Exit, Stop

# query and retrieve in the study root information model (PS3.4 C.6.2.1)
Find, Move, Get = (f"1.2.840.10008.5.1.4.1.2.2.{n}" for n in (1, 2, 3))

_CONNECT_S = 10.0
_PDU = 2**17
_ROOM = 4 * _PDU  # bytes that have to be free
_MOST = 127  # contexts of an association, beside that of the query
_PLAIN: list[str | UID] = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
_UNAUTHORISED, _NO_ROOM = 0x0124, 0xA700  # PS3.4 B.2.3
_NO_DESTINATION = 0xA801  # PS3.4 C.4.2.1.5
_PENDING = (0xFF00, 0xFF01)


class Dimse:
    """A classical DICOM archive."""

    at_once = 16

    def __init__(self, source: Pacs) -> None:
        if source.node is None:
            raise ValueError(f"{source.source} is no DIMSE node")
        self._source = source
        self._title, self._host, self._port = source.node
        self._ae = self._entity()
        self._link: Association | None = None
        self._speaks: frozenset[str] = frozenset()
        self._expected: dict[str, Instance] = {}
        self._shelf: Shelf | None = None
        self._broken: Exception | None = None
        self._sockets: list[socket.socket] = []
        self._handlers: Any = [
            (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_DATA_SENT, _prompt),
            (evt.EVT_DATA_RECV, self._room),
            (evt.EVT_C_STORE, self._arrived),
        ]
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.callback(self._hang_up)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self._link is not None:
            self._link.abort()  # a polite release would wait for what is still coming
        self._open.close()

    def find(self, level: Level, keys: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
        """C-FIND at one level of the study root model."""
        asked = Dataset()
        asked.QueryRetrieveLevel = level
        for key, value in keys.items():
            setattr(asked, key, value)
        for status, found in self._connected(Find).send_c_find(asked, Find):
            if "Status" not in status:
                raise Away(f"hangs up on a query: does it know the AE title {self._source.title}?")
            code = int(status.Status)
            if code in _PENDING and found is not None:
                yield {e.keyword: _text(e.value) for e in found if e.keyword in keys}
            elif code:
                self._failed("C-FIND", code)

    def fetch(self, instances: Sequence[Instance], shelf: Shelf) -> None:
        """C-GET or C-MOVE of some instances of one series."""
        self._expected, self._shelf, self._broken = {i.uid: i for i in instances}, shelf, None
        asked = Dataset()
        asked.QueryRetrieveLevel = "IMAGE"
        asked.StudyInstanceUID = instances[0].study
        asked.SeriesInstanceUID = instances[0].series
        asked.SOPInstanceUID = [i.uid for i in instances]
        try:
            with _spooled(shelf.spool):
                code = self._retrieve(asked, frozenset(i.sop_class for i in instances))
        finally:
            if self._broken is not None:
                raise self._broken
        if code == _UNAUTHORISED:
            self._failed(_NAMES[Get if self._source.via == "get" else Move], code)
        if code == _NO_DESTINATION:
            where = f"{self._source.title} at this host, port {self._source.listen}"
            raise Stop(Exit.PACS_REFUSED, f"{self._source.source} cannot move to {where}: enter it there")

    def _retrieve(self, asked: Dataset, classes: frozenset[str]) -> int:
        """Run a C-GET or C-MOVE to its end; returns its last status."""
        if self._source.via == "get":
            responses = self._connected(Get, classes).send_c_get(asked, Get)
        else:
            self._listen()
            responses = self._connected(Move).send_c_move(asked, self._source.title, Move)
        code = 0
        for status, _ in responses:
            if "Status" not in status:
                raise Away("went away")
            code = int(status.Status)
        return code

    def _entity(self) -> AE:
        entity = AE(ae_title=self._source.title)
        entity.acse_timeout = entity.connection_timeout = min(_CONNECT_S, self._source.timeout_s)
        entity.dimse_timeout = entity.network_timeout = self._source.timeout_s
        entity.maximum_pdu_size = _PDU
        entity.require_called_aet = True  # of C-MOVE: who does not know the title brings nothing
        return entity

    def _connected(self, model: str, classes: frozenset[str] = frozenset()) -> Association:
        """An association that speaks the model and can take objects of the classes."""
        needed = classes | {model}
        if self._link is not None and self._link.is_established and needed <= self._speaks:
            return self._link
        self._hang_up()
        self._knock()
        offered = _offered(classes)
        link = self._ae.associate(
            self._host,
            self._port,
            contexts=[build_context(model, _PLAIN), *offered],
            ae_title=self._title,
            max_pdu=_PDU,
            ext_neg=[build_role(c, scp_role=True) for c in {c.abstract_syntax for c in offered} if c],
            evt_handlers=self._handlers,
            tls_args=(trust(self._source), self._host) if self._source.tls else None,
        )
        if not link.is_established:
            self._refused(link)
        self._link, self._speaks = link, needed
        if not any(c.abstract_syntax == model for c in link.accepted_contexts):
            raise Stop(
                Exit.PACS_REFUSED, f"{self._source.source} does not offer {_NAMES[model]} to this site"
            )
        return link

    def _knock(self) -> None:
        """See whether anybody listens: an association that fails does not say why."""
        try:
            socket.create_connection((self._host, self._port), self._ae.connection_timeout).close()
        except OSError as error:
            raise Away(f"port {self._port} cannot be reached ({error.strerror or error})") from None

    def _refused(self, link: Association) -> None:
        """Say why there is no association.

        Raises:
            Away, Stop: (`PACS_REFUSED`).
        """
        if link.is_rejected:
            answer = link.acceptor.primitive
            why = answer.reason_str if answer is not None and answer.result == 1 else None
            if why is None:
                raise Away("is too busy for an association")
            text = f"{self._source.source} refuses {self._source.title} ({why}): check both AE titles"
            raise Stop(Exit.PACS_REFUSED, text)
        raise Away(f"does not answer as an archive at port {self._port}")

    def _hang_up(self) -> None:
        if self._link is not None and self._link.is_established:
            self._link.release()
        self._link = None
        while self._sockets:
            self._sockets.pop().close()

    def _opened(self, event: evt.Event) -> None:
        """Keep the socket: pynetdicom leaves it open where the other end died."""
        transport = event.assoc.dul.socket
        if event.assoc.is_requestor and transport is not None and transport.socket is not None:
            self._sockets.append(transport.socket)

    def _failed(self, what: str, code: int) -> None:
        if code in (0xA700, 0x0110):  # out of resources, processing failure
            raise Away(f"answers {what} with {code:04X}")
        raise Stop(
            Exit.PACS_REFUSED, f"{self._source.source} answers {what} with {code:04X}; ask its engineer"
        )

    def _listen(self) -> None:
        """Be a storage SCP for C-MOVE, from the first use on."""
        if any(True for _ in self._ae.supported_contexts):
            return
        for context in AllStoragePresentationContexts:
            self._ae.add_supported_context(str(context.abstract_syntax), AllTransferSyntaxes)
        where = self._source.listen_on or _way_to(self._host, self._port)
        at = (where, self._source.listen)
        try:
            server = self._ae.start_server(
                at,
                block=False,
                evt_handlers=self._handlers,
                ssl_context=self._shown() if self._source.tls else None,
            )
        except OSError as error:
            text = f"cannot listen on {where} port {self._source.listen} ({error.strerror}): set pacs.listen"
            raise Stop(Exit.CONFIG, text) from None
        if server is not None:
            self._open.callback(server.shutdown)

    def _room(self, event: evt.Event) -> None:
        """Hang up before the disk is full: pynetdicom's thread would die of it, and say nothing to us."""
        transport = event.assoc.dul.socket
        if (
            self._shelf is None
            or shutil.disk_usage(self._shelf.spool).free > _ROOM
            or self._broken is not None
        ):
            return
        self._broken = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if transport is not None and transport.socket is not None:
            transport.socket.shutdown(socket.SHUT_RDWR)

    def _shown(self) -> ssl.SSLContext:
        """What this site's own listener shows, and whom it lets in: whoever the authority signed.

        Raises:
            Stop: (`PACS_AUTH`) certificate, key or authority is missing or cannot be read.
        """
        own = self._source
        try:
            if own.certificate is None or own.authority is None:
                raise FileNotFoundError("C-MOVE over TLS needs pacs.certificate, key and authority")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(own.certificate, own.key)
            context.load_verify_locations(own.authority)
            context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:
            raise Stop(Exit.PACS_AUTH, f"cannot listen over TLS ({error})") from None
        return context

    def _arrived(self, event: evt.Event) -> int:
        """Take over an instance that was asked for; any other is refused."""
        request: Any = event.request
        file = event.dataset_path
        request._dataset_file.close()
        expected = self._expected.get(str(request.AffectedSOPInstanceUID))
        try:
            if expected is None or self._shelf is None:
                return _UNAUTHORISED
            self._shelf.adopt(expected, file)
        except OSError as error:
            self._broken = error
            return _NO_ROOM
        finally:
            file.unlink(missing_ok=True)
        return 0


_NAMES = {Find: "C-FIND", Get: "C-GET", Move: "C-MOVE"}


def _prompt(event: evt.Event) -> None:
    """Acknowledge what comes next at once: an archive that writes in bits waits 40 ms for it otherwise."""
    transport = event.assoc.dul.socket
    if transport is not None and transport.socket is not None and hasattr(socket, "TCP_QUICKACK"):
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _offered(classes: frozenset[str]) -> list[PresentationContext]:
    """Presentation contexts for objects that are to come.

    Each class is offered once per transfer syntax, so that the archive sends what it has and decodes
    nothing. Where it does not name the classes, or names many, the usual ones are offered once.
    """
    syntaxes: list[str | UID] = [s for s in AllTransferSyntaxes if s not in _PLAIN]
    if "" in classes or len(classes) * (len(syntaxes) + 1) > _MOST:
        usual = (str(context.abstract_syntax) for context in StoragePresentationContexts)
        return [build_context(sop_class, [*_PLAIN, *syntaxes]) for sop_class in usual]
    each: list[list[str | UID]] = [_PLAIN, *([s] for s in syntaxes)]
    return [build_context(c, syntax) for c in sorted(classes) for syntax in each]


@contextmanager
def _spooled(spool: Path) -> Iterator[None]:
    """Let arriving data sets go to files below `spool`, not to memory."""
    before = (_config.STORE_RECV_CHUNKED_DATASET, tempfile.tempdir)
    _config.STORE_RECV_CHUNKED_DATASET, tempfile.tempdir = True, str(spool)
    try:
        yield
    finally:
        _config.STORE_RECV_CHUNKED_DATASET, tempfile.tempdir = before
        for left in spool.iterdir():
            left.unlink(missing_ok=True)


def _way_to(host: str, port: int) -> str:
    """The address of this machine that `host` sees: no other is listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _text(value: Any) -> str:
    return "" if value is None else str(value)
