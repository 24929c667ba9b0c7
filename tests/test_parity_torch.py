"""With the same weights, our networks compute what the usual PyTorch ones compute."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from robust_ssl import models
from robust_ssl.models import vit

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.slow

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class TorchBlock(nn.Module):
    """torchvision's basic block or bottleneck, with torchvision's names."""

    def __init__(self, channels, width, stride, bottleneck):
        super().__init__()
        out = 4 * width if bottleneck else width
        shapes = (
            [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
            if bottleneck
            else [(channels, width, 3, stride), (width, width, 3, 1)]
        )
        self.depth = len(shapes)
        for i, (a, b, kernel, step) in enumerate(shapes, 1):
            conv = nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        if stride != 1 or channels != out:
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))
        else:
            self.downsample = nn.Identity()

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.depth else y
        return (y + self.downsample(x)).relu()


class TorchResNet(nn.Module):
    """torchvision's ResNet, up to the pooling, with a stem of choice."""

    def __init__(self, depths, bottleneck, width, stem, padding):
        super().__init__()
        kernel, stride, self.pooled = {
            "cifar": (3, 1, False),
            "cifar_half": (3, 2, False),
            "imagenet": (7, 2, True),
        }[stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.depths, channels = depths, width
        for s, depth in enumerate(depths):
            blocks = []
            for b in range(depth):
                step = 2 if s > 0 and b == 0 else 1
                blocks.append(TorchBlock(channels, width * 2**s, step, bottleneck))
                channels = width * 2**s * (4 if bottleneck else 1)
            setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1) if self.pooled else x
        taps = {"stem": x}
        for s in range(len(self.depths)):
            for b, block in enumerate(getattr(self, f"layer{s + 1}")):
                x = block(x)
                taps[f"stage{s + 1}/block{b + 1}"] = x
        return x.mean((2, 3)), taps


class TorchViTBlock(nn.Module):
    """timm's block, with timm's names; attention spelled out."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x))
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / (width // self.heads) ** 0.5).softmax(-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class TorchViT(nn.Module):
    """timm's VisionTransformer with global_pool "token", or "avg" with no class token."""

    def __init__(self, width, heads, depth, patch, size, pooling):
        super().__init__()
        tokens = (size // patch) ** 2 + (pooling == "token")
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if pooling == "token" else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList([TorchViTBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.pos_embed
        taps = {"embed": x}
        for i, block in enumerate(self.blocks):
            x = block(x)
            taps[f"block{i + 1}"] = x
        x = self.norm(x)
        return (x[:, 0] if self.cls_token is not None else x.mean(1)), taps


RENAMES = [  # ours -> theirs, in this order
    ("params/", ""), ("batch_stats/", ""),
    ("stem/conv/", "conv1/"), ("stem/norm/", "bn1/"), ("stage", "layer"),
    ("shortcut/conv", "downsample/0"), ("shortcut/norm", "downsample/1"),
    *((f"conv{i}/norm", f"bn{i}") for i in (1, 2, 3)),
    *((f"conv{i}/conv", f"conv{i}") for i in (1, 2, 3)),
    ("embed/patch", "patch_embed/proj"), ("embed/position", "pos_embed"),
    ("embed/token", "cls_token"), ("attention/output", "attn/proj"), ("attention/", "attn/"),
    ("dense", "fc"),
    ("kernel", "weight"), ("scale", "weight"),
]  # fmt: skip


def their_name(path):
    for ours, theirs in RENAMES:
        path = path.replace(ours, theirs)
    parts = path.split("/")
    parts[-1] = {"mean": "running_mean", "var": "running_var"}.get(parts[-1], parts[-1])
    for i, part in enumerate(parts):  # our blocks count from 1, theirs from 0
        if part.startswith("block"):
            number = str(int(part.removeprefix("block")) - 1)
            parts[i] = number if i > 0 else f"blocks.{number}"
    return ".".join(parts)


def skeleton(builder, **options):
    """An encoder with shapes in place of weights."""
    return jax.eval_shape(
        lambda key: builder(key, mean=MEAN, std=STD, **options), jax.random.key(0)
    )


def copy_weights(encoder, net):
    """Our encoder with the weights of a torch network; every one of them is used once."""
    theirs = {k: v for k, v in net.state_dict().items() if not k.endswith("batches_tracked")}
    flat = {}
    for path, leaf in traverse_util.flatten_dict(encoder.variables, sep="/").items():
        value = theirs.pop(their_name(path)).numpy()
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        flat[path] = value.reshape(leaf.shape).copy()  # reshapes the patch kernel only
        assert value.shape == leaf.shape or path == "params/embed/patch/kernel"
    assert not theirs
    return encoder.replace(variables=traverse_util.unflatten_dict(flat, sep="/"))


def randomize(net):
    """Random statistics, scales and biases, where a fresh network has zeros and ones."""
    torch.manual_seed(0)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and (tensor.ndim == 1 or "pos" in name or "cls" in name):
            tensor.normal_(0, 0.3)
    return net


def pixels(size, batch=8):
    return np.random.default_rng(0).uniform(size=(batch, size, size, 3)).astype(np.float32)


def to_torch(images):
    normalized = (images - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy())


def channels_last(tap):
    tap = tap.detach().numpy()
    return tap.transpose(0, 2, 3, 1) if tap.ndim == 4 else tap


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def assert_same(outputs, features, taps, tolerance):
    assert outputs.taps.keys() == taps.keys()
    errors = {
        name: relative_error(outputs.taps[name], channels_last(tap)) for name, tap in taps.items()
    }
    errors["features"] = relative_error(outputs.features, features.detach().numpy())
    assert max(errors.values()) < tolerance, errors


RESNETS = [
    # builder, depths, bottleneck, stem, padding, image size
    (models.resnet18, (2, 2, 2, 2), False, "cifar", 1, 16),
    (models.resnet18, (2, 2, 2, 2), False, "cifar", 2, 16),  # solo-learn's
    (models.resnet18, (2, 2, 2, 2), False, "cifar_half", 1, 32),
    (models.resnet34, (3, 4, 6, 3), False, "imagenet", 3, 64),
    (models.resnet50, (3, 4, 6, 3), True, "cifar", 1, 15),  # odd: strides round as theirs do
    (models.resnet50, (3, 4, 6, 3), True, "imagenet", 3, 64),
]


def resnet_pair(builder, depths, bottleneck, stem, padding, size):
    net = randomize(TorchResNet(depths, bottleneck, 8, stem, padding))
    encoder = skeleton(builder, width=8, stem=stem, stem_padding=padding, image_size=size)
    return copy_weights(encoder, net), net


@pytest.mark.parametrize("case", RESNETS)
def test_resnet_in_evaluation_mode(case):
    encoder, net = resnet_pair(*case)
    images = pixels(case[-1])
    with torch.no_grad():
        features, taps = net.eval()(to_torch(images))
    outputs = jax.jit(lambda encoder, images: encoder(images))(encoder, images)
    assert_same(outputs, features, taps, 1e-5)


@pytest.mark.parametrize("case", [RESNETS[1], RESNETS[5]])
def test_resnet_in_training_mode(case):
    encoder, net = resnet_pair(*case)
    images = pixels(case[-1])
    with torch.no_grad():
        features, taps = net.train()(to_torch(images))
    outputs, statistics = jax.jit(lambda encoder, images: encoder.apply_train(images))(
        encoder, images
    )
    # Looser: normalizing by the variance of few values magnifies rounding, layer after layer.
    assert_same(outputs, features, taps, 1e-4)
    updated = net.state_dict()
    before = traverse_util.flatten_dict(encoder.variables["batch_stats"], sep="/")
    stem = taps["stem"]
    for path, leaf in traverse_util.flatten_dict(statistics, sep="/").items():
        theirs = updated[their_name(f"batch_stats/{path}")].numpy()
        if path.endswith("mean"):
            assert relative_error(leaf, theirs) < 1e-4, path
        elif path == "stem/norm/var" and not net.pooled:
            # torch keeps the unbiased variance, n / (n - 1) times the batch's; ours is the batch's
            count = stem.shape[0] * stem.shape[2] * stem.shape[3]
            batch = (theirs - 0.9 * before[path]) / 0.1 * (count - 1) / count
            assert relative_error(leaf, 0.9 * before[path] + 0.1 * batch) < 1e-5


@pytest.mark.parametrize("pooling", ["token", "mean"])
@pytest.mark.parametrize("size,heads", [("tiny", 3), ("small", 6)])
def test_vit(size, heads, pooling):
    width = {"tiny": 192, "small": 384}[size]
    net = randomize(TorchViT(width, heads, 3, 4, 16, pooling))
    encoder = skeleton(getattr(vit, f"vit_{size}"), depth=3, image_size=16, pooling=pooling)
    encoder = copy_weights(encoder, net)
    images = pixels(16)
    with torch.no_grad():
        features, taps = net.eval()(to_torch(images))
    outputs = jax.jit(lambda encoder, images: encoder(images))(encoder, images)
    assert_same(outputs, features, taps, 1e-5)


def test_the_input_gradient_is_theirs_too():
    """What an attack uses; through the convolution's own gradient."""
    encoder, net = resnet_pair(*RESNETS[1])
    images = pixels(16)
    x = to_torch(images).requires_grad_()
    net.eval()(x)[0].square().sum().backward()
    theirs = x.grad.numpy().transpose(0, 2, 3, 1) / np.float32(STD)
    ours = jax.jit(jax.grad(lambda x: (encoder(x).features ** 2).sum()))(images)
    assert relative_error(ours, theirs) < 1e-5
