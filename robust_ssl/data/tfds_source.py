"""TensorFlow Datasets without TensorFlow: prepared array_record files, read at random."""

from __future__ import annotations

import difflib
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from robust_ssl.data.pictures import UnreadableError
from robust_ssl.data.prepared import data_directory, find
from robust_ssl.data.public.table import SETS, find_set
from robust_ssl.data.streamed import StreamedExamples


def open_split(
    name: str, split: str, image_size: int | None, data_dir: str | pathlib.Path | None
) -> StreamedExamples:
    """Opens a split of a prepared TFDS data set; reads no picture yet.

    Args:
      name: ``"name"``, ``"name/config"``, either with ``":version"``.
      split: A split or a slice of one, as TFDS writes them.
      image_size: As in `StreamedExamples`.
      data_dir: Where data sets are prepared; None takes TFDS's own default.

    Raises:
      ValueError: If TFDS does not know the name, config or split, or the set has no image.
      FileNotFoundError: If the set is known but not prepared.
    """
    import tensorflow_datasets as tfds

    data_dir = data_directory(data_dir)
    folder = find(name, data_dir) or _find_public(name, data_dir)
    if folder is None:
        raise _why_not_prepared(name, data_dir)
    damaged = functools.partial(_damaged, name, folder, data_dir)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # of JSON and protocol buffers that were cut off
        raise damaged(error) from error
    image_key, label_key = _feature_keys(builder.info.features, name)
    try:
        # Pillow decodes: TFDS would look for OpenCV, and its errors name no image.
        source = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"data set {name!r} in {str(folder)!r} is not stored as array_record, which reading "
            f"without TensorFlow needs; prepare it anew:\n  {_command(name, data_dir)} --overwrite"
        ) from error
    except ImportError as error:
        raise ModuleNotFoundError(
            f"reading the data set {name!r} needs the package array-record ({error}): pip install "
            "array-record. There is none for Windows and for Macs before Apple's processors; "
            "there, give a folder of pictures or a function as the source"
        ) from error
    except (RuntimeError, OSError) as error:  # of a shard that is gone or was cut off
        raise damaged(error) from error
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"data set {name!r} has no split {split!r}; its splits are "
            f"{sorted(builder.info.splits)} ({error})"
        ) from error
    records = _reader(source, image_key, label_key, damaged)
    # TFDS's mark for an image without a label, as in STL-10's unlabelled split.
    if label_key and len(source) and records([0])[0][1] == -1:
        label_key = None
        records = _reader(source, image_key, label_key, damaged)
    names = builder.info.features[label_key].names if label_key else ()
    base = name.partition(":")[0]
    rows = np.arange(len(source))
    return StreamedExamples(records, rows, image_size, names, base, split)


def _damaged(name: str, folder: pathlib.Path, data_dir: pathlib.Path, error: Exception):
    """Returns the error for a prepared set whose files are not what was written."""
    return UnreadableError(
        f"data set {name!r} in {str(folder)!r} is damaged ({type(error).__name__}: {error}); "
        f"prepare it anew:\n  {_command(name, data_dir)} --overwrite"
    )


def _reader(source: Any, image_key: str, label_key: str | None, damaged: Callable) -> Callable:
    def records(rows):
        try:
            examples = source.__getitems__([int(row) for row in rows])
        except (RuntimeError, OSError) as error:  # array_record's own
            raise damaged(error) from error
        return [(x[image_key], x[label_key] if label_key else None) for x in examples]

    return records


def _find_public(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of a public set that is asked for by its short name, ``"svhn"``."""
    base, colon, version = name.partition(":")
    public = find_set(base)
    return find(f"{public.stored}{colon}{version}", data_dir) if public else None


def _feature_keys(features: Any, name: str) -> tuple[str, str | None]:
    """Returns which feature is the image and which the label (None: there is none)."""
    import tensorflow_datasets as tfds

    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
    # The usual name first; else a lone feature of the type cannot be mistaken.
    image_key = "image" if "image" in images else images[0] if len(images) == 1 else None
    label_key = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    if image_key is None:
        raise ValueError(
            f"data set {name!r} has no feature 'image', nor exactly one image: its features are "
            f"{sorted(features)}; read it with a function of your own"
        )
    # 16-bit images are PNGs too, and would be cut to 8 bits where they are decoded.
    dtype = np.dtype(features[image_key].np_dtype)
    if dtype != np.uint8:
        raise ValueError(
            f"images of data set {name!r} are {dtype}, not uint8; read it with a function of your "
            "own"
        )
    return image_key, label_key


def _why_not_prepared(name: str, data_dir: pathlib.Path) -> Exception:
    """The error for a name that is not under `data_dir`: unknown, or known and to be prepared."""
    import tensorflow_datasets as tfds

    base, _, version = name.partition(":")
    dataset, _, config = base.partition("/")
    if version and find(base, data_dir) is not None:
        prepared = sorted(p.parent.name for p in (data_dir / base).glob("*/dataset_info.json"))
        return FileNotFoundError(
            f"data set {base!r} is prepared under {str(data_dir)!r} in versions {prepared}, "
            f"not {version!r}; to prepare it:\n  {_command(name, data_dir)}"
        )
    if find_set(base) is not None:
        return FileNotFoundError(
            f"data set {name!r} is not prepared under {str(data_dir)!r}; prepare it once:\n  "
            f"{_command(name, data_dir)}\n(--from ARCHIVE takes a copy that you have)"
        )
    builders = tfds.list_builders(with_community_datasets=False)
    if dataset in builders:
        configs = _configs(dataset)
        if configs and config not in configs:
            return ValueError(
                f"data set {dataset!r} comes in configurations and {config!r} is none; write one "
                "of: " + ", ".join(f"{dataset}/{c}" for c in _near(config, configs) or configs[:20])
            )
        return FileNotFoundError(
            f"data set {name!r} is not prepared under {str(data_dir)!r}; prepare it once (this "
            f"brings TensorFlow for the purpose):\n  {_command(name, data_dir)}\n"
            "`robust-ssl data list` shows the sets that need no TensorFlow"
        )
    local = _prepared_names(data_dir)
    candidates = [*local, *(public.name for public in SETS), *builders]
    for builder in builders:
        candidates += [f"{builder}/{config}" for config in _configs(builder)]
    near = _near(base, candidates)
    folder = (
        f"; for the folder of that name write './{name}'" if pathlib.Path(name).is_dir() else ""
    )
    return ValueError(
        f"data set {name!r} is not known to TFDS; near are: {', '.join(near) or 'none'}; prepared "
        f"under {str(data_dir)!r}: {', '.join(local) or 'none'}{folder}\n"
        "`robust-ssl data list` shows the public sets that can be prepared"
    )


def _prepared_names(data_dir: pathlib.Path) -> list[str]:
    # name/version/ of sets without configurations, name/config/version/ of those with
    files = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
    names = {file.parent.parent.relative_to(data_dir).as_posix() for file in files}
    return sorted(name for name in names if not name.startswith("."))


def _configs(dataset: str) -> list[str]:
    import tensorflow_datasets as tfds

    try:
        return list(tfds.builder_cls(dataset).builder_configs)
    except ImportError:  # a few builders need pandas or h5py merely to be looked at
        return []


def _near(name: str, candidates: list[str]) -> list[str]:
    """Returns the candidates that `name` resembles, by whole name or by its last part."""
    by_word: dict[str, str] = {}
    for candidate in candidates:
        for word in (candidate, candidate.rpartition("/")[2]):
            by_word.setdefault(word.lower(), candidate)
    words = difflib.get_close_matches(name.lower(), by_word, n=5, cutoff=0.6)
    return list(dict.fromkeys(by_word[word] for word in words))


def _command(name: str, data_dir: pathlib.Path) -> str:
    where = "" if data_dir == pathlib.Path("~/tensorflow_datasets").expanduser() else str(data_dir)
    public = find_set(name.partition(":")[0])
    # Another version than ours is TFDS's business.
    if public is not None and name.partition(":")[2] in ("", public.version):
        where = f" --data-dir={where}" if where else ""
        return f"robust-ssl data prepare {public.name}{where}"
    where = f" --data_dir={where}" if where else ""
    return (
        f"pip install 'robust-ssl[prepare]' && tfds build {name} --file_format=array_record{where}"
    )
