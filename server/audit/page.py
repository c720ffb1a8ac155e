"""An audit in words: on the screen, and as a page that has no script and loads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from conf.files import no_space, write_atomic

Found = dict[str, Any]
Rows = list[tuple[str, str]]

NOT_PRIVATE = "The run has no differential privacy: it claims no ε, and none was audited."
LIMITS = (
    "The bound is what this attack showed, never the ε of the run; far below the claim, it proves no claim.",
    "The replay uses code and plan as they are here now, canaries alone, and a clip norm that stands still.",
    "Membership is exact, of this run's own patients: it is for you, and no part of what the run promises.",
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f5f6f8;margin:0}
main{max-width:52rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin:0 0 .6rem}
section{background:#fff;border:1px solid #dde1e7;border-radius:8px;padding:1rem 1.2rem;margin:1rem 0}
.words{font-size:1.25rem;margin:.2rem 0}.verdict{font-weight:600;color:#0b6b3a}
.refuted .verdict{color:#b3261e}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .8rem .3rem 0;text-align:left}
th{font-weight:600;border-bottom:1px solid #dde1e7}td+td,th+th{font-variant-numeric:tabular-nums}
.note{color:#5a6675;font-size:.9rem}svg{width:100%;height:auto}
"""


def show(found: Found, run: Path) -> None:
    """Print an audit."""
    console = Console(highlight=False, markup=False)
    if claim := found["canaries"]:
        console.print(claim["words"], style="bold", soft_wrap=True)
        console.print(_beside(claim), soft_wrap=True)
        console.print(claim["verdict"], style="bold red" if claim["refuted"] else "bold", soft_wrap=True)
        console.print(_table(("replay", ""), details(claim)))
    else:
        console.print(NOT_PRIVATE, soft_wrap=True)
    console.print(_table(*_attacks(found["membership"])))
    console.print(_patients(found["membership"]), soft_wrap=True)
    console.print(f"page: {run / 'audit.html'}", soft_wrap=True)


def save(found: Found, run: Path) -> None:
    """Write `audit.html` into the run's directory."""
    with no_space(run, "wardround audit again"):
        write_atomic(run / "audit.html", "".join(_page(found, run.name)).encode())


def details(claim: Found) -> Rows:
    """What was replayed and seen, by name."""
    guesses, noise = claim["guesses"], claim["noise"]
    return [
        ("steps", f"{claim['steps']} of {claim['held']} that the run's ledgers hold at a site"),
        ("mechanism", f"sigma {claim['sigma']:g}, q {claim['q']:g}, delta {claim['delta']:g}"),
        ("canaries", f"m = {claim['m']}, {claim['included']} of them included, seed {claim['seed']}"),
        (
            "guesses",
            f"{guesses['in']} in and {guesses['out']} out, {guesses['right']} of "
            f"{guesses['in'] + guesses['out']} right",
        ),
        (
            "noise",
            f"deviation {noise['measured']:.3f} [{noise['low']:.3f}–{noise['high']:.3f}] times the plan's "
            "(99.9 %)",
        ),
    ]


def _beside(claim: Found) -> str:
    claimed = claim["epsilon_claimed"]
    return "claimed: ε " + (
        "without bound" if claimed is None else f"≤ {claimed:.4f} at delta {claim['delta']:g}, by PRV"
    )


def _attacks(membership: Found) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header: tuple[str, ...] = (
        "membership attack",
        "AUROC (95 %)",
        f"TPR at {100 * membership['fpr']:g} % FPR",
    )
    rows: list[tuple[str, ...]] = [
        (name, f"{one['auroc']:.3f} [{one['low']:.3f}–{one['high']:.3f}]", f"{one['tpr']:.3f}")
        for name, one in membership["attacks"].items()
    ]
    return header, rows


def _patients(membership: Found) -> str:
    others, allowed = membership["others"], int(membership["fpr"] * membership["others"])
    mistaken = "none" if not allowed else f"at most {allowed}"
    return (
        f"{membership['members']} training patients (members), {others} test patients: {mistaken} may "
        f"be taken for a member; {membership['references']} reference models, "
        f"seed {membership['seed']}"
    )


def _table(header: tuple[str, ...], rows: list[Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _page(found: Found, name: str) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield f"<title>Audit: {escape(name)}</title><style>{_STYLE}</style></head><body><main>"
    yield f"<h1>Audit: {escape(name)}</h1>"
    if claim := found["canaries"]:
        yield f"<section{' class=refuted' if claim['refuted'] else ''}><h2>The claim against canaries</h2>"
        yield f'<p class="words">{escape(claim["words"])}</p><p>{escape(_beside(claim))}</p>'
        yield f'<p class="verdict">{escape(claim["verdict"])}</p>'
        yield from _rows(("replay", ""), details(claim))
        yield from _histogram(claim["scores"])
        yield "</section>"
    else:
        yield f"<section><p>{escape(NOT_PRIVATE)}</p></section>"
    yield "<section><h2>Membership</h2>"
    yield from _rows(*_attacks(found["membership"]))
    yield f'<p class="note">{escape(_patients(found["membership"]))}</p></section>'
    limits = LIMITS if found["canaries"] else LIMITS[-1:]
    yield "".join(f'<p class="note">{escape(line)}</p>' for line in limits) + "</main></body></html>"


def _rows(header: tuple[str, ...], rows: list[Any]) -> Iterator[str]:
    yield "<table><tr>" + "".join(f"<th>{escape(text)}</th>" for text in header) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>"
    yield "</table>"


def _histogram(scores: dict[str, list[int]]) -> Iterator[str]:
    """Scores of canaries that were there, upwards, and of those that were not, downwards."""
    most = max(*scores["in"], *scores["out"], 1)
    yield '<svg viewBox="0 0 640 190" role="img" aria-label="scores of canaries">'
    for name, colour, sign in (("in", "#D55E00", -1), ("out", "#0072B2", 1)):
        for place, count in enumerate(scores[name]):
            height = 80 * count / most
            top = 90 - height if sign < 0 else 91
            bar = f'x="{32 * place + 1}" y="{top:.1f}" width="30" height="{height:.1f}"'
            yield f'<rect {bar} fill="{colour}"/>'
        yield f'<text x="4" y="{14 if sign < 0 else 184}" font-size="12" fill="{colour}">{name}</text>'
    yield '<text x="636" y="184" font-size="12" text-anchor="end" fill="#5a6675">higher score →</text></svg>'
