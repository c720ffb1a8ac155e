"""What an ingest costs: slices a second, a run without work, and memory, from a site's folder by its command.

    python bench/ingest.py [--slices 2000] [--folder DIR]

Generates a CT study of uncompressed 512x512 slices, ingests it on one core, ingests it again, ingests it with
memory watched, and the same number of slices in eight studies on all cores. Prints a line a figure with its
limit; leaves with 1 where one is missed. It wants about 4 GB below DIR. Other work on the machine shows.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from row import row

SIDE = 512
COMMAND = Path(sys.executable).with_name("wardround-site")


def study(folder: Path, slices: int, patient: str) -> None:
    """A CT series as a scanner writes it: 16 bits, a body with noise."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(list(patient.encode()))
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    body = np.where(x**2 / 0.7 + y**2 / 0.4 < 1, 1040, 24)
    series, reference = generate_uid(), generate_uid()
    for k in range(slices):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
        ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series, reference, reference
        ds.PatientID, ds.PatientName, ds.PatientSex, ds.PatientAge = patient, "Bench^Ann", "F", "041Y"
        ds.Modality, ds.Manufacturer, ds.InstanceNumber = "CT", "SIEMENS", k + 1
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.ImagePositionPatient = [-200, -200, 0.5 * k]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [0.78, 0.78], 0.5
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
        ds.Rows = ds.Columns = SIDE
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = (body + draw.integers(-20, 20, body.shape)).astype("<u2").tobytes()
        ds.save_as(folder / f"{k:05}.dcm", enforce_file_format=True)


def site(folder: Path, root: Path, workers: int) -> Path:
    """A new site over a data root."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(
        [COMMAND, "init", folder, "--name", "bench", "--data", root], check=True, stdout=subprocess.DEVNULL
    )
    file = folder / "site.yaml"
    section = f"  columns: {{label: null}}\n  workers: {workers}\n\ncache: cache "
    file.write_text(file.read_text().replace("\ncache: cache ", section, 1))
    return file


def ingest(file: Path, cores: set[int], watch: bool = False) -> tuple[float, float, float]:
    """Seconds by the clock and of work, and the largest PSS of all its processes in GB, where watched."""
    began, before, peak = time.perf_counter(), work(), 0.0
    os.sched_setaffinity(0, cores)
    process = subprocess.Popen(
        [COMMAND, "ingest", "--site-file", file], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    os.sched_setaffinity(0, ALL)
    while watch and process.poll() is None:
        peak = max(peak, sum(pss(process.pid)))
        time.sleep(0.05)
    _, said = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the ingest ended with {process.returncode}: {said.decode()}")
    return time.perf_counter() - began, work() - before, peak


def work() -> float:
    """Seconds that ended children have computed: on a quiet core, those of the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pss(pid: int) -> Iterator[float]:
    """GB of a process and of those below it."""
    try:
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            yield process.memory_full_info().pss / 1e9
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return


ALL = os.sched_getaffinity(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", type=int, default=2000)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    count: int = asked.slices
    home = Path(tempfile.mkdtemp(prefix="ingest-", dir=asked.folder))
    try:
        study(home / "one" / "study", count, "A")
        for i in range(8):
            study(home / "eight" / f"study{i}", count // 8, f"P{i}")
        one = {min(ALL)}
        print(f"{count} slices of {SIDE}x{SIDE}, {len(ALL)} cores", flush=True)
        file = site(home / "site", home / "one", 1)
        first, busy, _ = ingest(file, one)
        note = f"{count / busy:.0f} a second of work"
        kept = [row("ingest: one study, one core", count / first, "slices/s", 60, "least", note=note)]
        second, _, _ = ingest(file, one)
        share = second / first
        kept.append(row("ingest again, nothing new", 100 * share, "%", 2, note=f"{second:.2f} s"))
        _, _, peak = ingest(site(home / "site", home / "one", 0), ALL, watch=True)
        kept.append(row("ingest: one study, PSS of all processes", peak, "GB", 1.5))
        took, busy, peak = ingest(site(home / "site", home / "eight", 0), ALL, watch=True)
        rate = count // 8 * 8 / took / len(ALL)
        note = f"{count // 8 * 8 / busy:.0f} a second of work"
        kept.append(
            row("ingest: eight studies, all cores, per core", rate, "slices/s", 60, "least", note=note)
        )
        row("ingest: eight studies, PSS of all processes", peak, "GB")
    finally:
        shutil.rmtree(home)
    raise SystemExit(not all(kept))


if __name__ == "__main__":
    main()
