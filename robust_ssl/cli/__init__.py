"""The command line."""

import contextlib
import os
import sys

# `python -m` puts the working directory first, where a flax.py may lie beside downloaded weights.
# Only it calls the program "-m" while it looks for the module; under a test runner nothing changes.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    with contextlib.suppress(OSError):  # the working directory may be gone
        if sys.path[:1] == [os.getcwd()]:
            del sys.path[0]
