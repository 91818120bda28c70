#!/bin/sh
# Install the container engines that tests/engines need: this Debian's own by apt-get, a newer Docker, the CRI's
# api.proto and the engines' default profiles from NEWER into FOLDER, without touching the system. Quick where all is
# there.
#
#     install.sh [FOLDER]        default: build/engines in the repository
set -eu

PACKAGES="busybox-static conmon containerd crun docker.io golang-github-containers-common iptables podman runc tini
    uidmap util-linux"
NEWER=trixie
NEWER_PACKAGES="containerd docker-cli docker.io golang-github-containerd-containerd-dev
    golang-github-docker-docker-dev golang-github-kubernetes-cri-api-dev"

folder=${1:-$(dirname "$0")/../../build/engines}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

missing=$(for package in $PACKAGES; do
    dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || echo "$package"
done)
if [ -n "$missing" ]; then
    apt-get update -qq
    # shellcheck disable=SC2086 - one word each
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
fi

ready=$folder/newer-$NEWER
test ! "$ready" -nt "$0" || exit 0

# Where this machine gets its own Debian from, it gets the newer one from.
. /etc/os-release
origin=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $VERSION_CODENAME" 'Component: main' \
    'Created-By: Packages' | head -n 1)
test -n "$origin" || {
    echo "install.sh: no Debian repository of $VERSION_CODENAME is known to apt; run apt-get update" >&2
    exit 1
}
work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/parts" "$work/lists/partial" "$work/cache/archives/partial" "$work/root"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $origin $NEWER main" >"$work/parts/newer.list"
cat >"$work/apt.conf" <<EOF
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "$work/parts";
Dir::State::Lists "$work/lists";
Dir::Cache "$work/cache";
APT::Sandbox::User "root";
EOF
export APT_CONFIG="$work/apt.conf"
apt-get update -qq
# shellcheck disable=SC2086 - one word each
(cd "$work" && apt-get download -qq $NEWER_PACKAGES)
for archive in "$work"/*.deb; do
    dpkg-deb -x "$archive" "$work/root"
done
rm -rf "$ready"
mv "$work/root" "$ready"
touch "$ready"
