"""Only the last blocks of an encoder move, whatever it calls its stages."""

from __future__ import annotations

import re
from collections.abc import Mapping

from robust_ssl.optimizers.layerwise import FREEZE, Rate
from robust_ssl.optimizers.table import natural

_BLOCK = re.compile(r"encoder/(?:.*?/)?block\d+(?=/)")
_AFTER = ("encoder/norm/", "encoder/pool/")  # what ViT and ConvNeXt have after their last block


def last_blocks(rates: Mapping[str, Rate], count: int) -> dict[str, Rate]:
    """Freezes an encoder but for its last blocks and the norm or pooling after them.

    Args:
      rates: Path to rate, as `layer_rates` returns.
      count: How many blocks keep their rates.

    Returns:
      Path to rate, for every parameter.

    Raises:
      ValueError: If the encoder has no such number of blocks, or `rates` freeze them.

    Example:
      >>> rates = {f"encoder/block{i}/kernel": 0.1 for i in (1, 2, 10)} | {"head/kernel": 0.5}
      >>> last_blocks(rates, 1)["encoder/block2/kernel"], last_blocks(rates, 1)["head/kernel"]
      ('freeze', 0.5)
    """
    blocks = sorted({found[0] for path in rates if (found := _BLOCK.match(path))}, key=natural)
    if not 1 <= count <= len(blocks):
        names = f": {blocks[0]} to {blocks[-1]}" if blocks else ", named block1, block2, ..."
        raise ValueError(f"last_blocks is {count}, and the encoder has {len(blocks)} blocks{names}")
    moving = (*(f"{block}/" for block in blocks[-count:]), *_AFTER)
    chosen = {
        path: rate if path.startswith((*moving, "head/")) else FREEZE
        for path, rate in rates.items()
    }
    if all(rate == FREEZE for path, rate in chosen.items() if path.startswith(moving)):
        raise ValueError(
            f"last_blocks is {count}, and rates freeze {', '.join(blocks[-count:])}; give "
            '"encoder/**" a learning rate'
        )
    return chosen
