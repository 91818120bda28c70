/*
 * A program that makes RM controls in every way that a program can, good and bad, and says what it got.
 *
 *     caller DIRECTORY CASE
 *
 * DIRECTORY has the stand-in's nodes. Output: one line per call, "ret= errno= status= buffers=", or for a case that
 * succeeds the process ids, as "pids= 2". What is printed is the same for the same answer, whoever gave it.
 */
#include "rm_calls.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static void call(int fd, unsigned long cmd, void *argument, const struct place *place)
{
    long ret = syscall(SYS_ioctl, fd, cmd, argument);

    say(ret, errno, place);
}

static void call_pids(int fd, unsigned long cmd, void *argument, const struct place *place)
{
    long ret = syscall(SYS_ioctl, fd, cmd, argument);

    say_pids(ret, errno, place);
}

/* ---- bad pointers: the argument is put where it is not wholly mapped, or not writable ---- */

static void case_null_nvos54(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call(gpu->control, RM_CONTROL, NULL, place);
}

static void case_unmapped_nvos54(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call(gpu->control, RM_CONTROL, pages(1) + PAGE, place);
}

static void case_half_mapped_nvos54(struct gpu *gpu, struct place *place)
{
    uint8_t *end = pages(1) + PAGE;

    ask_pids(gpu, place);
    memcpy(end - 16, &place->call, 16);
    call(gpu->control, RM_CONTROL, end - 16, place);
}

static void case_readonly_nvos54(struct gpu *gpu, struct place *place)
{
    uint8_t *page = pages(1);
    long ret;

    ask_pids(gpu, place);
    memcpy(page, &place->call, sizeof(place->call));
    mprotect(page, PAGE, PROT_READ);
    ret = ioctl(gpu->control, RM_CONTROL, page);
    /* whether params were written before NVOS54 failed is the driver's affair; NVOS54 itself must be as it was */
    printf("ret=%ld errno=%d same=%d\n", ret, errno, memcmp(page, &place->call, sizeof(place->call)) == 0);
}

static void case_noaccess_nvos54(struct gpu *gpu, struct place *place)
{
    uint8_t *page = pages(1);

    ask_pids(gpu, place);
    memcpy(page, &place->call, sizeof(place->call));
    mprotect(page, PAGE, PROT_NONE);
    call(gpu->control, RM_CONTROL, page, place);
}

static void case_null_params(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    place->call.params = 0;
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_unmapped_params(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    place->call.params = (uintptr_t)pages(1) + PAGE;
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_half_mapped_params(struct gpu *gpu, struct place *place)
{
    uint8_t *end = pages(1) + PAGE;

    ask_pids(gpu, place);
    memcpy(end - 100, place->params, 100);
    place->call.params = (uintptr_t)(end - 100);
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_kernel_params(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    place->call.params = 0xffffffff81000000;
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void readonly_params(struct gpu *gpu, struct place *place, int protection)
{
    uint8_t *page = pages(1);
    long ret;

    ask_pids(gpu, place);
    memcpy(page, place->params, PIDS_SIZE);
    place->call.params = (uintptr_t)page;
    mprotect(page, PAGE, protection);
    ret = ioctl(gpu->control, RM_CONTROL, &place->call);
    printf("ret=%ld errno=%d status=0x%x\n", ret, ret < 0 ? errno : 0, place->call.status);
    mprotect(page, PAGE, PROT_READ);
    printf("same=%d\n", memcmp(page, place->params, PIDS_SIZE) == 0);
}

static void case_readonly_params(struct gpu *gpu, struct place *place)
{
    readonly_params(gpu, place, PROT_READ);
}

static void case_noaccess_params(struct gpu *gpu, struct place *place)
{
    readonly_params(gpu, place, PROT_NONE);
}

/* ---- bad values ---- */

static void with_size(struct gpu *gpu, struct place *place, uint32_t size)
{
    ask_pids(gpu, place);
    place->call.size = size;
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_size_zero(struct gpu *gpu, struct place *place)
{
    with_size(gpu, place, 0);
}

static void case_size_wrong(struct gpu *gpu, struct place *place)
{
    with_size(gpu, place, PIDS_SIZE + 4);
}

static void case_size_huge(struct gpu *gpu, struct place *place)
{
    with_size(gpu, place, 0xFFFFFFFF);
}

static void case_flags(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    place->call.flags = 2;
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_unknown_cmd(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    place->call.cmd = 0x2080FFF0;
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_bad_client(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    place->call.client ^= 0x01010101;
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_id_type(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    put32(place->params, 7);
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_count_over(struct gpu *gpu, struct place *place)
{
    ask_info(gpu, place, 201, 1);
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_count_huge(struct gpu *gpu, struct place *place)
{
    ask_info(gpu, place, 0xFFFFFFFF, 1);
    call(gpu->control, RM_CONTROL, &place->call, place);
}

static void case_count_zero(struct gpu *gpu, struct place *place)
{
    ask_info(gpu, place, 0, 0);
    call(gpu->control, RM_CONTROL, &place->call, place);
}

/* ---- bad files ---- */

static void case_other_file(struct gpu *gpu, struct place *place)
{
    int other = open("/dev/null", O_RDWR);

    ask_pids(gpu, place);
    call(other, RM_CONTROL, &place->call, place);
}

static void case_gpu_node(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call(gpu->node, RM_CONTROL, &place->call, place);
}

static void case_closed_file(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call(dup(gpu->control) + 50, RM_CONTROL, &place->call, place);
    call(-1, RM_CONTROL, &place->call, place);
}

static const char *directory_argument; /* for the cases that open another file */

static void case_path_file(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call(open_node(directory_argument, "nvidiactl", O_PATH), RM_CONTROL, &place->call, place);
}

static void case_another_open_file(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call(open_node(directory_argument, "nvidiactl", O_RDWR), RM_CONTROL, &place->call, place);
}

/* ---- wrapped calls that the driver refuses or takes ---- */

static void with_xfer(struct gpu *gpu, struct place *place, uint32_t cmd, uint32_t size, void *inner)
{
    long ret;

    ask_pids(gpu, place);
    place->xfer = (struct xfer){cmd, size, (uintptr_t)inner};
    ret = ioctl(gpu->control, XFER, &place->xfer);
    say_pids(ret, errno, place);
}

static void case_xfer_bad_size(struct gpu *gpu, struct place *place)
{
    with_xfer(gpu, place, 0x2A, 40, &place->call);
}

static void case_xfer_bad_pointer(struct gpu *gpu, struct place *place)
{
    with_xfer(gpu, place, 0x2A, 32, NULL);
}

static void case_xfer_null(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call(gpu->control, XFER, NULL, place);
}

static void case_xfer(struct gpu *gpu, struct place *place)
{
    with_xfer(gpu, place, 0x2A, 32, &place->call);
}

static void case_xfer_high_cmd(struct gpu *gpu, struct place *place)
{
    with_xfer(gpu, place, 0x12A, 32, &place->call);
}

/* ---- calls that succeed, made in unusual ways ---- */

static void case_plain(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call_pids(gpu->control, RM_CONTROL, &place->call, place);
}

/* A list that nobody is on: of a class that no chip has. What was behind the count must be gone. */
static void case_empty(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    put32(place->params + 4, 0xFFC0);
    call_pids(gpu->control, RM_CONTROL, &place->call, place);
    printf("tail=%x\n", get32(place->params + 12));
}

static void case_high_bits(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call_pids(gpu->control, 0xFFFFFFFF00000000UL | RM_CONTROL, &place->call, place);
}

static void case_other_type(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    call_pids(gpu->control, 0xC020992AUL, &place->call, place);
}

#if defined(__x86_64__)
static void case_int80(struct gpu *gpu, struct place *place)
{
    long ret;

    ask_pids(gpu, place);
    __asm__ volatile("int $0x80"
                     : "=a"(ret)
                     : "a"(54), "b"(gpu->control), "c"((uint32_t)RM_CONTROL), "d"((uint32_t)(uintptr_t)&place->call)
                     : "memory", "r8", "r9", "r10", "r11");
    say_pids(ret < 0 ? -1 : ret, (int)-ret, place);
}

/* The kernel uses the low halves of the registers only. */
static void case_int80_garbage(struct gpu *gpu, struct place *place)
{
    uint64_t garbage = UINT64_C(0x5555555500000000);
    long ret;

    ask_pids(gpu, place);
    __asm__ volatile("int $0x80"
                     : "=a"(ret)
                     : "a"(54), "b"(garbage | (uint32_t)gpu->control), "c"(garbage | (uint32_t)RM_CONTROL),
                       "d"(garbage | (uint32_t)(uintptr_t)&place->call)
                     : "memory", "r8", "r9", "r10", "r11");
    say_pids(ret < 0 ? -1 : ret, (int)-ret, place);
}

static void case_x32(struct gpu *gpu, struct place *place)
{
    long ret;

    ask_pids(gpu, place);
    ret = syscall(0x40000000 + 514, gpu->control, RM_CONTROL, &place->call);
    say_pids(ret, errno, place);
}
#endif

struct work {
    struct gpu *gpu;
    struct place *place;
};

static void *thread_plain(void *argument)
{
    struct work *work = argument;

    case_plain(work->gpu, work->place);
    return NULL;
}

static void in_thread(struct gpu *gpu, struct place *place, void *(*body)(void *))
{
    struct work work = {gpu, place};
    pthread_t thread;

    if (pthread_create(&thread, NULL, body, &work))
        die("pthread_create");
    pthread_join(thread, NULL);
}

static void case_thread(struct gpu *gpu, struct place *place)
{
    in_thread(gpu, place, thread_plain);
}

/* A thread whose files are no longer those of its process: there, fd 200 is another open file of the control node. */
static void *thread_unshared(void *argument)
{
    struct work *work = argument;
    struct gpu own = *work->gpu;

    if (unshare(CLONE_FILES))
        die("unshare");
    own.control = dup2(work->gpu->control, 200);
    close(work->gpu->control);
    case_plain(&own, work->place);
    return NULL;
}

static void case_unshared_files(struct gpu *gpu, struct place *place)
{
    if (dup2(open_node(directory_argument, "nvidiactl", O_RDWR), 200) != 200)
        die("dup2");
    in_thread(gpu, place, thread_unshared);
}

static void wait_for(pid_t pid)
{
    int status;

    if (waitpid(pid, &status, 0) != pid || status)
        die("child");
}

static void case_fork(struct gpu *gpu, struct place *place)
{
    pid_t pid = fork();

    if (pid == 0) {
        case_plain(gpu, place);
        fflush(stdout);
        _exit(0);
    }
    wait_for(pid);
}

static void case_vfork(struct gpu *gpu, struct place *place)
{
    pid_t pid;

    ask_pids(gpu, place);
    pid = vfork();
    if (pid == 0) {
        syscall(SYS_ioctl, gpu->control, RM_CONTROL, &place->call);
        _exit(0);
    }
    wait_for(pid);
    say_pids(0, 0, place);
}

/* The caller shares its memory with a process that tells, when the caller is gone, whether it was written to. */
static void case_shared_memory(struct gpu *gpu, struct place *place)
{
    static struct place asked;
    pid_t pid;
    char byte;

    ask_info(gpu, place, 1, 1);
    asked = *place;
    pid = vfork();
    if (pid == 0) {
        syscall(SYS_ioctl, gpu->control, RM_CONTROL, &place->call);
        _exit(0);
    }
    waitpid(pid, NULL, 0); /* it may have been killed */
    if (read(0, &byte, 1) == 1)
        printf("same=%d\n", memcmp(&asked, place, sizeof(asked)) == 0);
}

static void case_setuid(struct gpu *gpu, struct place *place)
{
    if (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534))
        die("setresuid");
    case_plain(gpu, place);
}

static void on_alarm(int signal)
{
    (void)signal;
}

/* A signal each millisecond with SA_RESTART: every call succeeds or says EINTR, and nothing hangs. */
static void case_signals(struct gpu *gpu, struct place *place)
{
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    struct itimerval timer = {{0, 1000}, {0, 1000}};
    unsigned good = 0, interrupted = 0;

    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
    for (int i = 0; i < 500; i++) {
        ask_pids(gpu, place);
        if (ioctl(gpu->control, RM_CONTROL, &place->call)) {
            if (errno != EINTR)
                die("ioctl");
            interrupted++;
        } else if (place->call.status == 0 && get32(place->params + 8) == 1 &&
                   get32(place->params + 12) == (uint32_t)getpid()) {
            good++;
        }
    }
    timer = (struct itimerval){0};
    setitimer(ITIMER_REAL, &timer, NULL);
    printf("good_or_interrupted=%u good_some=%d\n", good + interrupted, good > 0);
}

/* A second thread execs while the first is in the call. */
static void *thread_pending(void *argument)
{
    struct work *work = argument;

    ask_pids(work->gpu, work->place);
    while (ioctl(work->gpu->control, RM_CONTROL, &work->place->call) == 0)
        continue;
    return NULL;
}

static void case_exec(struct gpu *gpu, struct place *place)
{
    struct work work = {gpu, place};
    pthread_t thread;

    if (pthread_create(&thread, NULL, thread_pending, &work))
        die("pthread_create");
    usleep(20000);
    execl("/bin/echo", "echo", "executed", NULL);
    die("execl");
}

static void say_info(long ret, int error, const struct place *place)
{
    if (ret || place->call.status) {
        say(ret, error, place);
        return;
    }
    for (uint32_t i = 0; i < get32(place->params); i++) {
        const uint8_t *entry = place->params + 8 + 72 * i;
        uint64_t memory;

        memcpy(&memory, entry + 16, 8);
        printf("pid=%u result=0x%x private=%llu\n", get32(entry), get32(entry + 8), (unsigned long long)memory);
    }
}

static void case_own_info(struct gpu *gpu, struct place *place)
{
    long ret;

    ask_info(gpu, place, 1, (uint32_t)getpid());
    ret = ioctl(gpu->control, RM_CONTROL, &place->call);
    say_info(ret, errno, place);
}

/* A call after each byte on standard input, GET_PID_INFO for an i: a test decides when, and ends it by closing it. */
static void answer_on_demand(struct gpu *gpu, struct place *place)
{
    char byte;

    for (;;) {
        ssize_t got = read(0, &byte, 1);

        if (got < 0 && errno == EINTR)
            continue;
        if (got != 1)
            break;
        if (byte == 'i')
            case_own_info(gpu, place);
        else
            case_plain(gpu, place);
        fflush(stdout);
    }
}

static void case_on_demand(struct gpu *gpu, struct place *place)
{
    printf("up\n");
    fflush(stdout);
    answer_on_demand(gpu, place);
}

/* As on_demand, but it holds 1 MiB of GPU memory, so that GET_PID_INFO of itself tells it from others, and it catches a
 * signal that interrupts what waits. */
static void case_holder(struct gpu *gpu, struct place *place)
{
    const struct sigaction action = {.sa_handler = on_alarm};
    uint64_t params[16] = {[8] = 1 << 20};

    sigaction(SIGUSR1, &action, NULL);
    rm_alloc(gpu->control, gpu->client, gpu->device, 0xA0000003, 0x40, params);
    case_on_demand(gpu, place);
}

/* As on_demand, but the control node's fd is closed by another thread as soon as the byte is in. */
static void *thread_closer(void *argument)
{
    char byte;

    if (read(0, &byte, 1) == 1)
        close(((struct work *)argument)->gpu->control);
    return NULL;
}

static void *thread_replacer(void *argument)
{
    char byte;

    if (read(0, &byte, 1) == 1)
        dup2(open("/dev/null", O_RDWR), ((struct work *)argument)->gpu->control);
    return NULL;
}

static void call_beside(struct gpu *gpu, struct place *place, void *(*body)(void *))
{
    struct work work = {gpu, place};
    pthread_t thread;

    if (pthread_create(&thread, NULL, body, &work))
        die("pthread_create");
    printf("up\n");
    fflush(stdout);
    case_own_info(gpu, place);
    fflush(stdout);
    pthread_join(thread, NULL);
}

static void *thread_protector(void *argument)
{
    struct work *work = argument;
    char byte;

    if (read(0, &byte, 1) == 1)
        mprotect(work->place, sizeof(*work->place), PROT_READ);
    return NULL;
}

static void case_protected_while_pending(struct gpu *gpu, struct place *place)
{
    call_beside(gpu, place, thread_protector);
}

static void case_closed_while_pending(struct gpu *gpu, struct place *place)
{
    call_beside(gpu, place, thread_closer);
}

static void case_replaced_while_pending(struct gpu *gpu, struct place *place)
{
    call_beside(gpu, place, thread_replacer);
}

/* What the driver says of the process ids given after the case's name. */
static char **arguments;

static void case_info(struct gpu *gpu, struct place *place)
{
    uint32_t count = 0;
    long ret;

    ask_info(gpu, place, 0, 0);
    for (char **at = arguments; *at && count < 200; at++, count++)
        put32(place->params + 8 + 72 * count, (uint32_t)strtoul(*at, NULL, 10));
    put32(place->params, count);
    ret = ioctl(gpu->control, RM_CONTROL, &place->call);
    say_info(ret, errno, place);
}

/* ---- a table behind a pointer: the encoder sessions, of which we have one ---- */

#define TABLE_ROOM 512u
#define TABLE_SIZE (TABLE_ROOM * 32u)
#define TABLE ((uint8_t *)0x30000000)

/* The table is at a fixed address, so that every run has the same. */
static void ask_encoders(const struct gpu *gpu, struct place *place, uint32_t count, const uint8_t *table)
{
    uint64_t pointer = (uintptr_t)table;

    rm_alloc(gpu->control, gpu->client, gpu->device, 0xA0000003, 0xA0BC, NULL);
    if (mmap(TABLE, TABLE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) ==
        MAP_FAILED)
        die("mmap");
    memset(TABLE, 0xEE, TABLE_SIZE);
    place->call =
        (struct nvos54){gpu->client, gpu->subdevice, GET_ENCODERS, 0, (uintptr_t)place->params, ENCODERS_SIZE, 99};
    put32(place->params, count);
    memcpy(place->params + 8, &pointer, 8);
}

static void say_encoders(const struct gpu *gpu, struct place *place)
{
    long ret = ioctl(gpu->control, RM_CONTROL, &place->call);
    uint32_t stale = 0;

    if (ret || place->call.status) {
        say(ret, errno, place);
        return;
    }
    for (uint32_t i = 32; i < TABLE_SIZE; i++)
        stale += TABLE[i] != 0;
    printf("encoders=%u pid=%u codec=%u width=%u stale=%u\n", get32(place->params), get32(TABLE), get32(TABLE + 12),
           get32(TABLE + 16), stale);
}

static void case_encoders(struct gpu *gpu, struct place *place)
{
    ask_encoders(gpu, place, TABLE_ROOM, TABLE);
    say_encoders(gpu, place);
}

/* Later it says what the call has left in its params, and asks on demand. */
static void case_encoders_kept(struct gpu *gpu, struct place *place)
{
    char byte;

    case_encoders(gpu, place);
    fflush(stdout);
    if (read(0, &byte, 1) != 1)
        return;
    printf("count=%u\n", get32(place->params));
    fflush(stdout);
    answer_on_demand(gpu, place);
}

static void case_encoders_count(struct gpu *gpu, struct place *place)
{
    ask_encoders(gpu, place, 0, NULL);
    say_encoders(gpu, place);
}

static void case_encoders_short(struct gpu *gpu, struct place *place)
{
    ask_encoders(gpu, place, TABLE_ROOM - 1, TABLE);
    say_encoders(gpu, place);
}

static void case_encoders_huge(struct gpu *gpu, struct place *place)
{
    ask_encoders(gpu, place, 0xFFFFFFFF, TABLE);
    say_encoders(gpu, place);
}

static void case_encoders_null_counted(struct gpu *gpu, struct place *place)
{
    ask_encoders(gpu, place, TABLE_ROOM, NULL);
    say_encoders(gpu, place);
}

static void case_encoders_unmapped(struct gpu *gpu, struct place *place)
{
    ask_encoders(gpu, place, TABLE_ROOM, TABLE);
    munmap(TABLE, TABLE_SIZE);
    say_encoders(gpu, place);
}

static void case_encoders_half_mapped(struct gpu *gpu, struct place *place)
{
    ask_encoders(gpu, place, TABLE_ROOM, TABLE);
    munmap(TABLE + TABLE_SIZE - PAGE, PAGE);
    say_encoders(gpu, place);
}

static void case_encoders_readonly(struct gpu *gpu, struct place *place)
{
    ask_encoders(gpu, place, TABLE_ROOM, TABLE);
    mprotect(TABLE + PAGE, PAGE, PROT_READ);
    say_encoders(gpu, place);
}

static void case_encoders_kernel(struct gpu *gpu, struct place *place)
{
    ask_encoders(gpu, place, TABLE_ROOM, (const uint8_t *)0xFFFFFFFFFFFFF000);
    say_encoders(gpu, place);
}

static void *thread_table_protector(void *argument)
{
    char byte;

    (void)argument;
    if (read(0, &byte, 1) == 1)
        mprotect(TABLE, PAGE, PROT_READ);
    return NULL;
}

static void case_encoders_protected_while_pending(struct gpu *gpu, struct place *place)
{
    pthread_t thread;

    ask_encoders(gpu, place, TABLE_ROOM, TABLE);
    if (pthread_create(&thread, NULL, thread_table_protector, NULL))
        die("pthread_create");
    printf("up\n");
    fflush(stdout);
    say_encoders(gpu, place);
    fflush(stdout);
    pthread_join(thread, NULL);
}

/* As many calls as are said, lists and infos in turn; how many of each had ourselves and nobody else in them. */
static void case_many(struct gpu *gpu, struct place *place)
{
    unsigned lists = 0, infos = 0;

    for (unsigned long left = strtoul(arguments[0], NULL, 10); left; left--) {
        if (left % 2) {
            ask_pids(gpu, place);
            lists += ioctl(gpu->control, RM_CONTROL, &place->call) == 0 && place->call.status == 0 &&
                     get32(place->params + 8) == 1 && get32(place->params + 12) == (uint32_t)getpid();
        } else {
            ask_info(gpu, place, 1, (uint32_t)getpid());
            infos += ioctl(gpu->control, RM_CONTROL, &place->call) == 0 && place->call.status == 0 &&
                     get32(place->params + 8) == (uint32_t)getpid() && get32(place->params + 16) == 0;
        }
    }
    printf("lists=%u infos=%u\n", lists, infos);
}

static const struct named_case CASES[] = {
    CASE(null_nvos54),
    CASE(unmapped_nvos54),
    CASE(half_mapped_nvos54),
    CASE(readonly_nvos54),
    CASE(noaccess_nvos54),
    CASE(null_params),
    CASE(unmapped_params),
    CASE(half_mapped_params),
    CASE(kernel_params),
    CASE(readonly_params),
    CASE(noaccess_params),
    CASE(size_zero),
    CASE(size_wrong),
    CASE(size_huge),
    CASE(flags),
    CASE(unknown_cmd),
    CASE(bad_client),
    CASE(id_type),
    CASE(count_over),
    CASE(count_huge),
    CASE(count_zero),
    CASE(other_file),
    CASE(gpu_node),
    CASE(closed_file),
    CASE(path_file),
    CASE(another_open_file),
    CASE(xfer_bad_size),
    CASE(xfer_bad_pointer),
    CASE(xfer_null),
    CASE(xfer),
    CASE(xfer_high_cmd),
    CASE(plain),
    CASE(high_bits),
    CASE(empty),
    CASE(other_type),
#if defined(__x86_64__)
    CASE(int80),
    CASE(int80_garbage),
    CASE(x32),
#endif
    CASE(thread),
    CASE(unshared_files),
    CASE(fork),
    CASE(vfork),
    CASE(shared_memory),
    CASE(setuid),
    CASE(signals),
    CASE(exec),
    CASE(on_demand),
    CASE(holder),
    CASE(many),
    CASE(closed_while_pending),
    CASE(protected_while_pending),
    CASE(replaced_while_pending),
    CASE(info),
    CASE(encoders),
    CASE(encoders_count),
    CASE(encoders_kept),
    CASE(encoders_short),
    CASE(encoders_huge),
    CASE(encoders_null_counted),
    CASE(encoders_unmapped),
    CASE(encoders_half_mapped),
    CASE(encoders_readonly),
    CASE(encoders_kernel),
    CASE(encoders_protected_while_pending),
};

int main(int argc, char **argv)
{
    struct place *place;
    struct gpu gpu;

    if (argc < 3)
        return 2;
    directory_argument = argv[1];
    arguments = argv + 3;
    place = make_place();
    gpu = come_up(argv[1]);
    return run_case(CASES, sizeof(CASES) / sizeof(CASES[0]), argv[2], &gpu, place);
}
