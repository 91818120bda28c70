/* What the hook reads: a container's state, and after a 0 the config.json of its bundle. */
#define main hook_main
#include "../../csrc/hook.c"
#undef main

#include "fuzz.h"

/* What is handed over ends with the state as it came. */
static void check_handed_over(const struct container *container)
{
    size_t size = (size_t)(container->state.end - container->state.at);
    size_t room = size + 4096;
    char *message = malloc(room);
    int ends[2];
    ssize_t got;

    EXPECT(message && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    EXPECT(hand_over(ends[0], container, ends[0]) == 0);
    got = recv(ends[1], message, room, MSG_DONTWAIT); /* without room for the fd, which is closed */
    EXPECT(got > (ssize_t)size && (size_t)got < room && message[got - 1] == '}');
    EXPECT(memcmp(message + got - 1 - size, container->state.at, size) == 0);
    close(ends[0]);
    close(ends[1]);
    free(message);
}

static void check_state(struct container *container)
{
    int error = parse_state(container);
    struct json pid;
    char text[16];

    EXPECT(error == 0 || error == -EINVAL);
    if (error)
        return;
    EXPECT(container->pid > 1 && container->pid != getpid() && json_find(container->state, "pid", &pid) == 0);
    snprintf(text, sizeof(text), "%d", (int)container->pid);
    EXPECT(strlen(text) == (size_t)(pid.end - pid.at) && memcmp(text, pid.at, strlen(text)) == 0);
    EXPECT(is_plain(container->id) && strlen(container->id) < sizeof(container->id));
    EXPECT(strlen(container->bundle) < sizeof(container->bundle));
    check_handed_over(container);
}

static void check_config(struct container *container, int config, struct text text)
{
    const struct options options = {.listen = "/run/agent.sock"};
    struct attempt attempt;
    bool covered = false;
    int error;

    fill_file(config, text);
    strcpy(container->bundle, ".");
    error = check_profile(&options, container, &attempt, &covered);
    EXPECT(error == 0 || error == -EINVAL || error == -EBUSY);
    EXPECT(!covered || !error);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int config;
    struct input input = {data, size};
    AUTO_TEXT state = take_text(&input);
    AUTO_TEXT spec = take_text(&input);
    struct container container = {.state = {state.bytes, state.bytes + state.size}};
    int fds, error;
    bool enabled;

    if (!config)
        config = make_file("config.json");
    fds = open_fds();
    error = parse_annotations(container.state, &enabled);
    EXPECT(error == 0 || (error == -EINVAL && !enabled));
    check_state(&container);
    if (spec.size) /* which costs most of the time */
        check_config(&container, config, spec);
    EXPECT(open_fds() == fds);
    return 0;
}
