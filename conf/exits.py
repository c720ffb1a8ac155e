"""Numbered exit codes, each with a line of help, and the one error that carries them.

A user's mistake raises `Stop`: the message says what was wrong, what was given, what is accepted
and what to change. Command lines print it as one line and leave with its number.
"""

from enum import IntEnum


class Exit(IntEnum):
    """How a command ends. Numbers are stable: scripts may rely on them."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG = 10
    UNKNOWN_NAME = 11
    NO_ROUNDS = 12
    NO_CASES = 20
    ONE_PATIENT = 21
    TOO_MANY_SITES = 22
    SPLIT_LEAK = 23
    PARTLY = 24
    NO_DATA_ROOT = 25
    CACHE_DAMAGED = 26
    AUDIT_BROKEN = 27
    LEDGER_BROKEN = 28
    BUDGET = 29
    RUN_EXISTS = 30
    NO_RUN = 31
    CHECKPOINT_DAMAGED = 32
    DISK_FULL = 33
    CLAIM_REFUTED = 34
    TOO_FEW_REPLIES = 40
    SITE_REFUSED = 41
    SITE_BUSY = 42
    LINK = 43
    PACS_AWAY = 50
    PACS_REFUSED = 51
    PACS_AUTH = 52
    PACS_PARTLY = 53
    PACS_EMPTY = 54
    WARNING = 60
    PROBLEM = 61
    INTERRUPTED = 130


HELP: dict[Exit, str] = {
    Exit.OK: "everything asked for was done",
    Exit.INTERNAL: "a defect of wardround; run again with --debug and report the traceback",
    Exit.USAGE: "the command line could not be understood; see --help",
    Exit.CONFIG: "a setting has the wrong type or is out of range; the message names it",
    Exit.UNKNOWN_NAME: "no such task, model, loss or strategy; the message lists the known ones",
    Exit.NO_ROUNDS: "federation.rounds must be at least 1",
    Exit.NO_CASES: "no usable case was found; check data.root, the manifest and its columns",
    Exit.ONE_PATIENT: "one patient cannot be split into training and test; add patients",
    Exit.TOO_MANY_SITES: "a site has no patient to train on; use fewer sites",
    Exit.SPLIT_LEAK: "a patient stands in two splits; correct the manifest's split column",
    Exit.PARTLY: "some cases were refused, each listed with its reason; the others are usable",
    Exit.NO_DATA_ROOT: "data.root does not exist or cannot be read",
    Exit.CACHE_DAMAGED: "a cached case does not match its digest; remove the cache and ingest again",
    Exit.AUDIT_BROKEN: "the audit log is not what was written to it; keep it and find out who changed it",
    Exit.LEDGER_BROKEN: "the privacy ledger was deleted, cut or changed; see wardround-site ledger restore",
    Exit.BUDGET: "the hospital's privacy budget does not allow it; wardround-site ledger shows what is left",
    Exit.RUN_EXISTS: "the run directory exists; choose another run.dir or use wardround resume",
    Exit.NO_RUN: "this directory is not a wardround run",
    Exit.CHECKPOINT_DAMAGED: "no intact checkpoint is left that this run can continue from",
    Exit.DISK_FULL: "the disk is full; nothing was lost: free space and use wardround resume",
    Exit.CLAIM_REFUTED: "the audit shows more leakage than the run claims; do not release its model",
    Exit.TOO_FEW_REPLIES: "fewer valid replies than federation.min_replies; see journal.jsonl",
    Exit.SITE_REFUSED: "a site refused the plan; its code is in the message",
    Exit.SITE_BUSY: "another process works on this site already; let it end or stop it first",
    Exit.LINK: "SuperLink or a key to it is not what this process needs; the message says which",
    Exit.PACS_AWAY: "the archive (PACS) cannot be reached or went away; what came is kept: pull again",
    Exit.PACS_REFUSED: "the archive refuses this site or what it asks; check address, AE titles and query",
    Exit.PACS_AUTH: "the archive wants other credentials, or a certificate is not trusted",
    Exit.PACS_PARTLY: "the archive did not give some instances; the others are kept: pull again for them",
    Exit.PACS_EMPTY: "nothing in the archive matches the query",
    Exit.WARNING: "doctor has warnings and no problem; each line says what to do",
    Exit.PROBLEM: "doctor found a problem that will make this site fail; its line says what to do",
    Exit.INTERRUPTED: "interrupted; wardround resume continues the run",
}


class Stop(ValueError):
    """A run or command ends here, for a reason its user can act on.

    Attributes:
        exit: the numbered exit code.
    """

    def __init__(self, exit: Exit, message: str) -> None:
        super().__init__(message)
        self.exit = exit


def printable(text: str) -> str:
    """Text as it may stand in a terminal: names from outside can hold escape sequences, or be no text."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
