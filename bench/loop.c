/*
 * What the monitor is measured against: the least that can look at a call and let it go on.
 *
 *     loop LISTENER
 *
 * Receives, reads the caller's NVOS54, continues; ends with the last user of the filter.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/seccomp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS /* linux/seccomp.h, Linux 6.6 */
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif

static int die(const char *attempted)
{
    fprintf(stderr, "loop: %s: %s\n", attempted, strerror(errno));
    return 1;
}

int main(int argc, char **argv)
{
    int listener = argc == 2 ? atoi(argv[1]) : -1;
    struct seccomp_notif notif;
    struct seccomp_notif_resp response;
    uint8_t nvos54[32];

    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, (uint64_t)SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP))
        return die("set SYNC_WAKE_UP");
    for (;;) {
        memset(&notif, 0, sizeof(notif)); /* the kernel insists */
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &notif))
            return errno == ENOENT ? 0 : die("receive");

        struct iovec local = {nvos54, sizeof(nvos54)};
        struct iovec remote = {(void *)(uintptr_t)notif.data.args[2], sizeof(nvos54)};
        if (process_vm_readv((pid_t)notif.pid, &local, 1, &remote, 1, 0) != sizeof(nvos54))
            return die("read NVOS54");

        response = (struct seccomp_notif_resp){.id = notif.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response))
            return die("continue");
    }
}
