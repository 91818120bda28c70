#!/bin/busybox sh
# PID 1 of the guest, in the initramfs: the host's root, read-only, with what must be writable in memory. The kernel's
# command line has repository=PATH, on which agent.sh goes on.
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
while read -r module; do
    busybox insmod "/modules/$module.ko"
done </modules/order
# Nothing changes there while the guest runs, so all may be cached.
busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose host /host

repository=$(busybox sed -n 's/.*repository=\([^ ]*\).*/\1/p' /proc/cmdline)
# The repository may lie in one of the directories that are covered.
busybox mkdir /repository
busybox mount -o bind "/host$repository" /repository
for directory in /tmp /run /var/tmp; do
    busybox mount -t tmpfs -o mode=1777 memory "/host$directory"
done
busybox test -e "/host$repository" || busybox mkdir -p "/host$repository"
busybox mount -o move /repository "/host$repository"
busybox mount -o move /proc /host/proc
busybox mount -o move /sys /host/sys
busybox mount -o move /dev /host/dev
busybox mkdir -p /host/dev/shm /host/dev/pts
busybox mount -t tmpfs memory /host/dev/shm
busybox mount -t devpts devpts /host/dev/pts
busybox mount -t fusectl fusectl /host/sys/fs/fuse/connections
busybox mount -t cgroup2 cgroup2 /host/sys/fs/cgroup
exec busybox switch_root /host /bin/sh "$repository/tests/vm/agent.sh" "$repository"
