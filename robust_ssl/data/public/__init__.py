"""Public data sets, from their published archives to what `robust_ssl.data.load` reads.

No TensorFlow, and nothing but the archives themselves is fetched.
"""

from robust_ssl.data.public.digests import image_digest, pixel_digest
from robust_ssl.data.public.preparation import Prepared, named, prepare
from robust_ssl.data.public.table import SETS, find_set
from robust_ssl.data.public.values import Archive, Content, PublicSet

__all__ = [
    "SETS",
    "Archive",
    "Content",
    "Prepared",
    "PublicSet",
    "find_set",
    "image_digest",
    "named",
    "pixel_digest",
    "prepare",
]
