/*
 * The monitor's own seccomp filter: an allow-list of the system calls that it makes, put on before its first thread.
 *
 * What is not in the list fails with ENOSYS, as on a kernel that does not have it: C libraries know a way around that,
 * and a monitor that was killed instead would take the driver from every program that it serves. There is no execve in
 * it, no socket but unix ones, no memory that is executable and no new namespaces; files are opened, never made.
 */
#ifndef MPU_CONFINE_H
#define MPU_CONFINE_H

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define CONFINE_ARCH AUDIT_ARCH_X86_64
#define CONFINE_NUMBERS 0x40000000 /* from here on they are x32's */
#elif defined(__aarch64__)
#define CONFINE_ARCH AUDIT_ARCH_AARCH64
#define CONFINE_NUMBERS 0x80000000
#else
#error "mpu-notify knows x86-64 and aarch64"
#endif

#define CONFINE_NEW_NAMESPACES                                                                                         \
    (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET |       \
     0x00000080 /* CLONE_NEWTIME, Linux 5.6 */)
#define CONFINE_MAKES_FILES (O_CREAT | O_TRUNC | (O_TMPFILE & ~O_DIRECTORY))

#define CONFINE_LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define CONFINE_RETURN(what) BPF_STMT(BPF_RET | BPF_K, (what))
#define CONFINE_DENY CONFINE_RETURN(SECCOMP_RET_ERRNO | ENOSYS)
#define CONFINE_ALLOW CONFINE_RETURN(SECCOMP_RET_ALLOW)

#define ALLOW(name) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 1), CONFINE_ALLOW
/* Only where an argument, of which the lower half is looked at, has none of these bits, or is this value. */
#define ALLOW_WITHOUT(name, argument, bits)                                                                            \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 4), CONFINE_LOAD(args[argument]),                               \
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (bits), 0, 1), CONFINE_DENY, CONFINE_ALLOW
#define ALLOW_WHERE(name, argument, value)                                                                             \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 4), CONFINE_LOAD(args[argument]),                               \
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 1, 0), CONFINE_DENY, CONFINE_ALLOW

static const struct sock_filter CONFINE_FILTER[] = {
    CONFINE_LOAD(arch),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, CONFINE_ARCH, 1, 0),
    CONFINE_DENY,
    CONFINE_LOAD(nr),
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, CONFINE_NUMBERS, 0, 1),
    CONFINE_DENY,
    /* every call */
    ALLOW(ioctl),
    ALLOW(process_vm_readv),
#ifdef SYS_poll
    ALLOW(poll),
#endif
    ALLOW(ppoll),
    ALLOW(futex),
    /* a call in the table */
    ALLOW_WITHOUT(openat, 2, CONFINE_MAKES_FILES),
    ALLOW(pread64),
    ALLOW(pwrite64),
    ALLOW(statx),
    ALLOW(pidfd_open),
    ALLOW(pidfd_getfd),
    ALLOW(kcmp),
    ALLOW(close),
    ALLOW(sched_yield),
    /* sockets: the agent's, the supervisor's, the service manager's */
    ALLOW(sendmsg),
    ALLOW(recvmsg),
    ALLOW(sendto),
    ALLOW(recvfrom),
    ALLOW(accept4),
    ALLOW(getsockopt),
    ALLOW(setsockopt),
    ALLOW(getsockname),
    ALLOW(shutdown),
    ALLOW(socketpair),
    ALLOW_WHERE(socket, 0, AF_UNIX),
    ALLOW(connect),
    ALLOW(bind),
    ALLOW(listen),
    ALLOW(umask),
    ALLOW(unlinkat),
#ifdef SYS_unlink
    ALLOW(unlink),
    ALLOW(readlink),
#endif
    /* files and memory */
    ALLOW(read),
    ALLOW(write),
    ALLOW(writev),
    ALLOW(lseek),
    ALLOW(fstat),
    ALLOW(newfstatat),
    ALLOW(readlinkat),
    ALLOW(fcntl),
    ALLOW(dup),
    ALLOW(dup3),
    ALLOW(eventfd2),
    ALLOW(signalfd4),
    ALLOW(memfd_create),
    ALLOW(ftruncate),
    ALLOW_WITHOUT(mmap, 2, PROT_EXEC),
    ALLOW_WITHOUT(mprotect, 2, PROT_EXEC),
    ALLOW(munmap),
    ALLOW(mremap),
    ALLOW(madvise),
    ALLOW(brk),
    /* threads, and the child that looks at a rootless caller; clone3 has its flags in memory, so it is not for us */
    ALLOW_WITHOUT(clone, 0, CONFINE_NEW_NAMESPACES),
    ALLOW_WHERE(setns, 1, CLONE_NEWUSER),
    ALLOW_WHERE(prctl, 0, PR_SET_PDEATHSIG),
    ALLOW(wait4),
    ALLOW(waitid),
    ALLOW(set_robust_list),
    ALLOW(rseq),
    ALLOW(exit),
    ALLOW(exit_group),
    ALLOW(rt_sigaction),
    ALLOW(rt_sigprocmask),
    ALLOW(rt_sigreturn),
    ALLOW(sigaltstack),
    ALLOW(restart_syscall),
    ALLOW(tgkill),
    ALLOW(sched_getaffinity),
    ALLOW(gettid),
    ALLOW(getpid),
    ALLOW(getppid),
    ALLOW(getuid),
    ALLOW(geteuid),
    ALLOW(uname),
    ALLOW_WHERE(prlimit64, 0, 0), /* of ourselves */
    ALLOW(getrandom),
    ALLOW(clock_gettime),
    ALLOW(clock_nanosleep),
    ALLOW(nanosleep),
    ALLOW(seccomp), /* what sizes its structs have; a filter more can only take away */
    CONFINE_DENY,
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CONFINE_IS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CONFINE_IS_SANITIZED 1
#endif
#endif

/* Needs no_new_privs. Returns 0 or -errno. */
static inline int mpu_confine_monitor(void)
{
#ifdef CONFINE_IS_SANITIZED
    return 0; /* the sanitizer makes calls of its own, and traces its own process to look for leaks */
#else
    struct sock_fprog program = {.len = sizeof(CONFINE_FILTER) / sizeof(CONFINE_FILTER[0]),
                                 .filter = (struct sock_filter *)(uintptr_t)CONFINE_FILTER};

    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) ? -errno : 0;
#endif
}

#undef ALLOW
#undef ALLOW_WITHOUT
#undef ALLOW_WHERE

#endif
