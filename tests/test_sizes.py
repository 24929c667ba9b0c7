"""Builders, methods, losses and schedules refuse what means nothing, before anything is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import losses, models, optimizers
from robust_ssl.build import Function
from robust_ssl.models.sizes import number_type
from robust_ssl.pretraining.covariance import covariance_penalty, variance_hinge
from robust_ssl.types import LossInputs, Outputs
from robust_ssl.weights.normalization import _three

KEY = jax.random.key(0)
RESNET = {"width": 2, "image_size": 8}
VIT = {"width": 8, "heads": 2, "depth": 1, "patch_size": 4, "image_size": 8}
BUILDERS = {
    "resnet18": RESNET,
    "vision_transformer": VIT,
    "convnext": {"depths": (1,), "widths": (4,), "patch_size": 2, "image_size": 8},
    "swin_transformer": {"depths": (1,), "width": 4, "heads": (1,), "windows": 2, "image_size": 8},
    "clip_resnet": {"depths": (1,) * 4, "width": 2, "dim": 5, "image_size": 32},
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "float16"}, "dtype must be one of .*'float32', 'bfloat16'.*got 'float16'"),
        ({"dtype": "half"}, "dtype must be one of"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be three numbers above 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean must be three numbers"),
        ({"mean": (0.5,)}, "mean must be three numbers"),
    ],
)
@pytest.mark.parametrize("builder", BUILDERS)
def test_no_network_is_built_of_what_means_nothing(builder, wrong, message):
    with pytest.raises(ValueError, match=message):
        getattr(models, builder)(KEY, **{**BUILDERS[builder], **wrong})


@pytest.mark.parametrize(
    ("builder", "wrong", "message"),
    [
        ("resnet18", {"width": 0}, "width must be a whole number of at least 1, got 0"),
        ("resnet18", {"image_size": 0}, "image_size must be"),
        ("resnet18", {"width": 2.5}, "width must be"),
        ("vision_transformer", {"depth": 0}, "depth must be"),
        ("vision_transformer", {"width": 0}, "width must be"),
        ("vision_transformer", {"registers": -1}, "registers must be at least 0"),
    ],
)
def test_sizes_are_whole_and_positive(builder, wrong, message):
    with pytest.raises(ValueError, match=message):
        getattr(models, builder)(KEY, **{**BUILDERS[builder], **wrong})
    assert number_type(jnp.bfloat16) == jnp.bfloat16


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("ReSSL", {"key_temperature": -0.04}),
        ("ReSSL", {"key_temperature": 0.0}),
        ("DINO", {"center_momentum": 1.5}),
        ("DINO", {"first_teacher_temperature": -1.0}),
        ("DINO", {"local_crops": -1}),
        ("DINO", {"local_size": 0}),
        ("VICReg", {"covariance": -1.0}),
        ("VICReg", {"variance": -1.0}),
        ("VICReg", {"invariance": -1.0}),
        ("BarlowTwins", {"redundancy": -1.0}),
        ("WMSE", {"whitening_size": 1}),
        ("SwAV", {"sinkhorn_steps": 0}),
        ("SwAV", {"queue_start": -1.0}),
        ("DeepClusterV2", {"num_clusterings": 0}),
        ("DeepClusterV2", {"kmeans_steps": 0}),
        ("VIbCReg", {"group_size": 0}),
    ],
)
def test_methods_refuse_what_would_train_the_wrong_way(method, wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=name):
        Function.read({"function": f"robust_ssl.pretraining:{method}", **wrong}, "method")()


def test_losses_and_schedules_say_their_limits():
    outputs = Outputs(features=jnp.zeros((2, 3)), logits=jnp.zeros((2, 3)))
    inputs = LossInputs(labels=jnp.zeros(2, int), clean=outputs, teacher=outputs)
    for smoothing in (-1.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="smoothing must be at least 0 and below 1"):
            losses.clean_cross_entropy(inputs, smoothing=smoothing)
    for temperature in (0.0, -2.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            losses.teacher_kl(inputs, of="clean", temperature=temperature)
    for penalty in (variance_hinge, covariance_penalty):
        with pytest.raises(ValueError, match="one image has no variance"):
            penalty(jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="warmup_steps must be below 5 steps, got 5"):
        optimizers.pretraining_optimizer(
            "sgd", learning_rate=0.1, total_steps=5, warmup_steps=5, weight_decay=0.0
        )


def test_a_mean_may_be_an_array():
    mean = np.asarray((0.25, 0.5, 0.75), np.float32)
    assert _three(mean, "mean") == _three(jnp.asarray(mean), "mean") == (0.25, 0.5, 0.75)
    with pytest.raises(ValueError, match="mean must be three numbers"):
        _three(np.zeros(2), "mean")
