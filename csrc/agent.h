/* What comes in by the OCI seccomp agent's socket, or by an ATTACH. */
#ifndef MPU_AGENT_H
#define MPU_AGENT_H

#include <stdbool.h>

#define STATE_NAME "mpu-notify state" /* of the memfd with a ContainerProcessState */

/* Whether an fd is a seccomp listener; asks the file nothing, which may be anybody's. */
bool is_listener(int fd);

#endif
