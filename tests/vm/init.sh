#!/bin/busybox sh
# PID 1 of the guest, in the initramfs: the host's root, read-only, with what must be writable in memory. The kernel's
# command line has repository=PATH, on which agent.sh goes on. With guest=systemd all is writable, in memory, another
# folder of the host lies over its root, and systemd is PID 1 and starts agent.sh.
export PATH=/bin
# Of systemd's units: what is of no use here, and takes time.
UNUSED="cryptsetup.target dbus.service dbus.socket dev-hugepages.mount dev-mqueue.mount getty.target
    integritysetup.target kmod-static-nodes.service proc-sys-fs-binfmt_misc.automount
    sys-fs-fuse-connections.mount sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount
    systemd-binfmt.service systemd-firstboot.service systemd-hwdb-update.service
    systemd-journal-catalog-update.service systemd-journal-flush.service systemd-logind.service
    systemd-machine-id-commit.service systemd-modules-load.service systemd-random-seed.service
    systemd-repart.service systemd-sysctl.service systemd-sysusers.service systemd-tmpfiles-clean.timer
    systemd-udev-trigger.service systemd-update-done.service systemd-update-utmp-runlevel.service
    systemd-update-utmp.service systemd-user-sessions.service veritysetup.target"

busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do
    busybox insmod "/modules/$module.ko"
done </modules/order
# share TAG: mount a folder of the host. Nothing changes there while the guest runs, so all may be cached.
share() {
    busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose "$1" "/$1"
}
share host

# said NAME: what the kernel's command line says of it.
said() {
    busybox sed -n "s/.*\\b$1=\\([^ ]*\\).*/\\1/p" /proc/cmdline
}

repository=$(said repository) guest=$(said guest)
# The repository may lie in one of the directories that are covered.
busybox mkdir /repository
busybox mount -o bind "/host$repository" /repository
root=/host
if busybox test "$guest" = systemd; then
    root=/over
    busybox mkdir /layer /memory "$root"
    share layer
    busybox mount -t tmpfs memory /memory
    busybox mkdir /memory/upper /memory/work
    busybox mount -t overlay -o "lowerdir=/layer:/host,upperdir=/memory/upper,workdir=/memory/work" over "$root"
fi
for directory in /tmp /run /var/tmp; do
    busybox mount -t tmpfs -o mode=1777 memory "$root$directory"
done
busybox test -e "$root$repository" || busybox mkdir -p "$root$repository"
busybox mount -o move /repository "$root$repository"
busybox mount -o move /proc "$root/proc"
busybox mount -o move /sys "$root/sys"
busybox mount -o move /dev "$root/dev"
busybox mkdir -p "$root/dev/shm" "$root/dev/pts"
busybox mount -t tmpfs memory "$root/dev/shm"
busybox mount -t devpts devpts "$root/dev/pts"
busybox mount -t fusectl fusectl "$root/sys/fs/fuse/connections"
busybox mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
if busybox test "$guest" = systemd; then
    # None of the host's own units.
    units=$root/etc/systemd/system
    busybox rm -f "$root/.dockerenv" # the host may be a container; the guest is none
    busybox mount -t tmpfs memory "$units"
    busybox mkdir "$units/multi-user.target.wants"
    busybox sed "s|@repository@|$repository|g" "$root$repository/tests/vm/agent.service" >"$units/agent.service"
    busybox ln -s ../agent.service "$units/multi-user.target.wants"
    for unit in $UNUSED; do
        busybox ln -s /dev/null "$units/$unit"
    done
    exec busybox switch_root "$root" /lib/systemd/systemd
fi
exec busybox switch_root "$root" /bin/sh "$repository/tests/vm/agent.sh" "$repository"
