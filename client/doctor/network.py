"""What the site reaches: the coordinator, its clock and certificates, the archive, the own trainer."""

from __future__ import annotations

import datetime
import email.utils
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from client.doctor.finding import Finding, ok, problem, warning

if TYPE_CHECKING:
    from client.sitefile import Coordinator, SiteFile

_PATIENCE_S = 10.0
_SOON = datetime.timedelta(days=30)
_NONE = "site.yaml has no section coordinator"
_SET = "write its address and authority there, as the coordinator's kit says"
_LONGEST_SOCKET = 107  # bytes of a Unix socket's path (unix(7))


def coordinator(site: SiteFile) -> Finding:
    """Whether the coordinator answers, and is who its certificate says."""
    if site.coordinator is None:
        return warning(_NONE, _SET)
    try:
        _greet(site.coordinator).close()
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", "") or error.reason or str(error)
        return problem(
            f"{site.coordinator.address}: {why}", "ask the coordinator for the authority's certificate"
        )
    except OSError as error:
        remedy = "let the firewall pass outgoing TLS to it; ask whether the coordinator runs"
        return problem(f"{site.coordinator.address}: {error.strerror or error}", remedy)
    return ok(f"{site.coordinator.address} answers, and its certificate is trusted")


def clock(site: SiteFile) -> Finding:
    """This clock against the coordinator's (RFC 9110 6.6.1, Date)."""
    if site.coordinator is None:
        return warning(f"not compared: {_NONE}", _SET)
    try:
        with _greet(site.coordinator) as link:
            host = site.coordinator.address.rpartition(":")[0]
            link.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            head = link.recv(4096).decode("latin-1")
    except OSError as error:
        return warning(f"not compared: {error}", "see coordinator")
    stamps = [line[5:].strip() for line in head.splitlines() if line.lower().startswith("date:")]
    try:
        theirs = email.utils.parsedate_to_datetime(stamps[0])
    except (IndexError, ValueError):
        return warning("not compared: the coordinator gives no time", "check that this machine uses NTP")
    off = abs((datetime.datetime.now(datetime.UTC) - theirs).total_seconds())
    seen = f"{off:.0f} s from the coordinator's"
    if off > 60:
        return problem(seen, "set the clock by NTP (timedatectl set-ntp true): signatures carry the time")
    return warning(seen, "set the clock by NTP (timedatectl set-ntp true)") if off > 5 else ok(seen)


def certificates(site: SiteFile) -> Finding:
    """The dates of every certificate that site.yaml names, and of the coordinator's."""
    from cryptography import x509

    named = [site.coordinator.authority] if site.coordinator else []
    named += [p for p in (site.pacs.authority, site.pacs.certificate) if p] if site.pacs else []
    found: list[tuple[str, x509.Certificate]] = []
    for path in named:
        try:
            found += [(path.name, c) for c in x509.load_pem_x509_certificates(path.read_bytes())]
        except (OSError, ValueError) as error:
            return problem(f"{path} cannot be read ({error})", "put the certificate there, as PEM")
    if site.coordinator is not None and (shown := _shown(site.coordinator)) is not None:
        found.append(("the coordinator's", x509.load_der_x509_certificate(shown)))
    if not found:
        return warning(f"none to check: {_NONE}", _SET)
    now = datetime.datetime.now(datetime.UTC)
    name, first = min(found, key=lambda item: item[1].not_valid_after_utc)
    ends = first.not_valid_after_utc
    early = [name for name, c in found if c.not_valid_before_utc > now]
    if ends < now or early:
        seen = f"{early[0]} is not valid yet" if early else f"{name} ended on {ends:%Y-%m-%d}"
        return problem(seen, "ask its issuer for a new one, and check this machine's clock")
    if ends < now + _SOON:
        return warning(f"{name} ends on {ends:%Y-%m-%d}", "ask its issuer for a new one")
    return ok(f"{len(found)} certificates, the first ends on {ends:%Y-%m-%d}")


def pacs(site: SiteFile) -> Finding:
    """Whether the archive listens. Nothing is asked of it."""
    from urllib.parse import urlsplit

    if site.pacs is None:
        return ok("site.yaml names no archive")
    node, url = site.pacs.node, urlsplit(site.pacs.source)
    host, port = node[1:] if node else (str(url.hostname), url.port or (443 if url.scheme == "https" else 80))
    try:
        site.pacs.authorization()
        socket.create_connection((host, port), _PATIENCE_S).close()
    except OSError as error:
        seen = f"{host} port {port}: {error.strerror or error}"
        return problem(seen, "check pacs.source, and let the firewall pass this machine")
    except ValueError as error:
        return problem(str(error), "correct the section pacs of site.yaml")
    return ok(f"{host} listens at port {port}")


def trainer(site: SiteFile) -> Finding:
    """The trainer behind its socket."""
    path = str(site.socket)
    if len(path.encode()) > _LONGEST_SOCKET:
        return problem(f"{path} is too long for a socket", f"choose one of at most {_LONGEST_SOCKET} bytes")
    if not Path(path).exists():
        return warning("not running: no socket", "start it: python -m client.trainer site.yaml")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
            knock.settimeout(_PATIENCE_S)
            knock.connect(path)
    except OSError as error:
        remedy = f"start it again: python -m client.trainer site.yaml; see who owns {path}"
        return problem(f"nobody answers at its socket ({error.strerror or error})", remedy)
    return ok("answers")


def _greet(peer: Coordinator) -> ssl.SSLSocket:
    """A TLS connection whose other end is who it says.

    Raises:
        OSError: there is none.
    """
    host, _, port = peer.address.rpartition(":")
    context = ssl.create_default_context(cafile=peer.authority)
    link = socket.create_connection((host, int(port)), _PATIENCE_S)
    try:
        return context.wrap_socket(link, server_hostname=host)
    except OSError:
        link.close()
        raise


def _shown(peer: Coordinator) -> bytes | None:
    """The certificate that the coordinator shows, trusted or not; None where nobody answers."""
    host, _, port = peer.address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is said to it
    try:
        with (
            socket.create_connection((host, int(port)), _PATIENCE_S) as link,
            context.wrap_socket(link, server_hostname=host) as wrapped,
        ):
            return wrapped.getpeercert(binary_form=True)
    except OSError:
        return None
