"""`wardround-site ledger`, as the engineer types it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.audit import Audit
from client.cli import app
from client.ledger import Ledger
from client.sitefile import SiteFile
from conf.console import code
from conf.exits import Exit
from strategies.privacy.accountant import Entry, prv

HEAD = "0" * 64
ONCE = ["--q", "1", "--steps", "1", "--delta", "1e-5"]


@pytest.fixture
def home(ram: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert code(app, ["init", str(ram / "north"), "--name", "north"]) == Exit.OK
    file = ram / "north" / "site.yaml"
    file.write_text(
        file.read_text() + "\nprivacy:\n  patients: {epsilon: 3, delta: 1.0e-4, purposes: {statistics: 1}}\n"
    )
    capsys.readouterr()
    return ram / "north"


def test_a_price_is_that_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    row = ["--sigma", "1.0", "--q", "0.01", "--steps", "1000", "--delta", "1e-5"]
    assert code(app, ["ledger", "price", *row]) == Exit.OK
    first, second = capsys.readouterr().out.splitlines()
    assert first == "epsilon=1.8384"
    assert second.startswith("replace_one=4.")


def test_the_noise_for_a_price(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--epsilon", "2", "--q", "0.05", "--steps", "20", "--delta", "1e-4"]
    assert code(app, ["ledger", "price", *asked]) == Exit.OK
    sigma, found, _ = (float(line.split("=")[1]) for line in capsys.readouterr().out.splitlines())
    assert found <= 2
    assert prv([Entry(sigma - 0.001, 0.05, 20)], 1e-4) > 2


def test_no_noise_costs_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert code(app, ["ledger", "price", "--sigma", "0", *ONCE]) == Exit.OK
    said = capsys.readouterr()
    assert said.out.splitlines() == ["epsilon=inf", "replace_one=inf"]
    assert "Rényi DP's upper bound" in said.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("price --q 1 --steps 1 --delta 1e-5", "give --sigma to see the cost, or --epsilon"),
        ("price --q 1 --steps 1 --delta 1e-5 --sigma 1 --epsilon 1", "one of them"),
        ("price --q 2 --steps 1 --delta 1e-5 --sigma 1", "q is 2.0; need more than 0 and at most 1"),
        ("price --q 1 --steps 0 --delta 1e-5 --sigma 1", "steps is 0; need a whole number"),
        ("price --q 1 --steps 1 --delta 7 --sigma 1", "delta is 7.0; need more than 0 and less than 1"),
        ("price --q 1 --steps 1 --delta 1e-5 --sigma nan", "sigma is nan; need a finite number"),
        ("price --q 1 --steps 1 --delta 1e-5 --epsilon -1", "epsilon is -1.0; need more than 0"),
        ("--sigma 1 --site-file SITE", "a proposed run needs --sigma, --q and --steps"),
        ("--sigma 1 --q 1 --steps 1 --population x --site-file SITE", "site.yaml privacy has patients"),
        (
            "restore nowhere --anchor 12 --site-file SITE",
            "--anchor '12'; need a head's 64 hexadecimal digits",
        ),
        (f"restore nowhere --anchor {HEAD} --site-file SITE", "backup nowhere cannot be read"),
        (f"restore nowhere --anchor {HEAD} --lost 1,2 --site-file SITE", "--lost '1,2'; need SIGMA,Q,STEPS"),
        (f"restore nowhere --anchor {HEAD} --lost 1,2,3 --site-file SITE", "q is 2.0; need more than 0"),
    ],
)
def test_what_cannot_be_meant_is_said_in_a_line(
    home: Path, capsys: pytest.CaptureFixture[str], typed: str, said: str
) -> None:
    words = ["ledger", *typed.replace("SITE", str(home / "site.yaml")).split()]
    assert code(app, words) == Exit.CONFIG
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_spent_reserved_left_and_what_comes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = SiteFile.read(home / "site.yaml")
    book = Ledger(site.ledger, site.privacy)
    book.reserve(Entry(1.0, 0.02, 100), run="lungs").settle()
    book.reserve(Entry(30.0, 1.0, 1), run="lungs", purpose="statistics").settle()
    book.reserve(Entry(1.0, 0.02, 50), run="chests")
    site_file = ["--site-file", str(home / "site.yaml")]
    assert code(app, ["ledger", "--sigma", "1", "--q", "0.02", "--steps", "2000", *site_file]) == Exit.OK
    said = capsys.readouterr().out
    count = Entry(30.0, 1.0, 1)
    spent = prv([Entry(1.0, 0.02, 100), count], 1e-4)
    whole = prv([Entry(1.0, 0.02, 150), count], 1e-4)
    assert (
        f"patients: ε {whole:.4f} of 3 at δ 0.0001: spent {spent:.4f}, reserved {whole - spent:.4f},"
        f" left {3 - whole:.4f}; one patient in another's place" in said
    )
    assert f"  statistics: ε {prv([count], 1e-4):.4f} of 1\n" in said
    assert f"  chests  training  ε {prv([Entry(1.0, 0.02, 50)], 1e-4):.4f} alone  50 steps" in said
    assert "at sigma=1 q=0.02, 50 reserved" in said
    assert (
        f"ε {prv([Entry(1.0, 0.02, 2150), count], 1e-4):.4f} of 3, refused: privacy.patients.epsilon is 3"
        in said
    )
    assert f"3 entries, unchanged; head {book.head.hex()}" in said
    assert code(app, ["ledger", "--sigma", "9", "--q", "0.02", "--steps", "1", *site_file]) == Exit.OK
    assert "of 3, allowed" in capsys.readouterr().out


def test_a_rolled_back_ledger_is_restored_and_that_is_recorded(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = SiteFile.read(home / "site.yaml")
    book = Ledger(site.ledger, site.privacy)
    book.reserve(Entry(1.0, 0.02, 100), run="lungs")
    shutil.copy(site.ledger, home / "backup")
    book.reserve(Entry(1.0, 0.02, 100), run="lungs")
    anchor = book.head
    site.ledger.unlink()
    typed = ["ledger", "restore", str(home / "backup"), "--anchor", anchor.hex()]
    site_file = ["--site-file", str(home / "site.yaml")]
    assert code(app, ["ledger", *site_file]) == Exit.LEDGER_BROKEN
    assert code(app, [*typed, *site_file]) == Exit.LEDGER_BROKEN
    assert code(app, [*typed, "--lost", "1.0,0.02,120", *site_file]) == Exit.OK
    assert "holds 2 entries, 1 of them charged now" in capsys.readouterr().out
    restored = Ledger(site.ledger, site.privacy)
    restored.check(anchor)
    assert restored.entries() == [Entry(1.0, 0.02, 220)]
    assert [e["event"] for e in Audit(site.audit).events()] == ["init", "ledger-restore"]
