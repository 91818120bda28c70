"""What mpu-notify costs, measured on this machine; run it with ``python -m bench``."""
