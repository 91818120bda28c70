/*
 * Stops one thread at one moment of its next call, says so, and lets it go when it is told to.
 *
 *     gate THREAD SYSCALL ioctl-REQUEST|- enter|exit NTH [RESULT]
 *
 * THREAD is a monitor's thread that receives calls. The moment is the entry into, or the exit from, the NTH system call
 * SYSCALL (1 is the first; of an ioctl, with that REQUEST) since a call was received. It says "ready" when it watches,
 * "reached" when the thread stands there, and lets go for good when a byte comes, or its input ends.
 * The entry into the receive itself is one of those since it watches. With a RESULT, which goes with the entry, the
 * system call is not made, and returns that.
 */
#include <errno.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/ptrace.h>

#if !defined(__x86_64__)
#error "the registers of a system call are known on x86-64 only"
#endif

struct moment {
    uint64_t syscall;
    bool any_request;
    uint32_t request;
    bool at_exit;
    unsigned nth;
};

struct watch {
    pid_t thread;
    bool received;       /* a call, since we watch; or the receive is looked for */
    bool inside;         /* a system call that counts */
    unsigned seen;       /* of these, since then */
    uint64_t in_syscall; /* the one that the thread is in, and its request */
    uint64_t in_request;
};

static const struct {
    const char *name;
    uint64_t number;
} SYSCALLS[] = {
    {"close", SYS_close},           {"ioctl", SYS_ioctl},
    {"openat", SYS_openat},         {"pidfd_getfd", SYS_pidfd_getfd},
    {"pidfd_open", SYS_pidfd_open}, {"pread64", SYS_pread64},
    {"pwrite64", SYS_pwrite64},     {"recvmsg", SYS_recvmsg},
    {"sendmsg", SYS_sendmsg},       {"poll", SYS_poll},
    {"fcntl", SYS_fcntl},           {"read", SYS_read},
    {"recvfrom", SYS_recvfrom},     {"process_vm_readv", SYS_process_vm_readv},
    {"statx", SYS_statx},
};

static void die(const char *what)
{
    fprintf(stderr, "gate: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void say(const char *word)
{
    printf("%s\n", word);
    fflush(stdout);
}

static bool parse(char **arguments, struct moment *moment)
{
    bool found = false;

    for (size_t i = 0; i < sizeof(SYSCALLS) / sizeof(SYSCALLS[0]); i++)
        if (strcmp(SYSCALLS[i].name, arguments[0]) == 0) {
            moment->syscall = SYSCALLS[i].number;
            found = true;
        }
    moment->any_request = strcmp(arguments[1], "-") == 0;
    moment->request = (uint32_t)strtoul(arguments[1], NULL, 0);
    moment->at_exit = strcmp(arguments[2], "exit") == 0;
    moment->nth = (unsigned)strtoul(arguments[3], NULL, 10);
    return found && moment->nth;
}

/* Begin to watch: the wait for a call is restarted, as by any stop. */
static void seize(pid_t thread)
{
    int status;

    if (ptrace(PTRACE_SEIZE, thread, 0, PTRACE_O_TRACESYSGOOD) || ptrace(PTRACE_INTERRUPT, thread, 0, 0) ||
        waitpid(thread, &status, __WALL) != thread || ptrace(PTRACE_SYSCALL, thread, 0, 0))
        die("cannot watch the thread");
}

static bool counts(const struct moment *moment, const struct watch *watch)
{
    return watch->in_syscall == moment->syscall &&
           (moment->any_request || (uint32_t)watch->in_request == moment->request);
}

/* Whether a stop at a system call is the moment. */
static bool is_reached(const struct moment *moment, struct watch *watch, const struct __ptrace_syscall_info *info)
{
    if (info->op == PTRACE_SYSCALL_INFO_ENTRY) {
        watch->in_syscall = info->entry.nr;
        watch->in_request = info->entry.args[1];
        watch->inside = true;
        if (!watch->received || !counts(moment, watch))
            return false;
        return ++watch->seen == moment->nth && !moment->at_exit;
    }
    if (info->op != PTRACE_SYSCALL_INFO_EXIT || !watch->inside)
        return false;
    watch->inside = false;
    if (watch->in_syscall == SYS_ioctl && (uint32_t)watch->in_request == (uint32_t)SECCOMP_IOCTL_NOTIF_RECV &&
        info->exit.rval == 0) {
        watch->received = true;
        watch->seen = counts(moment, watch); /* the receive itself */
    }
    return watch->received && counts(moment, watch) && watch->seen == moment->nth && moment->at_exit;
}

/* Until the moment; false where the thread ended before. */
static bool await(const struct moment *moment, struct watch *watch)
{
    struct __ptrace_syscall_info info;
    int status;

    for (;;) {
        int signal = 0;

        if (waitpid(watch->thread, &status, __WALL) < 0)
            die("waitpid");
        if (!WIFSTOPPED(status))
            return false;
        if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
            if (ptrace(PTRACE_GET_SYSCALL_INFO, watch->thread, sizeof(info), &info) > 0 &&
                is_reached(moment, watch, &info))
                return true;
        } else if (status >> 16 == 0) {
            signal = WSTOPSIG(status);
        }
        if (ptrace(PTRACE_SYSCALL, watch->thread, 0, signal) && errno != ESRCH)
            die("cannot let the thread go on");
    }
}

/* The thread is at the entry of a system call: go to its exit without it. */
static void skip(pid_t thread, long result)
{
    struct user_regs_struct registers;
    int status;

    if (ptrace(PTRACE_GETREGS, thread, 0, &registers))
        die("cannot skip");
    registers.orig_rax = (unsigned long long)-1;
    if (ptrace(PTRACE_SETREGS, thread, 0, &registers) || ptrace(PTRACE_SYSCALL, thread, 0, 0) ||
        waitpid(thread, &status, __WALL) != thread || !WIFSTOPPED(status) ||
        ptrace(PTRACE_GETREGS, thread, 0, &registers))
        die("cannot skip");
    registers.rax = (unsigned long long)result;
    if (ptrace(PTRACE_SETREGS, thread, 0, &registers))
        die("cannot skip");
}

int main(int argc, char **argv)
{
    struct watch watch = {0};
    struct moment moment = {0};
    char byte;

    if (argc < 6 || argc > 7 || !parse(argv + 2, &moment)) {
        fprintf(stderr, "gate: what moment is that?\n");
        return 2;
    }
    watch.thread = (pid_t)strtol(argv[1], NULL, 10);
    watch.received = moment.request == (uint32_t)SECCOMP_IOCTL_NOTIF_RECV && !moment.at_exit;
    seize(watch.thread);
    say("ready");
    if (!await(&moment, &watch)) {
        say("gone");
        return 1;
    }
    if (argc == 7)
        skip(watch.thread, strtol(argv[6], NULL, 10));
    say("reached");
    if (read(STDIN_FILENO, &byte, 1) < 0)
        die("cannot read");
    if (ptrace(PTRACE_DETACH, watch.thread, 0, 0) && errno != ESRCH) /* it may have been killed */
        die("cannot let the thread go");
    return 0;
}
