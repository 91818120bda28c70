/* The way through of one call that was received: look, and for a control in the table the supervised exchange. */
#include "cleanup.h"
#include "monitor.h"
#include "packet.h"
#include "rm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SILENCES_SKIPPED 10 /* times as long as was waited for it, a silent supervisor is not asked */

/* A call in the table on its way through. A step returns a cause; MPU_TRANSLATED lets the next one run. */
struct call {
    const struct config *config; /* the same for all of the call */
    uint64_t received_ns;
    uint64_t begun_ns;
    uint64_t waited_ns; /* on the supervisor, all exchanges together */
    bool begun;         /* the supervisor knows of it */
    uint64_t address;   /* of the caller's NVOS54 */
    const struct mpu_control *control;
    struct nvos54 nvos54;
    uint64_t table;     /* the caller's, which the params point to; 0 where there is none */
    uint32_t count;     /* of its entries, as the caller says */
    uint8_t *more;      /* params of one more control */
    uint32_t performed; /* more controls */
    int error;
};

static enum mpu_cause fail(struct call *call, enum mpu_cause cause, int negative_errno)
{
    call->error = -negative_errno;
    return cause;
}

/* The first row of a control, whatever its size. */
static const struct mpu_control *table_find_cmd(const struct config *config, uint32_t cmd)
{
    for (uint32_t i = 0; i < config->n_controls; i++)
        if (config->controls[i].cmd == cmd)
            return &config->controls[i];
    return NULL;
}

static const struct mpu_control *table_find(const struct config *config, uint32_t cmd, uint32_t size)
{
    for (uint32_t i = 0; i < config->n_controls; i++)
        if (config->controls[i].cmd == cmd && config->controls[i].size == size)
            return &config->controls[i];
    return NULL;
}

static uint32_t pointed_size(const struct mpu_control *control)
{
    return control->entry_size * control->n_entries;
}

/* Of the params and, behind them, the table that they point to: as in listener->params. */
static uint32_t whole_size(const struct mpu_control *control)
{
    return control->size + pointed_size(control);
}

typedef int (*reader)(int handle, uint64_t address, void *buffer, size_t size);

/* Where the ioctl's NVOS54 is and what is in it: the argument itself, or what an XFER call points at. */
static int read_nvos54(const struct seccomp_data *data, reader read, int handle, uint64_t *address,
                       struct nvos54 *nvos54)
{
    struct nv_xfer xfer;
    int error;

    /* Registers of a 32-bit call may have anything above its 32 bits. */
    *address = caller_is_compat(data->arch) ? (uint32_t)data->args[2] : data->args[2];
    if (((uint32_t)data->args[1] & RM_IOCTL_MASK) == RM_XFER_WANT) {
        error = read(handle, *address, &xfer, sizeof(xfer));
        if (error)
            return error;
        if (xfer.cmd != RM_CONTROL_NR || xfer.size != sizeof(*nvos54))
            return -ENOTTY;
        *address = xfer.ptr;
    }
    return read(handle, *address, nvos54, sizeof(*nvos54));
}

static enum mpu_cause check_waiting(struct listener *listener)
{
    return caller_is_waiting(listener->fd, listener->notif->id) ? MPU_TRANSLATED : MPU_CALLER_GONE;
}

/* All buffers that an answer would be written to. */
static int check_writable(const struct listener *listener, const struct call *call, int maps)
{
    const struct kernel *kernel = &listener->monitor->kernel;
    int error = caller_may_write(kernel, maps, call->address, sizeof(call->nvos54));

    if (!error)
        error = caller_may_write(kernel, maps, call->nvos54.params, call->nvos54.params_size);
    if (!error && call->table)
        error = caller_may_write(kernel, maps, call->table, pointed_size(call->control));
    return error;
}

/*
 * Take the table that the params point to, where the control has one. A caller without one asks for the count alone,
 * which the driver would give of all processes: it is asked for the table all the same.
 */
static enum mpu_cause read_table(struct listener *listener, struct call *call, int memory)
{
    const struct mpu_control *control = call->control;
    uint8_t *table = listener->params + control->size;
    int error;

    if (!control->entry_size)
        return MPU_TRANSLATED;
    memcpy(&call->table, listener->params + control->pointer_at, sizeof(call->table));
    memcpy(&call->count, listener->params + control->count_at, sizeof(call->count));
    if (call->count != (call->table ? control->n_entries : 0))
        return MPU_TABLE_UNUSUAL;
    if (call->table) {
        error = caller_read(memory, call->table, table, pointed_size(control));
        return error ? fail(call, MPU_MEMORY_UNREADABLE, error) : MPU_TRANSLATED;
    }
    memset(table, 0, pointed_size(control));
    memcpy(listener->params + control->count_at, &control->n_entries, sizeof(control->n_entries));
    return MPU_TRANSLATED;
}

/* Read the call again, now from memory that is surely the caller's, and take its params. */
static enum mpu_cause read_call(struct listener *listener, struct call *call, int memory, int maps)
{
    const struct nvos54 *nvos54 = &call->nvos54;
    enum mpu_cause cause;
    int error = read_nvos54(&listener->notif->data, caller_read, memory, &call->address, &call->nvos54);

    if (error)
        return fail(call, MPU_MEMORY_UNREADABLE, error);
    call->control = table_find(call->config, nvos54->cmd, nvos54->params_size);
    if (!call->control)
        return MPU_SIZE_UNKNOWN;
    if (nvos54->flags)
        return MPU_FLAGS_SET;
    error = caller_read(memory, nvos54->params, listener->params, nvos54->params_size);
    if (error)
        return fail(call, MPU_MEMORY_UNREADABLE, error);
    cause = read_table(listener, call, memory);
    if (cause)
        return cause;
    error = check_writable(listener, call, maps);
    if (error)
        return fail(call, MPU_MEMORY_UNWRITABLE, error);
    return check_waiting(listener);
}

/* After nonsense, or for good: the supervisor's end sees the end of the channel, ours finds nobody. */
static void hang_up(struct listener *listener)
{
    shutdown(listener->channel, SHUT_RDWR);
}

int listener_tell(struct listener *listener, struct mpu_header *head, size_t head_size, uint64_t deadline)
{
    struct parcel parcel = {.head = head, .head_size = head_size};

    head->listener = listener->id;
    return packet_send(listener->channel, &parcel, deadline);
}

/* Where the params of an answer to our request go. -EPROTO where it is none that we asked for. */
static int find_room(struct listener *listener, struct call *call, const struct mpu_answer *answer, uint8_t **room)
{
    const struct mpu_control *control = call->control;

    *room = listener->params;
    if (!control) /* nothing was asked yet */
        return -EPROTO;
    if (answer->verdict != MPU_PERFORM)
        return answer->size == (answer->verdict == MPU_PROCEED ? whole_size(control) : 0) ? 0 : -EPROTO;
    control = table_find(call->config, answer->cmd, answer->size);
    if (!control || control->entry_size || call->performed == MPU_MAX_PERFORMED)
        return -EPROTO;
    *room = realloc(call->more, answer->size);
    if (!*room)
        return -ENOMEM;
    call->more = *room;
    return 0;
}

/*
 * Take the next answer off the channel, its params into listener->params, or call->more where it wants one more
 * control, if it is to the request of this sequence. -EAGAIN where there is none, -ESTALE where it came too late,
 * -EPIPE where there is no supervisor.
 */
static int take_answer(struct listener *listener, struct call *call, uint64_t sequence, struct mpu_answer *head)
{
    struct iovec parts[2] = {{head, sizeof(*head)}, {NULL, 0}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t length = recv(listener->channel, head, sizeof(*head), MSG_PEEK | MSG_DONTWAIT | MSG_TRUNC);
    uint8_t *room;
    int error;

    if (length <= 0)
        return length < 0 && (errno == EAGAIN || errno == EINTR) ? -EAGAIN : -EPIPE;
    if ((size_t)length < sizeof(*head) || !packet_is_sound(&head->header, (size_t)length) ||
        head->header.type != MPU_ANSWER || head->verdict > MPU_PERFORM || head->size != (size_t)length - sizeof(*head))
        return -EPROTO;
    if (head->sequence == sequence) {
        error = find_room(listener, call, head, &room);
        if (error)
            return error;
        parts[1] = (struct iovec){room, head->size};
    }
    if (recvmsg(listener->channel, &message, MSG_DONTWAIT) < 0)
        return -EPIPE;
    return head->sequence == sequence ? 0 : -ESTALE;
}

/* A waiting thread that sleeps at once wakes late: an answer mostly comes within this time. */
#define SPIN_NS NS_PER_MS

/* Wait for the answer to the latest request; see take_answer. */
static enum mpu_cause await_answer(struct listener *listener, struct call *call, uint64_t deadline,
                                   struct mpu_answer *answer)
{
    struct pollfd polled = {.fd = listener->channel, .events = POLLIN};
    uint64_t spin_until = now_ns(CLOCK_MONOTONIC) + SPIN_NS;
    int error;

    while ((error = take_answer(listener, call, listener->sequence, answer))) {
        if (error == -ESTALE)
            continue;
        if (error != -EAGAIN)
            break;
        if (now_ns(CLOCK_MONOTONIC) < spin_until)
            sched_yield();
        else if (poll(&polled, 1, ms_until(deadline)) == 0)
            return MPU_SUPERVISOR_SILENT;
    }
    if (error == -EPROTO) {
        complain("the supervisor answered listener %u with a packet that protocol version %d does not have; answering "
                 "it with continue from now on",
                 (unsigned)listener->id, MPU_PROTOCOL_VERSION);
        hang_up(listener);
    }
    return error ? fail(call, MPU_SUPERVISOR_GONE, error) : MPU_TRANSLATED;
}

/* Send the supervisor a request and wait for its answer. All exchanges of a call share one time to wait. */
static enum mpu_cause exchange(struct listener *listener, struct call *call, const struct parcel *request,
                               struct mpu_answer *answer)
{
    uint64_t start = now_ns(CLOCK_MONOTONIC);
    uint64_t budget = call->config->silence_ms * NS_PER_MS;
    uint64_t deadline = start + (budget > call->waited_ns ? budget - call->waited_ns : 0);
    int error = packet_send(listener->channel, request, deadline);
    enum mpu_cause cause;

    if (error && error != -ETIMEDOUT)
        return fail(call, MPU_SUPERVISOR_GONE, error);
    cause = error ? MPU_SUPERVISOR_SILENT : await_answer(listener, call, deadline, answer);
    call->waited_ns += now_ns(CLOCK_MONOTONIC) - start;
    if (cause == MPU_SUPERVISOR_SILENT)
        listener->silent_until = now_ns(CLOCK_MONOTONIC) + SILENCES_SKIPPED * budget;
    return cause;
}

/* Tell the supervisor of a call. One that was silent is not bothered for a while, or until a late answer comes. */
static enum mpu_cause begin(struct listener *listener, struct call *call)
{
    struct mpu_begun begun = {.header = {.type = MPU_BEGUN}, .tid = listener->notif->pid};
    struct mpu_answer late;
    int error;

    if (listener->silent_until) {
        while (take_answer(listener, call, 0, &late) == -ESTALE)
            listener->silent_until = 0;
        if (now_ns(CLOCK_MONOTONIC) < listener->silent_until)
            return MPU_SUPERVISOR_SILENT;
    }
    error = listener_tell(listener, &begun.header, sizeof(begun), 0);
    if (error && error != -ETIMEDOUT)
        return MPU_SUPERVISOR_GONE;
    call->begun = true;
    return MPU_TRANSLATED;
}

/*
 * A real ioctl, on a duplicate of the caller's file that lives no longer than the ioctl, from our own buffers. The RM
 * status is left in the NVOS54.
 */
static enum mpu_cause perform(struct listener *listener, struct call *call, struct nvos54 *ours, uint64_t *begun_ns)
{
    const struct kernel *kernel = &listener->monitor->kernel;
    const struct device *device = &call->config->device;
    pid_t tid = (pid_t)listener->notif->pid;
    int fd = (int)listener->notif->data.args[0];
    int error = caller_check_file(tid, fd, device);
    AUTO_CLOSE file = error ? error : caller_fetch_file(kernel, tid, fd, device);

    if (file < 0)
        return fail(call, file == -EXDEV ? MPU_FILE_FOREIGN : MPU_FILE_UNAVAILABLE, file);
    if (check_waiting(listener) != MPU_TRANSLATED)
        return MPU_CALLER_GONE;
    *begun_ns = now_ns(CLOCK_BOOTTIME);
    do /* a signal to us is none to the caller */
        error = ioctl(file, RM_CONTROL_IOCTL, ours) ? -errno : 0;
    while (error == -EINTR);
    return error ? fail(call, MPU_IOCTL_FAILED, error) : MPU_TRANSLATED;
}

/* The params' pointer to a table, where the control has one. */
static void point_at(struct listener *listener, const struct mpu_control *control, uint64_t table)
{
    if (control->entry_size)
        memcpy(listener->params + control->pointer_at, &table, sizeof(table));
}

static enum mpu_cause perform_call(struct listener *listener, struct call *call)
{
    struct nvos54 ours = call->nvos54;
    enum mpu_cause cause;

    ours.params = (uint64_t)(uintptr_t)listener->params;
    point_at(listener, call->control, ours.params + call->control->size);
    cause = perform(listener, call, &ours, &call->begun_ns);
    point_at(listener, call->control, call->table);
    if (cause)
        return cause;
    call->nvos54.status = ours.status;
    call->error = (int)ours.status;
    return ours.status ? MPU_STATUS_BAD : MPU_TRANSLATED;
}

/* The one more control that an answer wants, of the call's own object, and the next answer in its place. */
static enum mpu_cause perform_more(struct listener *listener, struct call *call, struct mpu_answer *answer)
{
    struct mpu_performed head = {
        .header = {.type = MPU_PERFORMED, .listener = listener->id}, .cmd = answer->cmd, .size = answer->size};
    struct parcel parcel = {
        .head = &head.header, .head_size = sizeof(head), .body = call->more, .body_size = head.size};
    struct nvos54 more = {
        .client = call->nvos54.client,
        .object = call->nvos54.object,
        .cmd = answer->cmd,
        .params = (uint64_t)(uintptr_t)call->more,
        .params_size = answer->size,
    };
    enum mpu_cause cause = perform(listener, call, &more, &head.begun_ns);

    if (cause)
        return cause;
    call->performed++;
    head.status = more.status;
    head.sequence = ++listener->sequence;
    return exchange(listener, call, &parcel, answer);
}

/* Ask the supervisor about listener->params, and do as it says until it has answered for good. */
static enum mpu_cause ask(struct listener *listener, struct call *call, enum mpu_type type)
{
    struct mpu_call head = {
        .header = {.type = (uint16_t)type, .listener = listener->id},
        .sequence = ++listener->sequence,
        .begun_ns = call->begun_ns,
        .cmd = call->nvos54.cmd,
        .size = whole_size(call->control),
    };
    struct parcel parcel = {
        .head = &head.header, .head_size = sizeof(head), .body = listener->params, .body_size = head.size};
    struct mpu_answer answer;
    enum mpu_cause cause = exchange(listener, call, &parcel, &answer);

    while (!cause && answer.verdict == MPU_PERFORM)
        cause = perform_more(listener, call, &answer);
    return !cause && answer.verdict == MPU_CONTINUE ? MPU_SUPERVISOR_DECLINED : cause;
}

/* The driver named nobody: the empty table is the whole translation, without what the caller had in it. */
static bool translate_empty(struct listener *listener, const struct call *call)
{
    const struct mpu_control *control = call->control;
    uint32_t count;

    memcpy(&count, listener->params + control->count_at, sizeof(count));
    if (control->asks || !control->table_size || count)
        return false;
    memset(listener->params + control->table_at, 0, control->table_size);
    return true;
}

/* From now on, what is written over is in the slot: the next monitor finds it there. */
static void keep_input(struct listener *listener, const struct call *call)
{
    if (call->control->entry_size)
        listener->slot->input =
            (struct slot_input){.is_due = 1, .count_at = call->control->count_at, .count = call->count};
}

/* Within the params and only where the driver could: a slot is not ours alone. */
static void put_input_back(struct listener *listener, int memory, int maps)
{
    const struct slot_input input = listener->slot->input;
    struct nvos54 nvos54;
    uint64_t address;

    if (!input.is_due || read_nvos54(&listener->notif->data, caller_read, memory, &address, &nvos54))
        return;
    if (nvos54.params_size < sizeof(input.count) || input.count_at > nvos54.params_size - sizeof(input.count))
        return;
    address = nvos54.params + input.count_at;
    if (caller_may_write(&listener->monitor->kernel, maps, address, sizeof(input.count)) == 0)
        caller_write(memory, address, &input.count, sizeof(input.count));
}

/*
 * First the table behind a pointer, which is no input, and NVOS54 last: until then a failure can still be answered with
 * continue, because the control's inputs are intact, or are put back.
 */
static enum mpu_cause write_back(struct listener *listener, struct call *call, int memory, int maps)
{
    int error;

    if (check_waiting(listener) != MPU_TRANSLATED)
        return MPU_CALLER_GONE;
    error = check_writable(listener, call, maps); /* again: another thread of the caller may have changed it */
    if (!error && call->table)
        error = caller_write(memory, call->table, listener->params + call->control->size, pointed_size(call->control));
    if (!error) {
        keep_input(listener, call);
        error = caller_write(memory, call->nvos54.params, listener->params, call->nvos54.params_size);
    }
    if (!error)
        error = caller_write(memory, call->address, &call->nvos54, sizeof(call->nvos54));
    if (error)
        put_input_back(listener, memory, maps);
    return error ? fail(call, MPU_MEMORY_UNWRITABLE, error) : MPU_TRANSLATED;
}

/* The steps of a call whose memory is open. */
static enum mpu_cause go_through(struct listener *listener, struct call *call, int memory, int maps)
{
    enum mpu_cause cause = check_waiting(listener);

    if (!cause)
        cause = begin(listener, call);
    if (!cause)
        cause = read_call(listener, call, memory, maps);
    if (!cause && call->control->asks)
        cause = ask(listener, call, MPU_TRANSLATE_IN);
    if (!cause)
        cause = perform_call(listener, call);
    if (!cause && !translate_empty(listener, call))
        cause = ask(listener, call, MPU_TRANSLATE_OUT);
    if (!cause)
        cause = write_back(listener, call, memory, maps);
    return cause;
}

static enum mpu_cause translate(struct listener *listener, struct call *call)
{
    pid_t tid = (pid_t)listener->notif->pid;
    AUTO_CLOSE memory = caller_open(tid, "mem", O_RDWR);
    AUTO_CLOSE maps = caller_open(tid, "maps", O_RDONLY);
    enum mpu_cause cause;

    if (memory < 0 || maps < 0)
        cause = fail(call, MPU_MEMORY_UNREADABLE, memory < 0 ? memory : maps);
    else
        cause = go_through(listener, call, memory, maps);
    /* Whatever failed, failed because of that. */
    if (cause && check_waiting(listener) != MPU_TRANSLATED)
        cause = MPU_CALLER_GONE;
    return cause;
}

static int reply(struct listener *listener, uint32_t flags)
{
    struct seccomp_notif_resp *response = listener->response;
    int result;

    response->id = listener->notif->id;
    response->val = 0;
    response->error = 0;
    response->flags = flags;
    do /* a reply that is lost leaves the caller waiting for ever */
        result = ioctl(listener->fd, SECCOMP_IOCTL_NOTIF_SEND, response);
    while (result && errno == EINTR);
    return result ? -errno : 0;
}

/* Whether the supervisor has heard of a cause; of a size that is not known, for each control on its own. */
static bool *reported(struct listener *listener, const struct call *call, enum mpu_cause cause)
{
    const struct mpu_control *row = table_find_cmd(call->config, call->nvos54.cmd);

    if (cause == MPU_SIZE_UNKNOWN && row)
        return &listener->size_reported[row - call->config->controls];
    return &listener->reported[cause];
}

/* The supervisor hears of each call that it was told of, and of each other cause once: nobody can flood it. */
static void report(struct listener *listener, const struct call *call, enum mpu_cause cause)
{
    struct mpu_outcome outcome = {
        .header = {.type = MPU_OUTCOME},
        .duration_ns = now_ns(CLOCK_MONOTONIC) - call->received_ns,
        .tid = listener->notif->pid,
        .cmd = call->nvos54.cmd,
        .size = call->nvos54.params_size,
        .cause = cause,
        .error = call->error,
    };

    listener->slot->counts.causes[cause]++;
    if (*reported(listener, call, cause) && !call->begun)
        return;
    if (listener_tell(listener, &outcome.header, sizeof(outcome), 0) == 0)
        *reported(listener, call, cause) = true;
}

static void supervise(struct listener *listener, const struct config *config, const struct nvos54 *glanced)
{
    struct call call = {.received_ns = now_ns(CLOCK_MONOTONIC), .config = config, .nvos54 = *glanced};
    enum mpu_cause cause = MPU_SIZE_UNKNOWN;
    int error;

    listener_take_channel(listener); /* the same for all of the call, too */
    if (table_find(config, glanced->cmd, glanced->params_size))
        cause = translate(listener, &call);
    error = reply(listener, cause == MPU_TRANSLATED ? 0 : (uint32_t)SECCOMP_USER_NOTIF_FLAG_CONTINUE);
    if (error && cause == MPU_TRANSLATED)
        cause = fail(&call, error == -ENOENT ? MPU_CALLER_GONE : MPU_REPLY_FAILED, error);
    report(listener, &call, cause);
    free(call.more);
}

/* Nearly every call ends here, after one small read: it is not in the table, the kernel goes on. */
void call_handle(struct listener *listener)
{
    const struct config *config = config_of(listener);
    const struct seccomp_notif *notif = listener->notif;
    struct nvos54 nvos54;
    uint64_t address;

    listener->slot->counts.received++;
    if (caller_abi_is_known(notif) &&
        read_nvos54(&notif->data, caller_glance, (int)notif->pid, &address, &nvos54) == 0 &&
        table_find_cmd(config, nvos54.cmd)) {
        supervise(listener, config, &nvos54);
        return;
    }
    listener->slot->counts.untranslated++;
    reply(listener, SECCOMP_USER_NOTIF_FLAG_CONTINUE); /* ENOENT: the caller went away meanwhile */
}

void call_leave(struct listener *listener)
{
    pid_t tid = (pid_t)listener->notif->pid;
    bool is_due = listener->slot->input.is_due;
    AUTO_CLOSE memory = is_due ? caller_open(tid, "mem", O_RDWR) : -1;
    AUTO_CLOSE maps = is_due ? caller_open(tid, "maps", O_RDONLY) : -1;

    if (!caller_is_waiting(listener->fd, listener->notif->id))
        return;
    if (memory >= 0 && maps >= 0)
        put_input_back(listener, memory, maps);
    reply(listener, SECCOMP_USER_NOTIF_FLAG_CONTINUE);
}
