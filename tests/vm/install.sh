#!/bin/sh
# Install what the virtual machine of tests/vm is made of: QEMU by apt-get; this Debian's kernel, not installed, and an
# initramfs into FOLDER. Quick where everything is there.
#
#     install.sh [FOLDER]        default: build/vm in the repository
set -eu

PACKAGES="busybox-static qemu-system-x86 seabios xz-utils"
KERNEL=linux-image-amd64
# In the order in which they need each other.
MODULES="virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_console
    9pnet 9pnet_virtio netfs fscache 9p fuse cuse overlay"

here=$(cd "$(dirname "$0")" && pwd)
. "$here/../apt.sh"
folder=${1:-$here/../../build/vm}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

# shellcheck disable=SC2086 - one word each
install_missing $PACKAGES

ready=$folder/guest
if [ "$ready" -nt "$0" ] && [ "$ready" -nt "$here/init.sh" ]; then
    exit 0
fi

work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/package" "$work/root/modules" "$work/root/bin" "$work/guest"
apt update
image=$(apt-cache depends "$KERNEL" | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)/\1/p' | head -n 1)
test -n "$image" || {
    echo "install.sh: $KERNEL names no kernel; is there a Debian repository that apt knows?" >&2
    exit 1
}
(cd "$work" && apt download -o APT::Sandbox::User=root "$image")
dpkg-deb -x "$work"/*.deb "$work/package"

# The kernel proper, out of the file that unpacks itself: under emulation that takes longer than the whole boot.
packed=$(echo "$work"/package/boot/vmlinuz-*)
at=$(LC_ALL=C grep -abo "$(printf '\3757zXZ')" "$packed" | head -n 1 | cut -d : -f 1)
tail -c "+$((at + 1))" "$packed" | xz --decompress --stdout --single-stream >"$work/guest/vmlinux"

for module in $MODULES; do
    find "$work/package" -name "$module.ko" -exec cp {} "$work/root/modules" \;
    test -f "$work/root/modules/$module.ko" || {
        echo "install.sh: $image has no module $module" >&2
        exit 1
    }
    echo "$module" >>"$work/root/modules/order"
done
cp "$(command -v busybox)" "$work/root/bin"
install -m 755 "$here/init.sh" "$work/root/init"
(cd "$work/root" && mkdir proc sys dev host && find . | busybox cpio -o -H newc) >"$work/guest/initramfs" 2>/dev/null

rm -rf "$ready"
mv "$work/guest" "$ready"
touch "$ready"
