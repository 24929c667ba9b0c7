"""Every ResNet layout computes what its PyTorch network computes, in and out again.

With ``-s`` the largest relative error of each file is printed, over all taps and the features.
"""

import jax
import numpy as np
import pytest
from test_parity_torch import (
    MEAN,
    STD,
    TorchResNet,
    channels_last,
    pixels,
    randomize,
    relative_error,
    to_torch,
    torch,
)

from robust_ssl import weights

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
DEPTHS = {False: (2, 2, 2, 2), True: (3, 4, 6, 3)}  # ResNet-18, ResNet-50
HEADS = ("projector.0.weight", "classifier.weight", "momentum_backbone.conv1.weight", "queue")

# case -> stem, padding, bottleneck, image size, how the file is wrapped, what must be named
CASES = {
    "torchvision-resnet": (
        "imagenet", 3, False, 64, lambda x: {**x, "fc.weight": torch.ones(2, 2)}, {}),
    "torchvision-resnet, bottleneck": ("imagenet", 3, True, 64, lambda x: x, {}),
    "torchvision-resnet, DataParallel, 3x3 stem": (
        "cifar", 1, False, 32, lambda x: {"model": _under("module.", x), "epoch": 3},
        {"stem": "cifar", "stem_padding": 1}),
    "torchvision-resnet, 3x3 stem of stride 2": (
        "cifar_half", 1, False, 32, lambda x: x, {"stem": "cifar_half", "stem_padding": 1}),
    "solo-learn": (
        "cifar", 2, False, 32,
        lambda x: {"epoch": 9, "state_dict": {**_under("backbone.", x), **_heads("")}},
        {"layout": "solo-learn"}),
    "solo-learn, old": (
        "cifar", 2, False, 32,
        lambda x: {"epoch": 9, "state_dict": {**_under("encoder.", x), **_heads("")}},
        {"layout": "solo-learn"}),
    "moco": (
        "imagenet", 3, True, 64,
        lambda x: {"epoch": 200, "arch": "resnet50", "state_dict": {
            **_under("module.encoder_q.", x), **_under("module.encoder_k.", x),
            "module.queue": torch.ones(4, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.long),
            "module.encoder_q.fc.0.weight": torch.ones(2, 2)}}, {}),
    "moco, version 3": (
        "imagenet", 3, True, 64,
        lambda x: {"state_dict": {
            **_under("module.base_encoder.", x), **_under("module.momentum_encoder.", x),
            "module.predictor.0.weight": torch.ones(2, 2)}}, {}),
}  # fmt: skip


def _under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _heads(prefix):
    return {prefix + name: torch.ones(2, 2) for name in HEADS}


def largest_error(encoder, size, features, taps):
    outputs = jax.jit(lambda images: encoder(images))(pixels(size, 4))
    assert outputs.taps.keys() == taps.keys()
    errors = [relative_error(outputs.taps[name], channels_last(taps[name])) for name in taps]
    return max(*errors, relative_error(outputs.features, features.detach().numpy()))


@pytest.mark.parametrize("case", CASES)
def test_in_and_out_again(tmp_path, case):
    stem, padding, bottleneck, size, wrap, facts = CASES[case]
    net = randomize(TorchResNet(DEPTHS[bottleneck], bottleneck, 8, stem, padding)).eval()
    file = tmp_path / "weights.pth"
    torch.save(wrap(net.state_dict()), file)
    encoder = weights.import_encoder(file, mean=MEAN, std=STD, image_size=size, **facts)
    with torch.no_grad():
        features, taps = net(to_torch(pixels(size, 4)))
    error = largest_error(encoder, size, features, taps)
    print(f"\n{case}: {error:.1e}")
    assert error < TOLERANCE
    exported = weights.export_safetensors(encoder, tmp_path / "out.safetensors")
    from safetensors.torch import load_file

    again = TorchResNet(DEPTHS[bottleneck], bottleneck, 8, stem, padding).eval()
    again.load_state_dict(load_file(exported), strict=True)
    with torch.no_grad():
        np.testing.assert_array_equal(again(to_torch(pixels(size, 4)))[0], features)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("headed", [False, True])
def test_hugging_face(tmp_path, kind, headed):
    import transformers

    bottleneck = kind == "bottleneck"
    times = 4 if bottleneck else 1
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8 * times * 2**i for i in range(4)],
        depths=DEPTHS[bottleneck], layer_type=kind, num_labels=3,
    )  # fmt: skip
    make = transformers.ResNetForImageClassification if headed else transformers.ResNetModel
    net = randomize(make(config)).eval()
    net.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(
        image_mean=MEAN, image_std=STD, size={"height": 64, "width": 64}
    )
    processor.save_pretrained(tmp_path)
    encoder = weights.import_encoder(tmp_path)
    assert (encoder.mean, encoder.std, encoder.image_size) == (MEAN, STD, 64)
    body, taps = net.resnet if headed else net, {}
    _watch(taps, "stem", body.embedder)
    for s, stage in enumerate(body.encoder.stages):
        for b, layer in enumerate(stage.layers):
            _watch(taps, f"stage{s + 1}/block{b + 1}", layer)
    with torch.no_grad():
        features = body(to_torch(pixels(64, 4))).pooler_output.flatten(1)
    error = largest_error(encoder, 64, features, taps)
    print(f"\nhuggingface-resnet, {kind}{', with a head' * headed}: {error:.1e}")
    assert error < TOLERANCE


def _watch(taps, name, module):
    module.register_forward_hook(
        lambda module, inputs, output: taps.__setitem__(name, output.clone())
    )


def test_hugging_face_s_other_strides_are_refused(tmp_path):
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], downsample_in_bottleneck=True
    )
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="downsample_in_bottleneck is True"):
        weights.import_encoder(tmp_path, normalization="imagenet", image_size=64)
