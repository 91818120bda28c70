/* The agent's reading of a message: where a JSON object ends, in whatever pieces it comes. */
#include "../../csrc/agent.c"

#include "fuzz.h"
#include "json_scan.h"

static int state;

/* Take a text in two pieces. */
static int take(struct arrival *arrival, struct text text, size_t first)
{
    int error;

    *arrival = (struct arrival){.connection = -1, .listener = -1, .state = state};
    EXPECT(ftruncate(state, 0) == 0 && lseek(state, 0, SEEK_SET) == 0);
    error = take_bytes(arrival, text.bytes, first);
    return error ? error : take_bytes(arrival, text.bytes + first, text.size - first);
}

static void check_state(struct text text)
{
    char *got = malloc(text.size + 1);

    EXPECT(got && pread(state, got, text.size + 1, 0) == (ssize_t)text.size);
    EXPECT(memcmp(got, text.bytes, text.size) == 0);
    free(got);
}

/* The same through a connection that brings no listener. */
static int read_connection(struct text text)
{
    struct arrival arrival = {.listener = -1};
    int ends[2], error;

    EXPECT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    EXPECT(send(ends[1], text.bytes, text.size, MSG_NOSIGNAL) == (ssize_t)text.size);
    close(ends[1]);
    arrival.connection = ends[0];
    error = read_state(&arrival);
    close(ends[0]);
    close(arrival.state);
    return error;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    size_t first = take_number(&input, 2);
    AUTO_TEXT text = take_text(&input);
    struct arrival whole, pieces;
    struct json json = {text.bytes, text.bytes + text.size}, nothing;
    int fds, error;

    if (!state)
        state = memfd_create("state", MFD_CLOEXEC);
    EXPECT(state > 0);
    fds = open_fds();
    error = take(&whole, text, text.size);
    EXPECT(error == 0 || error == -EBADMSG);
    EXPECT(take(&pieces, text, text.size ? first % (text.size + 1) : 0) == error);
    if (!error) {
        EXPECT(pieces.extent.complete == whole.extent.complete && whole.size == text.size);
        check_state(text);
    }
    if (!error && whole.extent.complete)
        EXPECT(extend(&pieces.extent, '{') == -EBADMSG && extend(&whole.extent, ' ') == 0);
    if (json_find(json, "", &nothing) == -ENOENT)
        EXPECT(!error && whole.extent.complete);
    EXPECT(read_connection(text) == (error ? error : -EBADF));
    EXPECT(open_fds() == fds);
    return 0;
}
