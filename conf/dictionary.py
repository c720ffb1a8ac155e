"""What the classes of a federation are called, and what a site calls them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conf.section import Frozen, Own


class Label(Frozen):
    """One class of the federation.

    Attributes:
        value: what masks and class labels hold. code: scheme, value and meaning, such as
            `[SCT, "10200004", Liver]`.
    """

    name: str = Field(min_length=1, max_length=64)
    value: int = Field(ge=0, le=255)
    code: tuple[str, str, str] | None = None


class Labels(Frozen):
    """The federation's label dictionary, and a site's own names for it.

    Attributes:
        names: to the dictionary's name, from a file value, a segment's number, label or `scheme:code`, the
            name of a ROI, or a class's text. The dictionary's own names and codes need no line here.
        unmapped: what happens to a case with another label.
        annotates: the classes this site looks for; none = all of the dictionary.
        threshold: share of the maximum from which a voxel of a FRACTIONAL segmentation belongs to it.
    """

    dictionary: tuple[Label, ...] = ()
    names: dict[Own, str] = Field(default_factory=dict)
    unmapped: Literal["refuse", "ignore"] = "refuse"
    annotates: tuple[str, ...] | None = None
    threshold: float = Field(0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _one_dictionary(self) -> Labels:
        for what in ("name", "value"):
            seen = [getattr(label, what) for label in self.dictionary]
            if twice := sorted({str(s) for s in seen if seen.count(s) > 1}):
                raise ValueError(f"labels.dictionary has the {what} {', '.join(twice)} twice")
        known = [label.name for label in self.dictionary]
        for where, used in (("names", self.names.values()), ("annotates", self.annotates or ())):
            if other := sorted(set(used) - set(known)):
                listed = ", ".join(known) or "none"
                raise ValueError(f"labels.{where} has {', '.join(other)}; labels.dictionary has {listed}")
        return self
