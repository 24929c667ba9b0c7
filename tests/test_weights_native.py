"""An encoder on disk comes back bit-equal or not at all."""

import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from robust_ssl import models, provenance
from robust_ssl.models import vit
from robust_ssl.types import Encoder
from robust_ssl.weights import cards
from robust_ssl.weights import native as weights


class TinyNet(nn.Module):
    """A network that the package does not know."""

    width: int = 4
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(self.width, name="dense")(x)
        return x.mean((1, 2)), {}


def tiny_net(key, *, width=4, image_size=8):
    module = TinyNet(width)
    return Encoder(
        variables=module.init(key, jnp.zeros((1, image_size, image_size, 3))),
        module=module,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        image_size=image_size,
        dim=width,
        name="tiny",
    )


def assert_bit_equal(ours, saved):
    assert weights._static(ours) == weights._static(saved)
    assert jax.tree.structure(ours) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(saved), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path):
    """A saved encoder of one's own: a directory to damage."""
    encoder = tiny_net(jax.random.key(1))
    return weights.save_encoder(encoder, tmp_path / "tiny", builder=tiny_net)


def load(directory):
    return weights.load_encoder(directory, builder=tiny_net)


def edit_card(directory, **changes):
    card = json.loads((directory / "encoder.json").read_text())
    card |= changes
    (directory / "encoder.json").write_text(json.dumps(card))


def edit_weights(directory, edit):
    """Changes the arrays and brings the sum in the card up to date, as a forger would."""
    arrays = {
        path: array.copy() for path, array in load_file(directory / weights.WEIGHTS_FILE).items()
    }
    edit(arrays)
    save_file(arrays, directory / weights.WEIGHTS_FILE)
    trust(directory)


def trust(directory):
    content = (directory / weights.WEIGHTS_FILE).read_bytes()
    edit_card(directory, weights={"sha256": hashlib.sha256(content).hexdigest()})


@pytest.mark.parametrize(
    "builder,options",
    [
        (models.resnet18, {"width": 4, "stem": "cifar_half", "stem_padding": 2, "image_size": 16}),
        (models.resnet34, {"width": 2, "stem": "imagenet", "dtype": "bfloat16"}),
        (models.resnet50, {"width": 2, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}),
        (vit.vit_tiny, {"depth": 1, "pooling": "mean", "patch_size": 8, "name": "mine"}),
        (vit.vit_small, {"depth": 1, "image_size": 8, "dtype": "bfloat16"}),
        (vit.vit_base, {"depth": 1, "image_size": 8}),
        (models.convnext, {"depths": (1, 1), "widths": (4, 8), "patch_size": 2, "image_size": 8}),
    ],
)
def test_every_builder_round_trips_bit_equal(builder, options, tmp_path):
    shapes = jax.eval_shape(lambda key: builder(key, **options), jax.random.key(0))
    random = np.random.default_rng(0)  # also where a fresh network has zeros and ones
    encoder = jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), shapes)
    weights.save_encoder(encoder, tmp_path)
    loaded = weights.load_encoder(tmp_path)
    assert_bit_equal(loaded, encoder)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_a_loaded_encoder_says_the_same_about_an_image(tmp_path):
    encoder = models.resnet18(jax.random.key(0), width=4, image_size=8)
    statistics = jax.tree.map(lambda x: x + 0.5, encoder.variables["batch_stats"])
    encoder = encoder.replace(variables={**encoder.variables, "batch_stats": statistics})
    weights.save_encoder(encoder, str(tmp_path), {"linear_accuracy": 0.5})
    image = jnp.full((8, 8, 3), 0.25)
    run = jax.jit(lambda encoder, image: encoder(image).features)
    np.testing.assert_array_equal(
        run(weights.load_encoder(str(tmp_path)), image), run(encoder, image)
    )
    arrays = load_file(tmp_path / "encoder.safetensors")
    assert arrays["params/stem/conv/kernel"].shape == (3, 3, 3, 4)
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
    assert "batch_stats/stage4/block2/conv2/norm/var" in arrays
    card = weights.encoder_card(tmp_path)
    assert card["builder"] == "robust_ssl.models:resnet18"
    assert card["options"]["width"] == 4 and card["options"]["stem_padding"] == 1
    assert card["card"] == {"linear_accuracy": 0.5} and card["name"] == "resnet18"


def test_saving_again_replaces_and_leaves_nothing_behind(saved):
    other = tiny_net(jax.random.key(2))
    weights.save_encoder(other, saved, builder=tiny_net)
    assert_bit_equal(load(saved), other)
    assert {file.name for file in saved.iterdir()} == {"encoder.json", "encoder.safetensors"}


def test_a_network_of_ones_own(saved):
    assert_bit_equal(load(saved), tiny_net(jax.random.key(1)))


def test_options_of_ones_own_builder(tmp_path):
    encoder = tiny_net(jax.random.key(0), width=6)
    with pytest.raises(ValueError, match=r"tiny_net\({}\) does not rebuild this encoder"):
        weights.save_encoder(encoder, tmp_path / "wrong", builder=tiny_net)
    assert not (tmp_path / "wrong").exists()
    weights.save_encoder(encoder, tmp_path, builder=tiny_net, options={"width": 6})
    assert load(tmp_path).dim == 6


def test_an_unknown_network_needs_a_builder(tmp_path):
    with pytest.raises(ValueError, match=r"no builder of robust_ssl.models makes TinyNet"):
        weights.save_encoder(tiny_net(jax.random.key(0)), tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_saved(value, tmp_path):
    encoder = tiny_net(jax.random.key(0))
    broken = jax.tree.map(lambda x: x.at[..., 0].set(value), encoder)
    with pytest.raises(ValueError, match="params/dense/bias has NaN or infinite values"):
        weights.save_encoder(broken, tmp_path / "x", builder=tiny_net)
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        weights.save_encoder(encoder, tmp_path / "x", {"accuracy": value}, builder=tiny_net)
    assert not (tmp_path / "x").exists()


def test_a_card_cannot_name_anything_but_a_public_builder(saved, monkeypatch):
    called = []
    monkeypatch.setattr("os.system", called.append)
    edit_card(saved, builder="os:system", options={"command": "true"})
    with pytest.raises(ValueError, match=r"'os:system', which is not one of .*resnet18.*builder="):
        weights.load_encoder(saved)
    for name in ("robust_ssl.models:classifier", "robust_ssl.models.resnet:resnet18", "resnet18"):
        edit_card(saved, builder=name)
        with pytest.raises(ValueError, match="which is not one of"):
            weights.load_encoder(saved)
    assert not called


@pytest.mark.parametrize("position", [-1, 0.5])  # the last byte, one in the middle
def test_a_flipped_bit_is_noticed(saved, position):
    file = saved / weights.WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    content[-1 if position == -1 else int(len(content) * position)] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"encoder.safetensors is not the file.*SHA-256 is"):
        load(saved)


def test_a_truncated_file_is_called_so(saved):
    file = saved / weights.WEIGHTS_FILE
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"it has {size - 10} bytes instead of {size}"):
        load(saved)
    trust(saved)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(saved)


def test_every_difference_is_listed(saved):
    def edit(arrays):
        arrays["params/dense/scale"] = arrays.pop("params/dense/bias")
        arrays["params/dense/kernel"] = arrays["params/dense/kernel"].T.copy()

    edit_weights(saved, edit)
    with pytest.raises(ValueError) as error:
        load(saved)
    assert "3 problems" in str(error.value)
    for problem in (
        "missing params/dense/bias",
        "unexpected params/dense/scale",
        "params/dense/kernel has shape (4, 3), the network needs (3, 4)",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x: x.astype(np.float16), "params/dense/bias is float16 .* must be float32"),
        (lambda x: x + np.float32(np.nan), "params/dense/bias has NaN or infinite values"),
        (lambda x: x - np.float32(np.inf), "params/dense/bias has NaN or infinite values"),
        (lambda x: x[:0], r"params/dense/bias has shape \(0,\)"),
    ],
)
def test_wrong_values_are_refused(saved, change, message):
    edit_weights(
        saved,
        lambda arrays: arrays.update({"params/dense/bias": change(arrays["params/dense/bias"])}),
    )
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize("name", [weights.WEIGHTS_FILE, weights.CARD_FILE])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        load(saved)


@pytest.mark.parametrize(
    "text,message",
    [
        ("{", "encoder.json is not JSON"),
        ("[]", 'must be an object with "schema": 1'),
        ('{"schema": 2}', 'must be an object with "schema": 1'),
        ('{"schema": 1, "weights": []}', "wrong type: name, builder, options, weights, card"),
        (
            '{"schema": 1, "name": "", "builder": "", "options": {}, "weights": {}, "card": {}}',
            "wrong type: weights/sha256",
        ),
    ],
)
def test_a_bad_card_is_refused(saved, text, message):
    (saved / weights.CARD_FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize("options", [{"depth": 3}, {"width": "wide"}, {"key": 0}])
def test_options_that_the_builder_does_not_take(saved, options):
    edit_card(saved, options=options)
    with pytest.raises(ValueError, match=r"encoder.json: cannot build the network from"):
        load(saved)


def test_absurd_options_cost_no_memory(saved):
    edit_card(saved, options={"width": 10**12})
    with pytest.raises(ValueError, match=r"kernel has shape \(3, 4\), the network needs"):
        load(saved)


def test_one_file_of_weights_is_not_taken_for_a_misspelt_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ours.pth", "weights/ours.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"there is no file {name}"):
            weights.load_encoder(name)
    (tmp_path / "ours.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file.*import_encoder\('ours\.pth'\)"):
        weights.load_encoder("ours.pth")


def test_shipped_encoders(monkeypatch, tmp_path):
    zoo = tmp_path / "zoo"
    for name in ("resnet18w16-cifar10", "vit-cifar10"):
        weights.save_encoder(tiny_net(jax.random.key(3)), zoo / name, builder=tiny_net)
    (zoo / "__pycache__").mkdir()
    monkeypatch.setattr(weights.resources, "files", lambda package: zoo)
    assert weights.list_encoders() == ["resnet18w16-cifar10", "vit-cifar10"]
    assert load("vit-cifar10").name == "tiny"
    with pytest.raises(
        ValueError, match=r"no encoder named 'resnet18-cifar10'.*near: resnet18w16-cifar10.*shipped"
    ):
        load("resnet18-cifar10")
    with pytest.raises(FileNotFoundError, match=r"no directory .*runs/none"):
        load("runs/none")
    with pytest.raises(FileNotFoundError, match="no directory"):
        load(tmp_path / "none")


@pytest.mark.parametrize("name", weights.list_encoders())
def test_what_is_shipped_loads_and_is_small(name):
    encoder = weights.load_encoder(name)
    card = weights.encoder_card(name)
    assert card["weights"]["bytes"] <= 12 * 2**20
    features = jax.jit(lambda e, x: e(x).features)(
        encoder, jnp.full((encoder.image_size, encoder.image_size, 3), 0.5)
    )
    assert features.shape == (encoder.dim,) and bool(jnp.isfinite(features).all())


# --- The card's own checksum ------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda options: options.update(std=[0.3, *options["std"][1:]]),
        lambda options: options.update(mean=[float("nan")] * 3),
        lambda options: options.update(std=[0, 0, 0]),
        lambda options: options.update(mean="abc"),
        lambda options: options.update(mean=[0.5] * 1000),
        lambda options: options.update(std=[0.2, -0.2, 0.2]),
    ],
)
def test_a_card_that_was_changed_or_makes_no_sense_is_refused(change, tmp_path):
    weights.save_encoder(models.resnet18(jax.random.key(0), width=4, image_size=16), tmp_path)
    file = tmp_path / "encoder.json"
    record = json.loads(file.read_text())
    change(record["options"])
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"encoder\.json"):
        weights.load_encoder(tmp_path)


def test_an_edit_of_ones_own_is_accepted_by_name_and_a_card_of_before_is_noted(tmp_path, caplog):
    weights.save_encoder(models.resnet18(jax.random.key(0), width=4, image_size=16), tmp_path)
    file = tmp_path / "encoder.json"
    record = json.loads(file.read_text())
    record["card"]["note"] = "mine"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"checksum does not agree.*edited .*seal_card\("):
        weights.load_encoder(tmp_path)
    cards.seal_card(tmp_path)
    weights.load_encoder(tmp_path)
    assert not caplog.text
    file.write_text(json.dumps({n: v for n, v in record.items() if n != "sha256"}))
    weights.load_encoder(tmp_path)
    assert "has no checksum of itself" in caplog.text


def test_of_a_lock_or_a_baseline_nobody_is_told_to_seal_a_card(caplog):
    """Sealing would change the cards beside it, and leave the lock as it is."""
    with pytest.raises(ValueError, match=r"encoder\.lock\.json is not .* or make it again$"):
        cards.check_seal({"schema": 1, "sha256": "0"}, "a/encoder.lock.json")
    cards.check_seal({"schema": 1}, "a/baseline.json")
    assert "make it again" in caplog.text and "seal_card" not in caplog.text


def test_a_card_with_numbers_for_keys_is_read_again(tmp_path):
    encoder = tiny_net(jax.random.key(1))
    shares = {epoch: epoch / 20 for epoch in (2, 10)}
    weights.save_encoder(encoder, tmp_path, {"accuracy": shares}, builder=tiny_net)
    assert_bit_equal(load(tmp_path), encoder)
    told = weights.encoder_card(tmp_path)["card"]["accuracy"]
    assert told == {"2": 0.1, "10": 0.5}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (models.convnext, {"depths": [10**9, 1]}),
        (models.vision_transformer, {"depth": 10**9}),
        (models.vision_transformer, {"mlp_width": 10**12}),
        (models.resnet18, {"image_size": 50_000}),
        (models.resnet18, {"width": 10**9}),
    ],
)
def test_a_network_that_no_file_can_hold_is_refused_before_it_is_built(make, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"the card: {name} is .*at most .* is built"):
        weights.build_skeleton(make, options, "the card")


def test_numbers_that_numpy_lacks_are_named(tmp_path):
    encoder = models.resnet18(jax.random.key(0), width=4, image_size=8)
    weights.save_encoder(encoder, tmp_path)
    arrays = load_file(tmp_path / "encoder.safetensors")
    header = {
        name: {"dtype": "BF16", "shape": list(a.shape), "data_offsets": [0, 0]}
        for name, a in arrays.items()
    }
    start = 0
    for name, a in arrays.items():
        header[name]["data_offsets"] = [start, start := start + 2 * a.size]
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(start)
    (tmp_path / "encoder.safetensors").write_bytes(content)
    card = json.loads((tmp_path / "encoder.json").read_text())
    card["weights"] = cards.describe_file("encoder.safetensors", content)
    card.pop("sha256")
    (tmp_path / "encoder.json").write_bytes(cards.encode(card))
    with pytest.raises(ValueError, match="numbers of type 'BF16'; it must be F32"):
        weights.load_encoder(tmp_path)
    (check,) = (c for c in provenance.examine(tmp_path) if c.number == 5)
    assert check.outcome == "fail" and "BF16" in check.said


@pytest.mark.parametrize("name", [None, 3, ""])
def test_what_is_no_name_of_an_encoder_is_said_so(name):
    with pytest.raises(ValueError, match=f"a shipped name .* or a directory, got {name!r}"):
        weights.load_encoder(name)
