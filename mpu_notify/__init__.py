"""nvidia-smi in a container shows the container's own GPU processes, from user space."""
