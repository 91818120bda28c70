/* Who is at the other end of a socket: rule 9 of the design. */
#ifndef MPU_PEER_H
#define MPU_PEER_H

#include <stdbool.h>
#include <sys/socket.h>

struct monitor;

#define PEER_REFUSED "it is neither root nor our user in our PID namespace"

/*
 * Who connected: root, or our own user, and in our PID namespace; else -EPERM. A container's root with the socket
 * mounted is not. One that has exited since is judged by its user alone where it `may_have_exited`.
 */
int peer_check(int connection, bool may_have_exited, struct ucred *peer);

/* Who listens where we connected: -EPERM unless it is root or our own user. Its process may be long gone. */
int peer_check_listener(int connection);

/* Say that it was refused on a socket, and why: of a flood of them now and then one, with how many were left out. */
void peer_complain(struct monitor *monitor, const struct ucred *peer, const char *socket, const char *why);

/*
 * Close the connection of one that was refused, in a thread of its own: a file that it sent goes with it, and may have
 * a server that does not let go of it.
 */
void peer_hang_up(int connection);

#endif
