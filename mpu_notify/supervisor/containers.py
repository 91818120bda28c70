"""What a listener belongs to, from the ContainerProcessState that came with it (OCI runtime-spec, config-linux.md)."""

from __future__ import annotations

import json
from typing import NamedTuple

from mpu_notify.oci.agent import metadata


class StateError(Exception):
    """The state cannot be read; the text says why."""


class Description(NamedTuple):
    """Whose processes a listener serves, and by which route it came."""

    container: str
    route: str
    pid: int | None = None

    @classmethod
    def of(cls, state: bytes) -> Description:
        """From a ContainerProcessState: its metadata, which is ours, else the runtime's words. Raises StateError."""
        whole = _object(state, "the state")
        text = whole.get("metadata")
        ours = _object(text, "its metadata") if isinstance(text, str) and text else {}
        inner = whole.get("state")
        runtimes = inner if isinstance(inner, dict) else {}
        pid = whole.get("pid")
        container = _text(ours.get("container")) or _text(runtimes.get("id")) or "unknown"
        return cls(container, _text(ours.get("route")) or "unknown", pid if type(pid) is int else None)

    def state(self) -> bytes:
        """A ContainerProcessState that says this."""
        ours = metadata(self.container, self.route)
        return json.dumps({"ociVersion": "1.1.0", "fds": ["seccompFd"], "metadata": ours}).encode()


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _object(text: bytes | str, what: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{what} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise StateError(f"{what} is no JSON object")
    return found
