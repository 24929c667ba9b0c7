"""A foreign encoder comes in whole or not at all, and says why."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from robust_ssl import experiment, models, weights
from robust_ssl.cli import main
from robust_ssl.experiment.sources import EncoderSource
from robust_ssl.weights import convert, mapping, normalization, resnet_layouts

NAMED = {"normalization": "cifar10", "image_size": 8, "stem": "cifar", "stem_padding": 2}
FLAGS = ["--normalization=cifar10", "--image-size=8", "--stem=cifar", "--stem-padding=2"]


def layout_of(name):
    return next(layout for layout in convert.LAYOUTS if layout.name == name)


def random_encoder(builder=models.resnet18, **options):
    """Random numbers also where a fresh network has zeros and ones."""
    shapes = jax.eval_shape(lambda key: builder(key, **options), jax.random.key(0))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: random.uniform(0.5, 1, s.shape).astype(np.float32), shapes)


def tensors_of(encoder, layout="torchvision-resnet"):
    flat = traverse_util.flatten_dict(encoder.variables, sep="/")
    return mapping.split(layout_of(layout).entries(encoder), flat)


ENCODER = random_encoder(width=4, image_size=8, stem_padding=2)
TENSORS = tensors_of(ENCODER)


def write(folder, tensors, metadata=None, **configs):
    save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()},
              folder / "model.safetensors", metadata)  # fmt: skip
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def assert_same_weights(ours, theirs):
    assert jax.tree.structure(ours.variables) == jax.tree.structure(theirs.variables)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


# --- what comes in ------------------------------------------------------------------------------


def test_every_weight_arrives_where_it_belongs(tmp_path):
    extra = {"fc.weight": np.zeros((3, 32), np.float32), "fc.bias": np.zeros(3, np.float32),
             "bn1.num_batches_tracked": np.array(7)}  # fmt: skip
    file = write(tmp_path, {**TENSORS, **extra})
    encoder = weights.import_encoder(file, **NAMED)
    assert_same_weights(encoder, ENCODER)
    assert encoder.mean == models.CIFAR10_MEAN and encoder.std == models.CIFAR10_STD
    assert encoder.image_size == 8 and encoder.name == "model"
    assert encoder.module == ENCODER.module
    inspection = weights.inspect_file(file, **NAMED)
    assert inspection.dropped == {"fc": 2, "num_batches_tracked": 1}
    assert set(inspection.kept) == set(TENSORS) and not inspection.problems
    assert inspection.builder == "resnet18"
    assert inspection.options == {"width": 4, "stem": "cifar", "stem_padding": 2, "image_size": 8}


@pytest.mark.parametrize(
    ("prefix", "layout", "others", "dropped"),
    [
        ("module.", "torchvision-resnet", ["module.fc.weight"], {"fc": 1}),
        ("backbone.", "solo-learn",
         ["projector.0.weight", "momentum_backbone.conv1.weight", "classifier.bias", "queue",
          "prototypes.weight", "backbone.fc.weight", "momentum_projector.1.running_mean"],
         {"projector": 1, "momentum_backbone": 1, "classifier": 1, "queue": 1, "prototypes": 1,
          "backbone.fc": 1, "momentum_projector": 1}),
        ("encoder.", "solo-learn", ["momentum_encoder.conv1.weight"], {"momentum_encoder": 1}),
        ("module.encoder_q.", "moco",
         ["module.encoder_k.conv1.weight", "module.queue", "module.queue_ptr",
          "module.encoder_q.fc.0.weight"],
         {"encoder_k": 1, "queue": 1, "queue_ptr": 1, "encoder_q.fc": 1}),
        ("module.base_encoder.", "moco",
         ["module.momentum_encoder.conv1.weight", "module.predictor.0.weight",
          "module.base_encoder.fc.0.weight"],
         {"momentum_encoder": 1, "predictor": 1, "base_encoder.fc": 1}),
    ],
)  # fmt: skip
def test_wrappers_come_off_and_their_other_parts_are_dropped(
    tmp_path, prefix, layout, others, dropped
):
    tensors = {f"{prefix}{name}": x for name, x in TENSORS.items()}
    tensors |= {name: np.zeros(2, np.float32) for name in others}
    file = write(tmp_path, tensors)
    inspection = weights.inspect_file(file, **NAMED)
    assert inspection.layout.name == layout and inspection.dropped == dropped
    assert_same_weights(weights.import_encoder(file, **NAMED), ENCODER)


def test_solo_learn_pads_by_two_if_it_is_named_and_others_are_asked(tmp_path):
    file = write(tmp_path, {f"backbone.{name}": x for name, x in TENSORS.items()})
    facts = {"normalization": "cifar10", "image_size": 8}
    with pytest.raises(ValueError, match=r"stem_padding, 1 .usual. or 2 .solo-learn's"):
        weights.import_encoder(file, **facts)  # others write ``backbone.`` too
    facts["layout"] = "solo-learn"
    assert weights.import_encoder(file, **facts).module.stem_padding == 2
    assert weights.import_encoder(file, **facts, stem_padding=1).module.stem_padding == 1


def test_a_normalization_that_is_not_the_files_is_said(tmp_path):
    exported = weights.export_safetensors(
        ENCODER.replace(mean=(0.1,) * 3), tmp_path / "own.safetensors"
    )
    with pytest.raises(ValueError, match=r"own header says mean \(0.1, .* is asked for"):
        weights.import_encoder(exported, normalization="imagenet")
    image = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 8}
    file = write(tmp_path, TENSORS, preprocessor_config=image)
    inspection = weights.inspect_file(file, **NAMED)
    assert "preprocessor_config.json says mean (0.5, 0.5, 0.5)" in "".join(inspection.notes)
    assert inspection.normalization.mean == models.CIFAR10_MEAN and not inspection.problems


def test_a_variant_with_a_plain_networks_tensors_is_refused(tmp_path):
    encoder = random_encoder(width=2, stem="imagenet", image_size=32)
    for config, message in (
        ({"architecture": "resnetblur18", "pretrained_cfg": {}}, "no plain ResNet"),
        ({"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"aa": 1}}, "model_args"),
    ):
        file = write(tmp_path, tensors_of(encoder), config=config)
        with pytest.raises(ValueError, match=message):
            weights.import_encoder(file, normalization="imagenet", image_size=32)


def test_negative_variances_are_refused(tmp_path):
    bad = {**TENSORS, "bn1.running_var": -TENSORS["bn1.running_var"]}
    with pytest.raises(ValueError, match=r"bn1.running_var has negative variances"):
        weights.import_encoder(write(tmp_path, bad), **NAMED)


@pytest.mark.parametrize(
    "config",
    [{"rescale_factor": None}, {"rescale_factor": "x"}, {"size": [{}, {}], "image_mean": [0.5] * 3,
     "image_std": [0.5] * 3}],
)  # fmt: skip
def test_json_that_makes_no_sense_is_a_problem_and_no_traceback(tmp_path, config):
    file = write(tmp_path, TENSORS, preprocessor_config=config)
    inspection = weights.inspect_file(file, stem="cifar", stem_padding=2)
    assert inspection.problems


def test_a_header_that_asks_for_the_absurd_is_refused(tmp_path):
    for options, message in (
        ({"width": 0}, "width|division"), ({"width": 10**30}, "width|large|int"),
    ):  # fmt: skip
        record = {"options": {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 8, **options}}
        file = write(tmp_path, TENSORS, {"robust_ssl": json.dumps(record)})
        with pytest.raises(ValueError, match=message):
            weights.import_encoder(file, stem="cifar", stem_padding=2)
    file = write(tmp_path, TENSORS, {"robust_ssl": "[" * 100_000})
    assert "export did not write" in str(weights.inspect_file(file))


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**7}, {"layer_norm_eps": -1}, {"num_attention_heads": True},
])  # fmt: skip
def test_a_vit_config_that_asks_for_the_absurd_is_refused_at_once(tmp_path, changes):
    sizes = {"width": 12, "heads": 2, "depth": 1, "patch_size": 4, "image_size": 8}
    encoder = random_encoder(models.vision_transformer, **sizes, norm_epsilon=1e-12)
    config = {"model_type": "vit", "num_attention_heads": 2, "num_hidden_layers": 1, **changes}
    file = write(tmp_path, tensors_of(encoder, "huggingface-vit"), config=config)
    with pytest.raises(ValueError, match=r"depth is|layer_norm_eps is|num_attention_heads is"):
        weights.import_encoder(file, normalization="half")


@pytest.mark.parametrize(
    "builder", [models.resnet18, models.resnet34, models.resnet50, models.resnet101,
                models.resnet152]
)  # fmt: skip
@pytest.mark.parametrize("layout", ["torchvision-resnet", "huggingface-resnet"])
def test_every_resnet_is_told_by_its_blocks(builder, layout):
    encoder = random_encoder(builder, width=2, stem="imagenet", image_size=32)
    tensors = tensors_of(encoder, layout)
    kind = "basic" if "conv3" not in encoder.variables["params"]["stage1"]["block1"] else "bottle"
    configs = {"config.json": {"model_type": "resnet", "layer_type": kind}}
    assert layout_of(layout).matches(tensors.keys())
    name, options, _ = layout_of(layout).network(tensors, configs)
    assert (name, options["width"]) == (builder.__name__, 2)
    assert (options["stem"], options["stem_padding"]) == ("imagenet", 3)
    flat = traverse_util.flatten_dict(encoder.variables, sep="/")
    joined = mapping.join(layout_of(layout).entries(encoder), tensors, flat, "memory")
    for path, leaf in flat.items():
        np.testing.assert_array_equal(joined[path], leaf)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_float32_with_a_note(tmp_path, dtype):
    file = write(tmp_path, {name: x.astype(dtype) for name, x in TENSORS.items()})
    encoder = weights.import_encoder(file, **NAMED)
    want = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), ENCODER)
    assert_same_weights(encoder, want)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(encoder.variables))
    note = f"{len(TENSORS)} tensors are {np.dtype(dtype).name}; converted to float32"
    assert note in weights.inspect_file(file, **NAMED).notes


# --- what does not ------------------------------------------------------------------------------


def _without(name):
    return {key: x for key, x in TENSORS.items() if key != name}


BAD = {
    "missing": (_without("layer1.1.bn2.bias"), r"missing layer1\.1\.bn2\.bias"),
    "missing stem": (_without("bn1.weight"), r"missing bn1\.weight"),
    "unexpected": ({**TENSORS, "layer1.0.se.weight": np.ones(3, np.float32)},
                   r"unexpected layer1\.0\.se\.weight \(3,\)"),
    "transposed": ({name: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x
                    for name, x in TENSORS.items()},
                   r"layer2\.0\.downsample\.0\.weight has shape \(1, 1, 4, 8\), .*transposed"),
    "grouped": ({**TENSORS, "layer1.0.conv1.weight": np.ones((4, 2, 3, 3), np.float32)},
                r"conv1\.weight has shape \(4, 2, 3, 3\), the network needs \(4, 4, 3, 3\)"),
    "blocks": ({k: x for k, x in TENSORS.items() if not k.startswith("layer3.1.")},
               r"\[2, 2, 1, 2\] BasicBlocks .* resnet18 \[2, 2, 2, 2\]"),
    "stem": ({**TENSORS, "conv1.weight": np.ones((4, 3, 5, 5), np.float32)},
             r"conv1\.weight has shape \(4, 3, 5, 5\); a stem is \[4, 3, k, k\]"),
    "NaN": ({**TENSORS, "layer4.0.bn1.bias": np.full(32, np.nan, np.float32)},
            r"layer4\.0\.bn1\.bias has NaN or infinite"),
    "infinite": ({**TENSORS, "bn1.bias": np.full(4, 1e300)}, r"bn1\.bias has NaN or infinite"),
    "integers": ({**TENSORS, "bn1.bias": np.ones(4, np.int8)}, r"bn1\.bias is int8"),
    "two copies": ({**{f"backbone.{k}": x for k, x in TENSORS.items()},
                    "encoder.conv1.weight": TENSORS["conv1.weight"]}, "are the same weight"),
    "unknown": ({"tower.0.kernel": np.ones(3, np.float32)},
                r"no layout has tensors called tower\.0\.kernel(.|\n)*solo-learn:"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(tmp_path, case):
    tensors, message = BAD[case]
    file = write(tmp_path, tensors)
    with pytest.raises(ValueError, match=message):
        weights.import_encoder(file, **NAMED)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be imported"):
        weights.convert_encoder(file, tmp_path / "out", **NAMED)
    assert not (tmp_path / "out").exists()
    assert "cannot be converted" in str(weights.inspect_file(file, **NAMED))


def test_all_problems_are_reported_at_once(tmp_path):
    tensors = {**_without("layer1.1.bn2.bias"), "bn1.bias": np.full(4, np.nan, np.float32)}
    problems = weights.inspect_file(write(tmp_path, tensors)).problems
    assert len(problems) == 3  # NaN, normalization, stem; what the stem hides comes next
    problems = weights.inspect_file(tmp_path, stem="cifar", stem_padding=1).problems
    text = "\n".join(problems)
    for part in ("bn1.bias has NaN", "how images were normalized", "how large", "missing layer1.1"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "torchvision"}, "no layout 'torchvision'; there are\n"),
        ({"stem": None}, r"stem is 3x3.*--stem cifar --stem-padding 1"),
        ({"stem_padding": None}, "its stride and padding are not in the file"),
        ({"stem": "imagenet"}, r"'imagenet' does not fit a 3x3 .*\['cifar', 'cifar_half'\]"),
        ({"normalization": None}, r"--normalization cifar10\|.*--mean R,G,B"),
        ({"normalization": "mnist"}, "no normalization 'mnist'"),
        ({"mean": (0, 0, 0)}, "name both"),
        ({"image_size": None}, "--image-size PIXELS"),
        ({"image_size": 7.5}, "whole number"),
        ({"heads": 3}, "heads"),
        ({"width": 8}, "width is 4 in the file, and 8 is asked for"),
    ],
)
def test_what_weights_do_not_tell_must_be_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        weights.import_encoder(write(tmp_path, TENSORS), **{**NAMED, **change})


# --- normalization ------------------------------------------------------------------------------

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({**HALF, "size": 8}, ((0.5,) * 3, (0.5,) * 3, 8)),
        ({**HALF, "size": {"height": 9, "width": 9}}, ((0.5,) * 3, (0.5,) * 3, 9)),
        ({**HALF, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
         ((0.5,) * 3, (0.5,) * 3, 224)),
        ({**HALF, "size": {"shortest_edge": 32}, "crop_size": 24, "do_center_crop": False},
         ((0.5,) * 3, (0.5,) * 3, 32)),
        ({"do_normalize": False, "size": 8}, ((0.0,) * 3, (1.0,) * 3, 8)),
        ({"size": 8}, (None, None, 8)),
        ({}, (None, None, None)),
    ],
)  # fmt: skip
def test_the_preprocessor_says_how_images_look(config, want):
    inspection = normalization.read({"preprocessor_config.json": config})
    assert (inspection.mean, inspection.std, inspection.image_size) == want


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**HALF, "rescale_factor": 1 / 127.5}, "does not scale pixels"),
        ({**HALF, "do_rescale": False}, "does not scale pixels"),
        ({**HALF, "size": {"height": 8, "width": 9}}, "takes squares"),
        ({**HALF, "image_std": [0.5, 0.5, 0.0]}, "three positive numbers"),
        ({**HALF, "image_mean": [123.7, 116.3, 103.5]}, "divide it by 255"),
        ({**HALF, "image_mean": 0.5}, "must be three numbers"),
    ],
)
def test_a_preprocessor_we_cannot_follow_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        normalization.read({"preprocessor_config.json": config})


def test_a_folder_brings_its_own_normalization(tmp_path):
    encoder = random_encoder(width=2, stem="imagenet", image_size=32)
    tensors = {f"resnet.{k}": x for k, x in tensors_of(encoder, "huggingface-resnet").items()}
    tensors["classifier.1.bias"] = np.zeros(3, np.float32)
    config = {"model_type": "resnet", "layer_type": "basic", "hidden_act": "relu"}
    write(tmp_path, tensors, config=config, preprocessor_config={**HALF, "size": 32})
    loaded = weights.import_encoder(tmp_path)
    assert_same_weights(loaded, encoder)
    assert (loaded.mean, loaded.image_size, loaded.name) == ((0.5,) * 3, 32, tmp_path.name)
    assert weights.import_encoder(tmp_path, normalization="imagenet").std == models.IMAGENET_STD
    for key, value in [("hidden_act", "gelu"), ("downsample_in_first_stage", True),
                       ("num_channels", 1), ("model_type", "regnet")]:  # fmt: skip
        write(tmp_path, tensors, config={**config, key: value})
        with pytest.raises(ValueError, match=f"{key} is {value!r}"):
            weights.import_encoder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        weights.import_encoder(tmp_path)


def test_a_bottleneck_that_strides_in_its_first_convolution_is_refused(tmp_path):
    tensors = tensors_of(random_encoder(models.resnet50, width=2), "huggingface-resnet")
    config = {"model_type": "resnet", "downsample_in_bottleneck": True}
    with pytest.raises(ValueError, match="downsample_in_bottleneck is True"):
        layout_of("huggingface-resnet").network(tensors, {"config.json": config})


# --- out, configs, command line -----------------------------------------------------------------


def test_the_card_says_where_it_came_from(tmp_path):
    file = write(tmp_path, {**TENSORS, "fc.bias": np.zeros(3, np.float32)})
    place = weights.convert_encoder(file, tmp_path / "out", name="mine", **NAMED)
    assert_same_weights(weights.load_encoder(place), ENCODER)
    card = weights.encoder_card(place)
    origin = card["card"]["imported_from"]
    assert card["name"] == "mine" and origin["file"] == "model.safetensors"
    assert (
        origin["sha256"] == weights.inspect_file(file).file.sha256 and len(origin["sha256"]) == 64
    )
    assert origin["layout"] == "torchvision-resnet" and origin["dropped"] == {"fc": 1}


def load(options):
    return EncoderSource.read(options, "config.encoder").load(jax.random.key(0))


def test_a_config_takes_a_name_a_directory_or_a_foreign_file(tmp_path):
    file = write(tmp_path, TENSORS)
    assert_same_weights(load({"path": str(file), **NAMED, "layout": None}), ENCODER)
    place = weights.convert_encoder(file, tmp_path / "out", **NAMED)
    assert_same_weights(load({"path": str(place)}), ENCODER)
    assert_same_weights(load(str(place)), ENCODER)
    for path in (str(place), "simclr-cifar10-r18w24"):
        with pytest.raises(ValueError, match=r"also \['normalization'\]; give one"):
            load({"path": path, "normalization": "half"})
    with pytest.raises(ValueError, match=r"config\.encoder.*'builder'"):
        load({"path": str(file), **NAMED, "builder": "resnet18"})
    with pytest.raises(ValueError, match=r"there is no file .*none\.pth"):
        load({"path": str(tmp_path / "none.pth"), **NAMED})


def test_a_run_finds_a_bad_file_before_its_first_step(tmp_path):
    file = write(tmp_path, TENSORS)
    config = {
        "stages": ["attack"],
        "encoder": {"path": str(file)},
        "surrogate": {"source": "anything"},
        "suite": {"attacks": {"noise": "robust_ssl.attacks:RandomNoise"}},
    }
    with pytest.raises(experiment.UsageError, match=r"config\.encoder(.|\n)*normalization"):
        experiment.plan(config)


def test_a_file_without_tensors_says_so(tmp_path, capsys):
    assert main.main(["encoder", "inspect", str(write(tmp_path, {})), *FLAGS]) == 2
    assert "there are no tensors in it" in "".join(capsys.readouterr())


def test_inspect_says_that_weights_are_not_those_of_the_card(tmp_path, capsys):
    file = weights.save_encoder(ENCODER, tmp_path / "mine") / "encoder.safetensors"
    assert main.main(["encoder", "inspect", str(file.parent)]) == 0
    capsys.readouterr()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main.main(["encoder", "inspect", str(file.parent)]) == 2
    out, err = capsys.readouterr()
    assert "is not the file its card" in " ".join(err.split()) and not out
    file.unlink()
    assert main.main(["encoder", "inspect", str(file.parent)]) == 0
    out, err = capsys.readouterr()
    assert "has no encoder.safetensors" in " ".join(err.split()) and '"sha256"' in out


def test_inspect_and_convert_from_the_command_line(tmp_path, capsys):
    file = write(tmp_path, TENSORS)
    assert main.main(["encoder", "inspect", str(file)]) == 2
    out = capsys.readouterr().out
    for part in ("torchvision-resnet", "problem", "--normalization", "cannot be converted"):
        assert part in out
    assert main.main(["encoder", "inspect", str(file), *FLAGS]) == 0
    out = capsys.readouterr().out
    assert "resnet18(width=4, stem='cifar', stem_padding=2, image_size=8)" in out
    target = tmp_path / "out"
    assert main.main(["encoder", "convert", str(file), f"--out={target}", *FLAGS]) == 0
    assert str(target) in capsys.readouterr().err
    assert_same_weights(weights.load_encoder(target), ENCODER)
    assert main.main(["encoder", "convert", str(file), f"--out={target}"]) == 2
    assert "how images were normalized" in capsys.readouterr().err
    numbers = ["--mean=1/2,1/2,1/2", "--std=0.5,0.5,0.5", *FLAGS[1:]]
    assert main.main(["encoder", "convert", str(file), f"--out={target}", *numbers]) == 0
    assert weights.load_encoder(target).mean == (0.5, 0.5, 0.5)
    before = {each: each.read_bytes() for each in target.iterdir()}
    (tmp_path / "another").mkdir()
    other = write(tmp_path / "another", {name: x + 1 for name, x in TENSORS.items()})
    assert main.main(["encoder", "convert", str(other), f"--out={target}", *numbers]) == 2
    assert "holds something else already (encoder.json)" in capsys.readouterr().err
    assert {each: each.read_bytes() for each in target.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.pth"], "nowhere.pth is not there"),
        (["convert", "nowhere.pth", "--out=x"], "nowhere.pth is not there"),
        (["convert", "simclr-cifar10-r18w24", "--out=x"], "an encoder of this package already"),
        (["inspect", "simclr-cifar10-r18"], "no encoder named"),
        (["export", "simclr-cifar10-r18w24"], "say where to"),
        (["export", "no-such-encoder", "--out=x"], "no encoder named"),
        (["inspect", "nowhere.pth", "--config.seed=1"], "there is no config here"),
    ],
)
def test_wrong_usage_is_2(arguments, message, capsys):
    assert main.main(["encoder", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["convert", "x"], ["inspect", "x", "--mean=a,b"], ["import"]]
)
def test_what_argparse_refuses_is_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main.main(["encoder", *arguments])
    assert caught.value.code == 2


def test_layouts_have_names_of_their_own():
    names = [layout.name for layout in convert.LAYOUTS]
    assert len(set(names)) == len(names) and len(resnet_layouts.LAYOUTS) == 7


def test_positions_are_resized_only_if_another_size_is_named(tmp_path):
    builder = models.vision_transformer
    options = {"width": 12, "heads": 2, "depth": 1, "patch_size": 4, "image_size": 8}
    encoder = random_encoder(builder, **options)
    file = write(tmp_path, tensors_of(encoder, "timm-vit"))
    facts = {"normalization": "half", "heads": 2}
    assert_same_weights(weights.import_encoder(file, **facts), encoder)
    with pytest.raises(ValueError, match="resize them differently: name --position-resizing"):
        weights.import_encoder(file, **facts, image_size=12)
    facts["position_resizing"] = "bicubic"
    resized = weights.import_encoder(file, **facts, image_size=12)
    assert_same_weights(resized, models.resize_positions(encoder, 12))
    assert resized.image_size == 12
    assert "resized from images of 8 pixels to 12" in str(
        weights.inspect_file(file, **facts, image_size=12)
    )
    with pytest.raises(ValueError, match="tile"):
        weights.import_encoder(file, **facts, image_size=10)


def test_a_processors_image_part_is_read(tmp_path):
    image = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 8, "width": 8}}
    facts = {"stem": "cifar", "stem_padding": 2}
    file = write(tmp_path, TENSORS, processor_config={"image_processor": image})
    encoder = weights.import_encoder(file, **facts)
    assert encoder.mean == (0.5,) * 3 and encoder.image_size == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=a.safetensors", "--batch=0"], "--batch must be at least 1"),
        (["--out=same", "--stablehlo=same"], "name one place"),
    ],
)
def test_export_refuses_what_makes_no_sense(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main.main(["encoder", "export", "simclr-cifar10-r18w24", *flags]) == main.USAGE
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_export_of_a_foreign_file_says_to_convert_it_first(tmp_path, capsys):
    file = write(tmp_path, TENSORS)
    assert main.main(["encoder", "export", str(file), "--out", f"{tmp_path}/o"]) == main.USAGE
    assert f"encoder convert {file}" in capsys.readouterr().err
