# Everything needs root and a Debian or Ubuntu: what is missing is installed, into the system by apt-get (only what
# PACKAGES names) and for the rest into .venv.

VENV := .venv
BIN := $(VENV)/bin
# The distribution's own Python: one that any user may execute, which the tests as an unprivileged user need.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
PACKAGES := gcc libc6-dev libseccomp2 make mount musl-tools procps python3-dev python3-venv strace systemd util-linux
# What the fuzz targets and the static analysers need besides.
TOOLS := clang libclang-rt-dev
C_SOURCES := $(wildcard csrc/*.c csrc/*.h bench/*.c tests/kernel/*.c tests/kernel/*.h tests/kernel/faults/*.c tests/engines/*.c tests/fuzz/*.c tests/fuzz/*.h tests/sanitize/*.c tests/unit/*.c)
PYTHON_SOURCES := mpu_notify csrc tests bench setup.py

# How long `make fuzz` works on each target.
SECONDS := 60

.PHONY: build demo engines vm test lint analyse fuzz sanitize reliability soak bench format clean packages tools

# Install those of some packages that are missing.
define install
	@set -e; . tests/apt.sh; install_missing $(1)
endef

build: $(VENV)/.built

# With what the tests and the linters need; the command alone does without.
$(VENV)/.built: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*) | packages
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'setuptools>=77' 'cffi>=1.17'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	touch $@

packages:
	$(call install,$(PACKAGES))

tools: | packages
	$(call install,$(TOOLS))

demo: $(VENV)/.installed
	@$(BIN)/mpu-notify demo

lint: build analyse
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)

# Static analysis of what runs as root. Clang's analyser does not know the cleanup attribute: what that frees is a leak
# to it, and what is set for it a store in vain. Gcc's knows it, and looks for leaks too; the limits let it come further.
ANALYSE := -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -c -o /dev/null
analyse: | tools
	@set -e; for source in csrc/*.c; do \
	    gcc $(ANALYSE) -O1 -fanalyzer --param analyzer-bb-explosion-factor=15 \
	        -Wlogical-op -Wduplicated-cond -Wduplicated-branches -Wnull-dereference $$source; \
	    clang $(ANALYSE) -O2 --analyze --analyzer-output text -Xclang -analyzer-werror \
	        -Xclang -analyzer-disable-checker -Xclang unix.Malloc,deadcode.DeadStores $$source; \
	done

# The container engines that the tests start; a newer Docker goes into build/, not into the system.
engines:
	tests/engines/install.sh

# QEMU, the kernel that the tests boot in it, old clients of the driver that they run there, and an installation.
vm:
	tests/vm/install.sh
	tests/vm/clients.sh
	tests/vm/systemd.sh

test: lint engines vm tools
	$(BIN)/pytest

# The C entry points on any bytes, from the inputs kept in tests/fuzz/corpus; make test does it for a few seconds each.
fuzz: build tools
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

# The tests with our C programs instrumented: AddressSanitizer and UBSan, then ThreadSanitizer where there are threads.
# (Left out are tests that put a library of their own in the monitor, before the sanitizer's, or look at or limit its
# memory.)
NOT_SANITIZED := test_no_allocation.py faults/test_out_of_memory.py faults/test_soak.py \
    faults/test_limits.py::test_a_monitor_without_memory_serves_and_lets_those_who_come_wait \
    faults/test_limits.py::test_no_wait_goes_by_a_clock_that_jumps
sanitize: | packages
	tests/sanitize/run.sh address tests/unit tests/kernel $(NOT_SANITIZED:%=--deselect=tests/kernel/%)
	tests/sanitize/run.sh thread tests/kernel/test_monitor.py tests/kernel/test_serve.py

# docs/reliability.md: every fault that the tests know, what the caller got and what was left behind.
ROWS := build/reliability.rows
SOAK := --calls 100000
reliability: build
	mkdir -p $(dir $(ROWS))
	: > $(ROWS)
	$(BIN)/pytest tests/kernel/faults $(SOAK) --rows $(ROWS)
	$(BIN)/python -m tests.kernel.faults.table $(ROWS) docs/reliability.md

# 100,000 calls through one daemon; make test makes 2,000.
soak: build
	$(BIN)/pytest tests/kernel/faults/test_soak.py $(SOAK)

bench: build
	$(BIN)/python -m bench

format: build
	$(BIN)/ruff check --fix-only $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(C_SOURCES)

clean:
	rm -rf $(VENV) build dist mpu_notify/_bin mpu_notify/notify/_native*.so mpu_notify.egg-info
