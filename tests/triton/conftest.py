from __future__ import annotations

import os

# Triton decides when it is imported whether kernels are interpreted: those tests run in a process of their own, which
# test_interpreter.py starts.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
