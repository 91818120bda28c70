"""The one image of the tests, made from busybox and ask.c: no registry is needed."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

#: In every image: what ask.c asks, and where it writes.
GPU = Path("/gpu")
OUT = Path("/out")
NAME = "mpu-notify.test/ask:root"
NAME_AS_USER = "mpu-notify.test/ask:user"
USER = 1234

_BUSYBOX = Path("/bin/busybox")
_APPLETS = ("sh", "sleep", "cat", "ls")


def make_rootfs(directory: Path) -> Path:
    """A root directory with busybox and /ask."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "run", GPU.name, OUT.name):
        (directory / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, directory / "bin" / "busybox")
    for applet in _APPLETS:
        (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
    source = Path(__file__).with_name("ask.c")
    flags = ["-static", "-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", directory / "ask", source], check=True)
    return directory


def make_tar(rootfs: Path, archive: Path) -> Path:
    """What `docker import` and `podman import` take."""
    with tarfile.open(archive, "w") as tar:
        tar.add(rootfs, arcname=".")
    return archive


def make_oci_archive(layer: Path, archive: Path) -> Path:
    """What `ctr images import` takes: both images, which differ in their user only."""
    blobs: list[bytes] = []

    def blob(kind: str, content: bytes, **more: object) -> dict[str, Any]:
        blobs.append(content)
        media = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media, "digest": _digest(content), "size": len(content), **more}

    root = blob("layer.v1.tar", layer.read_bytes())
    manifests = []
    for name, user in (NAME, "0:0"), (NAME_AS_USER, f"{USER}:{USER}"):
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"User": user, "Cmd": ["/bin/sleep", "100000"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [root["digest"]]},
        }
        described = blob("config.v1+json", _json(config))
        manifest = {"schemaVersion": 2, "config": described, "layers": [root]}
        annotations = {"io.containerd.image.name": name}
        manifests.append(blob("manifest.v1+json", _json(manifest), annotations=annotations))
    with tarfile.open(archive, "w") as tar:
        _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(tar, "index.json", _json({"schemaVersion": 2, "manifests": manifests}))
        for content in blobs:
            _add(tar, "blobs/" + _digest(content).replace(":", "/"), content)
    return archive


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
