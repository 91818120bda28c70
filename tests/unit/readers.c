/* What C reads of texts that Python reads, too, as a library for the tests that compare the two. */
#define main runtime_main
#include "../../csrc/runtime.c"
#undef main

#include "../../csrc/json_scan.h"

int find(const char *text, size_t size, const char *name, size_t *first, size_t *end);
void runtime_section(char *path, size_t size, int *by_name);

/* json_find; where in the text the value is. */
int find(const char *text, size_t size, const char *name, size_t *first, size_t *end)
{
    struct json object = {text, text + size}, value;
    int error = json_find(object, name, &value);

    if (!error) {
        *first = (size_t)(value.at - text);
        *end = (size_t)(value.end - text);
    }
    return error;
}

/* The section [runtime] of the file that the environment names. */
void runtime_section(char *path, size_t size, int *by_name)
{
    struct settings settings = {0};

    read_settings(NULL, &settings);
    snprintf(path, size, "%s", settings.path);
    *by_name = settings.by_name;
}
