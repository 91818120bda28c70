"""Engine configuration: how Docker, containerd, Podman and CRI-O come to know our runtime, and forget it again.

The planners (`docker`, `containerd`, `dropin`) are pure: from what the files contain to what they should contain.
`files` reads, compares and writes; `bound` finds the containers that need our runtime to start.
"""
