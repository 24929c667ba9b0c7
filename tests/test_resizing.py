"""How pictures get their size: closed forms, words in a config, what an encoder's files say."""

import json

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from robust_ssl import data, models, weights
from robust_ssl.data import Resizing, pictures
from robust_ssl.experiment.sources import Data, EncoderSource

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


def test_an_encoders_own_resizing_is_found(tmp_path):
    """Beside a foreign file, in the card of what is made of it, and for another size."""
    encoder = models.resnet18(jax.random.key(0), width=8)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    weights.export_safetensors(encoder, foreign / "model.safetensors")
    assert weights.resizing_of(foreign) is None
    (foreign / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM}))
    expected = Resizing("shorter", 35, interpolation="bilinear", sized="keep")
    assert weights.resizing_of(foreign) == expected
    assert EncoderSource.read(str(foreign), "config.encoder").resizing(64).side == 71
    assert weights.resizing_of("simclr-cifar10-r18w24", 32) is None
    (foreign / "config.json").write_text(
        json.dumps({"pretrained_cfg": {**TIMM, "interpolation": "spline"}})
    )
    with pytest.raises(ValueError, match=r"interpolation must be one of .*say how"):
        weights.resizing_of(foreign)
