"""A folder of pictures: which of its folders are splits, which are classes, what is left out."""

from __future__ import annotations

import collections
import difflib
import pathlib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from robust_ssl.data import pictures, tree
from robust_ssl.data.streamed import StreamedExamples

# What a split may be called, in any case; the first one that is there is taken.
SPLITS = {
    "train": ("train", "training"),
    # Where there is no test split, validation images are what one has to test on.
    "test": ("test", "testing", "val", "valid", "validation"),
    "validation": ("validation", "valid", "val"),
}
_SPLIT_NAMES = {name for names in SPLITS.values() for name in names}
# Names of classes that are seldom meant to be any: read, but named.
_DOUBTFUL = {
    *("annotation", "annotations", "ground_truth", "image", "images", "label", "labels", "mask"),
    *("masks", "sample", "samples", "thumbnails", "unlabeled", "unlabelled"),
}
_LISTED = 5  # of several names, so many are shown


class _Layout(NamedTuple):
    """Where the pictures of one split are.

    Attributes:
      root: The folder that holds the class folders.
      classes: What lies in each of them, by class name.
      names: Of all classes, in order.
      notes: What was left out.
    """

    root: pathlib.Path
    classes: Mapping[str, tree.Contents]
    names: tuple[str, ...]
    notes: tuple[str, ...]


def open_split(folder: pathlib.Path, split: str, image_size: int | None) -> StreamedExamples:
    """Opens one split of a folder of pictures; no picture is decoded yet.

    Args:
      folder: Holds ``split/class/*.png``, or ``class/*.png`` for a set that is all training.
      split: ``"train"``, ``"test"``, ... or another folder's name.  ``"test"`` is read from
        ``val``, ``valid`` or ``validation`` where there is no ``test``.
      image_size: As in `StreamedExamples`.

    Returns:
      The examples, labels in natural order of the class names (``class2`` before ``class10``).
      Their ``notes`` name what was left out.

    Raises:
      FileNotFoundError: If there is no such folder.
      ValueError: If there is no such split, or its folders cannot be taken for classes.
    """
    if folder.is_file():
        raise ValueError(f"data folder {str(folder)!r} is a file; unpack an archive, give a folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {str(folder)!r} does not exist")
    layout = _layout(folder, split)
    files, labels = [], []
    for label, name in enumerate(layout.names):
        if name in layout.classes:
            files += layout.classes[name].pictures
            labels += [label] * len(layout.classes[name].pictures)
    if not files:
        raise ValueError(
            f"data folder {str(layout.root)!r} is empty: no pictures in {layout.root.name}/CLASS/; "
            f"{', '.join(pictures.FORMATS)} are read{''.join(f'; {note}' for note in layout.notes)}"
        )
    labels = np.asarray(labels, np.int32)

    def records(rows):
        return [(files[row], int(labels[row])) for row in rows]

    rows = np.arange(len(files))
    name = folder.resolve().name
    return StreamedExamples(
        *(records, rows, image_size, layout.names, name, split, labels), notes=layout.notes
    )


# --- Splits and classes -------------------------------------------------------------------------


def _layout(folder: pathlib.Path, split: str) -> _Layout:
    """Finds the class folders of a split: in a folder of its name, else in `folder` itself."""
    inside = tree.folders(folder)
    # A folder of a split's name that holds no class folders is none: see `_without_splits`.
    splits = [name for name in inside if _is_split(name, split) and _class_names(folder / name)]
    chosen = _choose(split, splits)
    if chosen is None and splits:
        other = [name for name in inside if name not in splits and _class_names(folder / name)]
        example = f" (--config.downstream.{split}_split={other[0]})" if other else ""
        raise ValueError(
            f"data folder {str(folder)!r} has no split {split!r}; it has {inside}; say which one "
            f"with split=, in a config with train_split and test_split{example}"
        )
    if chosen is None:
        return _without_splits(folder, split)
    classes, notes = _read_classes(folder / chosen)
    training = _choose("train", splits)
    names = _class_names(folder / (training or chosen))
    if training is None:  # then what is alike numbers the classes, so that no label shifts
        alike = [_class_names(folder / name) for name in inside]
        names = set().union(names, *(other for other in alike if other & names))
    _check_trained(folder, training or chosen, chosen, classes, names)
    if chosen.lower() != split.lower():
        notes = [f"the split {split!r} is read from {chosen}/", *notes]
    # Of a split in two cases, or under two of its names, one is read.
    again = [name for name in splits if name != chosen and _choose(split, [name]) is not None]
    if again:
        more = _listed(_counted(folder, again))
        notes.append(f"left out, more than one split {split!r}: {more} in {folder.name}/")
    notes += _beside(folder, [name for name in inside if name not in splits])
    return _Layout(folder / chosen, classes, _ordered(names), tuple(notes))


def _without_splits(folder: pathlib.Path, split: str) -> _Layout:
    """Takes the folders in `folder` for classes of one training split, unless they look otherwise.

    Raises:
      ValueError: If they do, or another split is asked for.
    """
    classes, notes = _read_classes(folder)
    flat = [name for name in classes if name.lower() in _SPLIT_NAMES]
    # A class may be called "train" among trams and buses; two such are splits without classes.
    if flat and (len(flat) > 1 or len(classes) < 3):
        raise ValueError(
            f"data folder {str(folder)!r}: pictures lie directly in {_listed(flat, '/')}, not in "
            f"class folders; make {flat[0]}/CLASS/"
        )
    if classes and split != "train":
        raise ValueError(
            f"data folder {str(folder)!r} has class folders and no splits, so it is all 'train'; "
            f"for split {split!r} make {folder.name}/train/CLASS and {folder.name}/{split}/CLASS"
        )
    shared = _shared_holders(classes)
    if len(shared) > 1:
        raise ValueError(
            f"data folder {str(folder)!r}: each of {_listed(classes, '/')} holds folders such as "
            f"{_listed(sorted(shared), '/')}, so it is not clear which are the classes; make "
            f"{folder.name}/train/CLASS, or name a split with split="
        )
    return _Layout(folder, classes, _ordered(classes), tuple(notes))


def _shared_holders(classes: Mapping[str, tree.Contents]) -> set[str]:
    """Returns names of folders that several classes share, where all pictures lie in such."""
    if any("." in contents.holders for contents in classes.values()):
        return set()
    counts = collections.Counter(n for contents in classes.values() for n in contents.holders)
    return {name for name, count in counts.items() if count > 1 and not name.isdigit()}


def _is_split(name: str, split: str) -> bool:
    return name.lower() in _SPLIT_NAMES or name.lower() == split.lower()


def _choose(split: str, names: Iterable[str]) -> str | None:
    """Returns the folder that is a split: of its name, of its name in another case, of an alias."""
    names = list(names)
    if split in names:
        return split
    for alias in (split.lower(), *SPLITS.get(split, ())):
        for name in names:
            if name.lower() == alias:
                return name
    return None


def _class_names(folder: pathlib.Path) -> set[str]:
    """Returns the names of the folders in a folder that hold pictures."""
    names = tree.folders(folder)
    return {_normal(name) for name in names if next(tree.walk(folder / name), None) is not None}


def _normal(name: str) -> str:
    # macOS takes letters apart from their accents: the same name in other bytes.
    return unicodedata.normalize("NFC", name)


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=tree.natural))


def _read_classes(root: pathlib.Path) -> tuple[dict[str, tree.Contents], list[str]]:
    """Returns what lies in each class folder of a folder, and notes on what is left out.

    Raises:
      ValueError: If a folder holds splits or pictures of formats that are not read, if all lies
        one folder deeper, or if names cannot be told apart.
    """
    classes: dict[str, tree.Contents] = {}
    empty = []
    folded: dict[str, str] = {}
    for name in tree.folders(root):
        contents = tree.contents(root / name)
        if contents.pictures:
            _check_name(root, name, folded)
            classes[_normal(name)] = contents
        elif unread := [s for s in contents.others if s in pictures.UNREAD_SUFFIXES]:
            raise ValueError(
                f"class folder {str(root / name)!r} holds {_counts(contents.others)} and no "
                f"picture that is read; convert {_listed(unread)} to PNG or JPEG"
            )
        else:
            empty.append(name)
    if len(classes) == 1 and "." not in next(iter(classes.values())).holders:
        [(name, contents)] = classes.items()
        raise ValueError(
            f"the only folder with pictures in {str(root)!r} is {name}/, and they lie in folders "
            f"inside it ({_listed(sorted(contents.holders), '/')}); if those are the classes or "
            f"splits, give {str(root / name)!r} or move them up"
        )
    for name, contents in classes.items():
        _check_no_splits(root / name, contents)
    return classes, _left_out(root, classes, empty)


def _check_name(root: pathlib.Path, name: str, folded: dict[str, str]) -> None:
    """Raises ValueError for a name that cannot be written or told from those in `folded`."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the name of class folder {name!a} in {str(root)!r} is not UTF-8; rename it"
        ) from None
    key = _normal(name).casefold()
    if key in folded:
        raise ValueError(
            f"class folders {folded[key]!r} and {name!r} in {str(root)!r} differ in upper and "
            "lower case or accents only; merge or rename them"
        )
    folded[key] = name


def _check_no_splits(folder: pathlib.Path, contents: tree.Contents) -> None:
    splits = [name for name in contents.holders if name.lower() in _SPLIT_NAMES]
    if splits:
        raise ValueError(
            f"class folder {str(folder)!r} holds pictures in {_listed(sorted(splits), '/')}: "
            f"splits go outside and classes inside; make {splits[0]}/{folder.name}/, or give that "
            "folder if it is the data set"
        )


def _check_trained(
    folder: pathlib.Path,
    training: str,
    chosen: str,
    classes: Mapping[str, tree.Contents],
    names: Iterable[str],
) -> None:
    """Raises ValueError for classes that a split has and the training split has no picture of."""
    names = _ordered(names)
    unknown = [name for name in classes if name not in names]
    if not unknown:
        return
    listed = _listed(f"{name!r}{_nearest(name, names)}" for name in unknown)
    raise ValueError(
        f"data folder {str(folder)!r}: of classes that {chosen}/ has {training}/ has no picture: "
        f"{listed}; {training}/ has {_listed(map(repr, names))}; every class needs pictures in "
        f"{training}/, in a folder of the same name"
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    by_folded = {other.casefold().strip(): other for other in names}
    near = difflib.get_close_matches(name.casefold().strip(), by_folded, n=1)
    return f" (is it {by_folded[near[0]]!r}?)" if near else ""


# --- What is left out ---------------------------------------------------------------------------


def _left_out(
    root: pathlib.Path, classes: Mapping[str, tree.Contents], empty: Iterable[str]
) -> list[str]:
    """Returns notes on what is not read in a folder of classes, or may be none."""
    foreign, others = tree.foreign(root), collections.Counter()
    for contents in classes.values():
        foreign += contents.foreign
        others += contents.others
    notes = _foreign_notes(foreign)
    doubtful = [name for name in classes if name.lower() in _DOUBTFUL]
    if doubtful:
        parts = [f"{name}/ ({len(classes[name].pictures)} pictures)" for name in doubtful]
        notes.append(f"taken for classes: {_listed(parts)}; move what is none elsewhere")
    if empty:
        notes.append(f"left out, without pictures: {_listed(empty, '/')} in {root.name}/")
    if others:
        notes.append(f"left out, not read as pictures: {_counts(others)} in {root.name}/CLASS/")
    stray = tree.stray(root)
    if stray:
        notes.append(
            f"left out, outside of class folders: {len(stray)} pictures in {root.name}/ "
            f"({_listed(stray)})"
        )
    return notes


def _foreign_notes(foreign: Mapping[str, int]) -> list[str]:
    names = [f"{name}/" + f" ({n} times)" * (n > 1) for name, n in sorted(foreign.items())]
    return [f"left out, no classes: {_listed(names)}"] if names else []


def _beside(folder: pathlib.Path, names: Iterable[str]) -> list[str]:
    """Returns notes on what lies beside the splits."""
    parts = _counted(folder, names)
    parts += [f"{name}/" for name in sorted(tree.foreign(folder))]
    return [f"left out, no splits: {_listed(parts)} in {folder.name}/"] if parts else []


def _counted(folder: pathlib.Path, names: Iterable[str]) -> list[str]:
    counts = {name: sum(1 for _ in tree.walk(folder / name)) for name in names}
    return [f"{name}/ ({count or 'no'} pictures)" for name, count in counts.items()]


def _counts(counter: Mapping[str, int]) -> str:
    parts = sorted(counter.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{count} {kind}" for kind, count in parts)


def _listed(names: Iterable[str], end: str = "") -> str:
    names = [f"{name}{end}" for name in names]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
