r"""Gen-AF on real color images: attack, usual and secure fine-tuning, evaluation.

    robust-ssl run --config=configs/gen_af.py:downstream=gtsrb32 --workdir=runs/gtsrb
    robust-ssl run --config=configs/gen_af.py:downstream=cifar10,epsilon=10/255 \
        --config.finetune.adv_ratio=0.5 --workdir=runs/cifar10

The encoder was pre-trained on CIFAR-10; the attacker fits his perturbation on CIFAR-100, which the
defender does not have.  Arguments: ``downstream`` and ``surrogate`` (TFDS names), ``encoder`` (a
shipped name or a directory), ``epsilon`` (of the universal attacks), ``epochs``, ``train_limit``
(images of the downstream training split; 0 takes all) and ``batch_size``.
"""

from ml_collections import ConfigDict

from robust_ssl.settings import parse_arguments

ARGUMENTS = {
    "downstream": "gtsrb32",
    "surrogate": "cifar100_small",
    "encoder": "simclr-cifar10-r18w24",
    "epsilon": 10 / 255,
    "epochs": 50,
    "train_limit": 0,
    "batch_size": 256,
}


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the arguments."""
    given = parse_arguments(arguments, ARGUMENTS)
    config = ConfigDict()
    config.seed = 0
    config.stages = ("attack", "usual", "stage1", "sensitivity", "stage2", "evaluate")

    # What a foreign file does not say is named beside its path; None is what it does say.
    of_a_foreign_file = (
        *("normalization", "mean", "std", "image_size", "layout", "under", "reader"),
        *("stem", "stem_padding", "heads", "pooling", "activation"),
    )
    config.encoder = {"path": given["encoder"], **dict.fromkeys(of_a_foreign_file)}
    # image_size: height and width that images are brought to; None leaves them as they are.
    config.surrogate = {"source": given["surrogate"], "image_size": None}
    config.downstream = {
        "source": given["downstream"],
        "image_size": None,
        "validation": 0.1,
        "train_limit": given["train_limit"] or None,
    }
    config.downstream_head = "mlp"

    config.attack = {
        "methods": {
            "advencoder": {
                "function": "robust_ssl.attacks:AdvEncoderPER",
                "form": "released",
                "width": 32,
                "learning_rate": 1e-3,
            },
            "universal_pgd": {"function": "robust_ssl.attacks:UniversalPGD"},
            "random_noise": {"function": "robust_ssl.attacks:RandomNoise"},
        },
        "epsilon": given["epsilon"],
        "curve": (2 / 255, 5 / 255, 15 / 255),
        "seeds": (0,),
        "num_steps": 300,
        "batch_size": 64,
    }

    optimization = {
        "batch_size": given["batch_size"],
        "epochs": given["epochs"],
        "weight_decay": 8e-4,
        "decay": 0.96,
        "augment": "",
        "losses": {},
    }

    # Usual fine-tuning: the public encoder as it is, a head trained on clean images.
    config.usual = {
        **optimization,
        "rates": {"encoder/**": "freeze", "head/**": 5e-3},
        "batch_statistics": "frozen",
    }

    # Stage 1: both tracks, on adversarial images.
    config.finetune = {
        **optimization,
        "rates": {"encoder/**": 1e-3, "head/**": 5e-3},
        "batch_statistics": "both",
        "adv_ratio": 0.7,
        # Per image, whatever the batch; the released code's 20 adds up all pairs of a batch of
        # 256, which is 5120 here.
        "regularization_weight": 20.0,
        "regularize": "logits",
        "compat": "corrected",
        "compare_with_pretrained": False,
        "attack": {
            "epsilon": 8 / 255,
            "step_size": 2 / 255,
            "num_steps": 10,
            "random_start": True,
        },
    }

    config.sensitivity = {
        "images": 256,
        "num_steps": 10,
        "learning_rate": 1.0,
        "radius": 0.1,
        "top_k": None,
        "top_k_fraction": 0.2,
    }

    # Stage 2: only the robust-redundant layers, on clean images.
    config.stage2 = {
        **optimization,
        "learning_rate": 1e-3,
        "batch_statistics": "frozen",
        "tolerance": 0.01,
    }

    config.evaluate = {
        "models": ("usual", "stage1", "stage2"),
        "batch_size": 500,
        "per_image": {
            "attacks": ("embed", "pgd"),
            "epsilon": 8 / 255,
            "step_size": 2 / 255,
            "num_steps": 20,
        },
    }
    return config
