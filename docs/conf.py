"""The site. From the root of the repository:

    pip install -e .[docs]
    sphinx-build -W --keep-going -c docs . docs/_build/html

The root is also the folder that Sphinx reads, so that README.md, docs/ and examples/ link to each other by the paths
that work on GitHub. Nothing on the site is fetched from elsewhere: mathematics is set by the KaTeX in _static/katex.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "clip"
author = "the authors of clip"
copyright = f"{author}, MIT licence"
root_doc = "docs/index"
include_patterns = ["*.md", "benchmarks/README.md", "docs/**.md", "docs/gallery_run/*.rst", "examples/**.md"]
exclude_patterns = [
    *(".*", "**/.venv", "build", "data", "dist", "runs"),
    *("docs/_build", "docs/gallery", "examples/pictures"),
]

extensions = [
    "annotated",
    "docstrings",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.katex",
]

# Markdown, and the cells in it, which run when the site is built; one that fails, fails the build
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "auto"
nb_execution_timeout = 300  # seconds a cell
nb_merge_streams = True

# Docstrings
default_role = "py:obj"
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
highlight_language = "none"  # of the pictures in docstrings; doctests are coloured all the same

sphinx_gallery_conf = {
    "examples_dirs": "docs/gallery",
    "gallery_dirs": "docs/gallery_run",
    "filename_pattern": r"\.py$",
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "show_signature": False,
    "within_subsection_order": "gallery.ReadingOrder",
}

katex_css_path = "katex/katex.min.css"  # the scripts come with the extension

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "clip"
html_static_path = ["_static"]
html_extra_path = ["_extra"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # a summary has to be fetched, which a page opened from disk may not do
html_theme_options = {"navigation_with_keys": True}
