"""The mechanism as Python sees it: the filter, the monitor and the protocol that is spoken with it."""
