"""What settings are made of: immutable records, names in tables, numbers or names of a site's files."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Scalar = bool | int | float | str | None
Value = Scalar | list[Scalar] | dict[str, Scalar | list[Scalar]]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]


def _own(name: object) -> object:
    """Keys of JSON are texts: one that is a whole number is that number."""
    return int(name) if isinstance(name, str) and re.fullmatch(r"-?\d{1,9}", name) else name


#: a number or name as a site's files hold it
Own = Annotated[int | str, BeforeValidator(_own)]


class Frozen(BaseModel):
    """Immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Section(BaseModel):
    """A name in one of the tables, and that entry's own parameters (checked when it is built)."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Value] = Field(init=False)
    name: Name

    @property
    def parameters(self) -> dict[str, Any]:
        """All but the name; mappings in the order of their keys, as where a canonical plan was read."""
        given = (self.__pydantic_extra__ or {}).items()
        return {name: dict(sorted(v.items())) if isinstance(v, dict) else v for name, v in given}
