"""Self-supervised pre-training of a public encoder, by any of fifteen methods.

robust-ssl run pretrain:method=byol --workdir=runs/byol

The scale ``small`` (the default) is for two CPU cores: a ResNet-18 of width 16 with a strided stem,
AdamW, narrow heads.  The scale ``research`` is solo-learn's CIFAR-10 recipe for one accelerator
(ResNet-18 of width 64, batch 256, 1000 epochs).  What `small` reaches, and `research` at width 32
after 275 epochs (84.0 % linear, 7.5 minutes on one H100), stands with its commands in
docs/results/encoders.md.
"""

import re

from ml_collections import ConfigDict

from robust_ssl.settings import SettingsError, parse_arguments

# A momentum encoder is a moving average of the last 1 / (1 - momentum) steps; the recipes' 0.99 to
# 1 would hardly let it move in a run of a thousand steps.
FAST = {"momentum": 0.95, "final_momentum": 0.995}

# method: (class in robust_ssl.pretraining, optimizer, learning rate, weight decay, sizes at scale
# small).  Optimizer, rate and decay are solo-learn's scripts/pretrain/cifar/*.yaml at batch 256,
# used at scale research; each class's own defaults are those files' sizes.
METHODS = {
    "simclr": ("SimCLR", "lars", 0.4, 1e-4, {"hidden": 1024, "projection_dim": 128}),
    "mocov2plus": ("MoCoV2Plus", "sgd", 0.3, 1e-4, {"queue_size": 4096}),
    "mocov3": ("MoCoV3", "lars", 0.3, 1e-6, FAST),
    "byol": ("BYOL", "lars", 1.0, 1e-5, FAST),
    "dino": (
        *("DINO", "lars", 0.3, 1e-6),
        {"num_prototypes": 512, "teacher_temperature": 0.04, "freeze": 0.02, **FAST},
    ),
    "nnclr": ("NNCLR", "lars", 0.4, 1e-5, {"queue_size": 4096}),
    "ressl": ("ReSSL", "sgd", 0.05, 1e-4, {"queue_size": 4096, **FAST}),
    "swav": (
        "SwAV",
        "lars",
        0.6,
        1e-6,
        {"num_prototypes": 100, "queue_size": 0, "smoothness": 0.02},
    ),
    "vibcreg": ("VIbCReg", "lars", 0.3, 1e-4, {"projection_dim": 512}),
    "wmse": ("WMSE", "adam", 2e-3, 1e-6, {"projection_dim": 64}),
    "barlow": ("BarlowTwins", "lars", 0.3, 1e-4, {"projection_dim": 512}),
    "vicreg": ("VICReg", "lars", 0.3, 1e-4, {"projection_dim": 512}),
    "simsiam": ("SimSiam", "sgd", 0.5, 1e-5, {"projection_dim": 512, "predictor_hidden": 128}),
    "supcon": ("SupCon", "sgd", 0.4, 1e-5, {}),
    "deepclusterv2": ("DeepClusterV2", "lars", 0.6, 1e-6, {"num_prototypes": 300}),
}
NARROW = {"hidden": 512, "projection_dim": 128}  # of every projector at scale small


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: ``method``, ``data`` (a set or a folder), ``scale``, ``width``, ``epochs``."""
    given = parse_arguments(
        arguments,
        {"method": "simclr", "data": "cifar10", "scale": "small", "width": 0, "epochs": 0},
    )
    if given["method"] not in METHODS:
        raise SettingsError(f"method={given['method']!r} is none of {', '.join(METHODS)}")
    if given["scale"] not in ("small", "research"):
        raise SettingsError(f"scale={given['scale']!r} is neither small nor research")
    name, optimizer, learning_rate, weight_decay, sizes = METHODS[given["method"]]
    small = given["scale"] == "small"
    epochs = given["epochs"] or (4 if small else 1000)
    width = given["width"] or (16 if small else 64)
    data = re.sub(r"[^\w.-]+", "-", given["data"]).strip("-.")  # folders have slashes
    config = ConfigDict()
    config.seed = 0
    config.stages = ("pretrain",)
    config.pretrain = {
        "data": {"source": given["data"]},
        "encoder": {
            "function": "robust_ssl.models:resnet18",
            "width": width,
            "stem": "cifar_half" if small else "cifar",
            "image_size": 32,
            "dtype": "float32" if small else "bfloat16",
            "name": f"{given['method']}-{data}-r18w{width}",
        },
        "method": {
            "function": f"robust_ssl.pretraining:{name}",
            **({**NARROW, **sizes, "min_scale": 0.2} if small else {}),
        },
        "batch_size": 128 if small else 256,
        "epochs": epochs,
        "optimizer": "adamw" if small else optimizer,
        "learning_rate": 1e-3 if small else learning_rate,
        "warmup_epochs": 0.5 if small else min(10, epochs / 10),
        "weight_decay": 1e-4 if small else weight_decay,
        # solo-learn clips the trust ratio of LARS for all methods but this one.
        "clip": given["method"] != "vibcreg",
        "checkpoint_every": 200 if small else 2000,
        "monitor": {"every_epochs": 1 if small else 10, "images": 4000},
    }
    return config
