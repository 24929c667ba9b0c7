"""A PyTorch module is attacked and measured as it is, and as the same weights converted are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_ssl
from robust_ssl import attacks, models, threats
from robust_ssl.types import Classifier

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SIZE, MEAN, STD = 8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
IMAGES = np.random.default_rng(0).uniform(size=(12, SIZE, SIZE, 3)).astype(np.float32)
take = functools.partial(robust_ssl.from_torch, mean=MEAN, std=STD)


class Net(nn.Module):
    """Two convolutions with batch norm, a pooling and a head."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.relu = nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(inplace=True)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        return self.fc(self.relu(self.conv2(x)).mean((2, 3)))


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Programs that call out are never found in the cache on disk."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    module = Net().eval()
    module.bn.running_mean.normal_()
    with torch.no_grad():  # so that there are images of every class
        module.fc.bias -= module(normalized(IMAGES)).mean(0)
    return module


def normalized(images):
    return torch.tensor(np.transpose((images - MEAN) / STD, (0, 3, 1, 2)), dtype=torch.float32)


def converted(net):
    """The same weights in JAX."""
    kernels = {k: jnp.asarray(v.detach().numpy()) for k, v in net.state_dict().items()}

    def convolved(x, name):
        y = jax.lax.conv_general_dilated(
            x, kernels[f"{name}.weight"], (2, 2), [(1, 1)] * 2,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )  # fmt: skip
        return y + kernels[f"{name}.bias"].reshape(1, 1, 1, -1)

    def forward(x):
        mean, var, weight, bias = (
            kernels[f"bn.{n}"].reshape(1, 1, 1, -1)
            for n in ("running_mean", "running_var", "weight", "bias")
        )
        x = jax.nn.relu((convolved(x, "conv1") - mean) / jnp.sqrt(var + 1e-5) * weight + bias)
        x = jax.nn.relu(convolved(x, "conv2")).mean(axis=(1, 2))
        return x @ kernels["fc.weight"].T + kernels["fc.bias"].reshape(1, -1)

    return robust_ssl.from_callable(forward, SIZE, num_classes=4, mean=MEAN, std=STD)


def test_numbers_and_gradients_are_torchs_own(net):
    model = take(net, SIZE, head="fc", taps={"block1": "conv1"})
    assert isinstance(model, Classifier) and (model.num_classes, model.encoder.dim) == (4, 12)
    inputs = normalized(IMAGES).requires_grad_()
    logits = net(inputs)
    outputs = jax.jit(lambda model, x: model(x))(model, IMAGES)
    np.testing.assert_allclose(outputs.logits, logits.detach(), atol=1e-5)
    tap = net.conv1(inputs).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(outputs.taps["block1"], tap, atol=1e-5)
    (want,) = torch.autograd.grad((logits**2).sum(), inputs)
    got = jax.grad(lambda x: (model(x).logits ** 2).sum())(jnp.asarray(IMAGES))
    want = want.permute(0, 2, 3, 1).numpy() / np.array(STD)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert all(p.grad is None for p in net.parameters()) and not net.training
    assert not net.conv1._forward_hooks and not net.fc._forward_pre_hooks


def test_a_value_with_its_gradient_is_one_pass_forwards():
    calls = []
    module = Net().eval()
    module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model = take(module, SIZE)
    calls.clear()
    value = jax.value_and_grad(lambda x: model(x).features[:, 0].sum())
    first = jax.block_until_ready(value(jnp.asarray(IMAGES)))
    assert calls == [True]
    with torch.no_grad():  # weights that change are seen by the next call
        module.fc.bias += 1
    again = jax.block_until_ready(value(jnp.asarray(IMAGES)))
    np.testing.assert_allclose(again[0] - first[0], len(IMAGES), rtol=1e-4)
    np.testing.assert_allclose(again[1], first[1], atol=1e-6)
    _, pull = jax.vjp(lambda x: model(x).features, jnp.asarray(IMAGES))
    with torch.no_grad():  # also between a pass forwards and its gradient
        module.fc.weight *= 2
    (gradient,) = pull(jnp.ones((len(IMAGES), 4)).at[:, 1:].set(0))
    np.testing.assert_allclose(gradient, 2 * first[1], atol=1e-5)


def test_pgd_does_what_it_does_on_converted_weights(net):
    labels = net(normalized(IMAGES)).argmax(1).numpy()
    attack = attacks.PGD(threats.Linf(8 / 255), num_steps=5)

    @jax.jit
    def run(model):
        keys = jax.random.split(jax.random.key(0), len(IMAGES))
        return jax.vmap(lambda k, x, y: attack(k, model, x, y))(keys, IMAGES, labels)

    ours = converted(net)
    results = [
        run(model) for model in (ours, take(net, SIZE, head="fc"), take(net, SIZE, num_classes=4))
    ]
    for adversarial in results[1:]:
        np.testing.assert_allclose(adversarial, results[0], atol=1e-5)


def test_the_three_calls_go_through(net):
    model = take(net, SIZE, head="fc", taps={"block1": "conv1", "block2": "conv2"})
    labels = net(normalized(IMAGES)).argmax(1).numpy()
    fit = functools.partial(
        robust_ssl.attack, model.encoder, IMAGES, num_steps=2, batch_size=4, progress="quiet"
    )
    perturbations = [fit(), fit(attack="l4a_base")]
    result = robust_ssl.measure(
        model, IMAGES, labels, attacks=[*perturbations, "fgsm"], progress="quiet"
    )
    assert result.clean_accuracy == 1 and result.robust_accuracy < 1
    ran = [check.status for check in result.verdict.checks]
    assert len(ran) >= 19 and ran.count("not run") <= 2  # no surrogate, no images of files
    robust_ssl.check("encoder", model.encoder)


def test_attacks_go_in_turn_as_in_autoattack(net):
    model, linf = take(net, SIZE, num_classes=4), threats.Linf(2 / 255)
    labels = net(normalized(IMAGES)).argmax(1).numpy()
    in_turn = {
        "apgd": [attacks.APGD(linf, num_steps=3)],
        "fab_t": [attacks.FABT(linf, num_steps=2)],
        "square": [attacks.Square(linf, num_queries=20)],
    }
    left = robust_ssl.measure(
        model, IMAGES, labels, attacks={"all": in_turn}, examine=False, progress="quiet"
    )
    assert left.robust_accuracy < 1


class Returning(nn.Module):
    """Does to its input whatever it is told."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.function(self.linear(x.mean((2, 3))))


class Fields:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        (lambda y: (y, None), {}, r"Returning returns a tuple of .*0: \[2, 3\].*output=0"),
        (lambda y: {"logits": y}, {}, "a dict of .*output='logits'"),
        (lambda y: {"logits": y}, {"output": "logit"}, "did you mean 'logits'"),
        (Fields, {}, "a Fields of .*output='logits'"),
        (lambda y: y.argmax(1, keepdim=True), {}, "returns int64, not floats"),
        (lambda y: y.sum(), {}, r"into \[\]"),
        (lambda y: y[:, :, None, None], {}, "flatten or pool it"),
        (torch.squeeze, {}, r"1 image into \[3\]"),
        (lambda y: y * float("nan"), {}, "returns NaN"),
        (torch.detach, {}, "no gradient reaches the image"),
        (torch.no_grad()(lambda y: 2 * y), {}, "no gradient reaches the image"),
        (lambda y: y - y.mean(), {}, "beside another image"),
        (lambda y: y, {"head": "fc"}, "no submodule 'fc'"),
        (lambda y: y * 2, {"head": "linear"}, "not the last thing"),
        (lambda y: y, {"taps": {"block1": "liner"}}, "did you mean 'linear'"),
        (lambda y: y, {"num_classes": 5}, "num_classes is 5"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_the_first_step(function, options, said):
    module = Returning(function).eval()
    with pytest.raises(ValueError, match=f"(?s){said}"):
        take(module, SIZE, **options)


def test_an_output_that_is_named_is_taken():
    torch.manual_seed(0)
    modules = {
        1: Returning(lambda y: (None, y)),
        "logits": Returning(Fields),
        "second": Returning(lambda y: {"first": None, "second": y}),
    }
    for output, module in modules.items():
        module.eval()
        encoder = take(module, SIZE, output=output)
        want = module.linear(normalized(IMAGES).mean((2, 3))).detach()
        np.testing.assert_allclose(encoder(IMAGES).features, want, atol=1e-5)


def test_modes_devices_and_sizes_are_named(net):
    with pytest.raises(
        ValueError, match=r"in training mode \(itself, conv1, bn and 3 more\).*eval"
    ):
        take(Net(), SIZE)
    partly = Net().eval()
    partly.bn.train()
    with pytest.raises(ValueError, match=r"training mode \(bn\)"):
        take(partly, SIZE)
    with pytest.raises(ValueError, match=r"one device, with its weights: conv1\.weight on meta"):
        take(Net().eval().to("meta"), SIZE)
    mixed = Net().eval()
    mixed.fc.to("meta")
    with pytest.raises(ValueError, match=r"fc\.weight on meta"):
        take(mixed, SIZE)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    with pytest.raises(ValueError, match=r"does not take inputs \[2, 3, 8, 8\]"):
        take(flat, SIZE)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        take(lambda x: x, SIZE)
    with pytest.raises(ValueError, match="calls its submodule 'relu' 2 times"):
        take(net, SIZE, taps={"block1": "relu"})


def test_a_module_that_changes_its_mode_later_is_noticed():
    module = Net().eval()
    encoder = take(module, SIZE)
    module.train()
    with pytest.raises(Exception, match="in training mode"):
        jax.block_until_ready(encoder(IMAGES).features)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_are_converted(dtype):
    module = Net().eval().to(dtype)
    features = take(module, SIZE)(IMAGES).features
    want = module(normalized(IMAGES).to(dtype)).float().detach()
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, want, atol=1e-6)


def test_a_head_of_ours_goes_on_an_encoder_of_theirs(net):
    encoder = take(net, SIZE)
    model = models.classifier(jax.random.key(0), encoder, 3, head="linear")
    gradient = jax.grad(lambda model: model(IMAGES).logits.sum(), allow_int=True)(model)
    assert jax.tree.leaves(gradient)[0].shape == (3,)


def test_a_tap_is_what_came_out_whatever_works_in_place_behind_it():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 4, 3)
    activation = torch.nn.ReLU(inplace=True)
    rest = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    net = torch.nn.Sequential(convolution, activation, *rest).eval()
    tap = take(net, SIZE, taps={"conv": "0"})(IMAGES).taps["conv"]
    want = convolution(normalized(IMAGES)).detach()
    assert float(want.min()) < 0
    np.testing.assert_allclose(np.sort(np.ravel(tap)), np.sort(np.ravel(want)), atol=1e-5)
