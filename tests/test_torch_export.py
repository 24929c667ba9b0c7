"""A whole model goes to PyTorch and to ONNX, and is compared before it counts."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file

import robust_ssl
from robust_ssl import models, threats, weights
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.cli import main
from robust_ssl.data import Resizing
from robust_ssl.types import Classifier
from robust_ssl.weights import torch_export, torch_text

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
VIT = {"width": 24, "heads": 2, "depth": 2, "image_size": 8, "patch_size": 4}
CASES = {
    "resnet": (models.resnet18, {"width": 4, "image_size": 8, "stem_padding": 2}),
    "bottleneck": (models.resnet50, {"width": 2, "image_size": 32, "stem": "imagenet"}),
    "vit": (models.vision_transformer, VIT),
    "dinov2": (
        models.vision_transformer,
        {**VIT, "registers": 2, "layer_scale": True, "activation": "swiglu", "mlp_width": 16},
    ),
    "clip": (
        models.vision_transformer,
        {**VIT, "pre_norm": True, "patch_bias": False, "activation": "quick_gelu",
         "norm_epsilon": 1e-5},
    ),
    "mean": (
        models.vision_transformer,
        {**VIT, "pooling": "mean", "class_token": False, "norm_after_pooling": True},
    ),
    "siglip": (
        models.vision_transformer,
        {**VIT, "pooling": "attention", "class_token": False, "activation": "gelu_tanh"},
    ),
    "dinov3": (
        models.vision_transformer,
        {**VIT, "patch_size": 2, "rotary": 100.0, "registers": 2, "layer_scale": True},
    ),
    "convnext": (models.convnext, {"depths": (1, 2), "widths": (8, 16), "image_size": 16}),
    "convnext v2": (
        models.convnext,
        {"depths": (1, 1), "widths": (8, 16), "image_size": 16, "layer_scale": False,
         "response_norm": True},
    ),
}  # fmt: skip


def random_classifier(case, head="mlp", names=("cat", "dog", "ox")):
    builder, options = CASES[case]
    random = np.random.default_rng(0)

    def numbers(like):
        if len(like.shape) == 1:  # scales and variances are positive
            return random.uniform(0.5, 1, like.shape).astype(np.float32)
        return random.normal(scale=0.2, size=like.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda k: builder(k, mean=MEAN, std=STD, **options), jax.random.key(0))
    like = jax.eval_shape(
        lambda key: models.classifier(key, shapes, 3, head=head, class_names=names),
        jax.random.key(0),
    )
    return jax.tree.map(numbers, like)


@pytest.fixture
def without_torch(monkeypatch):
    find = torch_export.importlib.util.find_spec
    monkeypatch.setattr(
        torch_export.importlib.util, "find_spec", lambda n: None if n == "torch" else find(n)
    )


@pytest.mark.parametrize("case", CASES)
def test_two_files_are_written_and_the_python_is_python(tmp_path, case, without_torch):
    model = random_classifier(case, head="linear" if case == "resnet" else "mlp")
    path, difference = weights.export_torch(model, tmp_path / "new")
    assert path == tmp_path / "new" and difference is None
    text = (path / "model.py").read_text()
    compile(text, "model.py", "exec")
    assert "CLASS_NAMES = ('cat', 'dog', 'ox')" in text and len(text.splitlines()) < 140
    tensors = load_file(path / "model.safetensors")
    np.testing.assert_allclose(tensors["mean"].ravel(), MEAN, rtol=1e-6)
    assert sum(name.startswith("head.") for name in tensors) == (2 if case == "resnet" else 6)
    leaves = len(jax.tree.leaves(model.variables))
    # Keys and values of a pooling lie apart from its queries.
    assert len(tensors) == leaves + 2 + (2 if case == "siglip" else 0)


def test_names_of_classes_are_text_and_nothing_else(tmp_path, without_torch):
    names = ('"""\nimport os', "a'); raise SystemExit #", "$size ${width} \udc80")
    path, _ = weights.export_torch(random_classifier("vit", names=names), tmp_path)
    scope = {}
    lines = (path / "model.py").read_text().splitlines()
    exec(next(line for line in lines if line.startswith("CLASS_NAMES")), scope)
    assert scope["CLASS_NAMES"] == names


def test_what_has_no_form_elsewhere_is_refused_with_the_cause(tmp_path, without_torch):
    model = random_classifier("vit")
    own = models.classifier(jax.random.key(0), tiny.encoder(), 3, head="linear")
    both = models.confidence_ensemble([model, model])
    narrow = model.encoder.module.clone(dtype=jnp.dtype("bfloat16"))
    other_head = Classifier(model.encoder, {}, models.ViT(), 3)
    cases = {
        r"no builder of robust_ssl\.models makes TwoConvolutions": own,
        "no PyTorch form of the head ConfidenceFusion": both,
        "no PyTorch form of the head ViT": other_head,
        "computes in bfloat16": model.replace(encoder=model.encoder.replace(module=narrow)),
        "Quantize": model.replace(encoder=model.encoder.replace(preprocess=models.Quantize())),
    }
    for said, wrong in cases.items():
        with pytest.raises(ValueError, match=said):
            weights.export_torch(wrong, tmp_path / "out")
    with pytest.raises(ModuleNotFoundError, match=r"not installed: torch.*robust-ssl\[onnx\]"):
        weights.export_onnx(model, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_places_on_the_command_line_are_told_apart(tmp_path, capsys):
    place = str(weights.save_encoder(random_classifier("vit").encoder, tmp_path / "encoder"))
    export = ["encoder", "export", place]
    assert main.main(export) == 2
    assert "--torch DIR" in capsys.readouterr().err
    assert main.main([*export, "--onnx=a", "--stablehlo=./a"]) == 2
    assert "--onnx and --stablehlo name one place" in capsys.readouterr().err


def test_a_perturbation_is_one_array_that_is_added(tmp_path):
    images = np.random.default_rng(1).uniform(size=(3, 4, 6, 3)).astype(np.float32)
    pattern = np.random.default_rng(2).normal(size=(4, 6, 3))
    for threat in (threats.Linf(0.1), threats.L2(0.5)):
        delta = threat.project(0.5 + 0.1 * jnp.asarray(pattern), jnp.full((4, 6, 3), 0.5)) - 0.5
        perturbation = robust_ssl.Perturbation(UniversalPerturbation(delta, threat, name="x"))
        perturbation.export_npy(tmp_path / "delta.npy")
        added = np.load(tmp_path / "delta.npy")
        assert (added.shape, added.dtype) == ((3, 4, 6), np.float32)
        attacked = np.clip(images.transpose(0, 3, 1, 2) + added, 0, 1).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(attacked, perturbation.apply(images), atol=1e-6)
    patch = threats.Patch(0.1)
    canvas = UniversalPerturbation(jnp.ones((8, 8, 3)), patch, name="x")
    before = (tmp_path / "delta.npy").read_bytes()
    with pytest.raises(ValueError, match="under Patch is not just added"):
        robust_ssl.Perturbation(canvas).export_npy(tmp_path / "delta.npy")
    assert (tmp_path / "delta.npy").read_bytes() == before


# --- With PyTorch -------------------------------------------------------------------------------

_RUN = """
import sys
import numpy, torch
from model import CLASS_NAMES, load, picture
assert "robust_ssl" not in sys.modules and "jax" not in sys.modules
images = torch.from_numpy(numpy.load("images.npy"))
numpy.save("logits.npy", load()(images).detach().numpy())
numpy.save("picture.npy", picture("picture.png").numpy())
print(CLASS_NAMES)
"""


@pytest.fixture
def quickly_compiled():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


slow = pytest.mark.slow
quickly = pytest.mark.usefixtures("quickly_compiled")


def images_of(model, count=5):
    size = model.image_size
    return np.random.default_rng(3).uniform(size=(count, size, size, 3)).astype(np.float32)


@slow
@quickly
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", CASES)
def test_pytorch_gives_the_same_outputs(tmp_path, case):
    pytest.importorskip("torch")
    model = random_classifier(case, head="linear" if case == "resnet" else "mlp")
    if case == "resnet":  # the order of another data set
        model = models.in_order_of(model, ("ox", "cat", "dog"))
    _, difference = weights.export_torch(model, tmp_path)
    assert difference <= 3e-6  # of black, white and random images; that it is seen is tested below


@slow
@quickly
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", ["resnet", "vit"])
def test_onnx_gives_the_same_outputs_for_any_number_of_images(tmp_path, case):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("torch")
    model = random_classifier(case)
    model = model.replace(encoder=model.encoder.replace(resizing=Resizing("squash", 9)))
    file, difference = weights.export_onnx(model, tmp_path / "model.onnx")
    assert difference <= 3e-6 and [x.name for x in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["class_names"]) == ["cat", "dog", "ox"]
    assert json.loads(known["transform"]).items() >= {"mode": "squash", "resize": 9}.items()
    images = images_of(model)
    ours = np.asarray(jax.jit(lambda model, x: model(x).logits)(model, images))
    for count in (1, 5):
        given = {"images": np.ascontiguousarray(images[:count].transpose(0, 3, 1, 2))}
        (theirs,) = session.run(["logits"], given)
        np.testing.assert_allclose(theirs, ours[:count], atol=1e-5 * np.abs(ours).max())


@slow
@quickly
@pytest.mark.filterwarnings("default")
def test_a_file_that_gives_other_numbers_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    model = random_classifier("vit")
    weights.export_torch(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    text_of = torch_text.text_of
    monkeypatch.setattr(
        torch_text, "text_of", lambda *a, **k: text_of(*a, **k).replace("1e-06", "1e-02")
    )
    for export, place in ((weights.export_torch, tmp_path), (weights.export_onnx, tmp_path / "x")):
        if export is weights.export_onnx:
            pytest.importorskip("onnxscript")
        with pytest.raises(ValueError, match=r"gives other numbers than the model.*nothing is"):
            export(model, place)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@slow
@quickly
@pytest.mark.filterwarnings("default")
def test_the_command_writes_what_runs_without_this_package(tmp_path, capsys):
    pytest.importorskip("torch")
    resizing = Resizing("shorter", 9, interpolation="bilinear", offset="down")
    model = random_classifier("vit")
    place = str(weights.save_encoder(model.encoder, tmp_path / "public"))
    model = model.replace(encoder=model.encoder.replace(resizing=resizing))
    weights.save_classifier(model, tmp_path / "run" / "classifier")
    flags = [f"--classifier={tmp_path / 'run'}", f"--torch={tmp_path / 'out'}"]
    assert main.main(["encoder", "export", place, *flags]) == 0
    assert "same outputs to" in capsys.readouterr().err
    images = images_of(model)
    np.save(tmp_path / "out" / "images.npy", np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    pixels = np.random.default_rng(4).integers(0, 256, (11, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "out" / "picture.png")
    run = [sys.executable, "-c", _RUN]
    done = subprocess.run(run, cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('cat', 'dog', 'ox')"
    picture = np.load(tmp_path / "out" / "picture.npy")[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(picture, resizing(pixels, 8) / np.float32(255))
    logits = np.load(tmp_path / "out" / "logits.npy")
    ours = np.asarray(model(images).logits)
    np.testing.assert_allclose(logits, ours, atol=1e-5 * np.abs(ours).max())


def test_a_network_that_has_no_form_in_torch_is_refused_in_words(tmp_path):
    swin = models.swin_transformer(
        jax.random.key(0), depths=(1, 1), width=4, heads=(1, 2), windows=2, image_size=16
    )
    with pytest.raises(ValueError, match=r"no PyTorch form of this Swin.*--stablehlo"):
        weights.export_torch(swin, tmp_path / "out")
