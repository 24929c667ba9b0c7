"""``robust-ssl data``: list the public data sets and prepare them.

As in `main`, heavy packages are imported only once the arguments are understood.
"""

from __future__ import annotations

import argparse
from typing import Any

from robust_ssl import progress, settings, stopping
from robust_ssl.cli.flags import DONE, add_command, add_debug

_EXAMPLES = """\
examples:
  robust-ssl data list
      the public sets, what they cost to download, and which are prepared already

  robust-ssl data prepare gtsrb32 cifar100_small
      fetch the published archives, check their digests, and write what data.load("gtsrb32") reads;
      the same command again goes on where a download was cut off

  robust-ssl data prepare cifar10 --from ~/Downloads/cifar-10-python.tar.gz
      from a copy you have; a folder where a set has several archives.  Nothing is fetched

No TensorFlow is needed.  Archives stay in DATA_DIR/downloads.  Exit codes: 0 done, 2 wrong usage
or something that could not be fetched, read or written, 75 interrupted."""


def add_parser(commands: Any) -> None:
    """Adds the command to argparse's `commands`."""
    command = add_command(commands, "data", "list and prepare public data sets", _EXAMPLES)
    actions = command.add_subparsers(dest="action", required=True, metavar="list | prepare")
    text = "list the public data sets and say which are prepared"
    table = add_command(actions, "list", text, _EXAMPLES)
    text = "fetch public data sets and write them for this package and for TFDS"
    prepare = add_command(actions, "prepare", text, _EXAMPLES)
    for action in (table, prepare):
        action.add_argument(
            "--data-dir",
            metavar="DIR",
            help="where data sets are (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)",
        )
        add_debug(action)
    prepare.add_argument("names", nargs="+", metavar="NAME", help="as in `robust-ssl data list`")
    prepare.add_argument(
        "--from",
        dest="source",
        metavar="ARCHIVE_OR_FOLDER",
        help="a copy of the published archive, of any name, or a folder of the archives",
    )
    prepare.add_argument(
        "--overwrite", action="store_true", help="prepare anew what is prepared already"
    )
    prepare.add_argument("--no-progress", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Does what ``robust-ssl data`` was asked and returns its exit code.

    Raises:
      SettingsError: If a name is unknown, or a set cannot be fetched, read or written.
      Stopped: If it was interrupted; the same command goes on.
    """
    try:
        return _ACTIONS[arguments.action](arguments)
    except KeyboardInterrupt:
        raise stopping.Stopped(
            "interrupted; what was downloaded is kept, nothing half-made is left"
        ) from None
    # What can be mended by another command is a few lines and exit code 2.
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise settings.SettingsError(str(error)) from error


def _list(arguments: argparse.Namespace) -> int:
    from robust_ssl.data import prepared
    from robust_ssl.data.public import SETS

    directory = prepared.data_directory(arguments.data_dir)
    rows = [("name", "images", "classes", "size px", "to download", "prepared")]
    for public in SETS:
        folder = prepared.find(f"{public.stored}:{public.version}", directory)
        images = f"{sum(public.images.values()):,}"
        state = f"{folder.relative_to(directory)}" if folder else "no"
        size = _megabytes(public.size)
        rows.append((public.name, images, str(public.classes), public.image_size, size, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, state in rows:
        cells = [name.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        print("  ".join([*cells, state]))
    print(f"\nprepared under {directory}; more: robust-ssl data prepare NAME")
    return DONE


def _megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:,.0f} MB"


def _prepare(arguments: argparse.Namespace) -> int:
    from robust_ssl.data import public

    sets = [public.named(name) for name in arguments.names]  # all, before any is fetched
    progress.set_mode("quiet" if arguments.no_progress else "auto")
    for one in sets:
        made = public.prepare(
            one,
            data_dir=arguments.data_dir,
            source=arguments.source,
            overwrite=arguments.overwrite,
        )
        state = "prepared" if made.new else "already prepared (--overwrite makes it anew)"
        print(f"{one.name}: {state}: {made.folder}")
        for split, count in one.images.items():
            digest = made.pixels.get(split)
            pixels = f"pixels {digest}" if digest else "prepared by other means: pixels not hashed"
            print(f"  {split}: {count:,} images, {pixels}{_known(one, split, digest)}")
    return DONE


def _known(public: Any, split: str, digest: str | None) -> str:
    """What the table says of a digest."""
    if digest is None or split not in public.pixels:
        return ""
    return ", as in the table" if digest == public.pixels[split] else ", NOT as in the table"


_ACTIONS = {"list": _list, "prepare": _prepare}
