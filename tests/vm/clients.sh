#!/bin/sh
# Fetch NVIDIA's own nvidia-smi and libnvidia-ml of several branches, as Debian's non-free section has them, into FOLDER:
# one directory a branch, not installed. Quick where everything is there.
#
#     clients.sh [FOLDER]        default: build/vm/clients in the repository
set -eu

# Branch, Debian's release, packages.
BRANCHES="470 bookworm nvidia-tesla-470-smi libnvidia-tesla-470-ml1
535 bookworm nvidia-smi libnvidia-ml1
550 trixie nvidia-smi libnvidia-ml1"

folder=${1:-$(dirname "$0")/../../build/vm/clients}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
ready=$folder/ready
test ! "$ready" -nt "$0" || exit 0

# Where this machine gets its own Debian from, it gets these from.
. /etc/os-release
origin=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $VERSION_CODENAME" 'Component: main' \
    'Created-By: Packages' | head -n 1)
test -n "$origin" || {
    echo "clients.sh: no Debian repository of $VERSION_CODENAME is known to apt; run apt-get update" >&2
    exit 1
}
work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/parts" "$work/lists/partial" "$work/cache/archives/partial"
cat >"$work/apt.conf" <<EOC
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "$work/parts";
Dir::State::Lists "$work/lists";
Dir::Cache "$work/cache";
APT::Sandbox::User "root";
EOC
export APT_CONFIG="$work/apt.conf"
echo "$BRANCHES" | cut -d ' ' -f 2 | sort -u | while read -r release; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $origin $release non-free"
done >"$work/parts/clients.list"
apt-get update -qq
echo "$BRANCHES" | while read -r branch release packages; do
    mkdir "$work/$branch" "$work/$branch/root"
    for package in $packages; do
        (cd "$work/$branch" && apt-get download -qq "$package/$release")
    done
    for archive in "$work/$branch"/*.deb; do
        dpkg-deb -x "$archive" "$work/$branch/root"
    done
    rm -rf "${folder:?}/$branch"
    mkdir "$folder/$branch"
    find "$work/$branch/root/usr/lib" \( -name nvidia-smi -o -name 'libnvidia-ml.so.*' \) \
        -exec cp -P {} "$folder/$branch" \;
done
touch "$ready"
