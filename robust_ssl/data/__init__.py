"""A TFDS name, a folder, arrays or a function in; batches of pixels out.

Images stay ``uint8`` until a step divides them by 255.  Nothing here needs TensorFlow, and
tensorflow-datasets, scikit-learn and Pillow are imported only by what uses them.
"""

from robust_ssl.data.batches import Batches, batch_indices, epoch_batches, steps_per_epoch
from robust_ssl.data.builtin import digits, photo_crops
from robust_ssl.data.examples import (
    Examples,
    StreamedExamples,
    carve,
    check_classes,
    check_image_size,
    from_arrays,
)
from robust_ssl.data.sources import load

__all__ = [
    "Batches",
    "Examples",
    "StreamedExamples",
    "batch_indices",
    "carve",
    "check_classes",
    "check_image_size",
    "digits",
    "epoch_batches",
    "from_arrays",
    "load",
    "photo_crops",
    "steps_per_epoch",
]
