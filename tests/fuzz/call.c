/* What a caller has in its memory and what a supervisor answers. The first byte says which. */
#include "../../csrc/call.c"

#include "fuzz.h"

#include <linux/audit.h>

static const struct input *memory; /* of the caller: it begins at address 0 */

static int read_memory(int handle, uint64_t address, void *buffer, size_t size)
{
    EXPECT(handle == 0 && size <= sizeof(struct nvos54));
    if (address > memory->left || size > memory->left - address)
        return -EFAULT;
    memcpy(buffer, memory->at + address, size);
    return 0;
}

/* An ioctl and the memory of its caller. */
static void check_nvos54(struct input input)
{
    struct seccomp_data call = {.arch = AUDIT_ARCH_X86_64};
    struct nvos54 nvos54;
    struct nv_xfer xfer;
    uint64_t address, first;
    int error;

    if (take_number(&input, 1) & 1)
        call.arch = AUDIT_ARCH_I386;
    call.args[1] = take_number(&input, 8);
    call.args[2] = take_number(&input, 8);
    memory = &input;
    error = read_nvos54(&call, read_memory, 0, &address, &nvos54);
    EXPECT(error == 0 || error == -EFAULT || error == -ENOTTY);
    if (error)
        return;
    EXPECT(memcmp(&nvos54, input.at + address, sizeof(nvos54)) == 0);
    first = call.arch == AUDIT_ARCH_I386 ? (uint32_t)call.args[2] : call.args[2];
    if (((uint32_t)call.args[1] & RM_IOCTL_MASK) != RM_XFER_WANT) {
        EXPECT(address == first);
        return;
    }
    memcpy(&xfer, input.at + first, sizeof(xfer));
    EXPECT(xfer.cmd == RM_CONTROL_NR && xfer.size == sizeof(nvos54) && xfer.ptr == address);
}

/* Room for params that ends where the listener ends. */
static struct listener *make_listener(int channel)
{
    struct listener *listener = malloc(sizeof(*listener));

    EXPECT(listener);
    *listener = (struct listener){.fd = -1, .state = -1, .channel = channel};
    memset(listener->params, 0xEE, sizeof(listener->params));
    return listener;
}

static void check_params(const struct listener *listener, size_t size)
{
    for (size_t i = size; i < sizeof(listener->params); i += 61)
        EXPECT(listener->params[i] == 0xEE);
}

/* The sequence and size of a request, and a packet that comes as an answer. */
static void check_answer(struct input input)
{
    AUTO_FREE struct config *config = calloc(1, sizeof(*config));
    uint64_t sequence = take_number(&input, 1);
    uint32_t size = (uint32_t)take_number(&input, 2);
    struct mpu_answer answer = {0};
    int fds = open_fds(), ends[2], error;
    AUTO_FREE struct listener *listener = NULL;
    struct call call = {.config = config};

    EXPECT(config && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    config->n_controls = 1;
    config->controls[0] = (struct mpu_control){.cmd = 1, .size = size};
    call.control = &config->controls[0];
    listener = make_listener(ends[0]);
    EXPECT(take_answer(listener, &call, sequence, &answer) == -EAGAIN);
    EXPECT(send(ends[1], input.at, input.left, MSG_NOSIGNAL) == (ssize_t)input.left);
    error = take_answer(listener, &call, sequence, &answer);
    EXPECT(error == 0 || error == -EPROTO || error == -ESTALE || (error == -EPIPE && !input.left));
    EXPECT(error || answer.verdict == MPU_CONTINUE || answer.size == size);
    EXPECT(error || answer.verdict <= MPU_PERFORM);
    check_params(listener, !error && answer.verdict == MPU_PROCEED ? size : 0);
    free(call.more);
    close(ends[0]);
    close(ends[1]);
    EXPECT(open_fds() == fds);
}

/* A row of the control table, as the monitor takes it from a supervisor, and params that the driver answered. */
static void check_empty(struct input input)
{
    struct mpu_control control = {
        .size = (uint32_t)take_number(&input, 2),
        .asks = (uint32_t)take_number(&input, 1) & 1,
        .count_at = (uint32_t)take_number(&input, 2),
        .table_at = (uint32_t)take_number(&input, 2),
        .table_size = (uint32_t)take_number(&input, 2),
    };
    struct call call = {.control = &control};
    AUTO_FREE struct listener *listener = make_listener(-1);

    if (control.count_at + sizeof(uint32_t) > control.size || control.table_at + control.table_size > control.size)
        return;
    memcpy(listener->params, input.at, input.left < control.size ? input.left : control.size);
    if (!translate_empty(listener, &call))
        return;
    EXPECT(!control.asks && control.table_size);
    for (uint32_t i = 0; i < control.table_size; i++)
        EXPECT(listener->params[control.table_at + i] == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};

    switch (take_number(&input, 1)) {
    case 'n':
        check_nvos54(input);
        break;
    case 'a':
        check_answer(input);
        break;
    case 'e':
        check_empty(input);
        break;
    default:
        break;
    }
    return 0;
}
