/*
 * Putting a seccomp filter on a process that did not ask for it, with ptrace: its first thread is stopped, made to run
 * mmap, seccomp, close and munmap, and goes on where it was. A call that it was blocked in is restarted, but for the
 * few that the kernel restarts after no stop, such as epoll_wait (signal(7)): these return EINTR.
 *
 * Error rule, as everywhere: 0 or a negative errno.
 */
#ifndef MPU_INJECT_H
#define MPU_INJECT_H

#include <stdbool.h>
#include <sys/types.h>

struct sock_filter;

struct injection {
    bool committed; /* also where it failed: the filter is in, or the target could not be left as it was */
    int listener;   /* a duplicate, ours to close; -1 until there is one */
};

/*
 * Install `program`, of `count` instructions, on all threads of a process and fetch its listener, which the process
 * itself does not keep. For a program that has nothing else to do: blocks SIGCHLD in the calling thread for good.
 *
 * -EBUSY: a filter with a listener is there already. -EACCES: the process may not have a filter without
 * no_new_privs. -ESRCH: it is gone, or one of its threads has a filter that the others lack. -ENOSYS: not for this
 * machine, or a kernel before 5.7. Should the calling process die meanwhile, the kernel kills the target: it never goes
 * on half changed.
 */
int inject_filter(pid_t pid, const struct sock_filter *program, unsigned short count, struct injection *done);

#endif
