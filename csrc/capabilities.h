/* Dropping capabilities, for the monitor and, through cffi, for the supervisor. */
#ifndef MPU_CAPABILITIES_H
#define MPU_CAPABILITIES_H

#include <errno.h>
#include <linux/capability.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * What looking at a caller needs, and nothing that raises RM privilege (CAP_SYS_ADMIN does: rule 7 of the design).
 * CAP_DAC_OVERRIDE: /proc/TID/mem is 0600 and the caller's user's own.
 */
#define MPU_CAPABILITIES_NEEDED ((UINT64_C(1) << CAP_SYS_PTRACE) | (UINT64_C(1) << CAP_DAC_OVERRIDE))

/* Keep, of the capabilities that the calling thread has, those in `keep`, and gain none by exec. Returns 0 or -errno.
 */
static inline int mpu_keep_capabilities(uint64_t keep)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];

    if (syscall(SYS_capget, &header, data))
        return -errno;
    for (int word = 0; word < 2; word++) {
        data[word].permitted &= (uint32_t)(keep >> (32 * word));
        data[word].effective = data[word].permitted;
        data[word].inheritable = 0;
    }
    if (syscall(SYS_capset, &header, data) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -errno;
    return 0;
}

#endif
