/*
 * What a supervisor sends, or who connects to the control socket, by the first bit, which may be a monitor that gives
 * listeners back: packets, each with its length (2 bytes), how many fds go with it (1), and its bytes.
 */
#include "../../csrc/monitor.c"

#include "fuzz.h"

static void send_packet(int supervisor, struct input *input)
{
    static const int files[] = {STDIN_FILENO, STDIN_FILENO, STDIN_FILENO};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(files))] = {0};
    size_t size = take_number(input, 2), n_fds = take_number(input, 1) % 4;
    struct iovec part;
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    if (size > input->left)
        size = input->left;
    part = (struct iovec){(void *)(uintptr_t)input->at, size};
    if (n_fds) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        *CMSG_FIRSTHDR(&message) = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(n_fds * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), files, n_fds * sizeof(int));
    }
    EXPECT(sendmsg(supervisor, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)size);
    input->at += size;
    input->left -= size;
}

/* Whatever was sent: what the threads take from the configuration stays in the params that a call has room for. */
static void check_config(const struct config *config)
{
    EXPECT(config->n_controls <= MPU_MAX_CONTROLS);
    for (uint32_t i = 0; i < config->n_controls; i++) {
        const struct mpu_control *control = &config->controls[i];

        uint64_t behind = (uint64_t)control->entry_size * control->n_entries, whole = control->size + behind;

        EXPECT(whole <= MPU_MAX_PARAMS);
        EXPECT(control->size >= sizeof(uint32_t) && control->count_at <= control->size - sizeof(uint32_t));
        EXPECT(control->table_at <= whole && control->table_size <= whole - control->table_at);
        EXPECT(!control->entry_size || control->pointer_at + sizeof(uint64_t) <= control->size);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct monitor monitor = {.lock = PTHREAD_MUTEX_INITIALIZER,
                              .told = PTHREAD_COND_INITIALIZER,
                              .supervisor = -1,
                              .newcomer = -1,
                              .predecessor = -1,
                              .successor = -1,
                              .control = -1,
                              .agent = -1,
                              .wake = -1};
    AUTO_FREE struct packet *packet = malloc(sizeof(*packet));
    struct input input = {data, size};
    int fds = open_fds(), ends[2];

    config_publish(&monitor, calloc(1, sizeof(struct config)));
    EXPECT(packet && monitor.config && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    EXPECT(monitor_greet(&monitor, ends[0]) == 0);
    *(take_number(&input, 1) & 1 ? &monitor.newcomer : &monitor.supervisor) = ends[0];
    while (input.left && (monitor.newcomer >= 0 || monitor.supervisor >= 0 || monitor.predecessor >= 0)) {
        send_packet(ends[1], &input);
        if (monitor.newcomer >= 0)
            serve_newcomer(&monitor, packet);
        else if (monitor.supervisor >= 0)
            serve_supervisor(&monitor, packet);
        else
            serve_predecessor(&monitor, packet);
        check_config(monitor.config);
    }
    drop_newcomer(&monitor);
    if (monitor.predecessor >= 0)
        close(monitor.predecessor);
    EXPECT(monitor.yielding == (monitor.successor >= 0));
    lose_successor(&monitor);
    EXPECT(monitor.has_supervisor == (monitor.supervisor >= 0 && monitor.configured));
    if (monitor.supervisor >= 0)
        lose_supervisor(&monitor);
    close(ends[1]);
    config_publish(&monitor, NULL);
    EXPECT(open_fds() == fds);
    return 0;
}
