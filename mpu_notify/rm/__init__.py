"""The NVIDIA resource manager's user-space ABI, as data, and a small client of it. Touches no kernel but by ioctl."""
