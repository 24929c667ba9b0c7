"""The working directory of a run: stage directories, their manifests and their arrays.

`open_stage` opens the directory of one stage, new, to be resumed or done.  Arrays carry checksums
and files are replaced whole, so what can be read is what was written.
"""

from robust_ssl.workdir import readable
from robust_ssl.workdir.arrays import (
    DamagedTreeError,
    WrongTreeError,
    fingerprint,
    load_arrays,
    read_tree,
    save_arrays,
)
from robust_ssl.workdir.lock import hold
from robust_ssl.workdir.manifest import (
    ConfigChangedError,
    UnwritableError,
    changed_files,
    check_layout,
    check_unchanged,
    devices,
    digest,
    json_ready,
    make_directory,
    read_manifest,
    sum_files,
    unwritable,
    versions,
    write_atomically,
)
from robust_ssl.workdir.metrics import read_metrics
from robust_ssl.workdir.opening import check_left, open_stage
from robust_ssl.workdir.paths import WorkdirError, check_files, check_place, workdir_path
from robust_ssl.workdir.readable import write_pages
from robust_ssl.workdir.stage import StageDirectory

__all__ = [
    "ConfigChangedError",
    "DamagedTreeError",
    "StageDirectory",
    "UnwritableError",
    "WorkdirError",
    "WrongTreeError",
    "changed_files",
    "check_files",
    "check_layout",
    "check_left",
    "check_place",
    "check_unchanged",
    "devices",
    "digest",
    "fingerprint",
    "hold",
    "json_ready",
    "load_arrays",
    "make_directory",
    "open_stage",
    "read_manifest",
    "read_metrics",
    "read_tree",
    "readable",
    "save_arrays",
    "sum_files",
    "unwritable",
    "versions",
    "workdir_path",
    "write_atomically",
    "write_pages",
]
