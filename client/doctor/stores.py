"""What the site holds: data, labels, cache, audit log, and who may read them."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from client.doctor.finding import Finding, ok, problem, warning
from conf.exits import Stop

if TYPE_CHECKING:
    from client.sitefile import SiteFile

_LOOKED_AT = 2000  # files of the data root that are opened
_READ = 50  # cases whose masks are read


def data(site: SiteFile) -> Finding:
    """Whether the files below the data root can be read."""
    root = site.data.root or (site.pacs.folder if site.pacs else None)
    if root is None:
        return warning("site.yaml names no data root", "write data.root there")
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        remedy = f"mount or make it, and let the user of this service read it (uid {os.getuid()})"
        return problem(f"{root} is not a readable folder", remedy)
    seen, bad = 0, []
    for path in itertools.islice(_files(root), _LOOKED_AT):
        seen += 1
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            bad.append(f"{path} ({error.strerror})")
    if bad:
        return problem(
            f"{len(bad)} of {seen} files cannot be read: {bad[0]}", "restore them, or let them be read"
        )
    if not seen:
        return warning(
            f"{root} holds no files", "put the images there, or pull them: wardround-site ingest --pacs"
        )
    return ok(f"{root}: {seen}{'+' if seen == _LOOKED_AT else ''} files can be read")


def cache(site: SiteFile) -> Finding:
    """Every cached case against its digest."""
    from tasks.data.cache import Cache

    cases = Cache(site.cache)
    try:
        cases.verify()
    except Stop as stop:
        return problem(str(stop), f"remove {site.cache} and ingest again")
    if not cases.entries:
        return warning(f"no case in {site.cache}", "wardround-site ingest")
    patients = len({entry.patient for entry in cases.entries})
    return ok(f"{len(cases.entries)} cases of {patients} patients, each as it was written")


def labels(site: SiteFile) -> Finding:
    """Classes in cached masks against those that site.yaml declares."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    from tasks.data.cache import MASK, Cache

    declared = _declared(site)
    seen: set[int] = set()
    try:
        entries = Cache(site.cache).entries[:_READ]
        for entry in entries:
            with safe_open(Cache(site.cache).path(entry.digest), framework="np") as file:
                if MASK in file.keys():  # noqa: SIM118  it is no mapping
                    seen |= {int(value) for value in np.unique(file.get_tensor(MASK))}
    except (OSError, SafetensorError, Stop) as error:
        return warning(f"not looked at: {error}", "see cache")
    classes = ", ".join(map(str, sorted(seen))) or "none"
    if declared is None:
        return ok(f"classes {classes}; site.yaml declares no dictionary")
    if stray := sorted(seen - declared):
        remedy = "ingest again after a change of data.labels; the coordinator trains on declared classes"
        return problem(
            f"cached masks have {', '.join(map(str, stray))}, which site.yaml does not declare", remedy
        )
    if seen and (absent := sorted(declared - seen - {0})):
        text = f"no mask of the first {len(entries)} has {', '.join(map(str, absent))}"
        return warning(text, "check data.labels.names, or leave these classes out of data.labels.annotates")
    return ok(f"classes {classes}, all declared")


def audit(site: SiteFile) -> Finding:
    """The chain of the audit log."""
    from client.audit import Audit

    if not site.audit.exists():
        return warning("no audit log yet", "wardround-site init makes a site's folder with one")
    try:
        head = Audit(site.audit).verify()
    except Stop as stop:
        return problem(str(stop), "keep the file as it is, and find out who changed it")
    return ok(f"{head.lines} entries, unchanged")


def ledger(site: SiteFile) -> Finding:
    """The privacy account, line by line."""
    from client.ledger import Ledger

    if not site.ledger.exists() and not site.ledger.with_suffix(".head").exists():
        return ok("nothing was released under a privacy budget yet")
    try:
        lines, waiting = Ledger(site.ledger, site.privacy).lines()
    except Stop as stop:
        return problem(str(stop), "stop the trainer, restore the ledger, and find out who changed it")
    return ok(f"{len(lines)} releases, unchanged, {len(waiting)} of them never settled")


def permissions(site: SiteFile) -> Finding:
    """Whatever names patients or holds a secret is for its owner only."""
    private = [site.key, site.state, site.cache, site.audit, site.ledger, site.socket.parent]
    if site.coordinator is not None and site.coordinator.key is not None:
        private.append(site.coordinator.key)
    if site.pacs is not None:
        given = (site.pacs.key, site.pacs.token_file, site.pacs.login_file, site.pacs.folder)
        private += [path for path in given if path is not None]
    found = [path for path in private if path.exists()]
    wide = [path for path in found if path.stat().st_mode & 0o077 and not _sheltered(path, site)]
    if wide:
        path = wide[0]
        mode = stat.S_IMODE(path.stat().st_mode)
        more = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
        return problem(
            f"{path} is open to others (mode {mode:o}){more}", f"chmod go= {' '.join(map(str, wide))}"
        )
    foreign = [path for path in found if path.stat().st_uid != os.geteuid()]
    if foreign:
        remedy = "run as the owner, or chown them to the service's user"
        return warning(f"{foreign[0]} belongs to uid {foreign[0].stat().st_uid}", remedy)
    if not site.key.exists():
        return warning(
            f"no key at {site.key}", "wardround-site init or ingest makes it; restore the old one first"
        )
    return ok(f"{len(found)} places, all for their owner only")


def _sheltered(path: Path, site: SiteFile) -> bool:
    """A plain file in an owner-only folder of the site needs no mode of its own, unless it is a secret."""
    return path == site.audit and not path.parent.stat().st_mode & 0o077


def _declared(site: SiteFile) -> set[int] | None:
    """Class values that masks may have; None where nothing is declared."""
    labels, mapped = site.data.labels, site.data.label_map
    if labels.dictionary:
        looked_for = labels.annotates
        return {0} | {d.value for d in labels.dictionary if looked_for is None or d.name in looked_for}
    if mapped is None:
        return None
    return {0, 1} if isinstance(mapped, str) else {0, *mapped.values()}


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
