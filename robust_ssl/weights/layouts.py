"""Every way in which foreign encoders are named, in the order in which they are tried."""

from __future__ import annotations

from robust_ssl.weights import (
    clip_resnet_layouts,
    convnext_layouts,
    eva_layouts,
    mapping,
    resnet_layouts,
    swin_layouts,
    vit_layouts,
)

LAYOUTS: tuple[mapping.Layout, ...] = (
    *resnet_layouts.LAYOUTS,
    *clip_resnet_layouts.LAYOUTS,
    *eva_layouts.LAYOUTS,
    *vit_layouts.LAYOUTS,
    *convnext_layouts.LAYOUTS,
    *swin_layouts.LAYOUTS,
)
