/*
 * The only program in the containers: it becomes a user of GPU 0 and says who the driver says uses that GPU.
 *
 *     ask                once, on standard output
 *     ask every MS FILE  again and again, appended to FILE
 *
 * /gpu has the stand-in's nodes. A line is JSON: {"pid": 7, "pids": [1, 7]}. Exit 3 where a call fails.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define RM_CONTROL 0xC020462AUL
#define RM_ALLOC 0xC020462BUL
#define ROOT_CLIENT 0x41u
#define DEVICE 0x80u
#define SUBDEVICE 0x2080u
#define GET_PIDS 0x2080018Du

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

struct pids {
    uint32_t id_type, id, count, pids[950];
};

static void die(const char *what, uint32_t status)
{
    fprintf(stderr, "ask: %s: %s, status 0x%x\n", what, strerror(errno), status);
    exit(3);
}

static int open_node(const char *path)
{
    int fd = open(path, O_RDWR);

    if (fd < 0)
        die(path, 0);
    return fd;
}

static uint32_t allocate(int fd, uint32_t root, uint32_t parent, uint32_t handle, uint32_t class, void *params)
{
    struct nvos21 call = {root, parent, handle, class, (uintptr_t)params, 0, 0};

    if (ioctl(fd, RM_ALLOC, &call) || call.status)
        die("RM_ALLOC", call.status);
    return call.object;
}

static void ask(int control, uint32_t client, uint32_t subdevice, FILE *out)
{
    struct pids pids = {.id = SUBDEVICE};
    struct nvos54 call = {client, subdevice, GET_PIDS, 0, (uintptr_t)&pids, sizeof(pids), 0};

    if (ioctl(control, RM_CONTROL, &call) || call.status)
        die("GET_PIDS", call.status);
    fprintf(out, "{\"pid\": %d, \"pids\": [", getpid());
    for (uint32_t i = 0; i < pids.count && i < 950; i++)
        fprintf(out, "%s%u", i ? ", " : "", pids.pids[i]);
    fprintf(out, "]}\n");
    if (fflush(out))
        die("write", 0);
}

int main(int argc, char **argv)
{
    uint8_t device_params[56] = {0};
    uint32_t subdevice_params = 0, client, subdevice;
    int control = open_node("/gpu/nvidiactl");
    FILE *out;

    open_node("/gpu/nvidia0");
    client = allocate(control, 0, 0, 0, ROOT_CLIENT, NULL);
    allocate(control, client, client, 0xA0000001, DEVICE, device_params);
    subdevice = allocate(control, client, 0xA0000001, 0xA0000002, SUBDEVICE, &subdevice_params);
    if (argc < 4) {
        ask(control, client, subdevice, stdout);
        return 0;
    }
    out = fopen(argv[3], "a");
    if (!out)
        die(argv[3], 0);
    for (;;) {
        ask(control, client, subdevice, out);
        usleep(1000 * (useconds_t)atoi(argv[2]));
    }
}
