"""Self-supervised pre-training of a public encoder.

robust-ssl run --config=configs/pretrain.py --workdir=runs/pretrain
"""

from ml_collections import ConfigDict

from robust_ssl.settings import parse_arguments


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: ``data`` (a TFDS name), ``width`` (of the ResNet-18), ``epochs``."""
    given = parse_arguments(arguments, {"data": "cifar10", "width": 24, "epochs": 16})
    config = ConfigDict()
    config.seed = 0
    config.stages = ("pretrain",)
    config.pretrain = ConfigDict(
        {
            "data": {"source": given["data"]},
            "encoder": {
                "builder": "resnet18",
                "width": given["width"],
                "stem": "cifar_half",
                "image_size": 32,
                "name": f"simclr-{given['data']}-r18w{given['width']}",
            },
            "method": "robust_ssl.pretraining:SimCLR",
            "method_options": {
                "temperature": 0.2,
                "hidden": 1024,
                "projection_dim": 128,
                "min_scale": 0.2,
            },
            "batch_size": 128,
            "epochs": given["epochs"],
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "warmup_epochs": 0.5,
            "weight_decay": 1e-4,
            "checkpoint_every": 100,
            "monitor": {"every_epochs": 1, "images": 4000},
        }
    )
    return config
