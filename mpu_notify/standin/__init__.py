"""The stand-in driver: FUSE files that answer like the NVIDIA driver's nodes, where there is no GPU.

``fuse`` is the protocol and knows nothing of NVIDIA, ``driver`` is the model and knows nothing of FUSE, ``callers``
is what the model may ask about the task that calls. It is a process of its own: one that serves a file and also has
it open can hang for good on exit.
"""
