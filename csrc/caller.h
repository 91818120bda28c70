/*
 * One trapped call and everything that is ever done to its caller. Nothing here is remembered between calls: a thread
 * id is good only while the notification is valid, which the kernel alone can say (caller_is_waiting).
 *
 * Error rule of the monitor: a function that can fail returns 0 or a negative errno.
 */
#ifndef MPU_CALLER_H
#define MPU_CALLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct seccomp_notif;

/* What a kernel offers. */
struct kernel {
    bool pidfd_thread; /* pidfd_open(PIDFD_THREAD), Linux 6.9 */
    bool receive_ends; /* a blocked receive ends with the filter's last user, Linux 6.11 */
    bool map_query;    /* PROCMAP_QUERY on a maps file, Linux 6.11 */
};

/* The control node, as statx names it. */
struct device {
    bool is_device; /* compare st_rdev of a character device, else st_dev and st_ino */
    uint32_t major;
    uint32_t minor;
    uint64_t ino;
};

/* What a kernel of this release (uname -r) offers; what is left out is made up for, so too little is never wrong. */
struct kernel kernel_of_release(const char *release);

/* Whether an AUDIT_ARCH_* is the machine's 32-bit ABI. */
bool caller_is_compat(uint32_t arch);

/* Whether this is an ioctl of the 64- or 32-bit ABI. x32 is not: kernels may lack it, and then continue is right. */
bool caller_abi_is_known(const struct seccomp_notif *notif);

/* Still blocked in the call of this notification? Only then what was read since is really the caller's. */
bool caller_is_waiting(int listener, uint64_t id);

/* A quick look at memory by thread id, good for deciding to continue and for nothing else. */
int caller_glance(pid_t tid, uint64_t address, void *buffer, size_t size);

/* An fd of the caller's /proc/TID file `name`: "mem" or "maps". Both are bound to its address space for good. */
int caller_open(pid_t tid, const char *name, int flags);

/* All of [address, address + size) or an error. */
int caller_read(int memory, uint64_t address, void *buffer, size_t size);
int caller_write(int memory, uint64_t address, const void *buffer, size_t size);

/* -EFAULT unless all of [address, address + size) is mapped readable and writable. */
int caller_may_write(const struct kernel *kernel, int maps, uint64_t address, size_t size);

/* -EXDEV unless the caller's fd is the control node. Asks no file server anything. */
int caller_check_file(pid_t tid, int fd, const struct device *device);

/* A duplicate of the caller's fd, checked to be the control node; the caller of this function closes it. */
int caller_fetch_file(const struct kernel *kernel, pid_t tid, int fd, const struct device *device);

#endif
