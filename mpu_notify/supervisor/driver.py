"""Which era the loaded driver is of, and what is to be translated for it.

A driver that was asked (see ``probe``) says best what it does. Asking takes privilege and opens a GPU, so it is done
once and the answer kept in a file, which is good for as long as the same driver is loaded. Without it flavour and
version tell; where these tell nothing, everything is translated, which is right on every driver.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from mpu_notify.errors import MpuNotifyError
from mpu_notify.notify.monitor import ControlNodeError, identify
from mpu_notify.notify.protocol import Device
from mpu_notify.rm import eras
from mpu_notify.rm.abi import CONTROL_NODE_MAJOR, CONTROL_NODE_MINOR
from mpu_notify.rm.controls import Control
from mpu_notify.rm.eras import Driver, Era

ERA_FILE = Path("/run/mpu-notify/era.json")


class EraFileError(MpuNotifyError):
    """The file that keeps what a driver was asked cannot be written."""


class How(Enum):
    """How an era was found."""

    ASKED = "the driver was asked"
    VERSION = "by flavour and version"
    NOT = "not known"


class Identity(NamedTuple):
    """What tells one loaded driver from another: its version file, and the control node it is reached by."""

    version_text: str | None
    node: Device | None

    @property
    def driver(self) -> Driver | None:
        """What the version file says; None too where the node is not the driver's own, so it says nothing of it."""
        if self.version_text is None or self.node is None:
            return None
        is_drivers = self.node[:3] == (True, CONTROL_NODE_MAJOR, CONTROL_NODE_MINOR)
        return eras.parse_version(self.version_text) if is_drivers else None


@dataclass(frozen=True)
class Finding:
    """The era of a driver, None where it is not known, how it was found, and for a reader what was seen."""

    identity: Identity
    era: Era | None
    how: How
    seen: str = ""


@dataclass(frozen=True)
class Places:
    """Where to look: other ones in tests."""

    version_file: Path = eras.VERSION_FILE
    era_file: Path = ERA_FILE


def look(node: Path, places: Places) -> Identity:
    """Which driver is loaded: two small files, no driver is touched."""
    text = None
    with suppress(OSError):
        text = places.version_file.read_text(encoding="utf-8", errors="replace")
    try:
        return Identity(text, identify(node))
    except ControlNodeError:
        return Identity(text, None)


def find(node: Path, places: Places | None = None) -> Finding:
    """The era of the driver behind a control node, without asking it."""
    places = places or Places()
    identity = look(node, places)
    kept = _read(places.era_file)
    if kept is not None and kept.identity == identity:
        return kept
    driver = identity.driver
    era = eras.by_version(driver) if driver else None
    return Finding(identity, era, How.NOT if era is None else How.VERSION)


def conclude(identity: Identity, possible: frozenset[Era], seen: str) -> Finding:
    """What follows from what a driver was asked, which may leave several eras possible: then its version decides."""
    if len(possible) == 1:
        return Finding(identity, next(iter(possible)), How.ASKED, seen)
    driver = identity.driver
    era = eras.by_version(driver) if driver else None
    if era in possible:
        return Finding(identity, era, How.ASKED, f"{seen}; the rest by its version")
    if possible <= {Era.THREAD_BOTH, Era.THREAD_ALL}:
        return Finding(identity, Era.THREAD_BOTH, How.ASKED, f"{seen}; or thread-all, which is translated alike")
    return Finding(identity, None, How.NOT, seen)


def write(finding: Finding, file: Path) -> None:
    """Keep it for `find`, atomically: a reader sees the old file or the new one. Raises EraFileError."""
    document = {
        "era": finding.era.value if finding.era else None,
        "how": finding.how.name.lower(),
        "seen": finding.seen,
        "version_text": finding.identity.version_text,
        "node": finding.identity.node,
    }
    try:
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        made = file.with_name(f".{file.name}.{os.getpid()}")
        made.write_text(json.dumps(document) + "\n", encoding="utf-8")
        made.chmod(0o644)
        made.replace(file)
    except OSError as error:
        raise EraFileError(f"cannot write {file}: {error.strerror}; name another file with --write") from error


def _read(file: Path) -> Finding | None:
    """What was kept; None where nothing is, or what is there is not ours to believe."""
    try:
        with file.open(encoding="utf-8") as opened:
            # Whoever may write it may have us leave out a translation.
            if os.fstat(opened.fileno()).st_uid not in (0, os.geteuid()):
                return None
            document = json.load(opened)
        node = document["node"]
        identity = Identity(document["version_text"], None if node is None else Device(*node))
        era = None if document["era"] is None else Era(document["era"])
        return Finding(identity, era, How[document["how"].upper()], str(document["seen"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Treatment(NamedTuple):
    """What a supervisor does with a driver: the rows that it translates, and whether processes must be summed up."""

    rows: tuple[Control, ...]
    by_thread: bool


class Watch:
    """Keeps an eye on which driver is loaded. `translate` is "auto" or "always", of the command line."""

    def __init__(self, node: Path, translate: str, finding: Finding, places: Places | None = None) -> None:
        self._node = node
        self._everything = translate == "always"
        self._places = places or Places()
        self.finding = finding

    @property
    def treatment(self) -> Treatment:
        """What is to be done with the driver that was last seen."""
        era = self.finding.era
        return Treatment(eras.table_for(era, everything=self._everything), eras.counts_by_thread(era))

    def changed(self) -> bool:
        """Look again; whether another driver, or more about this one, is to be seen. Cheap."""
        identity = look(self._node, self._places)
        if identity == self.finding.identity and self.finding.how is How.ASKED:
            return False
        before, self.finding = self.finding, find(self._node, self._places)
        return self.finding != before
