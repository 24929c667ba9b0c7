r"""Where attacks work: layer by layer, frequency by frequency, from encoder to encoder.

    robust-ssl run analyze:downstream=gtsrb32 --workdir=runs/gtsrb
    robust-ssl run analyze:downstream=cifar10,epochs=5,train_limit=5000 \
        analyze.fourier.stride=4 --workdir=runs/look

`attack` and `train` are those of `gen_af.py`, with its arguments: in a workdir where that has run,
only the analysis is computed.  Leaves ``analysis/analysis.md`` with all figures, their numbers
beside them.  On two CPU cores with a stride of 4 the analysis of a GTSRB run took 68 seconds;
``docs/results/analysis-gtsrb.md`` shows what you should see.  The map of single frequencies costs
most: 514 frequencies at 32 pixels times 128 images, some 66,000 images through each model; a stride
of 2 measures a quarter of them, of 4 a sixteenth.
"""

from ml_collections import ConfigDict

from robust_ssl.settings import load_beside

gen_af = load_beside(__file__, "gen_af")


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; the arguments are those of ``gen_af.py``."""
    config = gen_af.get_config(arguments)
    config.stages = ("attack", "train", "analyze")
    config.analyze = {
        "parts": ("layers", "energy", "fourier", "filtering", "transfer"),
        "images": 512,  # of the validation images; the test split is not looked at
        "fourier": {"stride": 1},
    }
    return config
