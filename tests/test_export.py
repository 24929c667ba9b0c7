"""What goes out is what PyTorch or a bare JAX expects, and comes back bit by bit."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from robust_ssl import models, weights
from robust_ssl.cli import main
from robust_ssl.models import vit
from robust_ssl.types import Encoder
from robust_ssl.weights import convert

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def random_encoder(builder, **options):
    shapes = jax.eval_shape(
        lambda key: builder(key, mean=MEAN, std=STD, **options), jax.random.key(0)
    )
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: random.uniform(0.5, 1, s.shape).astype(np.float32), shapes)


ENCODERS = {
    "cifar": (models.resnet18, {"width": 4, "image_size": 8, "stem_padding": 2}),
    "cifar_half": (models.resnet18, {"width": 4, "image_size": 8, "stem": "cifar_half"}),
    "imagenet": (models.resnet34, {"width": 4, "image_size": 32, "stem": "imagenet"}),
    "bottleneck": (models.resnet50, {"width": 2, "image_size": 8}),
    "vit": (models.vit_tiny, {"depth": 1, "image_size": 8}),
    "vit, mean": (models.vit_tiny, {"depth": 1, "image_size": 8, "pooling": "mean"}),
    "own heads": (
        vit.vision_transformer,
        {"width": 24, "heads": 2, "depth": 1, "image_size": 8, "patch_size": 4,
         "norm_epsilon": 1e-5, "activation": "quick_gelu"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODERS)
def test_an_export_comes_back_without_being_told_anything(tmp_path, case):
    builder, options = ENCODERS[case]
    encoder = random_encoder(builder, **options)
    file = weights.export_safetensors(encoder, tmp_path / "sub" / "out.safetensors")
    loaded = weights.import_encoder(file, name=encoder.name)
    assert loaded.module == encoder.module
    assert (loaded.mean, loaded.std, loaded.image_size) == (MEAN, STD, encoder.image_size)
    assert jax.tree.structure(loaded) == jax.tree.structure(encoder)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(encoder), strict=True):
        np.testing.assert_array_equal(a, b)


def test_names_shapes_and_header_are_what_torch_reads(tmp_path):
    encoder = random_encoder(models.resnet18, width=4, image_size=8)
    file = weights.export_safetensors(encoder, tmp_path / "out.safetensors")
    tensors = load_file(file)
    kernel = np.asarray(encoder.variables["params"]["stage2"]["block1"]["conv1"]["conv"]["kernel"])
    np.testing.assert_array_equal(tensors["layer2.0.conv1.weight"], kernel.transpose(3, 2, 0, 1))
    assert tensors["layer2.0.downsample.1.running_var"].shape == (8,)
    assert len(tensors) == len(jax.tree.leaves(encoder.variables))
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["robust_ssl"])["options"]["stem_padding"] == 1


def test_a_header_that_lies_about_shapes_is_caught(tmp_path):
    encoder = random_encoder(models.resnet18, width=4, image_size=8)
    file = weights.export_safetensors(encoder, tmp_path / "out.safetensors")
    tensors = load_file(file)
    with safe_open(file, "np") as opened:
        record = json.loads(opened.metadata()["robust_ssl"])
    record["options"]["width"] = 8
    save_file(tensors, file, {"robust_ssl": json.dumps(record)})
    with pytest.raises(ValueError, match=r"conv1\.weight has shape"):
        weights.import_encoder(file)
    for text in ("{", "[]", '{"options": {}}'):
        save_file(tensors, file, {"robust_ssl": text})
        with pytest.raises(ValueError, match="an entry robust_ssl that export did not write"):
            weights.import_encoder(file)


def tiny(stem):
    """One block, for what takes any encoder; a whole ResNet costs a minute of compiling."""
    module = models.ResNet(depths=(1,), width=4, stem=stem)
    size = 16
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    random = np.random.default_rng(0)
    return Encoder(
        variables=jax.tree.map(lambda s: random.uniform(0, 1, s.shape).astype(np.float32), shapes),
        module=module, mean=MEAN, std=STD, image_size=size, dim=4, name="tiny",
    )  # fmt: skip


def test_a_network_without_names_elsewhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no builder of robust_ssl\.models makes"):
        weights.export_safetensors(tiny("cifar"), tmp_path / "out.safetensors")


@pytest.mark.parametrize("case", ["cifar", "imagenet", "vit"])
def test_a_program_says_what_the_model_says(tmp_path, case):
    builder, options = ENCODERS["vit"]
    encoder = random_encoder(builder, **options) if case == "vit" else tiny(case)
    model = models.classifier(jax.random.key(1), encoder, 3, head="linear")
    run = weights.load_stablehlo(weights.export_stablehlo(model, tmp_path / "model"))
    size = encoder.image_size
    images = np.random.default_rng(0).uniform(size=(3, size, size, 3)).astype(np.float32)
    want = jax.jit(lambda images: model(images))(images)
    for count in (1, 3):  # any batch size
        np.testing.assert_allclose(run(images[:count]), want.logits[:count], rtol=1e-3, atol=1e-4)
    fixed = weights.load_stablehlo(weights.export_stablehlo(encoder, tmp_path / "enc", batch=2))
    np.testing.assert_allclose(fixed(images[:2]), want.features[:2], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="Shape mismatch"):
        fixed(images)


def test_a_program_is_for_every_platform(tmp_path):
    file = weights.export_stablehlo(tiny("cifar"), tmp_path / "model")
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert len(exported.in_avals) == 1  # weights and normalization are inside
    assert "stablehlo.convolution" in exported.mlir_module()


def test_what_is_not_a_program_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"no program at all, but long enough")
    with pytest.raises(ValueError, match=r"not a program that jax\.export wrote"):
        weights.load_stablehlo(tmp_path / "file")


def test_export_from_the_command_line_with_the_weights_of_a_classifier(tmp_path, capsys):
    builder, options = ENCODERS["own heads"]
    encoder = random_encoder(builder, **options)
    place = str(weights.save_encoder(encoder, tmp_path / "public"))
    public = str(tmp_path / "a")
    assert main.main(["encoder", "export", place, f"--out={public}"]) == 0
    np.testing.assert_array_equal(
        load_file(public)["norm.weight"], encoder.variables["params"]["norm"]["scale"]
    )
    for head in ("linear", "mlp"):
        model = models.classifier(jax.random.key(1), encoder, 3, head=head)
        model = model.with_variables(jax.tree.map(lambda x: x * 0.9, model.variables))
        folder = tmp_path / head
        secured, program = str(tmp_path / f"{head}.safetensors"), str(tmp_path / f"{head}.hlo")
        flags = [place, f"--classifier={folder}", f"--out={secured}", f"--stablehlo={program}"]
        assert main.main(["encoder", "export", *flags]) == 2
        assert "no classifier in" in capsys.readouterr().err
        weights.save_classifier(model, folder / "classifier")
        assert main.main(["encoder", "export", *flags, "--batch=2"]) == 0, capsys.readouterr().err
        loaded = weights.import_encoder(secured)
        for a, b in zip(jax.tree.leaves(loaded.variables),
                        jax.tree.leaves(model.encoder.variables), strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b)
        images = jnp.full((2, 8, 8, 3), 0.5)
        run = weights.load_stablehlo(program)
        np.testing.assert_allclose(run(images), model(images).logits, rtol=1e-3, atol=1e-4)
    other = str(weights.save_encoder(random_encoder(models.vit_tiny, depth=1), tmp_path / "other"))
    assert main.main(["encoder", "export", other, flags[1], f"--out={tmp_path}/new"]) == 2
    assert "was not fine-tuned from this encoder" in capsys.readouterr().err


def test_an_export_replaces_nothing(tmp_path, capsys):
    builder, options = ENCODERS["own heads"]
    place = weights.save_encoder(random_encoder(builder, **options), tmp_path / "mine")
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    for flag, said in (
        (f"--out={place}/encoder.safetensors", "is there already"),
        (f"--out={place}/other.safetensors", "lies among an encoder's own files"),
        (f"--out={tmp_path}/notes", "is there already"),
        (f"--stablehlo={tmp_path}/full", "is a folder; name a file in it"),
        (f"--torch={tmp_path}/full", "is there already"),
    ):
        assert main.main(["encoder", "export", str(place), flag]) == main.USAGE
        assert said in capsys.readouterr().err
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_layouts_used_for_export_exist():
    assert {"torchvision-resnet", "timm-vit"} <= {layout.name for layout in convert.LAYOUTS}


def test_a_program_does_not_keep_the_names_of_the_one_before(tmp_path):
    named = models.classifier(
        jax.random.key(1), tiny("cifar"), 2, head="linear", class_names=("cat", "dog")
    )
    weights.export_stablehlo(named, tmp_path / "model")
    assert "cat" in (tmp_path / "model.json").read_text()
    weights.export_stablehlo(tiny("cifar"), tmp_path / "model")
    assert not (tmp_path / "model.json").exists()


def test_an_export_takes_red_first_whatever_stands_beside_it(tmp_path):
    builder, options = ENCODERS["vit"]
    encoder = random_encoder(builder, **options)
    weights.export_safetensors(encoder, tmp_path / "model.safetensors")
    alone = weights.import_encoder(tmp_path)
    beside = {"do_flip_channel_order": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"height": encoder.image_size, "width": encoder.image_size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**beside, "size": size}))
    assert_same = np.testing.assert_array_equal
    jax.tree.map(assert_same, weights.import_encoder(tmp_path).variables, alone.variables)


def test_where_one_target_cannot_be_written_none_is(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else found(name, *a)
    )
    places = [f"--torch={tmp_path}/secured", f"--onnx={tmp_path}/secured.onnx"]
    assert main.main(["encoder", "export", "simclr-cifar10-r18w24", *places]) != 0
    assert "not installed: " in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_without_torch_its_form_is_written_and_said_to_be_compared_with_nothing(
    tmp_path, capsys, monkeypatch
):
    builder, options = ENCODERS["cifar"]
    place = weights.save_encoder(random_encoder(builder, **options), tmp_path / "mine")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else found(name, *a)
    )
    assert main.main(["encoder", "export", str(place), f"--torch={tmp_path / 't'}"]) == 0
    assert "(not compared: torch is not installed)" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "t").iterdir()} >= {"model.py", "model.safetensors"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the numbers differ")])
def test_what_ends_half_way_is_removed_and_the_same_command_goes(
    error, tmp_path, capsys, monkeypatch
):
    builder, options = ENCODERS["cifar"]
    place = weights.save_encoder(random_encoder(builder, **options), tmp_path / "mine")
    (tmp_path / "e.safetensors-notes").write_text("mine")
    before = sorted(tmp_path.rglob("*"))

    def half_way(model, file, **how):
        (tmp_path / "t" / ".model.py.0123456789abcdef.tmp").write_text("")
        raise error

    flags = [f"--{n}={tmp_path / f}" for n, f in (("out", "e.safetensors"), ("torch", "t"))]
    command = ["encoder", "export", str(place), *flags, f"--stablehlo={tmp_path / 'p'}"]
    with monkeypatch.context() as patch:
        patch.setattr(weights, "export_stablehlo", half_way)
        assert main.main(command) == (75 if isinstance(error, KeyboardInterrupt) else 2)
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().err
    assert f"removed: {tmp_path / 'e.safetensors'}\n" in said and "checkpoint" not in said
    assert main.main(command) == 0


def test_what_a_killed_export_was_writing_is_in_nobodys_way(tmp_path):
    builder, options = ENCODERS["cifar"]
    place = weights.save_encoder(random_encoder(builder, **options), tmp_path / "mine")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ".model.safetensors.0123456789abcdef.tmp").write_text("half")
    assert main.main(["encoder", "export", str(place), f"--torch={tmp_path / 't'}"]) == 0
