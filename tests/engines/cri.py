"""containerd as Kubernetes uses it: pods and containers over the container runtime interface (CRI)."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_tools import protoc

from . import images
from .agent import ANNOTATION
from .engines import CRI_PROTO, CRI_TABLE, RUNTIME, Container, Containerd, Setting, Wish
from .place import SECONDS, CommandError, eventually

_SERVICE = "runtime.v1.RuntimeService"
_NETWORK = "none"
_PLUGIN = """\
#!/bin/sh
if [ "$CNI_COMMAND" = VERSION ]; then
    echo '{"cniVersion": "0.4.0", "supportedVersions": ["0.4.0"]}'
else
    echo '{"cniVersion": "0.4.0", "interfaces": [{"name": "eth0", "sandbox": "'"$CNI_NETNS"'"}],'
    echo ' "ips": [{"version": "4", "address": "10.0.0.2/32", "interface": 0}]}'
fi
"""
_Request = Mapping[str, object]


class Client:
    """The CRI's RuntimeService, in the words of its api.proto: requests and responses are JSON."""

    def __init__(self, socket: Path, directory: Path) -> None:
        """Compile api.proto in a directory and connect."""
        # The annotations for Go are no part of the interface, and what they import is not there.
        lines = CRI_PROTO.read_text().splitlines(keepends=True)
        (directory / "api.proto").write_text("".join(line for line in lines if "gogoproto" not in line))
        described = directory / "api.pb"
        assert protoc.main(["protoc", f"-I{directory}", f"--descriptor_set_out={described}", "api.proto"]) == 0
        pool = descriptor_pool.DescriptorPool()
        for file in descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes()).file:
            pool.Add(file)
        self._methods = pool.FindServiceByName(_SERVICE).methods_by_name
        self._channel = grpc.insecure_channel(f"unix://{socket}")

    def call(self, method: str, **request: object) -> dict[str, Any]:
        """Call a method. Raises CommandError with what the engine said."""
        described = self._methods[method]
        asked = message_factory.GetMessageClass(described.input_type)()
        answer = message_factory.GetMessageClass(described.output_type)
        call: Callable[..., Any] = self._channel.unary_unary(
            f"/{_SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        try:
            response = call(json_format.ParseDict(request, asked), timeout=SECONDS)
        except grpc.RpcError as error:
            raise CommandError(f"{method}: {error}") from error
        return json_format.MessageToDict(response, preserving_proto_field_name=True)

    def close(self) -> None:
        self._channel.close()


class Cri(Containerd):
    """One container to a pod; a container is named by its own id, and its pod is known to the class."""

    def __init__(self, setting: Setting, *, newer: bool = False) -> None:
        super().__init__(setting, newer=newer)
        self._made: dict[str, tuple[str, _Request, _Request]] = {}  # pod id, its config, the container's config

    def _settings(self) -> str:
        """With a network plugin that makes no network, but says that it did."""
        programs, configuration = self.setting.below("cni/bin"), self.setting.below("cni/net.d")
        for name in "loopback", _NETWORK:
            (programs / name).write_text(_PLUGIN)
            (programs / name).chmod(0o755)
        described = {"cniVersion": "0.4.0", "name": _NETWORK, "plugins": [{"type": _NETWORK}]}
        (configuration / "10.conflist").write_text(json.dumps(described))
        table = f"[{CRI_TABLE}.cni]\nbin_dir = '{programs}'\nconf_dir = '{configuration}'\n"
        return super()._settings() + table

    def _serve(self) -> None:
        super()._serve()
        self._client = Client(self.socket, self.setting.directory)
        eventually(self._is_ready, "the CRI plugin takes calls")

    def _is_ready(self) -> bool:
        try:
            return bool(self._client.call("Status"))
        except CommandError:
            return False

    def serve_anew(self) -> None:
        self._client.close()
        super().serve_anew()

    def down(self) -> None:
        self._client.close()
        super().down()

    def _start(self, name: str, command: Sequence[str], wish: Wish) -> str:
        target = wish.pid_namespace_of
        # The namespace of another container can be had in the same pod only.
        pod_id, pod = self._made[target.identifier][:2] if target else self._pod(name, wish)
        # From here on the container's name leads to its pod, so that it can be removed whatever fails.
        self._made[name] = pod_id, pod, {}
        context: dict[str, object] = {
            "namespace_options": self._namespaces(wish),
            "privileged": wish.privileged,
            "readonly_rootfs": wish.read_only,
            "no_new_privs": wish.no_new_privileges,
            "seccomp": {"profile_type": "Unconfined" if wish.unconfined else "RuntimeDefault"},
        }
        if wish.user:
            context |= {"run_as_user": {"value": images.USER}, "run_as_group": {"value": images.USER}}
        mounts = (self.setting.gpu, images.GPU), (self.setting.out, images.OUT)
        container = {
            "metadata": {"name": name},
            "image": {"image": images.NAME},
            "command": list(command),
            "mounts": [{"host_path": str(source), "container_path": str(target)} for source, target in mounts],
            "linux": {"resources": {}, "security_context": context},
        }
        identifier = self._container(pod_id, pod, container)
        del self._made[name]
        return identifier

    def _pod(self, name: str, wish: Wish) -> tuple[str, _Request]:
        pod = {
            "metadata": {"name": name, "uid": name, "namespace": "default"},
            "annotations": {ANNOTATION: "true"} if wish.opted_in else {},
            "linux": {
                "cgroup_parent": f"/{self.place.cgroup}",
                "security_context": {"namespace_options": self._namespaces(wish), "privileged": wish.privileged},
            },
        }
        handler = "runc" if wish.stock else RUNTIME
        pod_id: str = self._client.call("RunPodSandbox", config=pod, runtime_handler=handler)["pod_sandbox_id"]
        return pod_id, pod

    def _namespaces(self, wish: Wish) -> dict[str, object]:
        # A user namespace needs a network of its own, or /sys cannot be mounted.
        options: dict[str, object] = {"network": "POD" if wish.user_namespace else "NODE", "pid": "CONTAINER"}
        if wish.pid_namespace_of:
            options |= {"pid": "TARGET", "target_id": wish.pid_namespace_of.identifier}
        if wish.user_namespace:
            mapping = [{"host_id": self.setting.account.first_subordinate, "container_id": 0, "length": 65536}]
            options |= {"userns_options": {"mode": "POD", "uids": mapping, "gids": mapping}}
        return options

    def _container(self, pod_id: str, pod: _Request, container: _Request) -> str:
        asked = {"pod_sandbox_id": pod_id, "sandbox_config": pod, "config": container}
        identifier: str = self._client.call("CreateContainer", **asked)["container_id"]
        self._client.call("StartContainer", container_id=identifier)
        self._made[identifier] = pod_id, pod, container
        return identifier

    def exec(self, container: Container, command: Sequence[str]) -> str:
        asked = {"container_id": container.identifier, "cmd": list(command), "timeout": int(SECONDS)}
        answer = self._client.call("ExecSync", **asked)
        said = {name: base64.b64decode(answer.get(name, "")).decode() for name in ("stdout", "stderr")}
        if answer.get("exit_code"):
            raise CommandError(f"{command}: exit {answer['exit_code']}\n{said}")
        return said["stdout"]

    def restart(self, container: Container) -> Container:
        """As a kubelet does: another container in the same pod."""
        pod_id, pod, config = self._made[container.identifier]
        self._client.call("RemoveContainer", container_id=container.identifier)
        restarted = dataclasses.replace(container, identifier=self._container(pod_id, pod, config))
        del self._made[container.identifier]
        return restarted

    def _remove(self, name: str) -> None:
        made = self._made.pop(name, None)
        if made and not any(pod_id == made[0] for pod_id, _, _ in self._made.values()):
            self._client.call("StopPodSandbox", pod_sandbox_id=made[0])
            self._client.call("RemovePodSandbox", pod_sandbox_id=made[0])
