"""The API reference: which modules have a page, and the signatures of dataclasses."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
# Those whose names are meant to be imported.  What they import from others has its page here.
PUBLIC = (
    "robust_ssl",
    "robust_ssl.api",
    "robust_ssl.attacks",
    "robust_ssl.attacks.autoattack",
    "robust_ssl.bridges",
    "robust_ssl.build",
    "robust_ssl.conformance",
    "robust_ssl.data",
    "robust_ssl.data.public",
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
    "robust_ssl.screening",
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
      >>> page_of("robust_ssl/struct.py"), page_of("robust_ssl/attacks/__init__.py")
      ('api/robust_ssl/struct/index.rst', 'api/robust_ssl/attacks/index.rst')
    """
    path = file.removesuffix(".py").removesuffix("/__init__")
    return f"api/{path}/index.rst" if path.replace("/", ".") in PUBLIC else None


@functools.cache
def _tree(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Returns a class of the package and its module, also where it is imported from another."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        imported = [alias.name for alias in getattr(node, "names", ()) if hasattr(node, "level")]
        if name in imported and (node.module or "").startswith("robust_ssl"):
            return _class(node.module, name)
    return None


def _default(value: ast.expr | None) -> str | None:
    """Returns the default of a field as code, also of ``struct.field(default=...)``."""
    if value is None:
        return None
    function = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    if function == "option":  # of pretraining: a static field
        return ast.unparse(value.args[0])
    if not function.endswith("field"):
        return ast.unparse(value)
    options = {word.arg: ast.unparse(word.value) for word in value.keywords}
    return options.get("default", "..." if "default_factory" in options else None)


def _fields(module: str, name: str) -> dict[str, str | None]:
    """Returns the fields of a dataclass with their defaults; those of its bases come first."""
    place = _class(module, name)
    if place is None:
        return {}
    home, node = place
    fields = {}
    for base in node.bases:
        fields |= _fields(home, ast.unparse(base))
    annotated = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    for each in annotated:
        field = ast.unparse(each.target)
        if not field.startswith("_") and "ClassVar" not in ast.unparse(each.annotation):
            fields[field] = _default(each.value)
    return fields


def signature(name: str) -> str:
    """Returns what a dataclass takes, as it is called.

    Example:
      >>> signature("robust_ssl.threats.Band")
      "threat, low=0.0, high=float('inf')"
    """
    fields = _fields(*name.rsplit(".", 1)).items()
    return ", ".join(name if default is None else f"{name}={default}" for name, default in fields)


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
    environment.filters["signature"] = signature
    environment.globals["homes"] = homes()


def _skip(app, what, name, obj, skip, options):
    if what in ("module", "package"):
        return name not in PUBLIC
    return skip or name.rpartition(".")[2].startswith("_")


def setup(app):
    """Leaves out modules that are not public, and gives the templates `signature` and `homes`."""
    app.config.autoapi_prepare_jinja_env = _prepare
    app.connect("autoapi-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
