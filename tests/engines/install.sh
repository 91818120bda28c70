#!/bin/sh
# Install the container engines that tests/engines need: this Debian's own by apt-get, a newer Docker, the CRI's
# api.proto and the engines' default profiles from NEWER into FOLDER, without touching the system. Quick where all is
# there.
#
#     install.sh [FOLDER]        default: build/engines in the repository
set -eu
. "$(dirname "$0")/../apt.sh"

PACKAGES="busybox-static conmon containerd crun docker.io golang-github-containers-common iptables podman runc tini
    uidmap util-linux"
NEWER=trixie
NEWER_PACKAGES="containerd docker-cli docker.io golang-github-containerd-containerd-dev
    golang-github-docker-docker-dev golang-github-kubernetes-cri-api-dev"

folder=${1:-$(dirname "$0")/../../build/engines}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

# shellcheck disable=SC2086 - one word each
install_missing $PACKAGES

ready=$folder/newer-$NEWER
test ! "$ready" -nt "$0" || exit 0

work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
other_suites "$work" main $NEWER
# shellcheck disable=SC2086 - one word each
(cd "$work" && apt download $NEWER_PACKAGES)
for archive in "$work"/*.deb; do
    dpkg-deb -x "$archive" "$work/root"
done
rm -rf "$ready"
mv "$work/root" "$ready"
touch "$ready"
