"""What a pull does with an archive that does not play along. No archive is needed here."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from client.pacs import pull as pulling
from client.pacs.pull import Away, pull
from client.pacs.query import KEYS, parse, uid
from client.pacs.settings import Pacs, chosen
from client.pacs.shelf import Instance, Shelf
from client.pacs.web import first_part
from conf.exits import Exit, Stop


def file(uid: str) -> bytes:
    """The smallest DICOM file that says who it is."""
    from io import BytesIO

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, uid
    out = BytesIO()
    data.save_as(out, enforce_file_format=True)
    return out.getvalue()


@given(
    body=st.binary(max_size=300),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    boundary=st.sampled_from([b"b", b"--b", b"0123456789abcdef"]),
)
def test_a_part_is_cut_out_however_it_arrives(body: bytes, sizes: list[int], boundary: bytes) -> None:
    if b"\r\n--" + boundary in b"\r\n\r\n" + body:
        return
    whole = (
        b"--"
        + boundary
        + b"\r\nContent-Type: application/dicom\r\n\r\n"
        + body
        + b"\r\n--"
        + boundary
        + b"--"
    )

    def pieces() -> Iterator[bytes]:
        at, turn = 0, 0
        while at < len(whole):
            yield whole[at : at + sizes[turn % len(sizes)]]
            at, turn = at + sizes[turn % len(sizes)], turn + 1

    assert b"".join(first_part(pieces(), boundary)) == body
    with pytest.raises(Away, match=r"ends an answer early|without a part"):
        b"".join(first_part([whole[: -len(boundary) - 3]], boundary))


@pytest.mark.parametrize("key", [key for keys in KEYS.values() for key in keys])
def test_every_key_has_good_and_bad_values(key: str) -> None:
    good = {"StudyDate": "20240101-20240630", "Modality": "CT,MR"}.get(key, "1.2.3")
    query = parse([f"{key}={good}"])
    assert {**query.study, **query.series}[key] == tuple(good.split(","))
    for bad in ("", "x" * 65, "a\\b", "a\x00"):
        with pytest.raises(Stop, match=f"is no value of {key}; want "):
            parse([f"{key}={bad}"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no query: the whole archive is never pulled; accepted is KEY=VALUE"),
        (["Modalty=CT"], "'Modalty=CT': accepted is KEY=VALUE.*with PatientID, .*Modality"),
        (["Modality"], "accepted is KEY=VALUE"),
        (["Modality=CT", "Modality=MR"], "gives Modality twice; write Modality=A,B"),
        (["StudyDate=2024"], "'2024' is no value of StudyDate; want 20240131"),
    ],
)
def test_a_query_is_checked(texts: list[str], message: str) -> None:
    with pytest.raises(Stop, match=message) as stop:
        parse(texts)
    assert stop.value.exit == Exit.CONFIG


@pytest.mark.parametrize(
    ("text", "found", "fits"),
    [
        ("StudyDate=20240101-20240630", "20240630", True),
        ("StudyDate=20240101-20240630", "20240701", False),
        ("StudyDate=20240101-", "20991231", True),
        ("StudyDate=-20240630", "19700101", True),
        ("StudyDate=-20240630", "", False),
        ("StudyDate=20240101", "20240101", True),
        ("StudyDescription=*thorax*", "CT Thorax nativ", True),
        ("StudyDescription=CT [a]", "ct [A]", True),
        ("StudyDescription=CT [a]", "CT a", False),
        ("PatientID=A1,A2", "A2", True),
        ("PatientID=A1", "A12", False),
    ],
)
def test_what_comes_is_held_against_what_was_asked(text: str, found: str, fits: bool) -> None:
    key = text.partition("=")[0]
    assert parse([text]).matches("STUDY", {key: found}) is fits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "pacs.example"}, "accepted is https://host/dicom-web or TITLE@host:port"),
        ({"source": "A@host:99999"}, "accepted is"),
        ({"source": "TOO_LONG_FOR_A_TITLE@host:104"}, "accepted is"),
        ({"source": "https://user:password@host/dicom-web"}, "source holds a login"),
        ({"source": "A@h:104", "title": "x" * 17}, "title"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pacs.model_validate(given)


def test_secrets_are_kept_from_others(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("abc\n")
    secret.chmod(0o644)
    source = Pacs(source="https://host/dicom-web", token_file=secret)
    with pytest.raises(Stop, match=r"can be read by others .mode 644.: chmod 600"):
        source.authorization()
    secret.chmod(0o600)
    assert source.authorization() == ("bearer", "abc")
    with pytest.raises(Stop, match="would show the credentials on the network: use https"):
        Pacs(source="http://host/dicom-web", token_file=secret).authorization()
    with pytest.raises(Stop, match=r"cannot be read .No such file"):
        Pacs(source="https://host/d", login_file=tmp_path / "none").authorization()


def test_another_archive_gets_no_secret_of_the_first(tmp_path: Path) -> None:
    section = Pacs(
        source="https://one/dw",
        login_file=tmp_path / "l",
        key=tmp_path / "k",
        title="SITE",
        query=("Modality=CT",),
    )
    other = chosen(section, "https://two/dw", None, tmp_path)
    assert (other.login_file, other.key, other.query, other.title) == (None, None, (), "SITE")
    assert chosen(section, None, ["Modality=MR"], tmp_path).query == ("Modality=MR",)
    with pytest.raises(Stop, match="has no section pacs"):
        chosen(None, None, None, tmp_path)


class Toy:
    """An archive of one series, whose answers a test scripts."""

    at_once = 3

    def __init__(self, act: Callable[[list[Instance], Shelf], None], uids: tuple[str, ...]) -> None:
        self.act, self.uids, self.asked = act, uids, list[list[str]]()

    def find(self, level: str, keys: Any) -> Iterator[dict[str, str]]:
        if level == "IMAGE":
            yield from ({"SOPInstanceUID": uid} for uid in self.uids)
        else:
            yield {
                "StudyInstanceUID": "1",
                "SeriesInstanceUID": "2",
                "Modality": "CT",
                "NumberOfSeriesRelatedInstances": "7",
            }

    def fetch(self, instances: list[Instance], shelf: Shelf) -> None:
        self.asked.append([i.uid for i in instances])
        self.act(instances, shelf)

    def __enter__(self) -> Toy:
        return self

    def __exit__(self, *_: object) -> None:
        pass


SOURCE = Pacs(source="A@h:1", query=("Modality=CT",), retries=2)


def give(instances: list[Instance], shelf: Shelf) -> None:
    for one in instances:
        shelf.land(one, [file(one.uid)])


def use(monkeypatch: pytest.MonkeyPatch, toy: Toy) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(pulling, "_connect", lambda source: toy)
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


def test_what_a_batch_left_out_is_asked_for_once_more(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(instances: list[Instance], shelf: Shelf) -> None:
        give([i for i in instances if i.uid != "3.2"], shelf)

    toy = Toy(act, ("3.1", "3.2", "3.3", "3.4"))
    use(monkeypatch, toy)
    pulled = pull(SOURCE, ram)
    assert toy.asked == [["3.1", "3.2", "3.3"], ["3.2"], ["3.4"]]
    assert ([i.uid for i in pulled.missing], pulled.fetched, pulled.exit) == (["3.2"], 3, Exit.PACS_PARTLY)


def test_patience_ends_and_grows(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(instances: list[Instance], shelf: Shelf) -> None:
        raise Away("is silent")

    pauses = use(monkeypatch, toy := Toy(act, ("3.1",)))
    with pytest.raises(Stop, match="A@h:1 is silent; 0 instances are here") as stop:
        pull(SOURCE, ram)
    assert (stop.value.exit, len(toy.asked), pauses) == (Exit.PACS_AWAY, 3, [0.5, 1.0])


def test_an_archive_that_gives_a_little_each_time_is_borne(
    ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(instances: list[Instance], shelf: Shelf) -> None:
        give(instances[:1], shelf)
        raise Away("is silent")

    use(monkeypatch, toy := Toy(act, tuple(f"3.{i}" for i in range(9))))
    assert pull(SOURCE, ram).fetched == 9
    assert len(toy.asked) == 9  # none asked for twice after it came


def test_a_crashed_pull_leaves_nothing_half(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(instances: list[Instance], shelf: Shelf) -> None:
        def pieces() -> Iterator[bytes]:
            yield file(instances[0].uid)[:200]
            raise KeyboardInterrupt

        shelf.land(instances[0], pieces())

    use(monkeypatch, Toy(act, ("3.1",)))
    with pytest.raises(KeyboardInterrupt):
        pull(SOURCE, ram)
    assert not list(ram.rglob("*.dcm"))
    (ram / ".coming" / "left.part").write_bytes(b"of a killed process")
    use(monkeypatch, Toy(give, ("3.1",)))
    assert pull(SOURCE, ram).fetched == 1
    assert not list((ram / ".coming").iterdir())


def test_two_pulls_do_not_share_a_folder(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(instances: list[Instance], shelf: Shelf) -> None:
        pull(SOURCE, ram)

    use(monkeypatch, Toy(act, ("3.1",)))
    with pytest.raises(Stop, match="another pull fills") as stop:
        pull(SOURCE, ram)
    assert stop.value.exit == Exit.SITE_BUSY


@contextmanager
def answering(answer: Callable[[str], tuple[int, str, bytes]]) -> Iterator[Pacs]:
    """A DICOMweb server that answers a path as a test says."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = answer(self.path.removeprefix("/dw/"))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/dw"
        yield Pacs(source=url, query=("Modality=CT",), retries=0, timeout_s=5)
        server.shutdown()
        thread.join()


def dicom_json(**values: str) -> dict[str, Any]:
    from pydicom.datadict import tag_for_keyword

    return {f"{tag_for_keyword(k):08X}": {"vr": "UI", "Value": [v]} for k, v in values.items()}


def web_answers(
    instance: tuple[int, str, bytes], modality: str = "CT"
) -> Callable[[str], tuple[int, str, bytes]]:
    def answer(path: str) -> tuple[int, str, bytes]:
        path = path.partition("?")[0]
        if path.endswith("/instances/3"):
            return instance
        found = dicom_json(StudyInstanceUID="1", SeriesInstanceUID="2", SOPInstanceUID="3", Modality=modality)
        return 200, "application/dicom+json", json.dumps([found]).encode()

    return answer


MULTIPART = "multipart/related; type=application/dicom; boundary=b"


def part(body: bytes) -> bytes:
    return b"--b\r\n\r\n" + body + b"\r\n--b--"


@pytest.mark.parametrize(
    "instance", [(200, MULTIPART, part(file("3"))), (200, "application/dicom", file("3"))]
)
def test_both_forms_of_an_instance(instance: tuple[int, str, bytes], ram: Path) -> None:
    with answering(web_answers(instance)) as source:
        pulled = pull(source, ram)
    assert (pulled.fetched, pulled.missing) == (1, [])
    assert next(ram.rglob("*.dcm")).read_bytes() == file("3")


@pytest.mark.parametrize(
    "instance",
    [
        (404, "text/plain", b""),
        (200, MULTIPART, part(file("4"))),
        (200, "text/html", b"<html>"),
        (302, "", b""),
    ],
)
def test_what_is_not_the_instance_does_not_land(instance: tuple[int, str, bytes], ram: Path) -> None:
    with answering(web_answers(instance)) as source:
        pulled = pull(source, ram)
    assert (pulled.fetched, len(pulled.missing), pulled.exit) == (0, 1, Exit.PACS_PARTLY)
    assert not [p for p in ram.rglob("*") if p.suffix in (".dcm", ".part")]


def one_line(answer: Callable[[str], tuple[int, str, bytes]], exit: Exit, match: str, ram: Path) -> None:
    with answering(answer) as source, pytest.raises(Stop, match=match) as stop:
        pull(source, ram)
    assert (stop.value.exit, len(str(stop.value).splitlines())) == (exit, 1)


def test_what_the_web_may_answer(ram: Path) -> None:
    cut = (200, MULTIPART, b"--b\r\n\r\n" + file("3"))
    one_line(web_answers(cut), Exit.PACS_AWAY, "ends an answer early", ram)
    one_line(web_answers((503, "", b"")), Exit.PACS_AWAY, "HTTP 503", ram)
    one_line(web_answers((403, "", b"")), Exit.PACS_AUTH, "HTTP 403", ram)
    one_line(lambda _: (200, "text/html", b"<html>"), Exit.PACS_REFUSED, "no DICOM JSON", ram)
    one_line(lambda _: (302, "", b""), Exit.PACS_REFUSED, "HTTP 302", ram)
    one_line(lambda _: (204, "", b""), Exit.PACS_EMPTY, "nothing that matches", ram)
    path = [dicom_json(StudyInstanceUID="../../instances", Modality="CT")]
    one_line(lambda _: (200, "", json.dumps(path).encode()), Exit.PACS_REFUSED, "is not a UID", ram)
    silent = [dicom_json(StudyInstanceUID="1", SeriesInstanceUID="2")]
    one_line(
        lambda _: (200, "", json.dumps(silent).encode()), Exit.PACS_REFUSED, "does not answer Modality", ram
    )


@pytest.mark.parametrize("value", [5, {"a": 1}, "text", [], [None], [{"Alphabetic": "x"}], None])
def test_whatever_stands_for_a_value_is_one_line(value: object, ram: Path) -> None:
    found = [{"0020000D": {"vr": "UI", "Value": value}, "zzz": {"Value": ["1"]}, "00080060": value}]
    one_line(
        lambda _: (200, "", json.dumps(found).encode()),
        Exit.PACS_REFUSED,
        r"is not a UID|does not answer",
        ram,
    )


@pytest.mark.parametrize("text", ["..", ".", "1..2", "1.", "", "1/2", "1" * 65, "１.2", "1.2\n"])
def test_what_is_no_uid_stands_in_no_path(text: str) -> None:
    with pytest.raises(ValueError, match="is not a UID"):
        uid(text)


def test_an_archive_without_end_is_left(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Toy(give, tuple(f"3.{i}" for i in range(9))))
    monkeypatch.setattr(pulling, "_MOST", 8)
    with pytest.raises(Stop, match="more than 8 answers to one query: ask for less"):
        pull(SOURCE, ram)


def test_an_archive_that_ignores_a_key_gives_nothing_else(ram: Path) -> None:
    one_line(
        web_answers((200, MULTIPART, part(file("3"))), "MR"), Exit.PACS_EMPTY, "nothing that matches", ram
    )


def test_a_strange_certificate(ram: Path, tmp_path: Path) -> None:
    import ssl

    from deploy.keys import authority

    authority(tmp_path)
    plain = Pacs(source="https://h/dw", query=("Modality=CT",), retries=0, timeout_s=5)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        source = plain.model_copy(update={"source": f"https://127.0.0.1:{server.server_address[1]}/dw"})
        try:
            with pytest.raises(Stop, match=r"certificate that is not trusted: set pacs.authority"):
                pull(source, ram)
            trusted = source.model_copy(update={"authority": tmp_path / "ca.crt"})
            with pytest.raises(Stop, match="HTTP 501"):  # the connection stands
                pull(trusted, ram)
        finally:
            server.shutdown()
            thread.join()
