"""Which archive, and how it is spoken to: the `pacs` section of `site.yaml`."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator

from conf.exits import Exit, Stop
from conf.schema import Frozen, complaint

TOKEN, LOGIN = "WARDROUND_PACS_TOKEN", "WARDROUND_PACS_LOGIN"
"""Environment variables: a bearer token, or `user:password`."""

_TITLE = r"^[A-Za-z0-9_. -]{1,16}$"  # PS3.5 6.2: AE, at most 16 characters
_NODE = re.compile(r"(?P<title>[A-Za-z0-9_. -]{1,16})@(?P<host>[A-Za-z0-9_.:-]+):(?P<port>\d{1,5})")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Pacs(Frozen):
    """An archive. No password or token stands here: only the name of the file that holds it.

    Attributes:
        source: `https://host/dicom-web`, or `TITLE@host:port` (DIMSE). query: `Modality=CT` and the like.
        folder: where instances land. title: AE title of this site. via: how DIMSE brings instances.
        listen, listen_on: port and address for C-MOVE, which the archive must know under `title`.
        tls: DIMSE over TLS. authority: certificates to trust, PEM. certificate, key: this site's own.
        token_file, login_file: owner-only; a bearer token, or `user:password`.
        timeout_s: longest silence of the archive. retries: attempts in a row that may bring nothing.
    """

    source: str
    query: tuple[str, ...] = ()
    folder: Path = Path("state/pacs")
    title: Annotated[str, Field(pattern=_TITLE)] = "WARDROUND"
    via: Literal["get", "move"] = "get"
    listen: int = Field(11112, ge=1, le=65_535)
    listen_on: str | None = None
    tls: bool = False
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    login_file: Path | None = None
    timeout_s: float = Field(60.0, gt=0, le=3600)
    retries: int = Field(4, ge=0, le=20)

    @model_validator(mode="after")
    def _known_source(self) -> Pacs:
        if self.node is None and (urlsplit(self.source).scheme not in ("http", "https") or not self._host):
            wanted = "https://host/dicom-web or TITLE@host:port"
            raise ValueError(f"source is {self.source!r}; accepted is {wanted}")
        if "@" in self._host or (self.node is None and "@" in urlsplit(self.source).netloc):
            raise ValueError("source holds a login; give it by login_file or " + LOGIN)
        return self

    @property
    def node(self) -> tuple[str, str, int] | None:
        """AE title, host and port of a DIMSE archive; None for DICOMweb."""
        match = _NODE.fullmatch(self.source)
        if match is None or not 0 < int(match["port"]) < 65_536:
            return None
        return match["title"], match["host"], int(match["port"])

    @property
    def _host(self) -> str:
        return urlsplit(self.source).hostname or ""

    def placed(self, here: Path) -> Pacs:
        """The same, its relative paths counted from `here`."""
        names = ("folder", "authority", "certificate", "key", "token_file", "login_file")
        given = {name: getattr(self, name) for name in names}
        return self.model_copy(update={name: here / path for name, path in given.items() if path})

    def authorization(self) -> tuple[str, str] | None:
        """Scheme and credentials for DICOMweb: from a file, else from the environment.

        Raises:
            Stop: (`PACS_AUTH`) others may read the file, or the network the credentials.
        """
        token = _secret(self.token_file) or os.environ.get(TOKEN, "")
        login = _secret(self.login_file) or os.environ.get(LOGIN, "")
        if not token and not login:
            return None
        if not self.source.startswith("https:") and self._host not in _LOOPBACK:
            raise Stop(Exit.PACS_AUTH, f"{self.source} would show the credentials on the network: use https")
        return ("bearer", token) if token else ("basic", login)


def chosen(section: Pacs | None, source: str | None, query: Sequence[str] | None, root: Path) -> Pacs:
    """The archive of a command: `site.yaml`'s, or another one, which never gets the first one's secrets.

    Args:
        section: of `site.yaml`. source, query: as the command line has them. root: where another archive's
            instances land, in `pacs/`.

    Raises:
        Stop: (`CONFIG`) neither a section nor a source, or no such source.
    """
    if source is not None:
        kept = ("title", "via", "listen", "listen_on", "timeout_s", "retries")
        own = {name: getattr(section, name) for name in kept} if section is not None else {}
        try:
            section = Pacs.model_validate({**own, "source": source, "folder": root / "pacs"})
        except ValidationError as error:
            raise Stop(Exit.CONFIG, f"--pacs-from: {complaint(error)}") from None
    if section is None:
        raise Stop(Exit.CONFIG, "--pacs: the site's file has no section pacs")
    return section.model_copy(update={"query": tuple(query)}) if query else section


def _secret(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text().strip()
    except OSError as error:
        raise Stop(Exit.PACS_AUTH, f"{path} cannot be read ({error.strerror})") from None
    if mode & 0o077:
        raise Stop(Exit.PACS_AUTH, f"{path} can be read by others (mode {mode:o}): chmod 600 {path}")
    return text
