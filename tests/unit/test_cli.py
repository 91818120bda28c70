"""The command line as a user meets it: help, versions, and mistakes said in one line."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from mpu_notify.cli.main import VERBS


def mpu_notify(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mpu-notify", *arguments], capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    done = mpu_notify(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: mpu-notify {verb} ")
    assert "exit status:" in done.stdout
    assert "None" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_the_help_lists_all_verbs() -> None:
    done = mpu_notify("--help")
    assert done.returncode == 0
    assert [verb for verb in VERBS if not re.search(rf"^    {verb}\b", done.stdout, re.MULTILINE)] == []


def test_the_version_is_told() -> None:
    done = mpu_notify("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("mpu-notify 0.")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["--fly"], ["ps", "--fly"], ["demo", "fly"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    done = mpu_notify(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: mpu-notify")


def test_a_missing_driver_is_1_and_says_what_to_do() -> None:
    done = mpu_notify("ps", "--device", "/no/such/nvidiactl")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mpu-notify: cannot open the driver: /no/such/nvidiactl: No such file or directory; ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    done = subprocess.run(
        ["sh", "-c", "mpu-notify --help | head -c 1"], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.stderr == ""


def test_the_hook_is_a_command_too() -> None:
    done = subprocess.run(["mpu-notify-hook", "--help"], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mpu-notify-hook ")


def test_and_the_runtime(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_text('#!/bin/sh\necho "$@"\n')
    real.chmod(0o755)
    config = tmp_path / "config.toml"
    config.write_text(f'[runtime]\npath = "{real}"\n')
    environment = {**os.environ, "MPU_NOTIFY_CONFIG": str(config)}
    done = subprocess.run(["mpu-notify-runtime", "list"], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "list\n"
