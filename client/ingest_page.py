"""The ingest report as files beside the site's key: text, JSON, and one HTML page with pictures.

The page is for the engineer of this site. It has no script and loads nothing; every text in it is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from html import escape
from pathlib import Path

from safetensors import SafetensorError

from client.thumbs import Thumb, colour, thumbs
from conf.exits import printable
from conf.files import no_space, write_atomic
from tasks.data.cache import Cache, Record
from tasks.data.summary import Group, Summary, as_text

SHOWN = 36  # cases with pictures: a page of a few MB, however many cases there are
_WINDOWS = {"HU": (-160.0, 240.0, "soft tissue, -160 to 240 HU")}

_STYLE = Path(__file__).with_suffix(".css")


def write_report(
    path: Path,
    site: str,
    summary: Summary,
    records: Mapping[str, Record],
    cache: Cache,
    names: Mapping[int, str] | None = None,
) -> None:
    """Write `path`.txt, .json and .html, readable by their owner only.

    Args:
        site: its name, or that of the data root. names: of classes, by value.
    """
    page = "".join(_page(site, summary, records, cache, names or {}))
    files = {
        ".txt": as_text(summary),
        ".json": json.dumps(asdict(summary), indent=1),
        ".html": page,
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for suffix, text in files.items():
        with no_space(path, "ingest again"):
            # names of files may hold bytes that are no text
            write_atomic(path.with_suffix(suffix), text.encode("utf-8", "backslashreplace"), mode=0o600)


def _page(
    site: str, summary: Summary, records: Mapping[str, Record], cache: Cache, names: Mapping[int, str]
) -> Iterator[str]:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield f"<title>Ingest report: {_text(site)}</title><style>{_STYLE.read_text()}</style></head><body>"
    yield '<div class="private">For the engineer of this site only: this page shows patients\' images and '
    yield "names of files. It stays here; do not send or upload it.</div>"
    now = datetime.now().astimezone().strftime("%-d %B %Y, %H:%M")
    yield f'<main><h1>Ingest report: {_text(site)}</h1><p class="when">{now}</p>'
    yield from _tiles(summary)
    yield from _groups("Cases left out, and why", "reason", summary.out, "No case was left out.")
    yield from _checks(summary)
    yield from _geometry(summary)
    yield from _balance(summary, names)
    yield from _counts("Labels that are no class here", "label", summary.unmapped)
    yield from _counts("Decided while reading", "note", summary.notes)
    yield from _gallery(records, cache, names)
    yield "</main></body></html>"


def _tiles(summary: Summary) -> Iterator[str]:
    out = summary.cases - summary.kept
    tiles = (
        ("cases found", summary.cases),
        ("kept", summary.kept),
        ("patients", summary.patients),
        ("left out", out),
    )
    yield '<div class="tiles">'
    for what, count in tiles:
        bad = ' class="tile bad"' if what == "left out" and count else ' class="tile"'
        yield f"<div{bad}><b>{count:,}</b><span>{what}</span></div>"
    yield "</div>"


def _groups(title: str, head: str, groups: Sequence[Group], none: str) -> Iterator[str]:
    yield f"<h2>{title}</h2>"
    if not groups:
        yield f'<div class="ok">{none}</div>'
        return
    rows = []
    for group in groups:
        more = f", … and {group.count - len(group.ids):,} more" if group.count > len(group.ids) else ""
        rows.append((_text(group.what), f"{group.count:,}", _text(", ".join(group.ids) + more)))
    yield _table((head, "cases", "which"), rows, ("", "n", "ids"))


def _checks(summary: Summary) -> Iterator[str]:
    found = [
        *(Group(f"same image, {g.what}", g.count, g.ids) for g in summary.same),
        *(Group(f"patients {g.what}", g.count, g.ids) for g in summary.several),
        *summary.odd,
    ]
    none = "No image occurs twice, no patient stands in several splits, sites or sexes, no mask is empty."
    yield from _groups("To be looked at", "finding", found, none)


def _geometry(summary: Summary) -> Iterator[str]:
    rows = []
    for title, ranges, unit in (("size", summary.shapes, "voxels"), ("spacing", summary.spacings, "mm")):
        for axes, axis in ranges.items():
            for letter, (low, middle, high) in zip(
                "xyz" if axes == "3D" else ("rows", "columns"), axis, strict=True
            ):
                rows.append((f"{title} {axes}, {letter}", *(f"{v:.4g}" for v in (low, middle, high)), unit))
    if rows:
        yield "<h2>Geometry</h2>"
        yield _table(("", "smallest", "median", "largest", "unit"), rows, ("", "n", "n", "n", ""))
    if summary.intensities:
        yield "<h2>Intensity</h2>"
        head = ("unit", "minimum", "1 %", "median", "99 %", "maximum")
        rows = [(_text(u), *(f"{v:.4g}" for v in row)) for u, row in summary.intensities.items()]
        yield _table(head, rows, ("", *"nnnnn"))
        yield "<p>Each number is the median over cases.</p>"


def _balance(summary: Summary, names: Mapping[int, str]) -> Iterator[str]:
    if summary.classes:
        yield "<h2>Classes in the masks</h2>"
        rows = [
            (_named(int(c), names), f"{n:,}", f"{share:.3%}") for c, (n, share) in summary.classes.items()
        ]
        yield _table(("class", "cases", "share of voxels"), rows, ("", "n", "n"))
    for label, counts in summary.labels.items():
        yield from _counts(f"Label {_text(label)}", "value", counts)


def _counts(title: str, head: str, counts: Mapping[str, int]) -> Iterator[str]:
    if counts:
        rows = [(_text(name), f"{n:,}") for name, n in counts.items()]
        yield f"<h2>{title}</h2>{_table((head, 'cases'), rows, ('', 'n'))}"


def _gallery(records: Mapping[str, Record], cache: Cache, names: Mapping[int, str]) -> Iterator[str]:
    kept = [(s, r) for s, r in sorted(records.items()) if r.entry is not None and "look" in r.facts]
    if not kept:
        return
    step = max(1, -(-len(kept) // SHOWN))
    shown = kept[::step]
    all_of = f"all {len(kept)}" if step == 1 else f"{len(shown)} of {len(kept):,}, every {step}th by name"
    present = sorted({int(c) for _, r in shown for c in r.facts.get("classes", ()) if c != "0"})
    yield f"<h2>Pictures ({all_of})</h2><div class='legend'>"
    for number in present:
        yield f'<span><i style="background:rgb{colour(number)}"></i>{_named(number, names)}</span>'
    if any(r.entry is not None and len(r.entry.shape) == 4 for _, r in shown):
        yield "<span>Radiological view: the patient's right (R) is on the left. Proportions in millimetres. "
        yield "The slice of each plane with most of the mask, or the middle one; first channel.</span>"
    flat = all(r.entry is None or len(r.entry.shape) == 3 for _, r in shown)
    yield f'</div><div class="cases{" flat" if flat else ""}">'
    for source, record in shown:
        yield from _case(source, record, cache)
    yield "</div>"


def _case(source: str, record: Record, cache: Cache) -> Iterator[str]:
    entry, facts = record.entry, record.facts
    if entry is None:
        return
    low, high, window = _WINDOWS.get(facts["units"], (*facts["intensity"][1:4:2], "1 % to 99 % of values"))
    yield '<figure><div class="planes">'
    try:
        for thumb in thumbs(cache.path(entry.digest), facts["look"], (low, high)):
            yield _plane(thumb)
    except (OSError, SafetensorError, ValueError):
        yield "<p>its object cannot be read</p>"
    size = " x ".join(str(n) for n in entry.shape[1:])
    spacing = " x ".join(f"{s:.3g}" for s in facts["spacing"])
    about = f"patient {entry.patient}, {size}, {spacing} mm, {window}"
    yield f"</div><figcaption><b>{_text(source)}</b><br><span>{_text(about)}</span></figcaption></figure>"


def _plane(thumb: Thumb) -> str:
    data = base64.b64encode(thumb.png).decode()
    places = zip("lrab", thumb.letters, strict=False)
    letters = "".join(f'<u class="{place}">{letter}</u>' for place, letter in places)
    size = f'alt="{thumb.view}" width="{thumb.width}" height="{thumb.height}"'
    return f'<div class="plane"><img {size} src="data:image/png;base64,{data}">{letters}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kinds: Sequence[str]) -> str:
    """A table of cells that are escaped already. `kinds`: class of each column."""
    titles = "".join(f'<th class="{k}">{h}</th>' for h, k in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{k}">{c}</td>' for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{titles}</tr>{body}</table>"


def _named(number: int, names: Mapping[int, str]) -> str:
    known = names.get(number, "background" if number == 0 else "")
    return _text(f"{number} {known}".strip())


def _text(text: str) -> str:
    return escape(printable(text))
