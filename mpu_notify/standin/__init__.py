"""The stand-in driver: files or devices that answer like the NVIDIA driver's nodes, where there is no GPU.

``fuse`` (files), ``cuse`` (character devices) and ``connection`` (both) are the protocol and know nothing of NVIDIA,
``driver`` is the model and knows nothing of the protocol, ``callers`` is what the model may ask about the task that
calls. It is a process of its own: one that serves a file and also has it open can hang for good on exit.
"""
