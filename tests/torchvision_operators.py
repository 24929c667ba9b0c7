"""Lets torchvision be imported where its compiled part is for another build of torch.

timm, open_clip and transformers import it, and its compiled part says nothing of networks or of
resizing.  These names are all that its Python part asks for.
"""

import torch

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
