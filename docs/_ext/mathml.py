"""Formulas as MathML, which browsers draw themselves: no script, no font, no network."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

_LOG = logging.getLogger(__name__)
_SIZES = re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])")  # MathML stretches brackets by itself
_ACCENTED = re.compile(r"(\\(?:tilde|hat|bar)\s*(?:\w|\{\w\}))_")


def _formula(node: nodes.Node, as_block: bool) -> str:
    # Docutils sets the index of an accented letter below it; an empty group keeps them apart.
    text = _ACCENTED.sub(r"\1{}_", _SIZES.sub("", node.astext()))
    try:
        return tex2mathml(text, as_block=as_block)
    except MathError as error:
        _LOG.warning("this formula is not drawn: %s", error, location=node)
        return f"<code>{node.astext()}</code>"


def _inline(writer, node):
    writer.body.append(_formula(node, as_block=False))
    raise nodes.SkipNode


def _block(writer, node):
    writer.body.append(f'<div class="math">{_formula(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    """Registers the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
