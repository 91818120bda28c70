"""The agent's socket as those see it who send a container there: is it there, and what goes with the listener."""

from __future__ import annotations

import _socket  # socket itself would be a large part of the shim's time
import errno
import json

from mpu_notify.errors import MpuNotifyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mpu_notify.oci.settings import Settings


class AgentAbsentError(MpuNotifyError):
    """Nobody takes listeners, and the settings say that a container must not start then."""


def is_there(settings: Settings) -> bool:
    """Whether somebody listens on the agent's socket. Raises AgentAbsentError where nobody does, if set so."""
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    try:
        probe.connect(settings.socket)
    except BlockingIOError:  # somebody listens, but many come
        return True
    except OSError as error:
        if settings.absent == "refuse":
            raise AgentAbsentError(
                f"no mpu-notify agent on {settings.socket} ({_why(error)}), and {settings.file} says "
                'absent = "refuse". Start it with "mpu-notify serve", or set absent = "start".'
            ) from error
        return False
    finally:
        probe.close()
    return True


def _why(error: OSError) -> str:
    """Not in the system's words: from "No such file or directory" Podman concludes that the command was not found."""
    reasons = {errno.ENOENT: "there is no such socket", errno.ECONNREFUSED: "nobody listens"}
    return reasons.get(error.errno or 0) or errno.errorcode.get(error.errno or 0, "unknown error")


def warn(program: str, message: str) -> None:
    """Into the system's log: where engines keep what a runtime or a hook warns of, nobody finds it."""
    import syslog  # noqa: PLC0415 - where all is well, there is nothing to write

    syslog.openlog(program, syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_WARNING, message)


def absence(settings: Settings) -> str:
    """What to say where nobody is there and a container starts all the same."""
    return f'No mpu-notify agent on {settings.socket}; start it with "mpu-notify serve".'


def metadata(container: str, route: str) -> str:
    """What the agent is told of a listener, besides the container's state."""
    return json.dumps({"container": container, "route": route})
