"""What ``quantizer_quality`` is made of: texts, an oracle, the methods, and the table."""

from quantkit.system.threads import spin_briefly

spin_briefly()  # before any of them imports torch
