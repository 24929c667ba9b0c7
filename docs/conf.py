"""Settings of the documentation site.

    pip install -e '.[docs]'
    docs/build site

Nothing is fetched while the site is built, and nothing while it is read.
"""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "robust_ssl"
author = "the robust_ssl authors"
project_copyright = f"2026, {author}"

extensions = [
    "autoapi.extension",
    "myst_nb",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "reference",
    "repository",
]
exclude_patterns = ["_templates"]
templates_path = ["_templates"]
# `Patch` in a docstring is a link where the site has such an object, and code where it has not.
default_role = "py:obj"

# Pages
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # tests/test_notebooks.py runs them
suppress_warnings = [
    "autoapi.python_import_resolution",  # of constants that are unpacked from a tuple
]

# API reference: each public package is one page of the names that it exports.
autoapi_dirs = ["../robust_ssl"]
autoapi_root = "api"
autoapi_add_toctree_entry = False
autoapi_options = ["members", "imported-members"]
autoapi_template_dir = "_templates/autoapi"
toc_object_entries_show_parents = "hide"
autoapi_member_order = "groupwise"
autoapi_python_class_content = "class"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

# Languages: docs/build says what is translated.
locale_dirs = ["locale"]
gettext_compact = False
gettext_location = False
if tags.has("translated"):  # noqa: F821  # Sphinx puts it here
    extensions = [name for name in extensions if name not in ("autoapi.extension", "reference")]
    exclude_patterns += ["api.md"]
    suppress_warnings += ["toc.not_readable"]  # of this one; the English build looks at all

# Looks
html_theme = "sphinx_book_theme"
html_title = "robust_ssl"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_sidebars = {
    "**": [
        "navbar-logo.html",
        "language.html",
        "search-button-field.html",
        "sbt-sidebar-nav.html",
    ]
}
html_show_sourcelink = False
html_theme_options = {
    # The address stands in one place.
    "repository_url": re.search(
        r'^HOME = "(.*)"', (HERE.parent / "setup.py").read_text(), re.MULTILINE
    )[1],
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_download_button": False,
    "navbar_persistent": [],
    "show_toc_level": 2,
}
copybutton_exclude = ".linenos, .gp, .go"
