r"""Where attacks work: layer by layer, frequency by frequency, from encoder to encoder.

    robust-ssl run --config=configs/analyze.py:downstream=gtsrb32 --workdir=runs/gtsrb
    robust-ssl run --config=configs/analyze.py:downstream=cifar10,epochs=5,train_limit=5000 \
        --config.analyze.fourier.stride=4 --workdir=runs/look

Everything but the last stage is `gen_af.py`, with its arguments: in a workdir where that has run,
only the analysis is computed.  Leaves ``analysis/analysis.md`` with all figures, their numbers
beside them.  On two CPU cores with a stride of 4 the analysis of the README's GTSRB run took 68
seconds; ``docs/attacks.md`` shows what one should see.  The map of single frequencies costs most:
514 frequencies at 32 pixels times 128 images, some 66,000 images through each model; a stride of 2
measures a quarter of them, of 4 a sixteenth.
"""

import pathlib

from ml_collections import ConfigDict

from robust_ssl.settings import load_config

GEN_AF = pathlib.Path(__file__).with_name("gen_af.py")


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; the arguments are those of ``gen_af.py``."""
    config = load_config(f"{GEN_AF}:{arguments}").unlock()
    config.stages = ("attack", "usual", "stage1", "sensitivity", "stage2", "analyze")
    config.analyze = {
        "parts": ("layers", "energy", "fourier", "filtering", "transfer"),
        "images": 512,  # of the validation images; the test split is not looked at
        # Bands of spatial frequency, cycles per pixel.
        "edges": (0.0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 0.71),
        "fourier": {
            "norm": 4.0,  # L2 norm in each channel; Yin et al. 2019, for 32 pixels
            "stride": 1,
            "images": 128,
        },
        "filtering": {
            "cutoffs": (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2),  # cycles per pixel
            "rescale": False,  # True: what is left gets the size of the whole
        },
        "transfer": {
            "method": "universal_pgd",
            "encoders": (
                "simclr-cifar10-r18w24",
                "byol-cifar10-r18w16",
                "swav-cifar10-r18w16",
                "vibcreg-cifar10-r18w16",
            ),
            "head_epochs": 5,
            "head_learning_rate": 5e-3,
            "resize": "refuse",  # "bilinear": perturbations of another image size are resized
        },
    }
    return config
