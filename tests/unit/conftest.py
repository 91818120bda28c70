"""How hypothesis goes about: how long one example takes says nothing on a machine that does other things, too."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("mpu-notify", deadline=None)
settings.load_profile("mpu-notify")
