/*
 * The service manager that keeps us: systemd's protocol (sd_notify(3), sd_listen_fds(3)), of which this is the little
 * that we need. It stores the listeners' files, so that they outlive monitor and supervisor both.
 */
#ifndef MPU_KEEPER_H
#define MPU_KEEPER_H

#include "monitor.h"

#include <stdbool.h>

/* Whether there is one. */
bool keeper_is_there(void);

/* Say that we accept. */
void keeper_say_ready(void);

/* How often it wants to hear that we are well, in ns; 0 where it does not. */
uint64_t keeper_watches_every(void);

/* Say that we are. */
void keeper_say_alive(void);

/* Have it store a listener's files, or forget them. */
void keeper_remember(const struct listener *listener);
void keeper_forget(const struct listener *listener);

/* Serve what it stored for us. Of its fds those that are the monitor's sockets are left alone. */
int keeper_restore(struct monitor *monitor);

#endif
