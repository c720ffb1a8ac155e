"""`wardround-site ledger`: what was released about this site's patients, and what a run would cost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.places import SiteOption, site_file
from conf.exits import Exit, Stop

if TYPE_CHECKING:
    from client.budget import Budget
    from client.ledger import Line
    from client.sitefile import SiteFile
    from strategies.privacy.accountant import Entry

ledger = typer.Typer(
    help="What was released about this site's patients, what is left, what a run would cost.",
    rich_markup_mode=None,
    context_settings={"max_content_width": 110, "terminal_width": 110},
)

Sigma = Annotated[float | None, typer.Option(help="noise, in units of what one patient can move")]
Rate = Annotated[float | None, typer.Option(help="chance of a patient to take part in a step; 1 = all")]
Steps = Annotated[int | None, typer.Option(help="noised steps")]
Population = Annotated[str, typer.Option(metavar="NAME", help="a budget in site.yaml privacy")]


@ledger.callback(invoke_without_command=True)
def show(
    context: typer.Context,
    site: SiteOption = None,
    sigma: Sigma = None,
    q: Rate = None,
    steps: Steps = None,
    population: Population = "patients",
) -> None:
    """Show spent, reserved and left, by run; with --sigma, --q and --steps also what such a run would add."""
    if context.invoked_subcommand is not None:
        return
    file = _site(site)
    proposed = None
    if (sigma, q, steps) != (None, None, None):
        if sigma is None or q is None or steps is None:
            raise Stop(Exit.CONFIG, "a proposed run needs --sigma, --q and --steps")
        proposed = _entry(sigma, q, steps)
        _budget(file, population)
    from client.ledger import Ledger

    book = Ledger(file.ledger, file.privacy)
    lines, waiting = book.lines()
    for name, budget in file.privacy.items():
        own = [line for line in lines if line.population == name]
        _population(name, budget, own, waiting)
        if proposed is not None and name == population:
            _proposal(name, budget, own, proposed)
    for name in sorted({line.population for line in lines} - set(file.privacy)):
        number = sum(line.population == name for line in lines)
        typer.echo(f"{name}: {number} entries and no budget; nothing more is released of them")
    typer.echo(f"{len(lines)} entries, unchanged; head {book.head.hex()}")


@ledger.command()
def price(
    q: Annotated[float, typer.Option(help="chance of a patient to take part in a step; 1 = all")],
    steps: Annotated[int, typer.Option(help="noised steps")],
    delta: Annotated[float, typer.Option(help="δ")],
    sigma: Sigma = None,
    epsilon: Annotated[float | None, typer.Option(help="instead of sigma: the ε to stay within")] = None,
    evaluations: Annotated[
        int, typer.Option(help="noised scores of a model on a split, of all patients")
    ] = 0,
    metrics_sigma: Annotated[float, typer.Option(help="their noise")] = 0.0,
) -> None:
    """Print what steps cost (PRV, one patient more or less), or the least noise for an ε. Needs no site."""
    if (sigma is None) == (epsilon is None):
        raise Stop(
            Exit.CONFIG, "give --sigma to see the cost, or --epsilon to see the noise it needs; one of them"
        )
    from strategies.privacy.accountant import calibrate, prv, rdp, replace_one

    try:
        scores = [_entry(metrics_sigma, 1.0, evaluations)] if evaluations else []
        if sigma is None:
            sigma = calibrate(epsilon or 0.0, delta, steps, q, scores)
            typer.echo(f"sigma={sigma:.3f}")
        entries = [_entry(sigma, q, steps), *scores]
        found = prv(entries, delta)
        typer.echo(f"epsilon={found:.4f}")
        typer.echo(f"replace_one={replace_one(entries, delta):.4f}")
    except ValueError as error:
        raise _said(error) from None
    if found == rdp(entries, delta) > 0:
        typer.echo("beyond PRV's reach: this is Rényi DP's upper bound", err=True)


@ledger.command()
def restore(
    backup: Annotated[Path, typer.Argument(help="a copy of ledger.jsonl, the newest there is")],
    anchor: Annotated[str, typer.Option(metavar="HEX", help="its last head, as noted elsewhere: 64 digits")],
    lost: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIGMA,Q,STEPS", help="what was released since, where no copy knows it; repeatable"
        ),
    ] = None,
    population: Population = "patients",
    site: SiteOption = None,
) -> None:
    """Bring a deleted, rolled back or damaged ledger forward from a backup and an anchor."""
    from client.audit import Audit
    from client.restore import restore

    try:
        head = bytes.fromhex(anchor)
    except ValueError:
        head = b""
    if len(head) != 32:
        raise Stop(Exit.CONFIG, f"--anchor {anchor!r}; need a head's 64 hexadecimal digits")
    file = _site(site)
    _budget(file, population)
    declared = [_declared(text) for text in lost or ()]
    done = restore(file.ledger, backup, head, declared, population)
    Audit(file.audit).add("ledger-restore", lines=done.lines, charged=done.added, anchor=anchor)
    typer.echo(f"{file.ledger} holds {done.lines} entries, {done.added} of them charged now")
    if done.kept:
        typer.echo(f"what was there before is {done.kept}")


def _site(given: Path | None) -> SiteFile:
    if (file := site_file(given)) is None:
        text = "no site.yaml in this folder; go to the site's folder, or give --site-file FILE"
        raise Stop(Exit.CONFIG, text)
    return file


def _budget(file: SiteFile, population: str) -> Budget:
    if population not in file.privacy:
        known = ", ".join(file.privacy) or "none"
        raise Stop(Exit.CONFIG, f"--population {population!r}; site.yaml privacy has {known}")
    return file.privacy[population]


def _entry(sigma: float, q: float, steps: int) -> Entry:
    from strategies.privacy.accountant import Entry

    try:
        return Entry(sigma, q, steps)
    except ValueError as error:
        raise _said(error) from None


def _declared(text: str) -> Entry:
    try:
        sigma, q, steps = text.split(",")
        return _entry(float(sigma), float(q), int(steps))
    except ValueError as error:
        if isinstance(error, Stop):
            raise
        raise Stop(Exit.CONFIG, f"--lost {text!r}; need SIGMA,Q,STEPS such as 1.0,0.02,500") from None


def _said(error: ValueError) -> Stop:
    return error if isinstance(error, Stop) else Stop(Exit.CONFIG, str(error))


def _population(name: str, budget: Budget, lines: list[Line], waiting: set[int]) -> None:
    from strategies.privacy.accountant import prv, replace_one

    def cost(some: Iterable[Line]) -> float:
        return prv((line.entry for line in some), budget.delta)

    whole, settled = cost(lines), cost(line for line in lines if line.n not in waiting)
    other = replace_one((line.entry for line in lines), budget.delta)
    typer.echo(
        f"{name}: ε {whole:.4f} of {budget.epsilon:g} at δ {budget.delta:g}: spent {settled:.4f},"
        f" reserved {whole - settled:.4f}, left {budget.epsilon - whole:.4f};"
        f" one patient in another's place: {other:.4f}"
    )
    for part, limit in budget.purposes.items():
        spent = cost(line for line in lines if line.purpose == part)
        typer.echo(f"  {part}: ε {spent:.4f} of {limit:g}")
    runs = dict.fromkeys((line.run, line.purpose) for line in lines)
    for run, purpose in runs:
        own = [line for line in lines if (line.run, line.purpose) == (run, purpose)]
        typer.echo(f"  {run}  {purpose}  ε {cost(own):.4f} alone  {_kinds(own, waiting)}")


def _kinds(lines: list[Line], waiting: set[int]) -> str:
    """The releases of a run: σ, q, steps, and the steps of them that were never said to be made."""
    from strategies.privacy.accountant import merged

    texts = [_steps(entry) for entry in merged(line.entry for line in lines)]
    if unsure := sum(line.entry.steps for line in lines if line.n in waiting):
        texts.append(f"{unsure} reserved")
    return ", ".join(texts)


def _proposal(name: str, budget: Budget, lines: list[Line], proposed: Entry) -> None:
    from strategies.privacy.accountant import prv

    before = [line.entry for line in lines]
    after = prv([*before, proposed], budget.delta)
    reasons = [
        text
        for wrong, text in (
            (after > budget.epsilon, f"epsilon is {budget.epsilon:g}"),
            (proposed.sigma < budget.min_sigma, f"min_sigma is {budget.min_sigma:g}"),
            (proposed.q > budget.max_q, f"max_q is {budget.max_q:g}"),
        )
        if wrong
    ]
    verdict = f"refused: privacy.{name}.{' and '.join(reasons)}" if reasons else "allowed"
    typer.echo(f"  with {_steps(proposed)} more: ε {after:.4f} of {budget.epsilon:g}, {verdict}")


def _steps(entry: Entry) -> str:
    return f"{entry.steps} steps at sigma={entry.sigma:g} q={entry.q:g}"
