"""The working directory of a run: stage directories, their manifests and their arrays.

`open_stage` opens the directory of one stage, new, to be resumed or done.  Arrays carry checksums
and files are replaced whole, so what can be read is what was written.
"""

from robust_ssl.workdir.arrays import (
    DamagedTreeError,
    WrongTreeError,
    digest,
    fingerprint,
    load_arrays,
    read_tree,
    save_arrays,
)
from robust_ssl.workdir.manifest import (
    ConfigChangedError,
    WorkdirError,
    check_layout,
    check_unchanged,
    devices,
    json_ready,
    make_directory,
    read_manifest,
    versions,
    write_atomically,
)
from robust_ssl.workdir.stage import StageDirectory, open_stage

__all__ = [
    "ConfigChangedError",
    "DamagedTreeError",
    "StageDirectory",
    "WorkdirError",
    "WrongTreeError",
    "check_layout",
    "check_unchanged",
    "devices",
    "digest",
    "fingerprint",
    "json_ready",
    "load_arrays",
    "make_directory",
    "open_stage",
    "read_manifest",
    "read_tree",
    "save_arrays",
    "versions",
    "write_atomically",
]
