"""How pictures get their size: closed forms, words in a config, what an encoder's files say."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from robust_ssl import data, models, weights
from robust_ssl.api import inputs
from robust_ssl.data import Resizing, pictures
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.plan import Plan, plan
from robust_ssl.experiment.sources import Data, Downstream, EncoderSource
from robust_ssl.weights import torch_pictures, transforms

RAMP = np.repeat(np.arange(240, dtype=np.uint8).reshape(12, 20, 1), 3, axis=2)


def test_the_middle_is_where_each_library_has_it():
    """The picture has the scaled size already, so a crop shows its own pixels."""
    for offset, left in (("down", 4), ("nearest", 4)):
        cut = Resizing("shorter", side=12, crop=11, offset=offset)(RAMP)
        np.testing.assert_array_equal(cut, RAMP[:11, left : left + 11])
    # Half a pixel of 1.5: torchvision takes the even one.
    wide = Resizing("shorter", side=12, crop=9, offset="nearest")(RAMP)
    np.testing.assert_array_equal(wide, RAMP[2:11, 6:15])
    down = Resizing("shorter", side=12, crop=9, offset="down")(RAMP)
    np.testing.assert_array_equal(down, RAMP[1:10, 5:14])


def test_the_longer_side_leaves_bars():
    whole = Resizing("longest", side=20, crop=20, fill=(1, 2, 3))(RAMP)
    np.testing.assert_array_equal(whole[4:16], RAMP)
    assert (whole[:4] == [1, 2, 3]).all() and (whole[16:] == [1, 2, 3]).all()


def test_without_more_it_is_as_it_was():
    fitted = ImageOps.fit(Image.fromarray(RAMP), (6, 6), method=Image.Resampling.LANCZOS)
    expected = np.asarray(fitted)
    np.testing.assert_array_equal(pictures.resize(RAMP, 6), expected)
    np.testing.assert_array_equal(Resizing.read("fit", "here")(RAMP, 6), expected)
    assert pictures.resize(RAMP[:, :12], 12) is not None
    assert np.shares_memory(pictures.resize(RAMP[:, :12], 12), RAMP)


def test_every_source_is_resized_the_same_way(tmp_path):
    resizing = Resizing("squash", side=8, interpolation="bilinear")
    expected = resizing(RAMP, 6)
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(RAMP).save(tmp_path / split / label / "1.png")
    sources = [tmp_path, np.stack([RAMP] * 2), [RAMP, RAMP], lambda split: np.stack([RAMP] * 2)]
    for source in sources:
        examples = data.load(source, image_size=6, resizing=resizing)
        np.testing.assert_array_equal(examples.images[0], expected)
    streamed = data.load(tmp_path, image_size=6, resizing=resizing, memory_limit=1)
    np.testing.assert_array_equal(streamed.read([1])["images"][0], expected)
    named = {"mode": "squash", "side": 8, "crop": 6, "interpolation": "bilinear"}
    np.testing.assert_array_equal(data.load(RAMP[None], resizing=named).images[0], expected)


def jpeg(width, height, **options):
    """A smooth photograph, as JPEG's bytes."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y), np.sin(5 * x * y + 1)]
    file = io.BytesIO()
    pixels = np.uint8(127 + 100 * np.stack(waves, axis=-1))
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["shorter", "squash", "longest", "fit"])
def test_a_draft_is_nearly_the_picture_and_only_where_it_is_asked_for(mode, monkeypatch):
    whole, drafted = Resizing(mode), Resizing(mode, draft=True)
    large, small = jpeg(200, 150), jpeg(40, 60)
    ours = [pictures.decode(large, 16, "x", each).astype(int) for each in (whole, drafted)]
    difference = np.abs(ours[0] - ours[1])
    assert 0 < difference.mean() <= 3 and difference.max() <= 15
    scope = {}
    exec(torch_pictures.text_of(drafted, 16), scope)
    np.testing.assert_array_equal(scope["resized"](Image.open(io.BytesIO(large))), ours[1])
    # Too small for a half, no JPEG, or turned by its tag.
    turned = Image.Exif()
    turned[0x0112] = 6
    sizes = [small, _png(RAMP)]
    for file in sizes:
        same = [pictures.decode(file, 16, "x", each) for each in (whole, drafted)]
        np.testing.assert_array_equal(*same)
    upright = pictures.decode(jpeg(200, 150, exif=turned), 16, "x", drafted)
    assert upright.shape == (16, 16, 3)
    monkeypatch.setattr(Image.Image, "draft", pytest.fail)
    pictures.decode(large, 16, "x", None)
    pictures.decode(large, None, "x", drafted)


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_who_has_the_size_is_resized_or_kept():
    square = RAMP[:, :12]
    assert not (Resizing("shorter", side=14, crop=12)(square) == square).all()
    np.testing.assert_array_equal(
        Resizing("shorter", side=14, crop=12, sized="keep")(square), square
    )
    loaded = data.load(square[None], image_size=12, resizing={"side": 14})
    assert not (loaded.images[0] == square).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("shorterr", "did you mean 'shorter'"),
        ({"mode": "squish"}, "mode must be one of 'shorter', 'squash'"),
        ({"sides": 8}, "did you mean 'side'"),
        ({"interpolation": "cubic"}, "interpolation must be one of"),
        ({"side": 0}, "side must be a whole number of at least 1"),
        ({"side": 6}, "side is 6 and the square 8"),
        ({"crop": 4}, "crop=4 and image_size is 8"),
        ({"fill": [0, 0]}, "three numbers of 0 to 255"),
        ({"mode": "fit", "side": 9}, "leave out side"),
        (3, "must be one of shorter, squash"),
    ],
)
def test_a_misspelt_resizing_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        Data.read({"source": "./x", "image_size": 8, "resizing": value}, "config.downstream")
    with pytest.raises(ValueError, match=message):
        data.load(RAMP[None], image_size=8, resizing=value)


def test_a_size_must_be_known():
    with pytest.raises(ValueError, match="give image_size or crop"):
        data.load(RAMP[None], resizing="squash")


def test_a_config_says_it_in_a_word_or_in_full():
    by_word = Data.read({"source": "./x", "resizing": "squash"}, "config.downstream")
    assert by_word.resizing == Resizing("squash")
    again = Data.read(json.loads(json.dumps(by_word.text, default=vars)), "config.downstream")
    assert again == by_word


TIMM = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32], "crop_pct": 0.9,
        "interpolation": "bilinear"}  # fmt: skip


def tiny_encoder():
    """Of ones: nothing here looks at what it computes."""
    shapes = jax.eval_shape(lambda key: models.resnet18(key, width=2), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder of an encoder that timm's transform belongs to, and a folder of one picture."""
    folder = tmp_path_factory.mktemp("foreign")
    weights.export_safetensors(tiny_encoder(), folder / "model.safetensors")
    config = {"architecture": "resnet18", "pretrained_cfg": TIMM}
    (folder / "config.json").write_text(json.dumps(config))
    pictures = folder.parent / "photos" / "train" / "a"
    pictures.mkdir(parents=True)
    Image.fromarray(RAMP).save(pictures / "1.png")
    return folder, folder.parent / "photos"


def test_an_encoders_own_resizing_is_found(foreign, tmp_path):
    folder, _ = foreign
    expected = Resizing("shorter", 35, interpolation="bilinear", sized="keep")
    assert weights.resizing_of(folder) == expected
    assert EncoderSource.read(str(folder), "config.encoder").resizing(64).side == 71
    assert weights.resizing_of("simclr-cifar10-r18w24", 32) is None
    origin = {"imported_from": {"transform": transforms.of_timm(TIMM, 32)}}
    ours = weights.save_encoder(tiny_encoder(), tmp_path / "ours", origin)
    assert weights.resizing_of(ours) == expected
    assert weights.resizing_of(ours, 64).side == 71
    # What a card said before it told modes: the shorter side, and a crop of the middle.
    before = {"resize": 40, "crop": 32, "interpolation": "bicubic"}
    assert transforms.resizing(before, 32) == Resizing("shorter", 40, sized="keep")
    assert transforms.resizing({"interpolation": "bicubic"}, 32) is None


def test_a_transform_that_no_resizing_is_asks_for_one(tmp_path):
    told = {**transforms.of_timm(TIMM, 32), "interpolation": "spline"}
    with pytest.raises(ValueError, match=r"interpolation must be one of .*say how"):
        transforms.resizing(told, 32)


def test_a_run_resizes_pictures_as_its_encoders_files_say(foreign):
    folder, photos = foreign
    planned = Plan(encoder=EncoderSource(path=str(folder), options={"image_size": 32}))
    context = Context(planned, folder, None, None)
    source = Data(source=str(photos))
    own = Resizing("shorter", 35, interpolation="bilinear")
    images = context.load_sized(source, "train").images
    np.testing.assert_array_equal(images[0], own(RAMP, 32))
    asked = dataclasses.replace(source, resizing=Resizing.read("squash", "here"))
    images = context.load_sized(asked, "train").images
    np.testing.assert_array_equal(images[0], Resizing("squash")(RAMP, 32))
    # The encoder that is yet to be pre-trained has no transform.
    images = context.load_sized(source, "train", context.encoder).images
    np.testing.assert_array_equal(images[0], pictures.resize(RAMP, 32))
    secured = inputs.examples_of(photos, None, 32, "train", inputs.resizing_of(folder))
    np.testing.assert_array_equal(secured.images[0], own(RAMP, 32))
    assert inputs.resizing_of(context.encoder) == weights.resizing_of(folder)


# --- What is saved says how its pictures got their size --------------------------------------

EVERY_KIND = [
    Resizing("shorter", 35, interpolation="bilinear"),
    Resizing("shorter", 33, crop=32, offset="down", sized="keep"),
    Resizing("squash", 40, interpolation="nearest"),
    Resizing("longest", 30, fill=(1, 2, 3), offset="down"),
    Resizing("fit", draft=True),
]


def ones_classifier(encoder):
    """With a linear head of ones for three classes."""
    make = functools.partial(models.classifier, encoder=encoder, num_classes=3, head="linear")
    like = jax.eval_shape(lambda: make(jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), like)


@pytest.mark.parametrize("resizing", [EVERY_KIND[1], EVERY_KIND[3]])
def test_a_saved_model_keeps_how_its_pictures_got_their_size(tmp_path, resizing):
    encoder = tiny_encoder().replace(resizing=resizing)
    net = ones_classifier(encoder)
    both = models.confidence_ensemble([net, net])
    for index, model in enumerate((net, both)[: 1 + (resizing is EVERY_KIND[1])]):
        folder = weights.save_classifier(model, tmp_path / str(index) / "classifier")
        loaded = weights.load_classifier(folder).encoder.resizing
        # A finished recipe's directory too.
        for again in (loaded, weights.resizing_of(folder), weights.resizing_of(folder.parent)):
            np.testing.assert_array_equal(again(RAMP, 32), resizing(RAMP, 32))
    own = weights.export_safetensors(encoder, tmp_path / "encoder.safetensors")
    again = weights.import_encoder(own).resizing
    np.testing.assert_array_equal(again(RAMP, 32), resizing(RAMP, 32))
    assert ones_classifier(tiny_encoder()).encoder.resizing is None


def test_members_that_differ_say_nothing_together():
    nets = [ones_classifier(tiny_encoder().replace(resizing=each)) for each in EVERY_KIND[:2]]
    assert models.confidence_ensemble(nets).encoder.resizing is None


def test_what_is_no_resizing_is_refused_or_said(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"must be a robust_ssl\.data\.Resizing: 'squash'"):
        weights.save_encoder(tiny_encoder().replace(resizing="squash"), tmp_path)
    with pytest.raises(ValueError, match="side is 8 and the square 32"):
        weights.save_encoder(tiny_encoder().replace(resizing=Resizing(side=8)), tmp_path)
    told = {**transforms.of_timm(TIMM, 32), "interpolation": "spline"}
    card = {"options": {"image_size": 32}}
    # What a card says of its origin may be anything.
    for origin, warned in [({"transform": told}, True), ("a friend", False), ({"transform": 3}, 0)]:
        caplog.clear()
        assert transforms.of_saved({**card, "card": {"imported_from": origin}}, "x") is None
        assert ("interpolation must be one of" in caplog.text) == warned
    for wrong in (3, {**told, "crop": "x"}, {**told, "interpolation": "bicubic", "resize": [1]}):
        with pytest.raises(ValueError, match=r"x: .*transform"):
            transforms.of_saved({**card, "transform": wrong}, "x")


def test_a_runs_classifier_and_whoever_measures_it_see_the_same_pixels(foreign, tmp_path):
    folder, photos = foreign
    source = EncoderSource(path=str(folder), options={"image_size": 32})
    for asked in (None, Resizing.read("squash", "here")):
        task = Downstream(source=str(photos), resizing=asked)
        context = Context(Plan(encoder=source, downstream=task), folder, None, None)
        scored = context.load_sized(task, "train").images
        net = context.encoder.replace(resizing=context.resizing_of_downstream(context.encoder))
        saved = weights.save_classifier(ones_classifier(net), tmp_path / str(asked is None))
        for model in (saved, weights.load_classifier(saved)):
            resizing = inputs.resizing_of(model)
            again = inputs.examples_of(photos, None, 32, "train", resizing)
            np.testing.assert_array_equal(again.images, scored)
    # Images that had their size: what the encoder's own files say is kept.
    whole = Downstream(source="cifar10")
    arrays = Context(Plan(encoder=source, downstream=whole), folder, None, None)
    assert arrays.resizing_of_downstream(context.encoder) == context.encoder.resizing is not None


@pytest.mark.parametrize("resizing", [*EVERY_KIND, None])
def test_the_python_file_resizes_as_data_do(resizing):
    scope = {}
    exec(torch_pictures.text_of(resizing, 32), scope)  # torch is not needed up to here
    for height, width in ((32, 32), (50, 71), (90, 33), (20, 25)):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        theirs = scope["resized"](Image.fromarray(pixels))
        np.testing.assert_array_equal(theirs, pictures.resize(pixels, 32, resizing))
    assert scope["resized"](Image.new("P", (40, 40))).mode == "RGB"


@pytest.mark.parametrize("resizing", [{"side": 20}, {"crop": 48}])
def test_a_plan_holds_a_resizing_to_the_encoders_size(resizing):
    folder = {"source": "./photos", "resizing": resizing}
    config = {"stages": ["train"], "encoder": "simclr-cifar10-r18w24", "downstream": folder,
              "recipes": {"baseline": "robust_ssl.recipes:linear_probe"}}  # fmt: skip
    with pytest.raises(ValueError, match=r"config\.downstream\.resizing: .*(side is 20|crop=48)"):
        plan(config)
