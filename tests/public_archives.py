"""Tiny archives in the formats of the public data sets, and a server for them."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import pickle
import re
import tarfile
import threading
import zipfile

import numpy as np
from PIL import Image

from robust_ssl.data import public
from robust_ssl.progress import Progress

QUIET = Progress("quiet")


def pixels(count, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def tar(files, mode="w:gz"):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return content.getvalue()


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return content.getvalue()


def picture(image, kind):
    content = io.BytesIO()
    Image.fromarray(image).save(content, kind)
    return content.getvalue()


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def tiny(name, bodies, images, *, group=0):
    """The set of the table with archives of these contents, and so many images."""
    described = public.find_set(name)
    archives = tuple(
        dataclasses.replace(
            archive,
            size=len(bodies[archive.file]),
            digest=f"sha256:{hashlib.sha256(bodies[archive.file]).hexdigest()}",
        )
        for archive in described.archives[group]
    )
    return dataclasses.replace(described, archives=(archives,), images=images, pixels={})


def cifar10_binary():
    """2 images a batch; returns archives, pixels and labels by split."""
    images, labels = pixels(12), np.arange(12) % 10
    records = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    root = "cifar-10-batches-bin"
    files = {f"{root}/{n}.bin": records[2 * i : 2 * i + 2].tobytes() for i, n in enumerate(names)}
    files[f"{root}/batches.meta.txt"] = "\n".join("abcdefghij").encode() + b"\n\n"
    bodies = {"cifar-10-binary.tar.gz": tar(files)}
    return bodies, {"train": (images[:10], labels[:10]), "test": (images[10:], labels[10:])}


def cifar10_python():
    """The same as pickles of Python 2's protocol."""
    _, content = cifar10_binary()
    images = np.concatenate([content[split][0] for split in ("train", "test")])
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {}
    for i, name in enumerate(names):
        rows = range(2 * i, 2 * i + 2)
        batch = {
            "data": planes(images[rows]),
            "labels": [row % 10 for row in rows],
            "filenames": [f"picture_{row}.png" for row in rows],
            "batch_label": name,
        }
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=2)
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps(
        {"label_names": list("abcdefghij"), "num_vis": 3072}, protocol=2
    )
    return {"cifar-10-python.tar.gz": tar(files)}, content


def cifar100(kind, counts=None):
    """`counts` images of the classes 0, 1, ... in each split, in a mixed order."""
    counts = counts or {"train": 3, "test": 2}
    files, content, root = {}, {}, f"cifar-100-{kind}"
    names = {"coarse_label_names": [f"c{i}" for i in range(20)]}
    names["fine_label_names"] = [f"fine_{i:02d}" for i in range(100)]
    for split, count in counts.items():
        order = np.random.default_rng(1).permutation(count * 2)
        labels, numbers = order % 2, order // 2
        images = pixels(len(order), seed=len(split))
        if kind == "binary":
            columns = np.stack([labels + 5, labels], axis=1).astype(np.uint8)
            files[f"{root}/{split}.bin"] = np.concatenate([columns, planes(images)], 1).tobytes()
        else:
            batch = {"data": planes(images), "fine_labels": labels.tolist()}
            batch["coarse_labels"] = (labels + 5).tolist()
            batch["filenames"] = [f"{c}_{n:03d}.png" for c, n in zip(labels, numbers, strict=True)]
            files[f"{root}/{split}"] = pickle.dumps(batch, protocol=2)
        content[split] = (images, labels, numbers)
    if kind == "binary":
        files |= {f"{root}/{key}.txt": "\n".join(words).encode() for key, words in names.items()}
    else:
        files[f"{root}/meta"] = pickle.dumps(names, protocol=2)
    return {f"{root}.tar.gz": tar(files)}, content


def gtsrb():
    """Two classes of two tracks of two frames, already 32x32, and three test pictures."""
    images = pixels(11)
    paths = [(c, f"{t:05d}_{f:05d}") for c in (0, 7) for t in range(2) for f in range(2)]
    train = {
        f"GTSRB/Final_Training/Images/{c:05d}/{name}.ppm": picture(image, "PPM")
        for (c, name), image in zip(paths, images, strict=False)
    }
    train["GTSRB/Final_Training/Images/00000/GT-00000.csv"] = b"Filename;ClassId\n"
    test = {
        f"GTSRB/Final_Test/Images/{i:05d}.ppm": picture(image, "PPM")
        for i, image in enumerate(images[8:])
    }
    table = "Filename;Width;Height;Roi.X1;ClassId\r\n"
    table += "".join(f"{i:05d}.ppm;32;32;5;{label}\r\n" for i, label in enumerate((7, 42, 0)))
    bodies = {
        "GTSRB_Final_Training_Images.zip": zipped(train),
        "GTSRB_Final_Test_Images.zip": zipped(test),
        "GTSRB_Final_Test_GT.zip": zipped({"GT-final_test.csv": table.encode()}),
    }
    labels = [c for c, _ in paths]
    return bodies, {"train": (images[:8], labels), "test": (images[8:], [7, 42, 0])}


def stl10():
    images, labels = pixels(5, size=96), [0, 9, 3]
    columns = images.transpose(0, 3, 2, 1).reshape(5, -1)
    files = {
        "stl10_binary/test_X.bin": columns[2:3].tobytes(),
        "stl10_binary/test_y.bin": bytes([4]),
        "stl10_binary/train_X.bin": columns[:2].tobytes(),
        "stl10_binary/train_y.bin": bytes([1, 10]),
        "stl10_binary/unlabeled_X.bin": columns[3:].tobytes(),
        "stl10_binary/class_names.txt": "\n".join("abcdefghij").encode(),
    }
    content = {"train": (images[:2], labels[:2]), "test": (images[2:3], labels[2:])}
    content["unlabelled"] = (images[3:], None)
    return {"stl10_binary.tar.gz": tar(files)}, content


def matrix(**arrays):
    from scipy import io as scipy_io

    content = io.BytesIO()
    scipy_io.savemat(content, arrays, do_compression=True)
    return content.getvalue()


def svhn():
    images, labels = pixels(5), np.array([10, 1, 9, 3, 10], np.uint8)[:, None]
    cut = {"train": slice(0, 3), "test": slice(3, 5)}
    bodies = {
        f"{split}_32x32.mat": matrix(X=images[rows].transpose(1, 2, 3, 0), y=labels[rows])
        for split, rows in cut.items()
    }
    return bodies, {s: (images[rows], labels[rows, 0] % 10) for s, rows in cut.items()}


def eurosat():
    files = {}
    for folder in ("River", "AnnualCrop"):
        for number in (1, 2):
            body = picture(pixels(1, 64, seed=number)[0], "JPEG")
            files[f"2750/{folder}/{folder}_{number}.jpg"] = body
    files["2750/.DS_Store"] = b"no picture"
    images = [decoded(body) for name, body in files.items() if name.endswith("jpg")]
    return {"EuroSAT.zip": zipped(files)}, {"train": (np.stack(images), [8, 8, 0, 0])}


def tiny_imagenet():
    """Sixteen classes, of which the small set takes the sixth and the sixteenth."""
    numbers = [f"n{i:08d}" for i in range(100, 116)]
    files = {"wnids.txt": "\n".join(reversed(numbers)).encode()}
    files["words.txt"] = "".join(f"{n}\tword {n[-2:]}, other\n" for n in numbers).encode()
    content, annotations = {"train": ([], []), "test": ([], [])}, ""
    for label, number in enumerate(numbers):
        for split, name in (
            ("train", f"train/{number}/images/{number}_0.JPEG"),
            ("test", f"val/images/val_{label}.JPEG"),
        ):
            image = pixels(1, 64, seed=len(files))[0]
            image = image[..., 0] if label == 5 else image  # some are gray
            files[name] = picture(image, "JPEG")
            content[split][0].append(decoded(files[name]))
            content[split][1].append(label)
        annotations += f"val_{label}.JPEG\t{number}\t0\t0\t9\t9\n"
    files["val/val_annotations.txt"] = annotations.encode()
    files["test/images/test_0.JPEG"] = b"has no label and is not read"
    files = {f"tiny-imagenet-200/{name}": body for name, body in files.items()}
    return {"tiny-imagenet-200.zip": zipped(files)}, content


def flowers102():
    """An uncompressed tar, as published; six pictures of two sizes."""
    pictures = [picture(pixels(1, size, seed=size)[0], "JPEG") for size in (40, 41, 42, 43, 44, 45)]
    files = {f"jpg/image_{i + 1:05d}.jpg": body for i, body in enumerate(pictures)}
    ids = {"trnid": [[2, 5]], "valid": [[1]], "tstid": [[3, 4, 6]]}
    bodies = {
        "102flowers.tgz": tar(files, "w"),
        "imagelabels.mat": matrix(labels=np.array([[77, 1, 102, 5, 6, 7]], np.uint8)),
        "setid.mat": matrix(**{key: np.array(rows, np.uint16) for key, rows in ids.items()}),
    }
    images = [decoded(body) for body in pictures]
    content = {"train": ([images[1], images[4]], [0, 5]), "validation": ([images[0]], [76])}
    content["test"] = ([images[2], images[3], images[5]], [101, 4, 6])
    return bodies, content


def imagenette():
    files, content = {}, {"train": ([], []), "validation": ([], [])}
    for split, part in (("train", "train"), ("validation", "val")):
        for label, number in ((0, "n01440764"), (9, "n03888257")):
            body = picture(pixels(1, 40, seed=len(files))[0], "JPEG")
            files[f"imagenette-160/{part}/{number}/{number}_{len(files)}.JPEG"] = body
            content[split][0].append(decoded(body))
            content[split][1].append(label)
    return {"imagenette-160.tgz": tar(files)}, content


FORMATS = {
    "cifar10": cifar10_binary,
    "cifar10 python": cifar10_python,
    "gtsrb": gtsrb,
    "stl10": stl10,
    "svhn": svhn,
    "eurosat": eurosat,
    "tiny_imagenet": tiny_imagenet,
    "flowers102": flowers102,
    "imagenette": imagenette,
}


def stored(folder, bodies):
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    return folder


def prepared(tmp_path, described, bodies, **options):
    source = stored(tmp_path / "copies", bodies)
    options = {"source": source, "progress": QUIET, **options}
    return public.prepare(described, data_dir=tmp_path / "sets", **options)


def pairs(images, labels):
    labels = [None] * len(images) if labels is None else labels
    return sorted((str(label), im.tobytes()) for im, label in zip(images, labels, strict=True))


def counts(content):
    return {split: len(part[0]) for split, part in content.items()}


@dataclasses.dataclass
class Server:
    """A web server on this machine; a test sets how it behaves and reads what it was asked."""

    files: dict[str, bytes]
    ranges: bool = True
    cut_after: int | None = None  # bytes of each answer, less than it promises
    status: dict[str, int] = dataclasses.field(default_factory=dict)
    leads_to: dict[str, str] = dataclasses.field(default_factory=dict)
    tag: str = '"one"'
    asked: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # path and range
    root: str = ""


def _answer(handler, server):
    path, asked = handler.path.lstrip("/"), handler.headers.get("Range", "")
    server.asked.append((path, asked))
    if path in server.leads_to:
        handler.send_response(302)
        handler.send_header("Location", server.leads_to[path])
        handler.end_headers()
        return
    if path in server.status or path not in server.files:
        handler.send_error(server.status.get(path, 404))
        return
    body, start = server.files[path], 0
    same = handler.headers.get("If-Range", server.tag) == server.tag
    if server.ranges and same and (match := re.match(r"bytes=(\d+)-", asked)):
        start = int(match[1])
    if start >= len(body) > 0:
        handler.send_error(416)
        return
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    handler.send_header("Content-Length", str(len(body) - start))
    handler.send_header("ETag", server.tag)
    handler.end_headers()
    handler.wfile.write(body[start:][: server.cut_after])


@contextlib.contextmanager
def serving(files, **behavior):
    server = Server(files, **behavior)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            _answer(self, server)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        server.root = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            running.shutdown()
            thread.join()


def at(described, root):
    """The same set with its archives on another server."""
    groups = tuple(
        tuple(dataclasses.replace(archive, url=f"{root}/{archive.file}") for archive in group)
        for group in described.archives
    )
    return dataclasses.replace(described, archives=groups)
