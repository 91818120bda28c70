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
 * CAP_SYS_PTRACE: memory, files and namespaces of other users' processes. CAP_DAC_OVERRIDE: /proc/TID/mem is 0600 and
 * the caller's user's own; CAP_DAC_READ_SEARCH is not enough, because it is opened to be written, too.
 */
#define MPU_CAPABILITIES_NEEDED ((UINT64_C(1) << CAP_SYS_PTRACE) | (UINT64_C(1) << CAP_DAC_OVERRIDE))

/* The supervisor opens no memory: it looks at the namespaces of other users' processes. */
#define MPU_CAPABILITIES_OF_SUPERVISOR (UINT64_C(1) << CAP_SYS_PTRACE)

/* As far as we may: that takes CAP_SETPCAP, and who has not got that gains nothing by exec because of no_new_privs. */
static inline void mpu_limit_bounding_set(uint64_t keep)
{
    for (int capability = 0; capability < 64; capability++)
        if (!(keep & (UINT64_C(1) << capability)) && prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1 &&
            prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
            return;
}

/*
 * Keep, of the capabilities that the calling thread has, those in `effect`, and, not in effect, those in `inherited`,
 * which a program that it executes will have. Gain none by exec. Returns 0 or -errno.
 */
static inline int mpu_split_capabilities(uint64_t effect, uint64_t inherited)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];

    mpu_limit_bounding_set(effect | inherited);
    if (syscall(SYS_capget, &header, data))
        return -errno;
    for (int word = 0; word < 2; word++) {
        data[word].permitted &= (uint32_t)((effect | inherited) >> (32 * word));
        data[word].effective = data[word].permitted & (uint32_t)(effect >> (32 * word));
        data[word].inheritable = data[word].permitted & (uint32_t)(inherited >> (32 * word));
    }
    if (syscall(SYS_capset, &header, data) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -errno;
    for (int capability = 0; capability < 64; capability++)
        if (data[capability / 32].inheritable & (UINT32_C(1) << capability % 32) &&
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0))
            return -errno;
    return 0;
}

/* Keep, of the capabilities that the calling thread has, those in `keep`; gain none by exec. */
static inline int mpu_keep_capabilities(uint64_t keep)
{
    return mpu_split_capabilities(keep, 0);
}

#endif
