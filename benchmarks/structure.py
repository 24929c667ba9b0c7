"""Measures how the code reads: sizes, reasons, look-ups, and what one training step passes through.

    python benchmarks/structure.py                  # this tree
    python benchmarks/structure.py --package OTHER/robust_ssl --no-trace

Lines are all lines of the package; code lines have a token that is neither comment nor docstring.
A literal look-up is ``x["name"]`` or ``x.get("name")``.  The traced step is one epoch of
`gen_af_stage1` on images of eight pixels: functions of the package that Python enters on the way,
in how many files, and how often the next call is in another file.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import itertools
import pathlib
import re
import sys
import tempfile
import tokenize

ROOT = pathlib.Path(__file__).parents[1]


def docstring_lines(tree: ast.AST) -> set[int]:
    """Returns the numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines |= set(range(body[0].lineno, body[0].end_lineno + 1))
    return lines


def functions(tree: ast.AST) -> list[tuple[int, str]]:
    """Returns the length without docstring, and the name, of every function."""
    sizes = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            documented = node.body[0].end_lineno - node.body[0].lineno + 1 if text else 0
            sizes.append((node.end_lineno - node.lineno + 1 - documented, node.name))
    return sizes


def look_ups(tree: ast.AST) -> int:
    """Returns how often something is looked up by a literal text."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            count += isinstance(node.slice.value, str)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get" and node.args:
            first = node.args[0]
            count += isinstance(first, ast.Constant) and isinstance(first.value, str)
    return count


def measure(package: pathlib.Path) -> dict[str, object]:
    """Returns the figures of a package."""
    lines = code = comments = comprehensions = looked_up = documented = 0
    longest_file, longest_function = (0, ""), (0, "")
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for file in sorted(package.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        tree, name = ast.parse(text), str(file.relative_to(package))
        lines += text.count("\n")
        longest_file = max(longest_file, (text.count("\n"), name))
        docs = docstring_lines(tree)
        documented += len(docs)
        coded: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments += not token.string.startswith(("# noqa", "# type:", "# fmt"))
            elif token.type not in (
                tokenize.NL,
                tokenize.NEWLINE,
                tokenize.INDENT,
                tokenize.DEDENT,
            ):
                coded |= set(range(token.start[0], token.end[0] + 1))
        code += len(coded - docs)
        comprehensions += sum(isinstance(node, kinds) for node in ast.walk(tree))
        looked_up += look_ups(tree)
        longest_function = max(
            [longest_function, *((n, f"{name}:{f}") for n, f in functions(tree))]
        )
    return {
        "lines": lines,
        "code lines": code,
        "docstring lines": documented,
        "files": sum(1 for _ in package.rglob("*.py")),
        "longest file": longest_file,
        "longest function": longest_function,
        "comments per 100 code lines": round(100 * comments / code, 1),
        "comprehensions per 100 code lines": round(100 * comprehensions / code, 1),
        "literal look-ups": looked_up,
    }


def config_keys() -> dict[str, int]:
    """Returns how many settings each shipped config has."""
    from robust_ssl import settings

    def leaves(value) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) else 1

    names = ("quickstart", "gen_af", "compare", "score", "pretrain", "analyze")
    configs = {name: settings.load_config(str(ROOT / "configs" / f"{name}.py")) for name in names}
    return {name: leaves(settings.to_json(config)) for name, config in configs.items()}


def readme_words() -> dict[str, int]:
    """Returns the words outside code of the README, and those before its first Python."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    before = re.sub(r"```.*?```", "", text.partition("```python")[0], flags=re.S)
    count = re.compile(r"\w+")
    return {"words": len(count.findall(prose)), "before Python": len(count.findall(before))}


def traced_step() -> dict[str, int]:
    """Returns what one epoch of a recipe passes through in the package."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "tiny.py")
    sys.path.insert(0, str(ROOT / "tests"))
    tiny = sys.modules.setdefault("tiny", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(tiny)
    from robust_ssl import experiment
    from robust_ssl.experiment.train import train_recipe
    from robust_ssl.parallel import Parallel
    from robust_ssl.progress import Progress

    config = tiny.config("train")
    config.common.epochs = 1
    package, calls = str(ROOT / "robust_ssl"), []

    def enter(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    with tempfile.TemporaryDirectory() as folder:
        context = experiment.Context(
            *(experiment.plan(config), pathlib.Path(folder)),
            *(Parallel.create(num_devices=1), Progress("quiet")),
        )
        _ = context.encoder, context.downstream
        sys.setprofile(enter)
        try:
            train_recipe(context, context.plan.recipes["gen_af_stage1"], 0)
        finally:
            sys.setprofile(None)
    files = [file for file, _ in calls]
    switches = sum(a != b for a, b in itertools.pairwise(files))
    return {"functions": len({*calls}), "files": len({*files}), "changes of file": switches}


def main() -> None:
    """Prints the figures, one a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=pathlib.Path, default=ROOT / "robust_ssl")
    parser.add_argument("--no-trace", action="store_true", help="only what can be read")
    arguments = parser.parse_args()
    figures = measure(arguments.package)
    if not arguments.no_trace:
        figures |= {f"config keys, {name}": n for name, n in config_keys().items()}
        figures |= {f"README, {name}": n for name, n in readme_words().items()}
        figures |= {f"one epoch of one recipe, {name}": n for name, n in traced_step().items()}
    for name, figure in figures.items():
        shown = f"{figure[0]} ({figure[1]})" if isinstance(figure, tuple) else figure
        print(f"{name:42} {shown}")


if __name__ == "__main__":
    main()
