"""Podman and CRI-O: one file of ours in a directory that the engine reads."""

from __future__ import annotations

from mpu_notify.oci.engines.plan import RUNTIME, Files, Plan, check_drop_in, drop_in, quoted


def podman(shim: str) -> str:
    """The contents for containers.conf.d."""
    return f"[engine.runtimes]\n{RUNTIME} = [{quoted(shim)}]\n"


def crio(shim: str) -> str:
    """The contents for crio.conf.d.

    No `allowed_annotations`: CRI-O does not start if it lists one that CRI-O itself does not define, and passes all
    others through anyway.
    """
    return f'[crio.runtime.runtimes.{RUNTIME}]\nruntime_path = {quoted(shim)}\nruntime_type = "oci"\n'


def configure(files: Files, path: str, body: str) -> Plan:
    """The drop-in is there. Raises ConfigurationError."""
    check_drop_in(files, path)
    plan = Plan()
    plan.set(files, path, drop_in(body))
    return plan


def unconfigure(files: Files, path: str) -> Plan:
    """The drop-in is gone. Raises ConfigurationError."""
    check_drop_in(files, path)
    plan = Plan()
    plan.set(files, path, None)
    return plan
