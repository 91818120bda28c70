#include "inject.h"

#include "cleanup.h"

#include <errno.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>

#if defined(__x86_64__)

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV /* linux/seccomp.h, Linux 5.19 */
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

#define FLAGS                                                                                                          \
    (SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_TSYNC_ESRCH |                  \
     SECCOMP_FILTER_FLAG_SPEC_ALLOW)

#define STOP_SECONDS 5 /* how long the target may take to its next stop: none of our calls blocks */
#define HOLDS 100      /* how often it is looked for in a system call */

#define SYSCALL_INSTRUCTION 0x050F /* 0F 05 */
#define SYSCALL_BYTES 2
#define USER_CS_64 0x33
#define NO_SYSCALL UINT64_MAX /* orig_rax: nothing that the kernel may want to restart */

#define ROOM_BYTES 4096 /* for the filter in the target */

/* A stopped process and what it gets back: registers, orig_rax with the code to restart by, and blocked signals. */
struct target {
    pid_t pid;
    uint64_t address; /* of a syscall instruction */
    struct user_regs_struct registers;
    uint64_t signals;
};

/* What is in ROOM_BYTES: a struct sock_fprog and what it points at. */
struct room {
    struct sock_fprog head;
    struct sock_filter program[(ROOM_BYTES - sizeof(struct sock_fprog)) / sizeof(struct sock_filter)];
};

static int trace(enum __ptrace_request request, const struct target *target, unsigned long address, const void *data)
{
    return ptrace(request, target->pid, address, data) < 0 ? -errno : 0;
}

static int wait_stopped(const struct target *target, int *status)
{
    const struct timespec most = {.tv_sec = STOP_SECONDS};
    sigset_t child;
    pid_t got;

    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    while ((got = waitpid(target->pid, status, __WALL | WNOHANG)) == 0)
        if (sigtimedwait(&child, NULL, &most) < 0 && errno != EINTR)
            return -ETIMEDOUT;
    if (got < 0)
        return -errno;
    return WIFSTOPPED(*status) ? 0 : -ESRCH;
}

static bool is_held(int status)
{
    return status >> 16 == PTRACE_EVENT_STOP;
}

static bool is_at_call(int status)
{
    return status >> 16 == 0 && WSTOPSIG(status) == (SIGTRAP | 0x80);
}

/* Wait for a stop of this kind. At others (a signal, a stop of its whole group) the target goes on as it would have. */
static int wait_for(const struct target *target, enum __ptrace_request request, bool (*wanted)(int status))
{
    uintptr_t signal;
    int error, status;

    while ((error = wait_stopped(target, &status)) == 0 && !wanted(status)) {
        signal = is_held(status) ? 0 : (uintptr_t)WSTOPSIG(status);
        error = trace(request, target, 0, (void *)signal);
        if (error)
            break;
    }
    return error;
}

/* Stop it where it looks for signals, on its way from the kernel to its program. */
static int hold(const struct target *target)
{
    int error = trace(PTRACE_INTERRUPT, target, 0, NULL);

    return error ? error : wait_for(target, PTRACE_CONT, is_held);
}

/* From one stop to another. */
static int go_on(const struct target *target, enum __ptrace_request request, bool (*wanted)(int status))
{
    int error = trace(request, target, 0, NULL);

    return error ? error : wait_for(target, request, wanted);
}

/* As hold(), from another stop. */
static int hold_again(const struct target *target)
{
    int error = trace(PTRACE_INTERRUPT, target, 0, NULL);

    return error ? error : go_on(target, PTRACE_CONT, is_held);
}

/* -EAGAIN unless the target is just behind a syscall instruction: blocked in a call, as somebody who waits is. */
static int find_instruction(struct target *target)
{
    long word;
    int error = trace(PTRACE_GETREGS, target, 0, &target->registers);

    if (error)
        return error;
    if (target->registers.cs != USER_CS_64)
        return -ENOSYS;
    target->address = target->registers.rip - SYSCALL_BYTES;
    errno = 0;
    word = ptrace(PTRACE_PEEKTEXT, target->pid, target->address, NULL);
    return !errno && (word & 0xFFFF) == SYSCALL_INSTRUCTION ? 0 : -EAGAIN;
}

/* Where it is not in a call it is held in its next one, before any signal gets it out of there. */
static int hold_at_instruction(struct target *target)
{
    int error = hold(target);

    if (!error)
        error = find_instruction(target);
    for (int i = 0; error == -EAGAIN && i < HOLDS; i++) {
        error = go_on(target, PTRACE_SYSCALL, is_at_call);
        if (!error)
            error = hold_again(target);
        if (!error)
            error = find_instruction(target);
    }
    return error;
}

/* From here on no signal gets between its calls, but SIGSTOP, which does no harm; and it dies if we do. */
static int prepare(struct target *target)
{
    const uint64_t all = UINT64_MAX;
    int error = trace(PTRACE_GETSIGMASK, target, sizeof(target->signals), &target->signals);

    if (!error)
        error = trace(PTRACE_SETOPTIONS, target, 0, (void *)(PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL));
    if (!error)
        error = trace(PTRACE_SETSIGMASK, target, sizeof(all), &all);
    return error;
}

struct call {
    uint64_t number;
    uint64_t arguments[6];
};

/* Have the target make a system call. The errno of the call itself is an error as any other. */
static int run_call(const struct target *target, const struct call *call, uint64_t *result)
{
    struct user_regs_struct registers = target->registers;
    int error;

    registers.rip = target->address;
    registers.orig_rax = NO_SYSCALL;
    registers.rax = call->number;
    registers.rdi = call->arguments[0];
    registers.rsi = call->arguments[1];
    registers.rdx = call->arguments[2];
    registers.r10 = call->arguments[3];
    registers.r8 = call->arguments[4];
    registers.r9 = call->arguments[5];
    error = trace(PTRACE_SETREGS, target, 0, &registers);
    for (int stop = 0; !error && stop < 2; stop++) /* at its entry and at its exit */
        error = go_on(target, PTRACE_SYSCALL, is_at_call);
    if (!error)
        error = trace(PTRACE_GETREGS, target, 0, &registers);
    if (error)
        return error;
    *result = registers.rax;
    return (int64_t)registers.rax < 0 ? (int)registers.rax : 0;
}

/* Back to where it was. Only the kernel can restart a call rightly, and it does so behind such a stop only. */
static int give_back(const struct target *target)
{
    int error = hold_again(target);

    if (!error)
        error = trace(PTRACE_SETREGS, target, 0, &target->registers);
    if (!error)
        error = trace(PTRACE_SETSIGMASK, target, sizeof(target->signals), &target->signals);
    return error;
}

static int write_room(const struct target *target, uint64_t address, const struct sock_filter *program,
                      unsigned short count)
{
    struct room room = {.head = {.len = count}};
    const size_t size = offsetof(struct room, program) + count * sizeof(*program);
    const struct iovec from = {&room, size}, to = {(void *)address, size};
    ssize_t written;

    memcpy(room.program, program, count * sizeof(*program));
    room.head.filter = (struct sock_filter *)(address + offsetof(struct room, program));
    written = process_vm_writev(target->pid, &from, 1, &to, 1, 0);
    if (written < 0)
        return -errno;
    return (size_t)written == size ? 0 : -EFAULT;
}

static int install(const struct target *target, uint64_t address, uint64_t *listener)
{
    struct call call = {SYS_seccomp,
                        {SECCOMP_SET_MODE_FILTER, FLAGS | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, address, 0, 0, 0}};
    int error = run_call(target, &call, listener);

    if (error != -EINVAL)
        return error;
    call.arguments[1] = FLAGS;
    error = run_call(target, &call, listener);
    return error == -EINVAL ? -ENOSYS : error;
}

static int fetch(const struct target *target, int pidfd, uint64_t theirs, int *ours)
{
    const struct call close_it = {SYS_close, {theirs, 0, 0, 0, 0, 0}};
    uint64_t nothing;
    long fd = syscall(SYS_pidfd_getfd, pidfd, (int)theirs, 0);

    if (fd < 0)
        return -errno;
    *ours = (int)fd;
    return run_call(target, &close_it, &nothing);
}

static int install_and_fetch(const struct target *target, int pidfd, uint64_t address, struct injection *done)
{
    uint64_t theirs;
    int error = install(target, address, &theirs);

    if (error)
        return error;
    done->committed = true;
    return fetch(target, pidfd, theirs, &done->listener);
}

static int with_room(const struct target *target, int pidfd, const struct sock_filter *program, unsigned short count,
                     struct injection *done)
{
    const struct call map = {SYS_mmap,
                             {0, ROOM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, UINT64_MAX, 0}};
    struct call unmap = {SYS_munmap, {0, ROOM_BYTES, 0, 0, 0, 0}};
    uint64_t nothing;
    int error = run_call(target, &map, &unmap.arguments[0]), unmapped;

    if (error)
        return error;
    error = write_room(target, unmap.arguments[0], program, count);
    if (!error)
        error = install_and_fetch(target, pidfd, unmap.arguments[0], done);
    unmapped = run_call(target, &unmap, &nothing);
    return error ? error : unmapped;
}

/* Whether fetching will work, asked before anything is changed: nobody has this fd. */
static int check_fetching(int pidfd)
{
    return syscall(SYS_pidfd_getfd, pidfd, INT_MAX, 0) < 0 && errno != EBADF ? -errno : 0;
}

/* Of a target that cannot be given back nothing is left: it stays traced, and is killed when we end. */
static int inject_held(struct target *target, const struct sock_filter *program, unsigned short count,
                       struct injection *done)
{
    AUTO_CLOSE pidfd = (int)syscall(SYS_pidfd_open, target->pid, 0);
    int error = pidfd < 0 ? -errno : check_fetching(pidfd), given_back;

    if (!error)
        error = prepare(target);
    if (error) {
        trace(PTRACE_DETACH, target, 0, NULL);
        return error;
    }
    error = with_room(target, pidfd, program, count, done);
    given_back = give_back(target);
    if (given_back)
        done->committed = true;
    else
        given_back = trace(PTRACE_DETACH, target, 0, NULL);
    return error ? error : given_back;
}

static void await_stops(void)
{
    sigset_t child;

    signal(SIGCHLD, SIG_DFL);
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
}

int inject_filter(pid_t pid, const struct sock_filter *program, unsigned short count, struct injection *done)
{
    struct target target = {.pid = pid};
    int error;

    *done = (struct injection){.listener = -1};
    if (count > sizeof(((struct room *)0)->program) / sizeof(*program))
        return -E2BIG;
    await_stops();
    error = trace(PTRACE_SEIZE, &target, 0, (void *)PTRACE_O_TRACESYSGOOD);
    if (error)
        return error;
    error = hold_at_instruction(&target);
    if (!error)
        return inject_held(&target, program, count, done);
    trace(PTRACE_DETACH, &target, 0, NULL);
    return error;
}

#else

/* No other machine's registers were tried. */
int inject_filter(pid_t pid, const struct sock_filter *program, unsigned short count, struct injection *done)
{
    (void)pid;
    (void)program;
    (void)count;
    *done = (struct injection){.listener = -1};
    return -ENOSYS;
}

#endif
