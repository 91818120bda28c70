/* How the sanitizers in our programs report, wherever and with whatever environment an engine starts them. */

#define OPTIONS "log_path=" REPORTS "/report:"

const char *__asan_default_options(void);
const char *__ubsan_default_options(void);
const char *__tsan_default_options(void);

const char *__asan_default_options(void)
{
    return OPTIONS "detect_stack_use_after_return=1:strict_string_checks=1";
}

const char *__ubsan_default_options(void)
{
    return OPTIONS "print_stacktrace=1";
}

const char *__tsan_default_options(void)
{
    return OPTIONS "second_deadlock_stack=1";
}
