#!/bin/sh
# Fetch NVIDIA's own nvidia-smi and libnvidia-ml of several branches, as Debian's non-free section has them, into FOLDER:
# one directory a branch, not installed. Quick where everything is there.
#
#     clients.sh [FOLDER]        default: build/vm/clients in the repository
set -eu
. "$(dirname "$0")/../apt.sh"

# Branch, Debian's release, packages.
BRANCHES="470 bookworm nvidia-tesla-470-smi libnvidia-tesla-470-ml1
535 bookworm nvidia-smi libnvidia-ml1
550 trixie nvidia-smi libnvidia-ml1"

folder=${1:-$(dirname "$0")/../../build/vm/clients}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
ready=$folder/ready
test ! "$ready" -nt "$0" || exit 0

work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
# shellcheck disable=SC2046 - one word each
other_suites "$work" non-free $(echo "$BRANCHES" | cut -d ' ' -f 2 | sort -u)
echo "$BRANCHES" | while read -r branch release packages; do
    mkdir "$work/$branch" "$work/$branch/root"
    for package in $packages; do
        (cd "$work/$branch" && apt download "$package/$release")
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
