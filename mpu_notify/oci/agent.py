"""The agent's socket as those see it who send a container there: is it there, and what goes with the listener."""

from __future__ import annotations

import _socket  # socket itself would be a large part of the shim's time
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
                f"no mpu-notify agent on {settings.socket} ({error.strerror}), and {settings.file} says "
                'absent = "refuse". Start it with "mpu-notify serve", or set absent = "start".'
            ) from error
        return False
    finally:
        probe.close()
    return True


def absence(settings: Settings) -> str:
    """What to say where nobody is there and a container starts all the same."""
    return f'No mpu-notify agent on {settings.socket}; start it with "mpu-notify serve".'


def metadata(container: str, route: str) -> str:
    """What the agent is told of a listener, besides the container's state."""
    return json.dumps({"container": container, "route": route})
