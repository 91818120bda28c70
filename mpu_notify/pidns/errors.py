"""What can go wrong before there is a PID view. A view itself answers None, it does not raise."""

from mpu_notify.errors import MpuNotifyError


class PidNamespaceError(MpuNotifyError):
    """Base of the errors of this package; the text names what was attempted on what."""


class ProcessGone(PidNamespaceError):  # noqa: N818 - the name says what happened
    """The task whose namespace was asked for does not exist, or not any more."""


class NamespaceAccessDenied(PidNamespaceError):  # noqa: N818 - the name says what happened
    """The kernel does not let us look at that task's namespaces."""


class NotInitialNamespace(PidNamespaceError):  # noqa: N818 - the name says what happened
    """We do not run in the initial PID namespace, so the driver's host ids are not numbers we can look up."""
