"""A module as a page of the site: its prose on the left, its code on the right.

    ````{annotated} clip/attention.py
    :::{beside} MultiheadAttention.forward
    :line: weights = scores.softmax
    Prose of the page, joined to the line of that method which contains this text.
    :::
    ````

The file is cut into rows. A row begins where there is something to say: at a function or class, whose docstring and
whose `beside` stand next to it; at a comment that has its lines to itself; and at a `beside` with a line. What is said
moves to the left, so docstrings and such comments leave the code, and the line numbers show the gap. A comment behind
code, mostly a shape, stays where it is. Functions and classes get a heading, so that the page has a table of contents,
and every name an anchor, to which the role {source}`clip.attention.causal_mask` links from any page.
"""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from pydoc import locate

from docstrings import with_rubrics
from docutils import nodes
from docutils.parsers.rst import directives
from outline import Outline
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.roles import XRefRole
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parents[2]
FENCE = "`" * 10  # longer than any in a docstring


class beside(nodes.Element):
    """What a `beside` block says, until it stands in its row."""


class Beside(SphinxDirective):
    """The block ``:::{beside} NAME`` inside an `annotated` block; NAME is qualified, or ``module``."""

    required_arguments = 1
    has_content = True
    option_spec = {"line": directives.unchanged_required}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        return [beside("", *self.parse_content_to_nodes(), name=self.arguments[0], line=self.options.get("line"))]


class Annotated(SphinxDirective):
    """The block ``{annotated} PATH``: the module at PATH, seen from the root of the repository."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        path = ROOT / self.arguments[0]
        self.env.note_dependency(str(path))
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        self.env.ref_context["py:module"] = module  # :func:`causal_mask` in a docstring is the one of this module
        outline = Outline(path.read_text(encoding="utf-8"))
        anchors = self.anchors(module, outline)
        prose = self.prose(outline)

        opening = nodes.container("", *self.docstring(outline.opening), ids=[module], classes=["annotated-opening"])
        page = nodes.Element("", opening)
        open_sections = [page]
        for first, end in pairwise([*sorted({1, *outline.depths, *prose}), len(outline.lines) + 1]):
            if first in outline.depths:
                del open_sections[outline.depths[first] + 1 :]
            if first in outline.headings:
                name = outline.headings[first]
                title = nodes.title("", "", nodes.literal(text=name.split(".")[-1]))
                section = nodes.section("", title, ids=[anchors[name]])
                open_sections[-1] += section
                open_sections.append(section)
            code = code_html(outline, range(first, end), module, anchors)
            if code or first in prose:
                open_sections[-1] += nodes.container(
                    "",
                    nodes.container("", *prose.get(first, []), classes=["annotated-prose"]),
                    nodes.raw("", code, format="html"),
                    classes=["annotated-row"],
                )
        return page.children

    def anchors(self, module: str, outline: Outline) -> dict[str, str]:
        """The id of each name on this page: the name, behind its module's where the page has that id already."""
        ids = self.state.document.ids
        anchors = {name: f"{module.split('.')[-1]}.{name}" if name in ids else name for name in outline.spans}
        for name, anchor in anchors.items():
            ids[anchor] = self.state.document
            self.env.annotated[f"{module}.{name}"] = (self.env.docname, anchor)
        self.env.annotated[module] = (self.env.docname, module)
        return anchors

    def prose(self, outline: Outline) -> dict[int, list[nodes.Node]]:
        """First line of a row → what stands beside it: the page's own words, then the comment, then the docstring."""
        prose = defaultdict(list)
        for note in self.parse_content_to_nodes():
            if not isinstance(note, beside):
                raise self.error(f"an annotated block consists of `beside` blocks, got {note.astext()[:60]!r}")
            try:
                prose[outline.find(note["name"], note["line"])] += note.children
            except LookupError as error:
                raise self.error(f"{self.arguments[0]}: {error.args[0]}") from None
        for first, comment in outline.comments.items():
            prose[first] += self.parse_text_to_nodes(comment)
        for first, docstring in outline.docstrings.items():
            prose[first] += self.docstring(docstring)
        return prose

    def docstring(self, text: str) -> list[nodes.Node]:
        """A NumPy-style docstring as nodes; its sections get rubrics, because headings belong to the code."""
        return self.parse_text_to_nodes(f"{FENCE}{{eval-rst}}\n{with_rubrics(text)}\n{FENCE}")


def line_id(module: str, line: int) -> str:
    """The id of a line of code on the page, which may show several modules."""
    return f"{module.split('.')[-1]}-{line}"


def code_html(outline: Outline, lines: range, module: str, anchors: dict[str, str]) -> str:
    """The code among `lines`, each line numbered and linked to itself; "" if all of it is prose or blank."""
    shown = [line for line in lines if line not in outline.hidden]
    code = [line for line in shown if outline.lines[line - 1].strip()]
    if not code:
        return ""
    html = []
    for line in range(code[0], code[-1] + 1):
        if line in shown:
            text, here = outline.lines[line - 1], line_id(module, line)
            names = "".join(f'<span id="{anchors[name]}"></span>' for name in outline.assigned[line])
            html.append(
                f'<span class="line" id="{here}" style="--indent: {len(text) - len(text.lstrip())}ch">{names}'
                f'<a href="#{here}" data-line="{line}" aria-label="line {line}"></a>{outline.html[line - 1]}\n</span>'
            )
    return f'<div class="annotated-code highlight"><pre>{"".join(html)}</pre></div>'


def resolve_source(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Element | None:
    """Link the role `source` to where a name is annotated; a name that was imported, to where it comes from."""
    if node["reftype"] != "source":
        return None
    name = node["reftarget"]
    if name not in env.annotated and hasattr(found := locate(name), "__qualname__"):
        name = f"{found.__module__}.{found.__qualname__}"
    return make_refnode(app.builder, node["refdoc"], *env.annotated[name], text) if name in env.annotated else None


def forget(app: Sphinx, env: BuildEnvironment, page: str) -> None:
    """A page that is read anew defines its names anew."""
    env.annotated = {name: place for name, place in env.annotated.items() if place[0] != page}


def merge(app: Sphinx, env: BuildEnvironment, pages: list[str], other: BuildEnvironment) -> None:
    """Take over what another process has read."""
    env.annotated |= {name: place for name, place in other.annotated.items() if place[0] in pages}


def start(app: Sphinx) -> None:
    """The environment, which Sphinx keeps from build to build, maps each name to its page and its id there."""
    if not hasattr(app.env, "annotated"):
        app.env.annotated = {}


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("annotated", Annotated)
    app.add_directive("beside", Beside)
    app.add_role("source", XRefRole(warn_dangling=True))
    app.connect("builder-inited", start)
    app.connect("env-purge-doc", forget)
    app.connect("env-merge-info", merge)
    app.connect("missing-reference", resolve_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
