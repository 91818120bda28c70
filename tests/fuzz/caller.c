/* A release of a kernel, a 0, an address and a size (8 bytes each), and the text of a maps file. */
#include "../../csrc/caller.c"

#include "fuzz.h"

/* Whether the first mapping of the text that ends behind the address is readable and writable and has all up to `end`.
 */
static bool has(struct text text, uint64_t address, uint64_t end)
{
    struct input lines = {(const uint8_t *)text.bytes, text.size};
    AUTO_TEXT copy = take_text(&lines);
    char *rest = copy.bytes, mode[5];
    uint64_t first, last;

    for (char *line; (line = strsep(&rest, "\n"));)
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &first, &last, mode) == 3 && last > address)
            return first <= address && end <= last && strncmp(mode, "rw", 2) == 0;
    return false;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int maps;
    struct input input = {data, size};
    AUTO_TEXT release = take_text(&input);
    uint64_t address = take_number(&input, 8), length = take_number(&input, 8), end;
    AUTO_TEXT text = take_text(&input);
    struct kernel kernel = kernel_of_release(release.bytes);
    int fds, error;

    EXPECT(kernel.map_query == kernel.receive_ends && (kernel.pidfd_thread || !kernel.map_query));
    if (!maps)
        maps = make_file("maps");
    fds = open_fds();
    fill_file(maps, text);
    kernel.map_query = false;
    error = caller_may_write(&kernel, maps, address, length);
    EXPECT(error == 0 || error == -EFAULT);
    if (address && length && !__builtin_add_overflow(address, length, &end) && has(text, address, end))
        EXPECT(error == 0);
    if (length && !has(text, address, address))
        EXPECT(error == -EFAULT);
    EXPECT(open_fds() == fds);
    return 0;
}
