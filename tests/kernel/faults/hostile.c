/*
 * Callers that mean harm.
 *
 *     hostile DIRECTORY CASE [PLACE]
 *
 * DIRECTORY has the stand-in's nodes; PLACE is an empty directory, for a file system of the caller's own. Each case but
 * the xfer_ ones says "up" first, and does what it is named for after a byte on standard input.
 */
#include "../rm_calls.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define CROWD 1000
#define THREAD_STACK (64 * 1024)
#define SWAPPED_CALLS 30000

static const char *file_system; /* PLACE */

static void wait_for_byte(void)
{
    char byte;

    fflush(stdout);
    if (read(0, &byte, 1) != 1)
        exit(0);
}

static void up(void)
{
    printf("up\n");
    wait_for_byte();
}

static void start(void *(*body)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_t thread;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, THREAD_STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    errno = pthread_create(&thread, &attributes, body, argument);
    if (errno)
        die("pthread_create");
}

static void ask_and_say(int file, struct place *place)
{
    long ret = ioctl(file, RM_CONTROL, &place->call);

    say_pids(ret, errno, place);
    fflush(stdout);
}

/* ---- too many, without pause ---- */

struct work {
    struct gpu *gpu;
    struct place place;
};

static atomic_uint calls_made, calls_failed;

static void *ask_without_pause(void *argument)
{
    struct work *work = argument;

    for (;;) {
        ask_pids(work->gpu, &work->place);
        if (ioctl(work->gpu->control, RM_CONTROL, &work->place.call) || work->place.call.status ||
            get32(work->place.params + 8) != 1 || get32(work->place.params + 12) != (uint32_t)getpid())
            calls_failed++;
        calls_made++;
    }
    return NULL;
}

/* After each further byte: how many calls there were so far, and how many with another answer than ourselves. */
static void case_crowd(struct gpu *gpu, struct place *place)
{
    (void)place;
    up();
    for (unsigned i = 0; i < CROWD; i++) {
        struct work *work = calloc(1, sizeof(*work));

        if (!work)
            die("calloc");
        work->gpu = gpu;
        start(ask_without_pause, work);
    }
    for (;;) {
        wait_for_byte();
        printf("calls=%u wrong=%u\n", calls_made, calls_failed);
    }
}

/* ---- no taker ---- */

static void stay(int number)
{
    static const char said[] = "in the handler\n";

    (void)number;
    if (write(1, said, sizeof(said) - 1) < 0)
        _exit(3);
    for (;;)
        pause();
}

/* The main thread is caught in a signal's handler in the midst of its calls, for good; another thread asks on. */
static void *ask_on_demand(void *argument)
{
    struct work *work = argument;
    char byte;

    while (read(0, &byte, 1) == 1) {
        ask_pids(work->gpu, &work->place);
        ask_and_say(work->gpu->control, &work->place);
    }
    exit(0);
}

static void case_handler(struct gpu *gpu, struct place *place)
{
    static struct work other;
    struct sigaction action = {.sa_handler = stay};
    struct itimerval timer = {{0, 20000}, {0, 20000}};
    sigset_t alarm;

    up();
    other.gpu = gpu;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &alarm, NULL);
    start(ask_on_demand, &other);
    pthread_sigmask(SIG_UNBLOCK, &alarm, NULL);
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
    for (;;) {
        ask_pids(gpu, place);
        ioctl(gpu->control, RM_CONTROL, &place->call);
    }
}

/* ---- a file system whose server answers what it takes to open a file, and then nothing, ever ---- */

#define FILE_NODE 2
#define FILE_BYTES (1 << 20)

/* What the server answers besides. */
enum answers { OPENING, IOCTLS, ALL_BUT_WRITES };

static void answer(int fuse, const struct fuse_in_header *to, int error, const void *body, size_t size)
{
    uint8_t bytes[sizeof(struct fuse_out_header) + PAGE];
    struct fuse_out_header head = {(uint32_t)(sizeof(head) + size), error, to->unique};

    memcpy(bytes, &head, sizeof(head));
    if (size)
        memcpy(bytes + sizeof(head), body, size);
    if (write(fuse, bytes, head.len) < 0 && errno != ENOENT)
        _exit(3);
}

static struct fuse_attr attributes_of(uint64_t node)
{
    return (struct fuse_attr){.ino = node,
                              .size = FILE_BYTES,
                              .mode = node == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0666,
                              .nlink = 1,
                              .blksize = PAGE};
}

static void answer_init(int fuse, const struct fuse_in_header *head, const struct fuse_init_in *asked)
{
    struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION,
                                .minor =
                                    asked->minor < FUSE_KERNEL_MINOR_VERSION ? asked->minor : FUSE_KERNEL_MINOR_VERSION,
                                .max_readahead = PAGE,
                                .flags = FUSE_WRITEBACK_CACHE,
                                .max_write = PAGE};

    answer(fuse, head, 0, &out, sizeof(out));
}

/* Attributes are never good for later: whoever wants to know them must ask, and those of the file are not answered. */
static void answer_one(int fuse, const struct fuse_in_header *head, enum answers answers)
{
    struct fuse_entry_out entry = {.nodeid = FILE_NODE, .entry_valid = 3600, .attr = attributes_of(FILE_NODE)};
    struct fuse_attr_out node = {.attr = attributes_of(head->nodeid)};
    struct fuse_open_out opened = {.fh = 1};

    if (head->opcode == FUSE_INIT)
        answer_init(fuse, head, (const struct fuse_init_in *)(head + 1));
    else if (head->opcode == FUSE_LOOKUP)
        answer(fuse, head, 0, &entry, sizeof(entry));
    else if (head->opcode == FUSE_GETATTR && (head->nodeid == FUSE_ROOT_ID || answers == ALL_BUT_WRITES))
        answer(fuse, head, 0, &node, sizeof(node));
    else if (head->opcode == FUSE_OPEN)
        answer(fuse, head, 0, &opened, sizeof(opened));
    else if (head->opcode == FUSE_IOCTL && answers == IOCTLS)
        answer(fuse, head, -ENOTTY, NULL, 0);
    else if (head->opcode != FUSE_WRITE && answers == ALL_BUT_WRITES)
        answer(fuse, head, -ENOSYS, NULL, 0);
}

_Noreturn static void serve(int fuse, enum answers answers)
{
    static _Alignas(8) uint8_t request[1 << 17];

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) {
        if (read(fuse, request, sizeof(request)) > 0)
            answer_one(fuse, (const struct fuse_in_header *)request, answers);
        else if (errno == ENODEV)
            _exit(0);
    }
}

/* A file of it. */
static int open_silent(enum answers answers)
{
    int fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC), file;
    char options[128];

    snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0", fuse);
    if (fuse < 0 || mount("silent", file_system, "fuse", MS_NOSUID | MS_NODEV, options))
        die("a file system of our own");
    if (fork() == 0)
        serve(fuse, answers);
    close(fuse);
    file = open_node(file_system, "nvidiactl", O_RDWR);
    return file;
}

/* ---- memory that is not there, and will not be ---- */

static void *silent_memory(void)
{
    void *memory = mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, open_silent(OPENING), 0);

    if (memory == MAP_FAILED)
        die("mmap of a silent file");
    return memory;
}

static void *faulting_memory(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.range = {.len = FILE_BYTES}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    void *memory = mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    range.range.start = (uintptr_t)memory;
    if (fd < 0 || memory == MAP_FAILED || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
        die("userfaultfd");
    return memory;
}

/* On a file that refuses at once what comes through to it: the stand-in, unlike the driver, would wait as well. */
static void call_at(struct gpu *gpu, struct place *place, void *nvos54, void *params)
{
    int file = open("/dev/null", O_RDWR);

    up();
    ask_pids(gpu, place);
    if (params)
        place->call.params = (uintptr_t)params;
    ioctl(file, RM_CONTROL, nvos54 ? nvos54 : &place->call);
    printf("it came back\n");
    wait_for_byte();
}

static void case_userfault_nvos54(struct gpu *gpu, struct place *place)
{
    call_at(gpu, place, faulting_memory(), NULL);
}

static void case_userfault_params(struct gpu *gpu, struct place *place)
{
    call_at(gpu, place, NULL, faulting_memory());
}

static void case_silent_nvos54(struct gpu *gpu, struct place *place)
{
    call_at(gpu, place, silent_memory(), NULL);
}

static void case_silent_params(struct gpu *gpu, struct place *place)
{
    call_at(gpu, place, NULL, silent_memory());
}

/* ---- a control node that does not answer ---- */

static void case_silent_ioctl(struct gpu *gpu, struct place *place)
{
    int file = open_silent(OPENING);

    up();
    ask_pids(gpu, place);
    ioctl(file, RM_CONTROL, &place->call);
    printf("it came back\n");
}

static void case_silent_close(struct gpu *gpu, struct place *place)
{
    int file = open_silent(IOCTLS);

    up();
    ask_pids(gpu, place);
    ask_and_say(file, place);
    close(file);
    printf("it came back\n");
}

/* The second byte has the silent file take the place of the control node while the call is under way. */
static void *thread_put_silent(void *argument)
{
    int *from_to = argument;
    char byte;

    if (read(0, &byte, 1) == 1)
        dup2(from_to[0], from_to[1]);
    return NULL;
}

static bool send_file(int through, int file)
{
    char byte = 'x', room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room)};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);

    *head = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(head), &file, sizeof(file));
    return sendmsg(through, &message, 0) == 1;
}

/*
 * To the agent, whose socket is beside PLACE, a file that whoever closes it last must write back, which is not
 * answered. To be that, the agent gets it in a socket: our own close must come before there is something to write.
 */
static void case_silent_sent(struct gpu *gpu, struct place *place)
{
    static uint8_t page[PAGE];
    struct sockaddr_un agent = {.sun_family = AF_UNIX};
    int file = open_silent(ALL_BUT_WRITES), other = open_node(file_system, "nvidiactl", O_RDWR), ends[2];
    int connection = socket(AF_UNIX, SOCK_STREAM, 0);

    (void)gpu;
    (void)place;
    up();
    snprintf(agent.sun_path, sizeof(agent.sun_path), "%s/../agent.sock", file_system);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) || !send_file(ends[0], file))
        die("a socket with a file in it");
    close(file);
    if (write(other, page, sizeof(page)) != (ssize_t)sizeof(page))
        die("a page that is to be written back");
    if (connect(connection, (struct sockaddr *)&agent, sizeof(agent)) || !send_file(connection, ends[1]))
        die("the agent's socket");
    close(ends[1]);
    printf("sent\n");
    wait_for_byte();
}

static void case_silent_put_in_place(struct gpu *gpu, struct place *place)
{
    int from_to[] = {open_silent(IOCTLS), gpu->control};

    up();
    start(thread_put_silent, from_to);
    ask_pids(gpu, place);
    ask_and_say(gpu->control, place);
}

/* ---- everything changes while it is looked at ---- */

#define SWAPPED_FD 200
#define READ_ONLY ((uint8_t *)0x40000000)
#define OTHER ((uint8_t *)0x50000000)
#define OTHER_BYTES 65536u

static uint8_t *map_at(uint8_t *at, size_t size)
{
    if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != at)
        die("mmap");
    return at;
}

static uint32_t any(uint32_t *state, uint32_t below)
{
    *state = *state * 1664525u + 1013904223u;
    return (*state >> 8) % below;
}

static uint64_t any_pointer(uint32_t *state, const struct place *place)
{
    const uint64_t pointers[] = {(uintptr_t)place->params,
                                 (uintptr_t)place->params,
                                 (uintptr_t)OTHER,
                                 (uintptr_t)&place->call,
                                 (uintptr_t)&place->xfer,
                                 (uintptr_t)READ_ONLY,
                                 0xffffffff81000000,
                                 0xdead0000,
                                 0};

    return pointers[any(state, sizeof(pointers) / sizeof(pointers[0]))];
}

static void *thread_swap_call(void *argument)
{
    static const uint32_t CMDS[][2] = {
        {GET_PIDS, PIDS_SIZE}, {GET_PIDS, PIDS_SIZE},   {GET_PID_INFO, INFO_SIZE}, {GET_ENCODERS, ENCODERS_SIZE},
        {0x2080FFF0, 8},       {0x20800102, PIDS_SIZE}, {GET_PIDS, 0xFFFFFFFF},    {GET_PID_INFO, PIDS_SIZE}};
    struct work *work = argument;
    volatile struct place *place = &work->place;
    uint32_t state = 1;

    for (;;) {
        const uint32_t *cmd = CMDS[any(&state, sizeof(CMDS) / sizeof(CMDS[0]))];
        uint64_t table = any_pointer(&state, &work->place);

        place->call.cmd = cmd[0];
        place->call.size = cmd[1];
        place->call.params = any_pointer(&state, &work->place);
        place->call.flags = any(&state, 16) ? 0 : 2;
        place->call.client = any(&state, 16) ? work->gpu->client : 0xc1d00001;
        place->call.object = any(&state, 16) ? work->gpu->subdevice : work->gpu->client;
        place->xfer.cmd = any(&state, 8) ? 0x2A : 0x2B;
        place->xfer.size = any(&state, 8) ? 32 : 0xFFFF;
        place->xfer.ptr = any(&state, 2) ? (uintptr_t)&place->call : any_pointer(&state, &work->place);
        put32((uint8_t *)place->params, any(&state, 4) ? any(&state, 3) : 512);
        put32((uint8_t *)place->params + 4, 0x2080);
        memcpy((uint8_t *)place->params + 8, &table, 8);
    }
    return NULL;
}

static void *thread_swap_file(void *argument)
{
    struct work *work = argument;
    const int files[] = {work->gpu->control, work->gpu->control,        work->gpu->control,
                         work->gpu->node,    open("/dev/null", O_RDWR), open_node(file_system, "nvidiactl", O_RDWR)};
    uint32_t state = 2;

    for (;;) {
        uint32_t which = any(&state, sizeof(files) / sizeof(files[0]) + 1);

        if (which < sizeof(files) / sizeof(files[0]))
            dup2(files[which], SWAPPED_FD);
        else
            close(SWAPPED_FD);
    }
    return NULL;
}

static uint32_t digest_of_read_only(void)
{
    return digest(READ_ONLY, PAGE * 4);
}

/* PLACE is another control node than DIRECTORY's here: of another driver. */
static void case_swap(struct gpu *gpu, struct place *place)
{
    struct work *work = (struct work *)map_at((uint8_t *)0x60000000, sizeof(*work) + PAGE);
    unsigned done = 0, untouched;
    uint32_t state = 3;

    (void)place;
    work->gpu = gpu;
    memset(map_at(READ_ONLY, PAGE * 4), 0x5A, PAGE * 4);
    mprotect(READ_ONLY, PAGE * 4, PROT_READ);
    untouched = digest_of_read_only();
    map_at(OTHER, OTHER_BYTES);
    up();
    ask_pids(gpu, &work->place);
    dup2(gpu->control, SWAPPED_FD);
    start(thread_swap_call, work);
    start(thread_swap_file, work);
    for (unsigned i = 0; i < SWAPPED_CALLS; i++) {
        bool wrapped = any(&state, 4) == 0;

        if (ioctl(SWAPPED_FD, wrapped ? XFER : RM_CONTROL,
                  wrapped ? (void *)&work->place.xfer : (void *)&work->place.call) == 0)
            done++;
    }
    printf("calls=%u some_done=%d protected_memory_is_as_it_was=%d\n", SWAPPED_CALLS, done > 0,
           untouched == digest_of_read_only());
    fflush(stdout);
    _exit(0);
}

/* ---- crafted wrappers ---- */

static void wrapped(struct gpu *gpu, struct place *place, void *argument)
{
    long ret = syscall(SYS_ioctl, gpu->control, XFER, argument);

    say(ret, errno, place);
}

static void with_xfer(struct gpu *gpu, struct place *place, uint32_t cmd, uint32_t size, uint64_t pointer)
{
    ask_pids(gpu, place);
    place->xfer = (struct xfer){cmd, size, pointer};
    wrapped(gpu, place, &place->xfer);
}

static void case_xfer_in_xfer(struct gpu *gpu, struct place *place)
{
    struct xfer inner = {0x2A, 32, (uintptr_t)&place->call};

    with_xfer(gpu, place, 0xD3, 16, (uintptr_t)&inner);
    with_xfer(gpu, place, 0xD3, 32, (uintptr_t)&inner);
}

static void case_xfer_to_itself(struct gpu *gpu, struct place *place)
{
    with_xfer(gpu, place, 0x2A, 32, (uintptr_t)&place->xfer);
    with_xfer(gpu, place, 0xD3, 16, (uintptr_t)&place->xfer);
}

static void case_xfer_sizes(struct gpu *gpu, struct place *place)
{
    static const uint32_t SIZES[] = {0, 1, 16, 31, 33, 64, 4096, 0x3FFF, 0x4000, 0x7FFFFFFF, 0x80000020, 0xFFFFFFFF};

    for (size_t i = 0; i < sizeof(SIZES) / sizeof(SIZES[0]); i++)
        with_xfer(gpu, place, 0x2A, SIZES[i], (uintptr_t)&place->call);
}

static void case_xfer_pointers(struct gpu *gpu, struct place *place)
{
    uint8_t *end = pages(1) + PAGE;
    const uint64_t pointers[] = {
        0, 1, (uintptr_t)end, (uintptr_t)(end - 16), 0xffffffff81000000, UINT64_MAX, UINT64_MAX - 31};

    for (size_t i = 0; i < sizeof(pointers) / sizeof(pointers[0]); i++)
        with_xfer(gpu, place, 0x2A, 32, pointers[i]);
}

static void case_xfer_half_mapped(struct gpu *gpu, struct place *place)
{
    uint8_t *end = pages(1) + PAGE;

    ask_pids(gpu, place);
    memset(end - 8, 0x2A, 8);
    wrapped(gpu, place, end - 8);
    wrapped(gpu, place, end);
    wrapped(gpu, place, (void *)0xffffffff81000000);
}

/* The NVOS54 is in its own params. */
static void case_xfer_overlapping(struct gpu *gpu, struct place *place)
{
    ask_pids(gpu, place);
    place->call.params = (uintptr_t)&place->call;
    place->xfer = (struct xfer){0x2A, 32, (uintptr_t)&place->call};
    wrapped(gpu, place, &place->xfer);
}

static const struct named_case CASES[] = {
    CASE(crowd),
    CASE(handler),
    CASE(userfault_nvos54),
    CASE(userfault_params),
    CASE(silent_nvos54),
    CASE(silent_params),
    CASE(silent_ioctl),
    CASE(silent_close),
    CASE(silent_put_in_place),
    CASE(silent_sent),
    CASE(swap),
    CASE(xfer_in_xfer),
    CASE(xfer_to_itself),
    CASE(xfer_sizes),
    CASE(xfer_pointers),
    CASE(xfer_half_mapped),
    CASE(xfer_overlapping),
};

int main(int argc, char **argv)
{
    struct place *place;
    struct gpu gpu;

    if (argc < 3)
        return 2;
    file_system = argc > 3 ? argv[3] : NULL;
    place = make_place();
    gpu = come_up(argv[1]);
    return run_case(CASES, sizeof(CASES) / sizeof(CASES[0]), argv[2], &gpu, place);
}
