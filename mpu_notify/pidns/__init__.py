"""PID views: what a host PID is called in a container, and back."""

from mpu_notify.pidns.errors import (
    NamespaceAccessDenied,
    NotInitialNamespace,
    PidNamespaceError,
    ProcessGone,
)
from mpu_notify.pidns.procfs import in_initial_namespace, require_initial_namespace, started_by
from mpu_notify.pidns.views import NamespaceIoctlView, NSpidView, PidView, open_view

__all__ = [
    "NSpidView",
    "NamespaceAccessDenied",
    "NamespaceIoctlView",
    "NotInitialNamespace",
    "PidNamespaceError",
    "PidView",
    "ProcessGone",
    "in_initial_namespace",
    "open_view",
    "require_initial_namespace",
    "started_by",
]
