"""Models of other libraries, taken as they are: functions, modules of nnx."""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import robust_ssl
from robust_ssl import attacks, evaluation, models, threats, weights, workdir
from robust_ssl.api import inputs
from robust_ssl.bridges.probing import pick
from robust_ssl.experiment import linking
from robust_ssl.parallel import Parallel
from robust_ssl.types import Classifier, Encoder

SIZE = 4
random = np.random.default_rng(0)
WEIGHTS = random.normal(size=(SIZE * SIZE * 3, 3)).astype(np.float32)
IMAGES = random.uniform(size=(6, SIZE, SIZE, 3)).astype(np.float32)
LABELS = np.argmax(IMAGES.reshape(6, -1) @ WEIGHTS, axis=1)


def linear(images):
    """Logits on the host; would raise on a tracer."""
    assert isinstance(images, np.ndarray) and images.ndim == 4
    return images.reshape(len(images), -1) @ WEIGHTS


def transposed(images, cotangent):
    return (cotangent @ WEIGHTS.T).reshape(images.shape)


def in_jax(images):
    return images.reshape(len(images), -1) @ jnp.asarray(WEIGHTS)


host = functools.partial(robust_ssl.from_callable, on_host=True, num_classes=3)


def flat(images, **arrays):
    return images.reshape(len(images), -1)[:, :3]


def test_a_function_on_the_host_is_attacked_as_the_same_one_in_jax():
    on_host = host(linear, SIZE, gradient=transposed)
    ours = robust_ssl.from_callable(in_jax, SIZE, num_classes=3)
    assert isinstance(on_host, Classifier) and isinstance(ours, Classifier)
    attack = attacks.PGD(threats.Linf(0.05), num_steps=3)

    @jax.jit
    def run(model):
        keys = jax.random.split(jax.random.key(0), 6)
        return jax.vmap(lambda k, x, y: attack(k, model, x, y))(keys, IMAGES, LABELS)

    np.testing.assert_allclose(run(on_host), run(ours), atol=1e-6)
    np.testing.assert_allclose(on_host(IMAGES[0]).logits, ours(IMAGES[0]).logits, rtol=1e-6)


def test_a_function_on_the_host_may_write_into_its_images():
    def normalize(images):
        images -= 0.5
        images /= 0.25
        return linear(images)

    def gradient(images, cotangent):
        images[:] = transposed(images, cotangent) / 0.25
        return images

    model = host(normalize, SIZE, gradient=gradient)
    for _ in range(2):
        logits, pull = jax.vjp(lambda x: model(x).logits, jnp.asarray(IMAGES))
        np.testing.assert_allclose(logits, linear((IMAGES - 0.5) / 0.25), rtol=1e-4, atol=1e-5)
        expected = transposed(IMAGES, np.ones_like(logits)) / 0.25
        np.testing.assert_allclose(pull(jnp.ones_like(logits))[0], expected, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_all_mapped_axes_are_one_call(platform, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, **forms: forms[platform](*x))
    sizes = []

    def counted(images):
        sizes.append(len(images))
        return linear(images)

    model = host(counted, SIZE, gradient=transposed)
    sizes.clear()
    twice = jax.vmap(jax.vmap(model))(np.stack([IMAGES, IMAGES]))
    assert sizes == [12]
    np.testing.assert_allclose(twice.logits[1], linear(IMAGES), rtol=1e-6)
    jacobian = jax.jacrev(lambda x: model(x).logits)(jnp.asarray(IMAGES[0]))
    np.testing.assert_allclose(jacobian, WEIGHTS.T.reshape(3, SIZE, SIZE, 3), rtol=1e-5)


def test_the_normalization_is_applied_once():
    seen = []

    def look(images):
        seen.append(images)
        return flat(images)

    encoder = robust_ssl.from_callable(
        look, SIZE, on_host=True, mean=(0.5,) * 3, std=(0.25,) * 3, gradient=lambda x, c: x
    )
    encoder(jnp.full((1, SIZE, SIZE, 3), 0.75)).features.block_until_ready()
    np.testing.assert_allclose(seen[-1], 1.0)
    assert isinstance(encoder, Encoder) and encoder.dim == 3
    plain = robust_ssl.from_callable(in_jax, SIZE)
    assert (plain.mean, plain.std) == ((0.0,) * 3, (1.0,) * 3)
    named = robust_ssl.from_callable(in_jax, SIZE, normalization="imagenet")
    assert named.mean == models.IMAGENET_MEAN


def test_without_a_gradient_square_attacks_and_pgd_says_why_not():
    model = host(linear, SIZE)
    measure = functools.partial(robust_ssl.measure, model, IMAGES, LABELS, progress="quiet")
    square = attacks.Square(threats.Linf(0.3), num_queries=5)
    assert measure(attacks=square, examine=False).clean_accuracy == 1
    with pytest.raises(ValueError, match=r"function linear has no gradient.*'square'"):
        measure(attacks="fgsm", examine=False)


def test_variables_are_arguments_and_not_compiled_in():
    model = robust_ssl.from_callable(
        lambda weights, images: images.reshape(len(images), -1) @ weights, SIZE, variables=WEIGHTS
    )
    call = jax.jit(lambda model, images: model(images).features)
    doubled = model.replace(variables=jax.tree.map(lambda x: 2 * x, model.variables))
    np.testing.assert_allclose(call(doubled, IMAGES), 2 * call(model, IMAGES), rtol=1e-6)
    assert call._cache_size() == 1


class Small(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(nnx.relu(self.norm(self.conv(x)))).mean(axis=(1, 2))


def test_a_module_of_nnx_gives_its_own_features():
    module = Small()
    with pytest.raises(ValueError, match=r"nnx module Small is in training mode: drop.*\.eval\(\)"):
        robust_ssl.from_nnx(module, SIZE)
    module.eval()
    encoder = robust_ssl.from_nnx(module, SIZE)
    np.testing.assert_allclose(encoder(IMAGES).features, module(IMAGES), rtol=1e-5, atol=1e-6)
    robust_ssl.check("encoder", encoder)
    assert len(workdir.fingerprint(encoder.variables)) == 16  # dropout's random keys are no weights
    with pytest.raises(TypeError, match=r"takes a flax\.nnx\.Module"):
        robust_ssl.from_nnx(in_jax, SIZE)


class Named:
    """An object with fields, as some libraries return."""

    def __init__(self, images):
        self.logits, self.loss = flat(images), None


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        (lambda x: {"logits": flat(x), "x": x}, {}, r"dict of .*'logits': \[2, 3\].*output='log"),
        (lambda x: {"logits": flat(x)}, {"output": "logit"}, "did you mean 'logits'"),
        (lambda x: (flat(x), x), {}, r"tuple.*say which is meant: output=0"),
        (lambda x: [flat(x)], {"output": 3}, "no output 3"),
        (lambda x: Named(x), {"output": "loss"}, "'loss' is no array"),
        (flat, {"output": "logits"}, "one array"),
        (lambda x: x.mean(axis=(1, 2, 3)), {}, r"into \[2\]"),
        (lambda x: x, {}, r"into \[2, 4, 4, 3\].*flatten"),
        (lambda x: flat(x).argmax(axis=1, keepdims=True), {}, "int.*not floats"),
        (lambda x: flat(x) / 0, {}, "NaN|infinite"),
        (lambda x: flat(x) * float("nan"), {}, "returns NaN numbers"),
        (lambda x: flat(x) - x.mean(), {}, "beside another image"),
        (lambda x: flat(x).squeeze() if len(x) > 1 else flat(x)[0], {}, r"1 image into \[3\]"),
        (flat, {"num_classes": 4}, "returns 3 numbers.*num_classes is 4"),
        (lambda x: flat(x)[:, :1], {"num_classes": 1}, "two at least"),
        (flat, {"num_classes": 3, "class_names": "ab"}, "num_classes is 3, and there are 2"),
        (flat, {"num_classes": 2.5}, "must be an integer"),
        (flat, {"num_classes": 0}, "above 0"),
        (flat, {"normalization": "imagnet"}, "no normalization 'imagnet'"),
        (flat, {"mean": (0.5,) * 3}, "belong together"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*(divide by zero|invalid value)")
def test_what_is_wrong_is_named_before_the_first_step(function, options, said, on_host):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        robust_ssl.from_callable(function, SIZE, on_host=on_host, **options)


def test_more_that_is_refused():
    with pytest.raises(ValueError, match="say on_host=True"):
        robust_ssl.from_callable(linear_of_numpy, SIZE)
    with pytest.raises(ValueError, match="no gradient reaches the image"):
        robust_ssl.from_callable(lambda x: jax.lax.stop_gradient(flat(x)), SIZE)
    with pytest.raises(ValueError, match="belongs to on_host"):
        robust_ssl.from_callable(in_jax, SIZE, gradient=transposed)
    with pytest.raises(ValueError, match=r"gradient .* must be \[2, 4, 4, 3\], got \[2, 3\]"):
        host(linear, SIZE, gradient=lambda x, cotangent: cotangent)
    with pytest.raises(ValueError, match=r"does not take images \[2, 5, 5, 3\]"):
        robust_ssl.from_callable(in_jax, 5)
    for size in (0, 4.0, True, "4"):
        with pytest.raises(ValueError, match="image_size must be"):
            robust_ssl.from_callable(in_jax, size)
    with pytest.raises(TypeError, match="takes a function"):
        robust_ssl.from_callable(Named, SIZE)


def linear_of_numpy(images):
    return np.asarray(images).reshape(len(images), -1) @ WEIGHTS


def test_what_cannot_work_says_so(tmp_path):
    model = robust_ssl.from_callable(in_jax, SIZE, num_classes=3)
    theirs = r"the function in_jax cannot be {} here: its weights are not this package's"
    for what, call in {
        "saved": lambda: weights.save_classifier(model, tmp_path),
        "exported": lambda: weights.export_stablehlo(model, tmp_path / "x"),
        "trained": lambda: robust_ssl.secure(model.encoder, IMAGES, LABELS),
        "trained ": lambda: linking.check_against(None, model.encoder, "config.recipes.mine"),
    }.items():
        with pytest.raises(ValueError, match=theirs.format(what.strip())):
            call()
    with pytest.raises(ValueError, match=theirs.format("saved")):
        weights.save_encoder(model.encoder, tmp_path)
    # A head of its own on an encoder of ours, or the other way.
    mixed = models.classifier(jax.random.key(0), model.encoder, 3, head="linear")
    with pytest.raises(ValueError, match=theirs.format("saved")):
        weights.save_classifier(mixed, tmp_path)
    with pytest.raises(ValueError, match=theirs.format("trained")):
        model.apply_train(IMAGES, key=jax.random.key(0))
    with pytest.raises(ValueError, match=theirs.format("a member of an ensemble")):
        models.confidence_ensemble([model, model])(IMAGES)
    with pytest.raises(ValueError, match=r"taken for inputs \[4, 4, 3\], got \[8, 8, 3\]"):
        model(jnp.zeros((1, 8, 8, 3)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_several_devices_are_refused(kind):
    model = host(linear, SIZE, gradient=transposed)
    with pytest.raises(ValueError, match="num_devices=1"):
        evaluation.score(
            model,
            [{"images": IMAGES, "labels": LABELS}],
            {"pgd": attacks.PGD(threats.Linf(0.05), num_steps=1)},
            key=jax.random.key(0),
            parallel=Parallel.create(num_devices=2, kind=kind),
        )


def test_a_named_tuple_is_picked_by_name_and_by_place():
    values = types.SimpleNamespace(logits=IMAGES)
    is_array = lambda value: isinstance(value, np.ndarray)  # noqa: E731
    assert pick(values, "logits", "it", is_array) is IMAGES
    assert pick((1, IMAGES), 1, "it", is_array) is IMAGES
    pair = collections.namedtuple("Pair", "loss logits")(None, IMAGES)
    assert pick(pair, 1, "it", is_array) is pick(pair, "logits", "it", is_array) is IMAGES
    assert pick({"logits": IMAGES}, 0, "it", is_array) is IMAGES


def test_an_encoder_without_classes_says_what_to_name():
    with pytest.raises(ValueError, match="num_classes"):
        inputs.classifier_of(robust_ssl.from_callable(in_jax, SIZE))
    with pytest.raises(ValueError, match="recipe='linear_probe'"):
        inputs.classifier_of(tiny.encoder())


def test_outputs_that_sum_to_nothing_have_a_gradient():
    def two(images):
        score = images.mean((1, 2, 3))
        return jnp.stack([-score, score], 1)

    assert robust_ssl.from_callable(two, SIZE, num_classes=2).num_classes == 2
    with pytest.raises(ValueError, match="no gradient reaches the image"):
        robust_ssl.from_callable(lambda x: two(jax.lax.stop_gradient(x)), SIZE, num_classes=2)
