"""What every reader of files agrees on: what it hands over, and why a case can be refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from conf.exits import Exit, Stop, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
else:  # an ingest that finds nothing new should cost next to nothing: numpy alone takes 0.1 s
    Array = Any

_LISTED = 8  # names quoted in a message
_T = TypeVar("_T")
Names = Mapping[int, int] | Mapping[str, int] | Mapping[int | str, int]


class Reason(StrEnum):
    """Why a case is refused: the fixed vocabulary of ingest."""

    UNREADABLE = "unreadable"
    NO_MASK = "image without mask"
    NO_IMAGE = "mask without image"
    SIZE = "mask of other size"
    GEOMETRY = "mismatched geometry"
    LABEL = "label outside the map"
    SHAPE = "unsupported shape"
    NOT_FINITE = "value that is not finite"
    SEVERAL_MASKS = "several masks"
    SEVERAL_FILES = "several files of one name"
    DUPLICATE = "same content as another case"
    NO_PATIENT = "no patient"
    SPLIT = "unknown split"
    NO_POSITION = "no slice position"
    SLICES = "too few slices"
    UNEVEN = "uneven slices"
    TILT = "gantry tilt"
    ORIENTATION = "mixed orientation"
    MIXED = "mixed slices"
    REPEATED = "repeated slice positions"
    MASK_KIND = "unsupported mask"
    BURNED_IN = "pixels to be reviewed"
    OBJECT = "unsupported kind of object"
    EXISTS = "already there"
    FRAME = "other frame of reference"
    CELL = "unusable table cell"
    BARRED = "forgotten patient"
    SCOUT = "scout or localiser"
    LIMIT = "beyond the parsing limits"


class Faulty(ValueError):
    """One case cannot be used. `detail` may quote the file: it stays at the site."""

    def __init__(self, reason: Reason, detail: str, unmapped: Sequence[str] = ()) -> None:
        self.detail = printable(" ".join(detail.split()))
        super().__init__(f"{reason}: {self.detail}")
        self.reason = reason
        self.unmapped = tuple(unmapped)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail, self.unmapped)


@dataclass(frozen=True)
class Naming:
    """How the numbers and names in a site's files become the federation's classes.

    Attributes:
        known: to class, from a file value, segment number or label, ROI name, `scheme:code` or class text
            (upper and lower case are one); None: numbers are classes.
        nonzero: 0 stays 0 and all else is 1.
        ignore: what is not known is left out and reported; otherwise it refuses the case.
        threshold: share of a fractional segmentation's maximum from which a voxel belongs to it.
        annotates: the classes somebody looked for; None: all.
    """

    known: Mapping[int | str, int] | None = None
    nonzero: bool = False
    ignore: bool = False
    threshold: float = 0.5
    annotates: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.known is not None:
            object.__setattr__(self, "known", all_folded(self.known))

    @classmethod
    def of(cls, label_map: LabelMap) -> Naming:
        """The same for a plain map, `nonzero` or None."""
        if isinstance(label_map, Naming):
            return label_map
        if label_map is None or label_map == "nonzero":
            return cls(nonzero=label_map is not None)
        return cls(dict(label_map.items()))

    def find(self, *names: int | str) -> int | None:
        """The class of the first of `names` that has one."""
        if self.nonzero:
            return 1
        if self.known is None:
            return next((n for n in names if isinstance(n, int) and 0 <= n <= 255), None)
        return next((self.known[f] for f in map(folded, names) if f in self.known), None)

    @property
    def accepted(self) -> str:
        """What a refusal says is accepted."""
        if self.known is None:
            return "0 to 255"
        return ", ".join(sorted((str(k) for k in self.known), key=_by_number)[:_LISTED])

    def plain(self) -> dict[str, object]:
        """All of it as JSON can hold it, for stamps."""
        known = None if self.known is None else sorted((str(k), v) for k, v in self.known.items())
        return {**asdict(replace(self, known=None)), "known": known}

    def to_json(self) -> dict[str, Any]:
        """For another process; `from_json` is its inverse."""
        return {**asdict(self), "known": None if self.known is None else list(self.known.items())}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Naming:
        """What `to_json` gave."""
        known = None if data["known"] is None else dict(data["known"])
        annotates = None if data["annotates"] is None else tuple(data["annotates"])
        return cls(**{**data, "known": known, "annotates": annotates})


LabelMap = Names | Literal["nonzero"] | Naming | None


def folded(name: int | str) -> int | str:
    """A name as it is compared: spaces and case do not tell two apart."""
    return " ".join(name.casefold().split()) if isinstance(name, str) else name


def all_folded(names: Mapping[int | str, _T]) -> dict[int | str, _T]:
    """`names` as they are compared.

    Raises:
        Stop: (`CONFIG`) two of them are the same then, and mean different things.
    """
    out: dict[int | str, _T] = {}
    for name, meaning in names.items():
        if out.setdefault(folded(name), meaning) != meaning:
            raise Stop(Exit.CONFIG, f"the label {name!r} is mapped twice; capitals and spaces do not count")
    return out


def listed(names: Iterable[object]) -> str:
    """The first few of `names`, for a message."""
    texts = [str(n) for n in names]
    return ", ".join(texts[:_LISTED]) + (", …" if len(texts) > _LISTED else "")


def _by_number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.lstrip("-").isdecimal() else (1 << 62, text)


@dataclass(frozen=True)
class Grid:
    """Where an assembled DICOM volume lies.

    Attributes:
        affine: 4x4, (column, row, slice) -> LPS+ mm. shape: columns, rows, slices.
        frame: FrameOfReferenceUID (0020,0052), empty if unknown.
    """

    affine: Array
    shape: tuple[int, int, int]
    frame: str = ""


@dataclass(frozen=True)
class Raw:
    """One case as its files hold it.

    Attributes:
        image: `CHW[D]`; None where a case is a row of a table alone. mask: `HW[D]` uint8 classes.
        affine: 4x4, array index to RAS+ mm. spacing: mm, in array order. groups: coded columns.
        labels: class or value by name. table: clinical columns by name; what is missing is absent.
        units: `HU`, `SUVbw`, or empty: values as stored.
        unmapped: labels in the files that are no class here and were left out. notes: what was decided
            while reading. Both quote the files and stay at the site.
    """

    image: Array | None
    mask: Array | None
    affine: Array
    spacing: tuple[float, ...]
    groups: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, float] = field(default_factory=dict)
    table: Mapping[str, float] = field(default_factory=dict)
    units: str = ""
    unmapped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A case that discovery found: what is known before pixels are read.

    Attributes:
        source: path below the root, local only. patient: as the file or manifest names the person.
        files: all that is read, so that a change is seen. read: opens them; raises `Faulty`.
        fault: why it is refused already. cells: of its manifest row, so that a change is seen.
    """

    source: str
    patient: str
    files: tuple[Path, ...]
    read: Callable[[LabelMap], Raw] | None = None
    site: str | None = None
    split: str | None = None
    fault: Faulty | None = None
    cells: tuple[str, ...] = ()


@contextmanager
def quietly() -> Iterator[None]:
    """Silence readers that warn of odd headers and quote them: patients' names would stand in logs."""
    logger = logging.getLogger("pydicom")
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(before)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a file makes its reader raise into `Faulty`."""
    try:
        yield
    except (Faulty, MemoryError):  # a guard has its own word for the second
        raise
    except Exception as error:  # a broken file makes format readers raise nearly anything
        raise Faulty(Reason.UNREADABLE, f"{path.name}: {type(error).__name__}: {error}") from error


def finite_float32(image: Array) -> Array:
    """`image` as float32.

    Raises:
        Faulty: NaN, infinity, or a value beyond float32.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        out = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(out).all():
        bad = int(out.size - np.isfinite(out).sum())
        raise Faulty(Reason.NOT_FINITE, f"{bad} of {out.size} image values are NaN or infinite")
    return out


def stored(image: Array) -> Array:
    """`image` in the smallest of uint8, int16 and float32 that a case's float32 can be got from.

    Raises:
        Faulty: NaN, infinity, or a value beyond float32.
    """
    if image.dtype.kind in "iub":
        low, high = (int(image.min()), int(image.max())) if image.size else (0, 0)
        import numpy as np

        for small in (np.uint8, np.int16):
            if np.iinfo(small).min <= low and high <= np.iinfo(small).max:
                return np.ascontiguousarray(image, dtype=small)
    return finite_float32(image)
