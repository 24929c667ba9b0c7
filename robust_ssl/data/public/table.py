"""The public sets: what each is called, where it comes from, and what it must be.

Digests of archives are TFDS's (SHA-256) or torchvision's (MD5).  Those of GTSRB's training images
and of Tiny ImageNet are the ones that public loaders agree on.  (torchvision takes another training
archive of GTSRB, with 26,640 images, from an earlier stage of the competition.)

Digests of pixels were computed with this package: CIFAR-10's from batches that have the published
MD5s, the others from copies of the pictures.  So a difference in the others is only a warning.
"""

from __future__ import annotations

from robust_ssl.data.public import cifar, gtsrb, matrices, photographs
from robust_ssl.data.public.values import Archive, PublicSet

_TORONTO = "https://www.cs.toronto.edu/~kriz"
_ERDA = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"

_CIFAR10_BINARY = Archive(
    f"{_TORONTO}/cifar-10-binary.tar.gz",
    170_052_171,
    "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
_CIFAR10_PYTHON = Archive(
    f"{_TORONTO}/cifar-10-python.tar.gz", 170_498_071, "md5:c58f30108f718f92721af3b95e74349a"
)
_CIFAR100_BINARY = Archive(
    f"{_TORONTO}/cifar-100-binary.tar.gz",
    168_513_733,
    "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)
_CIFAR100_PYTHON = Archive(
    f"{_TORONTO}/cifar-100-python.tar.gz", 169_001_437, "md5:eb9058c3a382ffc7106e4002c42a8d85"
)
_GTSRB = (
    Archive(f"{_ERDA}/{gtsrb.TRAIN}", 276_294_756, "md5:f33fd80ac59bff73c82d25ab499e03a3"),
    Archive(f"{_ERDA}/{gtsrb.TEST}", 88_978_620, "md5:c7e4e6327067d32654124b0fe9e82185"),
    Archive(f"{_ERDA}/{gtsrb.TEST_LABELS}", 99_620, "md5:fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
)
_STL10 = Archive(
    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    2_640_397_119,
    "sha256:f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
)
_TINY_IMAGENET = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    248_100_043,
    "md5:90528d7ca1a48142e341f4ef8d21d0de",
)
_EUROSAT = Archive(
    "http://madm.dfki.de/files/sentinel/EuroSAT.zip",
    94_280_567,
    "sha256:8ebea626349354c5328b142b96d0430e647051f26efc2dc974c843f25ecf70bd",
)
_SVHN_CROPPED = (
    Archive(
        f"{_SVHN}/train_32x32.mat",
        182_040_794,
        "sha256:435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    ),
    Archive(
        f"{_SVHN}/test_32x32.mat",
        64_275_384,
        "sha256:cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    ),
)
_FLOWERS102 = (
    Archive(
        f"{_FLOWERS}/102flowers.tgz",
        344_862_509,
        "sha256:2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246",
    ),
    Archive(
        f"{_FLOWERS}/imagelabels.mat",
        502,
        "sha256:4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d",
    ),
    Archive(
        f"{_FLOWERS}/setid.mat",
        14_989,
        "sha256:46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd",
    ),
)
_IMAGENETTE = Archive(
    "https://s3.amazonaws.com/fast-ai-imageclas/imagenette-160.tgz",
    98_752_094,
    "sha256:4bacf19aa3f2454e330ac366c98ac1e470ccc6bebca8ff63ecc7f339cb2ead11",
)

SETS = (
    PublicSet(
        name="cifar10",
        stored="cifar10",
        version="3.0.2",
        images={"train": 50_000, "test": 10_000},
        classes=10,
        image_size="32",
        archives=((_CIFAR10_BINARY,), (_CIFAR10_PYTHON,)),
        read=cifar.cifar10,
        pixels={
            "train": "d1887ddecbb38dc66b23898c8c39ead3b34984b9f68f30202f8abea750f4251b",
            "test": "4352d244975c50b793389830c9311ecce0326a534e9b4cae659cf96dedd8b77e",
        },
        proven=True,
    ),
    PublicSet(
        name="cifar100",
        stored="cifar100",
        version="3.0.2",
        images={"train": 50_000, "test": 10_000},
        classes=100,
        image_size="32",
        archives=((_CIFAR100_BINARY,), (_CIFAR100_PYTHON,)),
        read=cifar.cifar100,
        pixels={
            "train": "1548a99ae5e07518d276448d1a92b901b5f5e888d82655cebf57c47d3406bd18",
            "test": "9cc27ea17aa00d69670bf25e6d2e78f8fda353474750de8b18bc902a39977803",
        },
    ),
    PublicSet(
        name="cifar100_small",
        stored="cifar100_small",
        version="1.0.0",
        images={"train": 7000, "test": 2000},
        classes=100,
        image_size="32",
        archives=((_CIFAR100_PYTHON,),),
        read=cifar.cifar100_small,
        pixels={
            "train": "cbcd224aa87f5493d70e87fe5ca83fe936536cf9effda52d15a274624eda2ae9",
            "test": "ee0888d705128c0c577c9e76d7d13103ab454ac1d5ef369b8f1b88289f5b30ab",
        },
    ),
    PublicSet(
        name="gtsrb",
        stored="gtsrb",
        version="1.0.0",
        images={"train": 39_209, "test": 12_630},
        classes=43,
        image_size="32",
        archives=(_GTSRB,),
        read=gtsrb.gtsrb,
        pixels={
            "train": "0a45563bd042c0e85d4c88dc91b5a30fbacfbbcfe282a6e4c6f81b44a86f1f74",
            "test": "2ff2534a405b5e2faec21387f7a35581c2097f0ef56466e797d6e0eecae8dc93",
        },
    ),
    PublicSet(
        name="gtsrb32",
        stored="gtsrb32",
        version="1.0.0",
        images={"train": 6450, "test": 3990},
        classes=43,
        image_size="32",
        archives=(_GTSRB,),
        read=gtsrb.gtsrb32,
        pixels={
            "train": "a8094d5e172b395fa3c0a090a2600de8396814f1e3e3df16e69eb826fd2c8407",
            "test": "48f764429a7919d4483e05b562365cc2794c0791da058630540eb3b209688b69",
        },
    ),
    PublicSet(
        name="stl10",
        stored="stl10",
        version="1.0.0",
        images={"train": 5000, "test": 8000, "unlabelled": 100_000},
        classes=10,
        image_size="96",
        archives=((_STL10,),),
        read=matrices.stl10,
    ),
    PublicSet(
        name="tiny_imagenet",
        stored="tiny_imagenet",
        version="1.0.0",
        images={"train": 100_000, "test": 10_000},
        classes=200,
        image_size="64",
        archives=((_TINY_IMAGENET,),),
        read=photographs.tiny_imagenet,
        pixels={
            "train": "c59f5a6c2d9afd988770afaf1e8049cd0e2b31a634521e882d01d29d581eafad",
            "test": "1ae3efa4e9a264ad1b1abd7f5a277c0fa5dc7d12553b4590dbab83778eb02701",
        },
    ),
    PublicSet(
        name="tiny_imagenet20",
        stored="tiny_imagenet20",
        version="1.0.0",
        images={"train": 3000, "test": 1000},
        classes=20,
        image_size="64",
        archives=((_TINY_IMAGENET,),),
        read=photographs.tiny_imagenet20,
        pixels={
            "train": "7b49b440a77d8c56bee2148c4b7a74a0f4b732b20be329fa15d52cd5d1861f71",
            "test": "b3d783ca3440fa601237754625022f24701171ee7ef7f34df6e8f8f676348d94",
        },
    ),
    PublicSet(
        name="eurosat",
        stored="eurosat/rgb",
        version="2.0.0",
        images={"train": 27_000},
        classes=10,
        image_size="64",
        archives=((_EUROSAT,),),
        read=photographs.eurosat,
    ),
    PublicSet(
        name="svhn",
        stored="svhn_cropped",
        version="3.1.0",
        images={"train": 73_257, "test": 26_032},
        classes=10,
        image_size="32",
        archives=(_SVHN_CROPPED,),
        read=matrices.svhn,
    ),
    PublicSet(
        name="flowers102",
        stored="oxford_flowers102",
        version="2.1.1",
        images={"train": 1020, "validation": 1020, "test": 6149},
        classes=102,
        image_size="500 up",
        archives=(_FLOWERS102,),
        read=photographs.flowers102,
    ),
    PublicSet(
        name="imagenette",
        stored="imagenette/160px",
        version="1.0.0",
        images={"train": 12_894, "validation": 500},
        classes=10,
        image_size="160 up",
        archives=((_IMAGENETTE,),),
        read=photographs.imagenette,
    ),
)


def find_set(name: str) -> PublicSet | None:
    """Returns the set of a name, its own or the one it is stored under; None if there is none.

    Example:
      >>> find_set("svhn").stored, find_set("svhn_cropped").name
      ('svhn_cropped', 'svhn')
    """
    for public in SETS:
        if name in (public.name, public.stored):
            return public
    return None
