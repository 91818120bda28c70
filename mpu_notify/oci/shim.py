"""The runtime shim's second half: rewrites the spec of a container that opted in, then becomes the real runtime.

csrc/runtime.c starts this, and only where a container seems to have opted in:

    python3 -I -S shim.py CONFIGURATION RUNTIME BUNDLE LOG LOG-FORMAT CONTAINER ARGUMENTS...

The words before ARGUMENTS are what it found out, empty where there is none. Each import here delays a container.
"""

# Pathlib would be a large part of the shim's time.
# ruff: noqa: PTH100, PTH105, PTH108, PTH116, PTH118, PTH120, PTH123

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":  # -I -S: nothing but the standard library is found by itself
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from mpu_notify.errors import MpuNotifyError
from mpu_notify.oci import agent, flags, settings, spec


class RuntimeLog:
    """The log of an OCI runtime: what the engine reads to say why a container did not start."""

    def __init__(self, file: str, form: str) -> None:
        """`file` and `form` are the runtime's --log and --log-format."""
        self._file = file.removeprefix("file:")
        self._form = form

    def write(self, level: str, message: str) -> None:
        """One line in the log file, and on standard error where there is no such file or the message is an error."""
        from time import gmtime, strftime  # noqa: PLC0415 - where all is well, there is nothing to write

        moment = strftime("%Y-%m-%dT%H:%M:%SZ", gmtime())
        if self._form == "json":
            line = json.dumps({"level": level, "msg": message, "time": moment})
        else:
            line = f'time="{moment}" level={level} msg={json.dumps(message)}'
        logged = self._append(line)
        if level == "error" or not logged:
            sys.stderr.write(f"mpu-notify-runtime: {message}\n" if logged else f"{line}\n")

    def _append(self, line: str) -> bool:
        if not self._file or self._file.startswith(("syslog:", "journald:")):
            return False
        try:
            fd = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        with open(fd, "w", encoding="utf-8") as stream:
            stream.write(f"{line}\n")
        return True


def main(  # noqa: PLR0913, PLR0917 - words of a command line
    configuration: str, runtime: str, bundle: str, log_file: str, log_format: str, container: str, *arguments: str
) -> None:
    """Rewrite the spec if that is asked for, then become the runtime. Ends the process, one way or the other."""
    log = RuntimeLog(log_file, log_format)
    try:
        _prepare(configuration, runtime, os.path.join(bundle, "config.json"), container, log)
        os.execv(runtime, [runtime, *arguments])  # noqa: S606 - that is the point
    except MpuNotifyError as error:
        log.write("error", str(error))
    except OSError as error:
        log.write("error", f"cannot start the container {container} by {runtime}: {error}")
    sys.exit(1)


def _prepare(configuration: str, runtime: str, config: str, container: str, log: RuntimeLog) -> None:
    with open(config, "rb") as stream:
        text = stream.read()
    try:
        before = json.loads(text)
    except (ValueError, RecursionError):
        return  # which the runtime says better
    ours = settings.load(configuration)
    if not (spec.opted_in(before) or (ours.opt_in == "name" and isinstance(before, dict))):
        return
    if agent.is_there(ours):
        metadata = agent.metadata(container, "shim")
        taken = flags.taken_by(runtime, os.path.dirname(ours.socket))
        after = spec.rewrite(before, ours.socket, metadata, taken, os.uname().machine)
    else:
        warning = f"{agent.absence(ours)} The container {container} starts without mpu-notify."
        log.write("warning", warning)
        agent.warn("mpu-notify-runtime", warning)
        after = spec.without_listener(before)
    if after != before:
        _replace(config, json.dumps(after, separators=(",", ":")).encode())


def _replace(path: str, content: bytes) -> None:
    """Put a file in the place of another, with its owner and mode, at once or not at all."""
    status = os.stat(path)
    new = f"{path}.mpu-notify.{os.getpid()}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as stream:
            os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, status.st_mode & 0o7777)
            stream.write(content)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
