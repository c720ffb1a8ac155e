"""An archive for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.client.pacs.orthanc import Orthanc, serving


@pytest.fixture(scope="package")
def archive(real: Callable[[str], Path]) -> Iterator[Orthanc]:
    """Holds the six series and one patient with RTSTRUCT."""
    with serving() as orthanc:
        orthanc.send(sorted(real("dicom_series").rglob("*.dcm")))
        orthanc.send(sorted((real("sts_rtstruct") / "STS_003").rglob("*.dcm")))
        yield orthanc
