#!/bin/sh
# Run tests with our C programs built with a sanitizer, in a tree of their own under build/. A report fails it.
#
#     run.sh address|thread TEST...
set -eu

cd "$(dirname "$0")/../.."
sanitizer=$1
shift
tree=$PWD/build/sanitize-$sanitizer
mkdir -p "$tree"
find "$tree" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
rm -f "$tree/.venv/.built"
tar -c --exclude=./build --exclude=./.git --exclude=./.venv --exclude=./mpu_notify/_bin --exclude='*.so' \
    --exclude=__pycache__ . | tar -x -C "$tree"
mkdir -m 1777 "$tree/reports" # programs under test run as other users, too
MPU_NOTIFY_SANITIZE=$sanitizer make -C "$tree" build

status=0
# The sanitizers of older compilers do not get along with how far newer kernels spread a program's addresses.
(cd "$tree" && setarch -R .venv/bin/pytest -p no:cacheprovider "$@") || status=$?
for report in "$tree"/reports/*; do
    test -e "$report" || continue
    status=1
    echo "--- $report"
    cat "$report"
done
test "$status" = 0 || echo "run.sh: the tests with the $sanitizer sanitizer failed, see above" >&2
exit "$status"
