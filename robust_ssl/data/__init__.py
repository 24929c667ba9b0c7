"""A TFDS name, a folder, arrays or a function in; batches of pixels out.

Images stay ``uint8`` until a step divides them by 255.  Nothing here needs TensorFlow, and
tensorflow-datasets, scikit-learn and Pillow are imported only by what uses them.
"""

from robust_ssl.data.batches import Batches, batch_indices, epoch_batches, steps_per_epoch
from robust_ssl.data.builtin import digits, photo_crops
from robust_ssl.data.classes import (
    check_classes,
    check_trained,
    difference,
    is_numbered,
    listed,
    taken_in_order,
    with_classes_of,
)
from robust_ssl.data.duplicates import Shared, are_known, labels_of, shared
from robust_ssl.data.examples import Examples, carve, check_image_size, from_arrays
from robust_ssl.data.pictures import UnreadableError
from robust_ssl.data.resizing import Resizing
from robust_ssl.data.sources import is_folder, load
from robust_ssl.data.streamed import StreamedExamples

__all__ = [
    "Batches",
    "Examples",
    "Resizing",
    "Shared",
    "StreamedExamples",
    "UnreadableError",
    "are_known",
    "batch_indices",
    "carve",
    "check_classes",
    "check_image_size",
    "check_trained",
    "difference",
    "digits",
    "epoch_batches",
    "from_arrays",
    "is_folder",
    "is_numbered",
    "labels_of",
    "listed",
    "load",
    "photo_crops",
    "shared",
    "steps_per_epoch",
    "taken_in_order",
    "with_classes_of",
]
