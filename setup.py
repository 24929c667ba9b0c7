"""Packaging of robust_ssl; tool settings stand in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

setup(
    name="robust-ssl",
    version="0.2.0",
    description="Adversarial robustness of pre-trained encoders: attack, secure fine-tuning, proof",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["robust_ssl", "robust_ssl.*"]),
    package_data={"robust_ssl": ["zoo/*/*", "schemas/*.json"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",  # for its V1 API, in 1.0 the only one
        "chex>=0.1.91",
        "tensorflow-datasets>=4.9.10",
        "array-record>=0.8",
        "importlib_resources",  # tensorflow-datasets imports it and does not declare it
        "Pillow>=10",
        "ml_collections>=1.1",
        "absl-py>=2",
        "dm-pix>=0.4",
        "safetensors>=0.5",
        "ml_dtypes>=0.5",  # bfloat16 and float8 in foreign files; comes with jax
        "flatbuffers>=24",  # jax.export writes StableHLO files with it
        "scipy>=1.13",  # tests of significance; comes with jax
        "scikit-learn>=1.5",  # the digits and the photographs of the quickstart
        "matplotlib>=3.9",
        "rich>=13",
        "jsonschema>=4.20",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "nbformat>=5.10",
            "nbclient>=0.10",
            "ipykernel>=6.29",
        ],
        "docs": [
            "sphinx>=9",
            "myst-nb>=1.4",
            "sphinx-book-theme>=1.4",
            "sphinx-autoapi>=3.9",
            "sphinx-copybutton>=0.5",
            "sphinx-intl>=2.3",
        ],
        "torch": ["torch>=2.10", "transformers>=5"],  # parity tests and benchmarks
        "prepare": ["tensorflow"],  # to prepare TFDS data sets from the network, once
        "cuda12": ["jax[cuda12]>=0.10"],
        "cuda13": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
    },
    entry_points={"console_scripts": ["robust-ssl=robust_ssl.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
