"""Classes that stand in DICOM headers, such as BodyPartExamined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydicom.datadict import tag_for_keyword

from conf.exits import Exit, Stop
from tasks.data.guard import Answer, Guard, shared
from tasks.data.header import opened
from tasks.data.source import Faulty, Found, LabelMap, Naming, Raw, Reason


def with_class(found: Iterable[Found], keyword: str, guard: Guard | None = None) -> list[Found]:
    """Cases of DICOM files with the class that one attribute of their first file names, if it says anything.

    Unlike a table's, a number there is not taken as it is: only what the label map gives a class is kept,
    since any attribute may identify somebody.

    Raises:
        Stop: (`CONFIG`) there is no such attribute.
    """
    if tag_for_keyword(keyword) is None:
        raise Stop(Exit.CONFIG, f"data.columns.attribute is {keyword}; need a keyword of DICOM PS3.6")
    return [
        f
        if f.read is None
        else replace(f, read=partial(_read, f.read, f.files[0], keyword, guard or shared()))
        for f in found
    ]


def text_of(path: Path, keyword: str) -> Iterator[Answer]:
    """Job: the text of one attribute, empty where it has none."""
    value = opened(path, pixels=False).get(keyword)
    yield {"text": "" if value is None else " ".join(str(value).split())}, None


def _read(
    read: Callable[[LabelMap], Raw], path: Path, keyword: str, guard: Guard, label_map: LabelMap
) -> Raw:
    names = Naming.of(label_map)
    text = str(guard.call(text_of, path, keyword=keyword)[0]["text"])
    found = None if names.nonzero else names.find(text, *([int(text)] if text.isdecimal() else []))
    if text and found is None and not names.ignore:
        raise Faulty(
            Reason.LABEL, f"{keyword} is {text!r}; accepted {names.accepted} (data.label_map)", [text]
        )
    raw = read(label_map)
    if found is None:
        return replace(raw, unmapped=(*raw.unmapped, text)) if text else raw
    return replace(raw, labels={**raw.labels, "label": float(found)})
