"""Forked children that never return into their parent's code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

_BUG_STATUS = 70  # EX_SOFTWARE, sysexits.h


def fork(child: Callable[[], int]) -> int:
    """Fork; the child runs the function and exits with what it returns. Returns the child's pid to the parent.

    An exception that the function lets through is a bug: it is shown and the child exits with 70.
    """
    _flush()
    pid = os.fork()
    if pid:
        return pid
    status = _BUG_STATUS
    try:
        status = child()
    except Exception:  # noqa: BLE001 - nobody is above us to let it through to
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # the descriptor was closed when Python started
            stream.flush()
