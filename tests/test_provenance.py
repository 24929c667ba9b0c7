"""Ten checks of where an encoder comes from: ten tampered encoders, each found by its check."""

import json
import os
import shutil
import zipfile

import jax
import numpy as np
import pytest
from hub_server import serving
from safetensors.numpy import load_file, save

from robust_ssl import models, provenance, weights
from robust_ssl.cli import main
from robust_ssl.weights import cards

ENCODER = models.vision_transformer(
    jax.random.key(0), width=16, heads=2, depth=2, patch_size=8, image_size=16
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = "---\nlicense: mit\ndatasets:\n- cifar10\ndate: 2026-01-31\n---\n# An encoder\n"
FACTS = {"normalization": "cifar10", "image_size": 16, "heads": 2}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A saved encoder with a page, and its lock."""
    folder = tmp_path_factory.mktemp("healthy") / "encoder"
    weights.save_encoder(ENCODER, folder, {"data": {"name": "cifar10"}})
    (folder / "README.md").write_text(PAGE)
    return folder, provenance.lock(folder)


@pytest.fixture
def folder(healthy, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(healthy[0], tmp_path / "copy")


def outcome(checks, name):
    assert [check.name for check in checks] == list(provenance.NAMES)
    assert [check.number for check in checks] == list(range(1, 11))
    assert all(check.said and check.outcome in ("pass", "fail", "absent") for check in checks)
    json.dumps(provenance.as_json(checks), allow_nan=False)
    return checks[provenance.NAMES.index(name)].outcome


def rewrite(folder, change):
    """Changes weights as somebody would who also mends the card's checksums."""
    arrays = load_file(folder / "encoder.safetensors")
    content = save(change(arrays) or arrays)
    (folder / "encoder.safetensors").write_bytes(content)
    recard(
        folder,
        lambda card: card.update(weights=cards.describe_file("encoder.safetensors", content)),
    )


def recard(folder, change):
    card = json.loads((folder / "encoder.json").read_text())
    change(card)
    (folder / "encoder.json").write_bytes(cards.encode(card))


def first_kernel(arrays):
    return next(path for path in sorted(arrays) if path.endswith("kernel"))


def flip(folder):
    file = folder / "encoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def hostile(folder):
    """A pickle that would run a command, beside the weights."""

    class Run:
        def __reduce__(self):
            return os.system, ("true",)

    import pickle

    with zipfile.ZipFile(folder / "extra.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Run()}, protocol=2))


def drop_layer(folder):
    rewrite(folder, lambda arrays: arrays.pop(first_kernel(arrays)) is None or arrays)


def with_nan(arrays):
    arrays[first_kernel(arrays)].flat[5] = np.nan


def constant(arrays):
    arrays[first_kernel(arrays)][:] = 0.25


def twins(arrays):
    first, second = (p for p in sorted(arrays) if p.endswith("mlp/dense1/kernel"))
    arrays[second] = arrays[first].copy()


def another_mean(folder):
    recard(folder, lambda card: card["options"].update(mean=[0.51, 0.48, 0.45]))


def blue_first(folder):
    def turn(arrays):
        stem = "params/embed/patch/kernel"
        turned = arrays[stem].reshape(-1, 3, 16)[:, ::-1]
        arrays[stem] = np.ascontiguousarray(turned).reshape(arrays[stem].shape)

    rewrite(folder, turn)


def relicense(folder):
    (folder / "README.md").write_text(PAGE.replace("mit", "cc-by-nc-4.0"))


def without_page(folder):
    (folder / "README.md").unlink()


def retrained(folder):
    recard(folder, lambda card: card["card"].update(data={"name": "something_scraped"}))


TAMPERED = {
    "files: a flipped bit": ("files", flip),
    "files: one more": ("files", lambda folder: (folder / "more.json").write_text("{}")),
    "files: one less": ("files", without_page),
    "format: a hostile pickle": ("format", hostile),
    "architecture: a layer is gone": ("architecture", drop_layer),
    "architecture: another mean": ("architecture", another_mean),
    "weights: NaN": ("weights", lambda folder: rewrite(folder, with_nan)),
    "weights: constant": ("weights", lambda folder: rewrite(folder, constant)),
    "weights: two layers are one": ("weights", lambda folder: rewrite(folder, twins)),
    "references: another mean": ("references", another_mean),
    "references: blue first": ("references", blue_first),
    "documents: another license": ("documents", relicense),
    "documents: no license": ("documents", without_page),
    "scanner: a hostile pickle": ("scanner", hostile),
    "training: other data": ("training", retrained),
}


def test_a_healthy_encoder_has_ten_outcomes_and_none_failed(healthy):
    folder, lock = healthy
    checks = provenance.examine(folder, lock)
    assert not provenance.differs(checks)
    assert provenance.holds(checks, provenance.needed(lock))
    for name in ("files", "format", "architecture", "weights", "references", "documents"):
        assert outcome(checks, name) == "pass"
    assert outcome(checks, "training") == "pass"
    assert lock == provenance.lock(folder)
    file = provenance.write_lock(lock, folder.parent / "encoder.lock.json")
    assert provenance.examine(folder, file) == checks


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_encoder_is_found_by_its_check(case, healthy, folder):
    name, tamper = TAMPERED[case]
    if name == "scanner":
        pytest.importorskip("picklescan")
    tamper(folder)
    assert outcome(provenance.examine(folder, healthy[1]), name) == "fail"


def test_an_encoder_that_computes_in_few_bits_is_held_as_closely(tmp_path):
    network = ENCODER.module.clone(dtype=np.dtype("bfloat16"))
    folder = weights.save_encoder(ENCODER.replace(module=network), tmp_path / "encoder")
    lock = provenance.lock(folder)
    assert outcome(provenance.examine(folder, lock), "references") == "pass"
    mean = [m + 1 / 255 for m in ENCODER.mean]
    recard(folder, lambda card: card["options"].update(mean=mean))
    assert outcome(provenance.examine(folder, lock), "references") == "fail"


def test_a_lock_with_mended_sums_still_shows_another_preprocessing(healthy, folder):
    another_mean(folder)
    mended = provenance.lock(folder)
    forged = {**healthy[1], "files": mended["files"], "architecture": mended["architecture"]}
    failed = [c.name for c in provenance.examine(folder, forged) if c.outcome == "fail"]
    assert failed == ["references"]


def test_without_a_lock_the_card_is_compared(folder):
    assert outcome(provenance.examine(folder), "files") == "absent"
    flip(folder)
    assert outcome(provenance.examine(folder), "files") == "fail"


@pytest.mark.slow  # with the tests that have torch
def test_a_foreign_file_is_examined_and_its_pickle_read_without_running_it(folder, tmp_path):
    torch = pytest.importorskip("torch")
    file = weights.export_safetensors(ENCODER, tmp_path / "ours.safetensors")
    lock = provenance.lock(file)
    assert outcome(provenance.examine(file, lock), "references") == "pass"
    state = {n: torch.tensor(a) for n, a in load_file(file).items()}
    torch.save(state, tmp_path / "ours.pth")
    checks = provenance.examine(tmp_path / "ours.pth", **FACTS)
    assert outcome(checks, "format") == "pass"
    assert "torch._utils._rebuild_tensor_v2" in checks[2].evidence["pickle_names"]["ours.pth"]
    hostile(tmp_path)
    checks = provenance.examine(tmp_path / "extra.pth")
    assert outcome(checks, "format") == "fail"
    assert any("system" in name for name in checks[2].evidence["unsafe"])
    assert outcome(checks, "architecture") == "fail"


def test_a_classifier_is_locked_with_its_logits(tmp_path, folder):
    net = models.classifier(jax.random.key(1), ENCODER, 3, head="linear")
    weights.save_classifier(net, tmp_path / "run" / "classifier")
    lock = provenance.lock(tmp_path / "run")
    assert {"features", "logits"} == set(lock["references"])
    assert not provenance.differs(provenance.examine(tmp_path / "run", lock))
    other = models.classifier(jax.random.key(2), ENCODER, 3, head="linear")
    weights.save_classifier(other, tmp_path / "run" / "classifier")
    failed = [c.name for c in provenance.examine(tmp_path / "run", lock) if c.outcome == "fail"]
    assert failed == ["files", "references"]


# ------------------------------------------------------------------------------------ the hub


@pytest.fixture
def served(healthy, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(healthy[0]) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def test_a_revision_of_the_hub_is_pinned_or_fails(served):
    lock = provenance.lock(f"hf://someone/encoder@{COMMIT}")
    assert lock["source"]["revision"] == COMMIT
    checks = provenance.examine(f"hf://someone/encoder@{COMMIT}", lock)
    assert outcome(checks, "revision") == "pass"
    assert not provenance.differs(checks)
    with pytest.raises(ValueError, match="pin it"):
        provenance.examine("hf://someone/encoder@main", lock)
    checks = provenance.examine("hf://someone/encoder@main", lock, allow_moving=True)
    assert outcome(checks, "revision") == "fail"
    served.commit = "f" * 40
    checks = provenance.examine(f"hf://someone/encoder@{'f' * 40}", lock)
    assert outcome(checks, "revision") == "fail"


# ----------------------------------------------------------------------------------- signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.mark.filterwarnings("default")  # of what signs
def test_a_signature_holds_for_its_key_and_its_files_only(folder, keys):
    from model_signing import signing

    config = signing.Config().use_elliptic_key_signer(private_key=str(keys / "ours.pem"))
    provenance.write_beside(folder)  # signed with it
    config.sign(str(folder), str(folder / "model.sig"))

    def checked(key):
        checks = provenance.examine(folder, public_key=key and keys / key)
        return outcome(checks, "signature"), checks[3].said

    assert checked("ours.pub")[0] == "pass", checked("ours.pub")[1]
    assert checked("theirs.pub")[0] == "fail"
    assert checked(None) == ("absent", checked(None)[1])
    assert checked("nobody.pub")[0] == "absent"
    # What this package writes about an encoder may come later.
    provenance.write_lock(provenance.lock(folder), folder / "encoder.lock.json")
    assert checked("ours.pub")[0] == "pass", checked("ours.pub")[1]
    (folder / "more.json").write_text("{}")
    assert checked("ours.pub")[0] == "fail"
    (folder / "more.json").unlink()
    flip(folder)
    assert checked("ours.pub")[0] == "fail"


@pytest.mark.parametrize(
    ("library", "check"), [("model_signing", "signature"), ("picklescan", "scanner")]
)
def test_without_a_library_its_check_is_absent_and_says_what_to_install(
    library, check, folder, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    (folder / "model.sig").write_text("{}")
    checks = provenance.examine(folder, public_key=folder / "README.md")
    assert outcome(checks, check) == "absent"
    assert "robust-ssl[provenance]" in checks[provenance.NAMES.index(check)].said


# ---------------------------------------------------------------------------- locks and commands


def test_a_lock_is_verified_where_it_was_moved_with_its_encoder(folder, tmp_path, capsys):
    file = folder.parent / "encoder.lock.json"
    assert main.main(["encoder", "lock", str(folder), "-o", str(file)]) == 0
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(folder, moved / folder.name)
    shutil.move(file, moved / file.name)
    checks = tmp_path / "checks.json"
    verify = ["encoder", "verify", str(moved / file.name)]
    assert main.main([*verify, "--json", str(checks)]) == 0
    assert len(json.loads(checks.read_text())) == 10
    lock = ["encoder", "lock", str(moved / folder.name), "-o"]
    assert main.main([*lock, str(moved / file.name)]) == 0  # it says the same
    assert main.main([*lock, str(moved / folder.name / "encoder.safetensors")]) == 2
    assert main.main([*verify, "--signature", "none.sig", "--public-key", "none.pub"]) == 3
    flip(moved / folder.name)
    assert main.main(verify) == 1
    assert "encoder.safetensors has changed" in capsys.readouterr().out
    assert main.main([*verify, "nothing"]) == 2


@pytest.mark.parametrize("change", ["a shard", "the preprocessing", "a shard that is gone"])
def test_a_lock_of_a_lone_file_is_of_all_that_is_read_with_it(tmp_path, change):
    folder = tmp_path / "shards"
    folder.mkdir()
    encoder = models.resnet18(jax.random.key(0), width=8, image_size=32)
    weights.export_safetensors(encoder, tmp_path / "whole.safetensors")
    tensors, places = load_file(tmp_path / "whole.safetensors"), {}
    for number in range(2):
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        (folder / f"part{number}.safetensors").write_bytes(save(part))
        places |= dict.fromkeys(part, f"part{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**images, "resample": 3}))
    lock = provenance.lock(str(index), stem="cifar", stem_padding=1)
    assert len(lock["files"]) == 4
    file = provenance.write_lock(lock, tmp_path / "encoder.lock.json")
    assert outcome(provenance.verify(file), "files") == "pass"
    shard = folder / "part1.safetensors"
    if change == "the preprocessing":
        (folder / "preprocessor_config.json").write_text(json.dumps({**images, "resample": 0}))
    elif change == "a shard that is gone":
        shard.unlink()
    else:
        stored = load_file(shard)
        name = next(name for name in stored if name.endswith("weight"))
        shard.write_bytes(save({**stored, name: 1.0005 * stored[name]}))
    assert outcome(provenance.verify(file), "files") == "fail"


def test_a_lock_beside_its_encoder_is_not_in_itself_whatever_it_is_called(healthy, folder):
    file = provenance.write_lock(healthy[1] | {"source": _at(folder)}, folder / "approved.json")
    assert outcome(provenance.verify(file), "files") == "pass"
    (folder / "another.json").write_text("{}")
    assert outcome(provenance.verify(file), "files") == "fail"


def _at(folder):
    return {"given": str(folder), "kind": "encoder", "revision": ""}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: text.replace('"bytes": ', '"bytes": NaN, "x": ', 1), "not JSON|no number"),
        (lambda text: text.replace('"schema": 1', '"schema": 2', 1), "take a newer robust-ssl"),
        (lambda text: text.replace("cifar10", "cifar11", 1), "is not what was written"),
        (lambda text: "[]", "no lock of an encoder"),
        (lambda text: text.replace('"sha256": "', '"sha256": "x', 1), "no lock of an encoder"),
    ],
    ids=["truncated", "NaN", "newer", "edited", "list", "no sum"],
)
def test_a_lock_that_cannot_be_used_is_refused(change, said, healthy, tmp_path, capsys):
    file = tmp_path / "encoder.lock.json"
    provenance.write_lock(healthy[1], file)
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=said):
        provenance.read_lock(file)
    assert main.main(["encoder", "verify", str(file)]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_lock_imports_nothing_that_it_names(healthy, folder, tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    named = {"builder": "hostile:build", "preprocess": "hostile:build", "head": "hostile:build"}
    checks = provenance.examine(folder, {**healthy[1], "options": named})
    assert not provenance.differs(checks)
    recard(folder, lambda card: card.update(builder="hostile:build"))
    assert outcome(provenance.examine(folder), "architecture") == "fail"
    assert not (tmp_path / "ran").exists()


def test_what_is_wrong_in_itself_is_not_locked(folder):
    rewrite(folder, constant)
    with pytest.raises(ValueError, match="not locked as it is: weights"):
        provenance.lock(folder)


def test_a_misspelt_source_is_told_what_is_near():
    with pytest.raises(ValueError, match="simclr-cifar10-r18w24"):
        provenance.examine("simclr-cifar10-r18w42")


# ------------------------------------------------------------------------------------ statements


def test_the_statement_names_every_file_with_its_hash(healthy):
    made = provenance.statement(healthy[0])
    sums = {entry["name"]: entry["digest"]["sha256"] for entry in made["subject"]}
    assert sums == {n: entry["sha256"] for n, entry in healthy[1]["files"].items()}
    assert made["predicate"]["buildDefinition"]["resolvedDependencies"][0]["name"] == "cifar10"


def test_the_statement_names_what_it_was_made_from(healthy):
    made = provenance.statement(healthy[0], made_from=[healthy[0]])
    origin = made["predicate"]["buildDefinition"]["resolvedDependencies"][-1]
    assert origin["digest"]["sha256"] == healthy[1]["files"]["encoder.safetensors"]["sha256"]


@pytest.mark.filterwarnings("default")
def test_the_statement_is_one_to_its_own_library(healthy):
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement, statement_pb2

    made = provenance.statement(healthy[0])
    statement.Statement.copy_from_pb(
        json_format.ParseDict(made, statement_pb2.Statement())
    ).validate()
    json_format.ParseDict(made["predicate"], provenance_pb2.Provenance())


@pytest.mark.filterwarnings("default")
def test_the_bill_of_materials_is_valid_cyclonedx(healthy):
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    made = provenance.bill_of_materials(healthy[0])
    assert made == provenance.bill_of_materials(healthy[0])
    try:
        errors = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made))
    except Exception as error:  # its validator is a part that may not be installed
        pytest.skip(str(error))
    assert errors is None


def test_a_converted_encoder_comes_with_both(tmp_path):
    file = weights.export_safetensors(ENCODER, tmp_path / "ours.safetensors")
    assert main.main(["encoder", "convert", str(file), "--out", str(tmp_path / "new")]) == 0
    made = json.loads((tmp_path / "new" / "provenance.intoto.json").read_text())
    (origin,) = made["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert origin["name"] == "ours.safetensors"
    assert len(origin["digest"]["sha256"]) == 64
    assert (tmp_path / "new" / "bom.cdx.json").is_file()
    again = tmp_path / "again.safetensors"
    assert main.main(["encoder", "export", str(tmp_path / "new"), "--out", str(again)]) == 0
    made = json.loads((tmp_path / "again.safetensors.provenance.intoto.json").read_text())
    (origin,) = made["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert origin["name"] == "new"


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("Attribution-NonCommercial 4.0 International", "CC-BY-NC-4.0"),
        ("Attribution-NonCommercial-ShareAlike 4.0 International", "CC-BY-NC-SA-4.0"),
        ("Attribution-NonCommercial-NoDerivatives 3.0 Unported", "see LICENSE"),
        ("Permission is hereby granted, free of charge, to any person obtaining a copy", "MIT"),
        ("Permission is hereby granted, free of charge, to any person or organization", "see LIC"),
    ],
)
def test_a_license_is_called_what_it_is_or_where_it_stands(tmp_path, text, license):
    from robust_ssl.provenance import documents

    (tmp_path / "LICENSE").write_text(text)
    encoder = models.resnet18(jax.random.key(0), width=4, image_size=8)
    weights.save_encoder(encoder, tmp_path)
    found = documents.documents(provenance.open_source(tmp_path))["license"]
    assert found.startswith(license)


def test_a_lock_that_is_not_there_is_named_with_its_way_out(tmp_path, capsys):
    assert main.main(["encoder", "verify", f"{tmp_path}/none.json"]) == main.USAGE
    assert f"there is no lock {tmp_path}/none.json; make one: robust-ssl encoder lock SOURCE" in (
        capsys.readouterr().err
    )
