/* What Python needs of the kernel and has no call for; compiled into mpu_notify.notify._native. */
#ifndef MPU_NATIVE_H
#define MPU_NATIVE_H

#include "capabilities.h"
#include "claim.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV /* linux/seccomp.h, Linux 5.19 */
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

/* Put a filter on the calling thread. `instructions` counts struct sock_filter. Returns the listener or -errno. */
static int mpu_install_filter(const void *program, unsigned short instructions, unsigned long flags)
{
    struct sock_fprog filter = {.len = instructions, .filter = (struct sock_filter *)program};
    long fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags | SECCOMP_FILTER_FLAG_NEW_LISTENER, &filter);

    return fd < 0 ? -errno : (int)fd;
}

/* Whether the kernel has these flags: it looks at them before it looks for the filter, which is not there. */
static int mpu_filter_flags_known(unsigned long flags)
{
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags | SECCOMP_FILTER_FLAG_NEW_LISTENER, NULL) &&
           errno == EFAULT;
}

static int mpu_no_new_privileges(void)
{
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? -errno : 0;
}

static int mpu_unshare(int flags)
{
    return unshare(flags) ? -errno : 0;
}

static int mpu_mount(const char *source, const char *target, const char *type, unsigned long flags)
{
    return mount(source, target, type, flags, NULL) ? -errno : 0;
}

/* SIGKILL for the calling process when its parent dies. */
static int mpu_die_with_parent(void)
{
    return prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) ? -errno : 0;
}

/* Keep the supervisor's capabilities; where it starts monitors, theirs as well, for them only. */
static int mpu_keep_needed_capabilities(bool starts_monitors)
{
    return mpu_split_capabilities(MPU_CAPABILITIES_OF_SUPERVISOR, starts_monitors ? MPU_CAPABILITIES_NEEDED : 0);
}

/* Whether a living monitor serves the sockets of which this is the one that supervisors connect to. */
static bool mpu_has_monitor(int control)
{
    int unclaimed;

    return mpu_is_claimed(control, &unclaimed);
}

/* Put a filter without a listener on the whole calling process. */
static int mpu_confine(const void *program, unsigned short instructions)
{
    struct sock_fprog filter = {.len = instructions, .filter = (struct sock_filter *)program};
    long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
                          SECCOMP_FILTER_FLAG_SPEC_ALLOW | SECCOMP_FILTER_FLAG_TSYNC, &filter);

    return result < 0 ? -errno : result ? -EBUSY : 0; /* more than 0 is a thread that could not follow */
}

#endif
