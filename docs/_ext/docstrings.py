"""Our docstrings as reStructuredText, on the annotated pages and in the API reference.

They are written to be read in the source: pictures and equations stand indented and nothing announces them, and an
asterisk is an asterisk. Sphinx wants to be told.
"""

import re
from textwrap import indent as indented

from sphinx.application import Sphinx

MARKUP = re.compile(
    r"(?P<markup>``.+?``|`[^`]+`|\*{1,2}\w[^*]*\*{1,2})"  # what is meant as markup
    r"|[*|]|(?<=\w)_(?!\w)|\b[A-Za-z](?=\.(?:\s|$))",  # what only looks like it: "D." is the item of no list
    re.DOTALL,
)


def restructured(docstring: str) -> str:
    """A docstring as reStructuredText: pictures become literal blocks, and what only looks like markup is escaped.

    A picture is a paragraph that stands indented by itself, has lines drawn in it, or is a table.

    >>> print(restructured("The rule of *all* `Merge`s:\\n\\n    a * b"))
    The rule of *all* `Merge`\\ s:
    <BLANKLINE>
    ::
    <BLANKLINE>
        a * b
    """
    paragraphs: list[str] = []
    around, in_picture = 0, False  # indentation of the text that pictures stand in
    for paragraph in re.split(r"\n(?:[ ]*\n)+", docstring):
        indent = len(paragraph) - len(paragraph.lstrip())
        goes_on = in_picture and indent > around
        in_picture = goes_on or indent >= around + 4 or bool(re.search(r"[│┌┐└┘├─→]\s{2}|^\s*\|", paragraph))
        if in_picture:
            paragraphs += [] if goes_on else [" " * around + "::"]
            paragraphs.append(paragraph if indent > around else indented(paragraph, "    "))
        elif paragraph.lstrip().startswith(">>>"):
            paragraphs.append(paragraph)
        else:
            last = paragraph.rpartition("\n")[2]
            around = len(last) - len(last.lstrip())
            paragraphs.append(re.sub(r"^(\s.*)\n(?=\S)", r"\1\n\n", MARKUP.sub(escaped, paragraph), flags=re.MULTILINE))
    return "\n\n".join(paragraphs)


def escaped(match: re.Match) -> str:
    """Markup as it is, with a joint before a letter that follows it directly; other characters with a backslash."""
    if match["markup"]:
        return match["markup"] + ("\\ " if match.string[match.end() :][:1].isalnum() else "")
    return "\\" + match[0]


def with_rubrics(docstring: str) -> str:
    """The same, and NumPy-style sections as rubrics with definition lists, where headings belong to the code."""
    text = re.sub(r"^(\w.*)\n-{3,}$", r".. rubric:: \1\n", restructured(docstring), flags=re.MULTILINE)
    # a name without description gets an empty comment for one
    return re.sub(r"^(\w[\w, ]* : .+)$(?!\n +\S)\n?", r"\1\n    ..\n\n", text, flags=re.MULTILINE)


def restructure(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """In the API reference, where napoleon then takes care of the sections."""
    lines[:] = [*restructured("\n".join(lines)).splitlines(), ""]


def link_source(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """From the API reference to the code."""
    if what in ("class", "exception", "function"):
        lines += ["", f":source:`Annotated source <{found.__module__}.{found.__qualname__}>`", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", restructure, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", link_source, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
