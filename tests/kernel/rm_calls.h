/* What the tests' programs share: to come up on the stand-in's nodes, to ask for processes, and to say what came. */
#ifndef TESTS_RM_CALLS_H
#define TESTS_RM_CALLS_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define RM_CONTROL 0xC020462AUL
#define RM_ALLOC 0xC020462BUL
#define XFER 0xC01046D3UL
#define GET_PIDS 0x2080018Du
#define GET_PID_INFO 0x2080018Eu
#define GET_ENCODERS 0x2080016Eu
#define PIDS_SIZE 3812u
#define INFO_SIZE 14408u
#define ENCODERS_SIZE 16u
#define PAGE 4096u

struct nvos54 {
    uint32_t client, object, cmd, flags;
    uint64_t params;
    uint32_t size, status;
};

struct nvos21 {
    uint32_t root, parent, object, class;
    uint64_t params;
    uint32_t size, status;
};

struct xfer {
    uint32_t cmd, size;
    uint64_t ptr;
};

/* Where the calls of a case are made from: low addresses, so that the 32-bit ABI can pass them. */
struct place {
    struct nvos54 call;
    struct xfer xfer;
    uint8_t params[16384];
};

struct gpu {
    int control, node;
    uint32_t client, device, subdevice;
};

static inline void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(3);
}

static inline uint32_t rm_alloc(int fd, uint32_t root, uint32_t parent, uint32_t handle, uint32_t class, void *params)
{
    struct nvos21 call = {root, parent, handle, class, (uintptr_t)params, 0, 0};

    if (ioctl(fd, RM_ALLOC, &call))
        die("RM_ALLOC");
    if (call.status) {
        fprintf(stderr, "RM_ALLOC class 0x%x: status 0x%x\n", class, call.status);
        exit(3);
    }
    return call.object;
}

static inline int open_node(const char *directory, const char *name, int flags)
{
    char path[256];
    int fd;

    snprintf(path, sizeof(path), "%s/%s", directory, name);
    fd = open(path, flags);
    if (fd < 0)
        die(path);
    return fd;
}

static inline struct gpu come_up(const char *directory)
{
    uint8_t device_params[56] = {0};
    uint32_t subdevice_params = 0;
    struct gpu gpu;

    gpu.control = open_node(directory, "nvidiactl", O_RDWR);
    gpu.node = open_node(directory, "nvidia0", O_RDWR);
    gpu.client = rm_alloc(gpu.control, 0, 0, 0, 0x41, NULL);
    gpu.device = rm_alloc(gpu.control, gpu.client, gpu.client, 0xA0000001, 0x80, device_params);
    gpu.subdevice = rm_alloc(gpu.control, gpu.client, gpu.device, 0xA0000002, 0x2080, &subdevice_params);
    return gpu;
}

static inline struct place *make_place(void)
{
    struct place *place = mmap((void *)0x20000000, (sizeof(struct place) + PAGE) & ~(PAGE - 1), PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

    if (place == MAP_FAILED)
        die("mmap");
    memset(place, 0xEE, sizeof(*place));
    return place;
}

/* So many, and behind them none. */
static inline uint8_t *pages(unsigned count)
{
    uint8_t *start = mmap(NULL, (count + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (start == MAP_FAILED)
        die("mmap");
    munmap(start + count * PAGE, PAGE);
    return start;
}

static inline void put32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, 4);
}

static inline uint32_t get32(const uint8_t *at)
{
    uint32_t value;

    memcpy(&value, at, 4);
    return value;
}

/* GET_PIDS of every process with a subdevice of this GPU: at least ourselves. */
static inline void ask_pids(const struct gpu *gpu, struct place *place)
{
    place->call = (struct nvos54){gpu->client, gpu->subdevice, GET_PIDS, 0, (uintptr_t)place->params, PIDS_SIZE, 99};
    put32(place->params, 0);
    put32(place->params + 4, 0x2080);
}

static inline void ask_info(const struct gpu *gpu, struct place *place, uint32_t count, uint32_t pid)
{
    place->call =
        (struct nvos54){gpu->client, gpu->subdevice, GET_PID_INFO, 0, (uintptr_t)place->params, INFO_SIZE, 99};
    memset(place->params, 0, sizeof(place->params));
    put32(place->params, count);
    for (uint32_t i = 0; i < count && i < 200; i++)
        put32(place->params + 8 + i * 72, pid);
}

static inline uint32_t digest(const void *data, size_t size)
{
    const uint8_t *bytes = data;
    uint32_t hash = 2166136261u;

    for (size_t i = 0; i < size; i++)
        hash = (hash ^ bytes[i]) * 16777619u;
    return hash;
}

/* The buffers without what differs between two runs of the same thing: handles. */
static inline void say(long ret, int error, const struct place *place)
{
    printf("ret=%ld errno=%d status=0x%x size=%u flags=%u buffers=%08x\n", ret, ret < 0 ? error : 0, place->call.status,
           place->call.size, place->call.flags, digest(place->params, sizeof(place->params)));
}

static inline void say_pids(long ret, int error, const struct place *place)
{
    uint32_t count = get32(place->params + 8);

    if (ret || place->call.status) {
        say(ret, error, place);
        return;
    }
    printf("pids=");
    for (uint32_t i = 0; i < count && i < 950; i++)
        printf(" %u", get32(place->params + 12 + 4 * i));
    printf("\n");
}

struct named_case {
    const char *name;
    void (*run)(struct gpu *gpu, struct place *place);
};

#define CASE(name) {#name, case_##name}

/* The case of this name; the exit status of the program. */
static inline int run_case(const struct named_case *cases, size_t count, const char *name, struct gpu *gpu,
                           struct place *place)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(name, cases[i].name) == 0) {
            cases[i].run(gpu, place);
            return 0;
        }
    fprintf(stderr, "caller: no case %s\n", name);
    return 2;
}

#endif
