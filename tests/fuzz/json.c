/* json_scan.h on any bytes: what it finds lies in the text and is itself JSON. */
#include "json_scan.h"

#include "fuzz.h"

#define NO_NAME "\x01" /* strict JSON has no such character in a string */

static void check_value(struct json text, struct json value)
{
    struct json inner;
    bool is_object;

    EXPECT(text.at < value.at && value.at < value.end && value.end < text.end);
    is_object = *value.at == '{';
    EXPECT(json_find(value, NO_NAME, &inner) == (is_object ? -ENOENT : -EINVAL));
}

static void check_text(struct json value, size_t size)
{
    char *out = malloc(size);

    EXPECT(out);
    if (json_text(value, out, size) == 0) {
        EXPECT(strlen(out) < size && strlen(out) == (size_t)(value.end - value.at) - 2);
        EXPECT(json_string_is(value, out));
    }
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const names[] = {"a", "pid", "annotations", ""};
    struct input input = {data, size};
    size_t room = take_number(&input, 1) + 1;
    struct json text = {(const char *)input.at, (const char *)input.at + input.left}, value;
    int whole = json_find(text, NO_NAME, &value);

    EXPECT(whole == -EINVAL || whole == -ENOENT);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        int error = json_find(text, names[i], &value);

        EXPECT(error == 0 || error == -EINVAL || error == -ENOENT);
        EXPECT(error == -EINVAL || whole == -ENOENT);
        if (error)
            continue;
        check_value(text, value);
        check_text(value, room);
    }
    return 0;
}
