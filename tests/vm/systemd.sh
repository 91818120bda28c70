#!/bin/sh
# Make what lies over this machine's root in a guest with systemd: mpu-notify as README.md installs it, in a virtual
# environment, and Debian's udev. Quick where everything is there.
#
#     systemd.sh [FOLDER]        default: build/vm/systemd in the repository
set -eu

here=$(cd "$(dirname "$0")" && pwd)
. "$here/../apt.sh"
cd "$here/../.."
folder=${1:-build/vm/systemd}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
ready=$folder/ready

install_missing python3-dev python3-venv
test -e "$folder/root/usr/bin/udevadm" || {
    (cd "$folder" && apt download -o APT::Sandbox::User=root udev)
    dpkg-deb -x "$folder"/udev_*.deb "$folder/udev"
    mkdir -p "$folder/root/usr"
    for part in bin lib; do # of /usr, where they are links to
        cp -a "$folder/udev/$part" "$folder/root/usr"
        rm -r "$folder/udev/$part"
    done
    cp -a "$folder/udev/." "$folder/root"
}
test -n "$(find setup.py pyproject.toml csrc mpu_notify "$0" -newer "$ready" ! -path '*/__pycache__*' ! -path '*/_bin*' \
    ! -name '*.so' ! -type d 2>&1 | head -n 1)" || exit 0

place=$folder/root/opt/mpu-notify
rm -rf "$place" "$folder/root/usr/local"
/usr/bin/python3 -m venv "$place"
"$place/bin/pip" install --quiet --disable-pip-version-check .
# It has been installed where it will not be.
grep -lIr "$place" "$place/bin" | xargs sed -i "s|$place|/opt/mpu-notify|g"
mkdir -p "$folder/root/usr/local/bin"
for program in "$place"/bin/mpu-notify*; do
    ln -s "/opt/mpu-notify/bin/${program##*/}" "$folder/root/usr/local/bin"
done
touch "$ready"
