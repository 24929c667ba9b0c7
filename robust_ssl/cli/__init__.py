"""The command line."""

import os
import sys

# `python -m` puts the working directory first, where a flax.py may lie beside downloaded weights.
# Only it calls the program "-m" while it looks for the module; under a test runner nothing changes.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]
