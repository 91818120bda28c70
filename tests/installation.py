"""The package where every user can read it: the tests as another user cannot rely on where they themselves lie."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import cffi

import mpu_notify

#: The interpreter itself, not the link to it in a virtual environment that others may not read.
PYTHON = Path(sys.executable).resolve()


@cache
def public_copy() -> Path:
    """A directory for PYTHONPATH with the package and what it needs; it is removed when the tests end."""
    directory = Path(tempfile.mkdtemp(prefix="mpu-notify-test-", dir="/tmp"))
    atexit.register(shutil.rmtree, directory)
    directory.chmod(0o755)
    site = Path(cffi.__file__).parent.parent
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in (Path(mpu_notify.__file__).parent, site / "cffi", site / "psutil"):
        shutil.copytree(folder, directory / folder.name, ignore=ignore)
    for file in (*site.glob("_cffi_backend*.so"), site / "pyseccomp.py", *site.glob("tomli")):
        copy = shutil.copytree if file.is_dir() else shutil.copy
        copy(file, directory / file.name)
    return directory


def command() -> list[str]:
    """The command `mpu-notify` of that copy, for any user."""
    return ["env", f"PYTHONPATH={public_copy()}", str(PYTHON), "-m", "mpu_notify.cli.main"]
