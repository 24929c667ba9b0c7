"""Models of other libraries as encoders and classifiers of this one, without conversion."""

from robust_ssl.bridges.functions import from_callable
from robust_ssl.bridges.nnx_module import from_nnx
from robust_ssl.bridges.torch_module import from_torch

__all__ = ["from_callable", "from_nnx", "from_torch"]
