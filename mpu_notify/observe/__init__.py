"""What is seen from outside: the log."""
