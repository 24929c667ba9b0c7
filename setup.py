"""Packaging of robust_ssl; tool settings stand in pyproject.toml."""

import ast
import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

# The one place to change when the project moves: every link of the index page begins with it.
HOME = "https://github.com/robust-ssl/robust-ssl"

PICTURES = (".png", ".svg", ".jpg", ".gif")

# A Markdown link or picture, `[text](target)`.
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")


def version() -> str:
    """Returns ``__version__`` of the package without importing it, which would need JAX."""
    text = (HERE / "robust_ssl" / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError("robust_ssl/__init__.py has no __version__")


def with_absolute_links(text: str, home: str = HOME) -> str:
    """Returns Markdown whose relative links and pictures lead to the repository at `home`.

    The index shows the README away from the files beside it.  Links within the page, and code
    between fences, stay as they are.
    """

    def absolute(match: re.Match) -> str:
        label, target = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|#|/", target):
            return match[0]
        path = target.removeprefix("./")
        kind = "raw" if path.partition("#")[0].endswith(PICTURES) else "blob"
        return f"{label}({home}/{kind}/main/{path})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(absolute, part) for part in parts)


if __name__ == "__main__":
    setup(
        name="robust-ssl",
        version=version(),
        description="Adversarial robustness of pre-trained encoders: attack, secure fine-tuning, "
        "proof",
        long_description=with_absolute_links((HERE / "README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
        author="the robust_ssl authors",
        url=HOME,
        project_urls={
            "Documentation": f"{HOME}/blob/main/docs/index.md",
            "Changes": f"{HOME}/blob/main/CHANGELOG.md",
            "Issues": f"{HOME}/issues",
        },
        keywords=[
            *("adversarial robustness", "adversarial examples", "self-supervised learning"),
            *("fine-tuning", "vision encoders", "AutoAttack", "JAX", "Flax"),
        ],
        license_expression="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.11",
        packages=[*find_packages(include=["robust_ssl", "robust_ssl.*"]), "robust_ssl.configs"],
        package_dir={"robust_ssl.configs": "configs"},  # found by name, `robust_ssl.shipped`
        package_data={
            "robust_ssl": ["py.typed", "zoo/*/*", "schemas/*.json", "audit/*.yaml", "audit/pages/*"]
        },
        install_requires=[
            "jax>=0.10",
            "flax>=0.12",
            "optax>=0.2.8",
            "orbax-checkpoint>=0.12.8",  # for its V1 API, in 1.0 the only one
            "chex>=0.1.91",
            "tensorflow-datasets>=4.9.10",
            # There is none for Windows and for Macs before Apple's own processors.
            "array-record>=0.8; sys_platform == 'linux' or "
            "(sys_platform == 'darwin' and platform_machine == 'arm64')",
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
                "mypy>=1.15",
                "shtab>=1.7",
                "build>=1.2",
                "setuptools>=77",  # wheel and sdist are built without isolation
                "nbformat>=5.10",
                "nbclient>=0.10",
                "ipykernel>=6.29",
                "jinja2>=3.1",
            ],
            "torch": ["torch>=2.10", "transformers>=5"],  # parity tests and benchmarks
            "onnx": ["torch>=2.10", "onnx>=1.19", "onnxruntime>=1.23", "onnxscript>=0.5"],
            "prepare": ["tensorflow"],  # to prepare TFDS data sets from the network, once
            "hf": ["datasets>=3"],
            "grain": ["grain>=0.2.12"],  # processes that read and decode large sets
            # Where an encoder comes from: the hub, signatures, a scanner, bills of materials.
            "provenance": [
                "huggingface_hub>=1",
                "model-signing>=1.1",
                "pyopenssl>=24",  # which model-signing imports and does not declare
                "picklescan>=1",
                "cyclonedx-python-lib[json-validation]>=11",
            ],
            "docs": [
                "sphinx>=8",
                "myst-nb",
                "sphinx-book-theme",
                "sphinx-autoapi",
                "sphinx-copybutton",
                "sphinx-intl",
                "docutils>=0.22",  # which reads formulas
            ],
            "audit": ["jinja2>=3.1"],  # the pages of an audit; flax brings PyYAML
            "completion": ["shtab>=1.7"],
            # Where `robust-ssl track` sends the metrics of a run.
            "wandb": ["wandb"],
            "mlflow": ["mlflow"],
            "trackio": ["trackio"],
            "tensorboard": ["tensorboardX"],
            "cuda12": ["jax[cuda12]>=0.10"],
            "cuda13": ["jax[cuda13]>=0.10"],
            "tpu": ["jax[tpu]>=0.10"],
        },
        entry_points={"console_scripts": ["robust-ssl=robust_ssl.cli.main:main"]},
        classifiers=[
            "Development Status :: 4 - Beta",
            "Environment :: Console",
            "Intended Audience :: Science/Research",
            "Operating System :: OS Independent",
            "Programming Language :: Python :: 3",
            "Programming Language :: Python :: 3 :: Only",
            "Programming Language :: Python :: 3.11",
            "Programming Language :: Python :: 3.12",
            "Programming Language :: Python :: 3.13",
            "Programming Language :: Python :: 3.14",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Topic :: Scientific/Engineering :: Image Recognition",
            "Typing :: Typed",
        ],
    )
