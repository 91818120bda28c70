/* What the runtime shim reads, with a 0 between: its arguments, a line each; the configuration; a config.json. */
#define main runtime_main
#include "../../csrc/runtime.c"
#undef main

#include "fuzz.h"

#define ARGUMENTS 64

static int split(struct text text, char *arguments[ARGUMENTS + 2])
{
    int count = 0;
    char *rest = text.bytes;

    arguments[count++] = (char *)"mpu-notify-runtime";
    for (char *word; count <= ARGUMENTS && (word = strsep(&rest, "\n"));)
        arguments[count++] = word;
    arguments[count] = NULL;
    return count;
}

/* Each is an argument, or the end of one. */
static void check_word(const char *word, int count, char **arguments)
{
    for (int i = 1; i < count; i++)
        if (word >= arguments[i] && word <= arguments[i] + strlen(arguments[i]))
            return;
    EXPECT(*word == 0);
}

static void check_command(const struct command *command, int count, char **arguments)
{
    check_word(command->verb, count, arguments);
    check_word(command->bundle, count, arguments);
    check_word(command->log, count, arguments);
    check_word(command->log_format, count, arguments);
    check_word(command->container, count, arguments);
}

static void check_escape(const char *text, size_t size)
{
    char *out = malloc(size);

    EXPECT(out);
    escape(out, size, text);
    EXPECT(strlen(out) < size);
    for (const char *at = out; *at; at++)
        EXPECT((unsigned char)*at >= 0x20);
    free(out);
}

static void check_rewriting(const struct command *command, const struct settings *settings, struct text spec)
{
    bool starts = strcmp(command->verb, "create") == 0 || strcmp(command->verb, "run") == 0;
    bool asks = settings->by_name || memmem(spec.bytes, spec.size, ANNOTATION, strlen(ANNOTATION));

    if (*command->bundle == 0 || strcmp(command->bundle, ".") == 0)
        EXPECT(must_rewrite(command, settings) == (starts && asks));
    else if (!starts)
        EXPECT(!must_rewrite(command, settings));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int configuration, config;
    struct input input = {data, size};
    AUTO_TEXT words = take_text(&input);
    AUTO_TEXT toml = take_text(&input);
    AUTO_TEXT spec = take_text(&input);
    char *arguments[ARGUMENTS + 2];
    struct settings settings = {0};
    struct command command;
    int count, fds;

    if (!configuration) {
        configuration = make_file("config.toml");
        config = make_file("config.json");
        EXPECT(setenv(SETTINGS_VARIABLE, "config.toml", 1) == 0);
    }
    fds = open_fds();
    check_escape(words.bytes, words.size / 2 + 1);
    count = split(words, arguments);
    command = read_command(count, arguments);
    check_command(&command, count, arguments);
    fill_file(configuration, toml);
    EXPECT(read_settings(NULL, &settings) == 0);
    EXPECT(strlen(settings.path) < sizeof(settings.path));
    fill_file(config, spec);
    check_rewriting(&command, &settings, spec);
    EXPECT(open_fds() == fds);
    return 0;
}
