"""The API reference: which modules have a page, and the signatures of dataclasses."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
# Those whose names are meant to be imported.  What they import from others has its page here.
PUBLIC = (
    "robust_ssl",
    "robust_ssl.api",
    "robust_ssl.attacks",
    "robust_ssl.attacks.autoattack",
    "robust_ssl.build",
    "robust_ssl.conformance",
    "robust_ssl.data",
    "robust_ssl.evaluation",
    "robust_ssl.evaluation.analysis",
    "robust_ssl.evaluation.checks",
    "robust_ssl.experiment",
    "robust_ssl.finetuning",
    "robust_ssl.frequencies",
    "robust_ssl.losses",
    "robust_ssl.models",
    "robust_ssl.objectives",
    "robust_ssl.optimizers",
    "robust_ssl.parallel",
    "robust_ssl.pretraining",
    "robust_ssl.recipes",
    "robust_ssl.report",
    "robust_ssl.report.claims",
    "robust_ssl.report.results",
    "robust_ssl.settings",
    "robust_ssl.struct",
    "robust_ssl.threats",
    "robust_ssl.types",
    "robust_ssl.weights",
    "robust_ssl.xla",
)


def page_of(file: str) -> str | None:
    """Returns the page of a module's file, under docs/, or None if the module has none.

    Example:
      >>> page_of("robust_ssl/losses.py"), page_of("robust_ssl/attacks/__init__.py")
      ('api/robust_ssl/losses/index.rst', 'api/robust_ssl/attacks/index.rst')
    """
    path = file.removesuffix(".py").removesuffix("/__init__")
    return f"api/{path}/index.rst" if path.replace("/", ".") in PUBLIC else None


def _default(value: str) -> str | None:
    """Returns the default of a field as code, also of ``struct.field(default=...)``."""
    call = ast.parse(value, mode="eval").body
    if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith("field"):
        return value
    options = {word.arg: ast.unparse(word.value) for word in call.keywords}
    made = options.get("default_factory")
    return options.get("default", f"{made}()" if made else None)


def fields(cls) -> str:
    """Returns the fields of a dataclass as a signature."""
    arguments = []
    for child in cls.children:
        if child.type == "attribute" and child.annotation and not child.name.startswith("_"):
            default = _default(child.value) if child.value is not None else None
            arguments.append(child.name if default is None else f"{child.name}={default}")
    return ", ".join(arguments)


def homes() -> dict[str, str]:
    """Returns the names of `robust_ssl` itself, which it imports late, and where each is described.

    Example:
      >>> homes()["Encoder"]
      'robust_ssl.types.Encoder'
    """
    tree = ast.parse((ROOT / "robust_ssl/__init__.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    modules = ast.literal_eval(values["_HOMES"])
    renamed = {"list": "list_names"}
    return {
        name: f"robust_ssl.{module}.{renamed.get(name, name)}" for name, module in modules.items()
    }


def _prepare(environment):
    environment.filters["fields"] = fields
    environment.globals["homes"] = homes()


def _skip(app, what, name, obj, skip, options):
    if what in ("module", "package"):
        return name not in PUBLIC
    return skip or name.rpartition(".")[2].startswith("_")


def setup(app):
    """Leaves out modules that are not public, and gives the templates `fields` and `homes`."""
    app.config.autoapi_prepare_jinja_env = _prepare
    app.connect("autoapi-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
