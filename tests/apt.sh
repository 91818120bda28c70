# What the install scripts and the Makefile share, to be sourced: packages of this Debian, and of other suites of it.
# shellcheck shell=sh

# apt-get, which waits out a moment without a network.
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=5 "$@"
}

# install_missing PACKAGE...: into the system, those that are not there.
install_missing() {
    missing=$(for package in "$@"; do
        dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || echo "$package"
    done)
    if [ -n "$missing" ]; then
        apt update
        # shellcheck disable=SC2086 - one word each
        apt install -y --no-install-recommends $missing
    fi
}

# other_suites FOLDER COMPONENT SUITE...: from here on apt knows these, and nothing of the system's: for `apt download`.
# They come from where this machine gets its own Debian.
other_suites() {
    . /etc/os-release
    origin=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $VERSION_CODENAME" 'Component: main' \
        'Created-By: Packages' | head -n 1)
    test -n "$origin" || {
        echo "$0: no Debian repository of $VERSION_CODENAME is known to apt; run apt-get update" >&2
        exit 1
    }
    mkdir -p "$1/apt/parts" "$1/apt/lists/partial" "$1/apt/cache/archives/partial"
    export APT_CONFIG="$1/apt/apt.conf"
    cat >"$APT_CONFIG" <<END
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "$1/apt/parts";
Dir::State::Lists "$1/apt/lists";
Dir::Cache "$1/apt/cache";
APT::Sandbox::User "root";
END
    parts=$1/apt/parts component=$2
    shift 2
    for suite in "$@"; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $origin $suite $component"
    done >"$parts/other.list"
    apt update
}
