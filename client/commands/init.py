"""`wardround-site init`: a new site's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.places import NAME
from conf.exits import Exit, Stop

_FILE = """\
# What this hospital says about itself: read by wardround-site and the trainer, never sent.
# Relative paths count from this file's folder.

name: {name}          # as the federation knows this site

data:
  root: {root}        # DICOM series, NIfTI or pictures; only read, never written
  # manifest: manifest.csv            # a CSV below root with a case per row
  # columns: {{image: image, label: label, patient: patient, site: null, split: null}}
  # label_map: {{0: 0, 255: 1}}         # file values to classes, or: nonzero
  # labels:                           # instead: the federation's dictionary, and this site's names for it
  #   dictionary: [{{name: liver, value: 1}}, {{name: tumour, value: 2}}]
  #   names: {{Leber: liver, 7: tumour}}
  # workers: 0                        # processes that read; 0: one per core

cache: cache          # cases in pseudonymous form, made by: wardround-site ingest
state: state          # plans, replies, incidents, ingest reports
key: state/patient.key  # names patients. Back it up: without it the same patient gets another name
audit: audit.jsonl    # every request, decision and release; check it with: wardround-site audit
ledger: ledger.jsonl  # what was released about the patients: wardround-site ledger. Back it up after runs

# policy:             # what the coordinator may ask for
#   tasks: [segmentation]             # default: every installed one
#   statistics: exact                 # noised: only under noise, charged; none: scores stay home
#   minimum_cell: 10                  # fewest patients behind any number that leaves
#   privacy: optional                 # or required: no plan without differential privacy

# privacy:            # limits over all runs together, by population of patients; these are the defaults
#   patients: {{epsilon: 8, delta: 1.0e-5, min_sigma: 0.3, max_q: 1, purposes: {{}}}}
#   # purposes: {{statistics: 1}}       # less for what serves one: training, statistics, metrics, calibration

# pacs:               # the archive that wardround-site ingest --pacs pulls from
#   source: https://pacs.example/dicom-web   # or TITLE@host:port
#   query: [Modality=CT, StudyDate=20260101-]
#   folder: data/pacs                 # below data.root
#   login_file: state/pacs.login      # user:password, mode 600; or token_file

# coordinator:        # what wardround-site doctor tries to reach
#   address: coordinator.example:443
#   authority: coordinator.crt        # certificates to trust, PEM
#   key: state/node.key               # this node's private key, mode 600

# val_fraction: 0.1
# test_fraction: 0.2
# device: auto
"""


def init(
    folder: Annotated[Path, typer.Argument(help="the new site's folder")],
    name: Annotated[str, typer.Option(help="the site's name in the federation")],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="data root  [default: data/ in the folder]")
    ] = None,
) -> None:
    """Make a site's folder: site.yaml to fill in, the key that names patients, places for its owner only."""
    from pydantic import TypeAdapter, ValidationError

    from client.audit import Audit
    from conf.files import write_atomic
    from conf.schema import SiteName
    from tasks.data.patients import fingerprint, patient_key

    try:
        TypeAdapter(SiteName).validate_python(name)
    except ValidationError:
        accepted = "letters, digits, - _ and . (64 at most), a letter or digit first"
        raise Stop(Exit.CONFIG, f"--name {name!r}; accepted are {accepted}") from None
    file, key = folder / NAME, folder / "state" / "patient.key"
    if file.exists():
        raise Stop(Exit.CONFIG, f"{file} exists; nothing was changed: edit it, or choose another folder")
    try:
        for place in (folder, folder / "cache", folder / "state", folder / "run"):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            place.chmod(0o700)
        if data is None:
            (folder / "data").mkdir(mode=0o700, exist_ok=True)
        Audit(folder / "audit.jsonl").add("init", site=name, key=fingerprint(patient_key(key)))
        # JSON's quoted text is YAML's too
        text = _FILE.format(name=_quoted(name), root=_quoted(str(data.absolute() if data else "data")))
        write_atomic(file, text.encode(), mode=0o600)  # last: a site without it is made again
    except OSError as error:
        raise Stop(Exit.CONFIG, f"{folder} cannot be made a site's folder: {error.strerror}") from None
    typer.echo(
        f"{file} describes site {name}; {key} names its patients: keep a copy where only you can read it"
    )
    typer.echo(f"next: put the data root into {file}, then wardround-site ingest --site-file {file}")


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)
