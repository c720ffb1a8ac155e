"""A real archive on loopback: what comes is what was sent, once, whatever happens in between."""

from __future__ import annotations

import datetime
import gc
import hashlib
import ipaddress
import os
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client.cli import app
from client.pacs.pull import pull
from client.pacs.settings import Pacs
from conf.console import code
from conf.exits import Exit, Stop
from tests.client.pacs.orthanc import Orthanc, free_port, serving

pytestmark = pytest.mark.federation

ALL = ("Modality=CT,MR,PT,RWV",)
WAYS: dict[str, Callable[..., Pacs]] = {
    "web": lambda archive, **more: archive.web(**more),
    "get": lambda archive, **more: archive.dimse("get", **more),
    "move": lambda archive, **more: archive.dimse("move", **more),
}


def pixels(files: list[Path]) -> dict[str, str]:
    """SHA-256 of stored values by SOP instance."""
    read = (pydicom.dcmread(file) for file in files)
    return {d.SOPInstanceUID: hashlib.sha256(d.get("PixelData", b"")).hexdigest() for d in read}


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_is_what_was_sent_and_comes_once(
    way: str, archive: Orthanc, real: Callable[[str], Path], ram: Path
) -> None:
    source = WAYS[way](archive, query=ALL)
    told: list[tuple[int, int]] = []
    pulled = pull(source, ram / "pacs", lambda done, known: told.append((done, known)))
    files = [
        *real("dicom_series").rglob("*.dcm"),
        *(real("sts_rtstruct") / "STS_003" / "MR_T1" / "image").rglob("*.dcm"),
    ]
    here = sorted((ram / "pacs").rglob("*.dcm"))
    assert pixels(here) == pixels(files)
    assert (pulled.found, pulled.fetched, pulled.here, pulled.missing) == (len(here), len(here), 0, [])
    assert told[-1] == (len(here), len(here))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {
        stat.S_IMODE(p.stat().st_mode) & 0o077 for p in (ram / "pacs").rglob("*") if p.name != ".lock"
    } == {0}
    given = archive.given()
    times = {p: p.stat().st_mtime_ns for p in here}
    again = pull(source, ram / "pacs")
    assert (again.fetched, again.here) == (0, len(here))
    assert archive.given() == given
    assert times == {p: p.stat().st_mtime_ns for p in here}


@pytest.mark.parametrize("way", WAYS)
def test_only_what_is_asked_for(way: str, archive: Orthanc, ram: Path) -> None:
    pulled = pull(WAYS[way](archive, query=("Modality=PT",)), ram / "pacs")
    assert pulled.found == 10
    assert {pydicom.dcmread(p).Modality for p in (ram / "pacs").rglob("*.dcm")} == {"PT"}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_matches(way: str, archive: Orthanc, ram: Path) -> None:
    with pytest.raises(Stop, match="nothing that matches Modality=XA") as stop:
        pull(WAYS[way](archive, query=("Modality=XA",)), ram / "pacs")
    assert stop.value.exit == Exit.PACS_EMPTY


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_archive_is_asked_for_the_rest_alone(
    way: str, real: Callable[[str], Path], ram: Path
) -> None:
    files = sorted((real("dicom_series") / "mr_ge_mr750_epi_multivolume").rglob("*.dcm"))
    half = 21
    with serving() as mortal:
        mortal.send(files)
        source = WAYS[way](mortal, query=("Modality=MR",))

        def kill(done: int, known: int) -> None:
            if done == half:
                mortal.kill()

        with pytest.raises(Stop, match=f"{half} instances are here: pull again to go on") as stop:
            pull(source, ram / "pacs", kill)
        assert stop.value.exit == Exit.PACS_AWAY
        first = pixels(sorted((ram / "pacs").rglob("*.dcm")))
        assert len(first) == half
        assert half <= mortal.given() <= half + 1  # one may have been on its way
        before = mortal.given()
        mortal.start()
        pulled = pull(source, ram / "pacs")
        assert (pulled.here, pulled.fetched) == (half, len(files) - half)
        assert mortal.given() - before == len(files) - half
        assert pixels(sorted((ram / "pacs").rglob("*.dcm"))) == pixels(files)


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_is_called_so_and_the_pull_goes_on(
    way: str, archive: Orthanc, real: Callable[[str], Path], ram: Path
) -> None:
    one = pydicom.dcmread(next((real("dicom_series") / "ct_ge_petct_lowdose").rglob("*.dcm")))
    small = ram / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=2m", "tmpfs", str(small)], check=False, capture_output=True).returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("cannot mount a tmpfs; run the tests as root")
        pytest.skip("needs root to mount a small disk: sudo make test")
    try:
        source = WAYS[way](archive, query=(f"SeriesInstanceUID={one.SeriesInstanceUID}",))
        with pytest.raises(Stop, match=r"disk full while writing .*pull again: what came is kept") as stop:
            pull(source, small / "pacs")
        assert stop.value.exit == Exit.DISK_FULL
        here = len(list(small.rglob("*.dcm")))
        assert here in (2, 3)
        subprocess.run([*mount, "remount,size=9m", str(small)], check=True)
        assert (pulled := pull(source, small / "pacs")).here == here
        assert (pulled.found, pulled.fetched) == (10, 10 - here)
        assert not list((small / "pacs" / ".coming").iterdir())
    finally:
        gc.collect()  # pynetdicom leaves a file open that never became whole
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_frozen_archive_is_not_waited_for_forever(way: str, archive: Orthanc, ram: Path) -> None:
    assert archive.process is not None
    archive.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(Stop, match="0 instances are here") as stop:
            pull(WAYS[way](archive, query=ALL, timeout_s=0.5), ram / "pacs")
        assert stop.value.exit == Exit.PACS_AWAY
    finally:
        archive.process.send_signal(signal.SIGCONT)


def test_a_restarted_archive_is_waited_for(real: Callable[[str], Path], ram: Path) -> None:
    files = sorted((real("dicom_series") / "pt_ge_petctac").rglob("*.dcm"))
    with serving() as mortal:
        mortal.send(files)

        def restart(done: int, known: int) -> None:
            if done == 4:
                mortal.kill()
                mortal.start()

        pulled = pull(mortal.dimse("get", query=("Modality=PT",), retries=2), ram / "pacs", restart)
        assert (pulled.fetched, pulled.missing) == (10, [])


def lines(error: Stop) -> int:
    return len(str(error).splitlines())


def test_what_dimse_refuses(archive: Orthanc, ram: Path) -> None:
    node = f"127.0.0.1:{archive.port}"
    for source, exit, message in (
        (archive.dimse("get", source=f"OTHER@{node}", query=ALL), Exit.PACS_REFUSED, "Called AE title not"),
        (
            archive.dimse("get", title="STRANGER", query=ALL),
            Exit.PACS_AWAY,
            "hangs up on a query: does it know the AE title STRANGER",
        ),
        (
            archive.dimse("get", source=f"ORTHANC@127.0.0.1:{free_port()}", query=ALL),
            Exit.PACS_AWAY,
            "port .* cannot be reached",
        ),
        (
            archive.dimse("get", source=f"ORTHANC@127.0.0.1:{archive.web_port}", query=ALL),
            Exit.PACS_AWAY,
            "does not answer as an archive",
        ),
    ):
        with pytest.raises(Stop, match=message) as stop:
            pull(source, ram / "pacs")
        assert (stop.value.exit, lines(stop.value)) == (exit, 1)


def test_what_dicomweb_refuses(archive: Orthanc, ram: Path) -> None:
    for source, exit, message in (
        (archive.web(source=f"{archive.url}/nothing", query=ALL), Exit.PACS_REFUSED, "HTTP 404"),
        (archive.web(source=f"{archive.url}/app/explorer.html", query=ALL), Exit.PACS_REFUSED, "HTTP 404"),
        (
            archive.web(source=f"http://127.0.0.1:{free_port()}/dicom-web", query=ALL),
            Exit.PACS_AWAY,
            "ConnectError",
        ),
        (
            archive.web(source=f"http://127.0.0.1:{archive.port}/dicom-web", query=ALL),
            Exit.PACS_AWAY,
            "does not answer",
        ),
    ):
        with pytest.raises(Stop, match=message) as stop:
            pull(source, ram / "pacs")
        assert (stop.value.exit, lines(stop.value)) == (exit, 1)


def test_a_login(real: Callable[[str], Path], ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((real("dicom_series") / "pt_ge_petctac").rglob("*.dcm"))
    with serving(AuthenticationEnabled=True, RegisteredUsers={"ward": "round"}) as locked:
        source = locked.web(query=("Modality=PT",))
        with pytest.raises(
            Stop, match=r"wants other credentials .HTTP 401.: give token_file, login_file"
        ) as stop:
            pull(source, ram / "pacs")
        assert stop.value.exit == Exit.PACS_AUTH
        locked.send(files, auth=("ward", "round"))
        monkeypatch.setenv("WARDROUND_PACS_LOGIN", "ward:round")
        assert pull(source, ram / "pacs").fetched == 10


def test_ingest_from_an_archive(
    archive: Orthanc, ram: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = ram / "site"
    assert code(app, ["init", str(site), "--name", "A"]) == Exit.OK
    monkeypatch.chdir(site)
    go = ["ingest", "--pacs-from", f"{archive.url}/dicom-web", "--query", "Modality=RTSTRUCT,MR"]
    go += ["--query", "PatientID=STS_003"]
    capsys.readouterr()
    assert code(app, go) == Exit.OK, capsys.readouterr()
    said = capsys.readouterr().out
    assert "48 instances found: 48 fetched, 0 here before, 0 not to be had" in said
    assert "1 cases in" in said
    assert code(app, go) == Exit.OK
    assert "48 instances found: 0 fetched, 48 here before" in capsys.readouterr().out
    assert code(app, [*go[:3], "--query", "Modalty=MR"]) == Exit.CONFIG
    assert code(app, ["ingest", "--pacs-from", "nonsense", "--query", "Modality=MR"]) == Exit.CONFIG
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "accepted is KEY=VALUE" in errors[0]
    assert "accepted is https://host/dicom-web or TITLE@host:port" in errors[1]


def both_ways(folder: Path) -> tuple[Path, Path]:
    """A certificate that trusts itself, for either end of a connection."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "own.crt").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "own.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    return folder / "own.crt", folder / "own.key"


@pytest.mark.parametrize("via", ["get", "move"])
def test_dimse_over_tls(via: str, real: Callable[[str], Path], ram: Path) -> None:
    certificate, key = both_ways(ram)
    settings = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(certificate),
        "DicomTlsPrivateKey": str(key),
        "DicomTlsTrustedCertificates": str(certificate),
    }
    with serving(over_tls=True, **settings) as archive:
        archive.send(sorted((real("dicom_series") / "pt_ge_petctac").rglob("*.dcm")))
        plain = archive.dimse(via, query=("Modality=PT",), timeout_s=5)
        with pytest.raises(Stop, match="at port") as stop:
            pull(plain, ram / "pacs")
        assert stop.value.exit == Exit.PACS_AWAY
        own = {"tls": True, "authority": certificate, "certificate": certificate, "key": key}
        assert pull(plain.model_copy(update=own), ram / "pacs").fetched == 10
