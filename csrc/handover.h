/* One monitor in another's place: listeners change hands between two calls, or after the other's end. */
#ifndef MPU_HANDOVER_H
#define MPU_HANDOVER_H

#include "monitor.h"
#include "packet.h"

#include <stdbool.h>

/* Connect to a living monitor and ask for its place: its sockets are ours at once, its listeners come by and by. */
int take_over(struct monitor *monitor, const char *control);

/* Serve a listener that an ADOPT brought. One that is there already is left as it is. */
int adopt(struct monitor *monitor, struct packet *packet);

/*
 * Claim the sockets (claim.h): 0, or an error where another monitor has claimed them, which may be one whose place we
 * took, until it has ended.
 */
int claim(struct monitor *monitor);

/* Connect to the monitor that has claimed the sockets, to give listeners back to it: the socket, or an error. */
int connect_to_sole(const struct monitor *monitor);

/* Begin to let the listeners go, to the monitor at the other end of the socket, which is ours from now on. */
void hand_over(struct monitor *monitor, int successor);

/* Take notice of the successor's end: what it has not got stays ours. */
void lose_successor(struct monitor *monitor);

/* Interrupt the threads that wait for a call, so that they see that they are to let go. */
void hurry(struct monitor *monitor);

/* Whether a listener that is to be let go is let go; false where it stays ours after all. */
bool listener_hand_over(struct listener *listener);

#endif
