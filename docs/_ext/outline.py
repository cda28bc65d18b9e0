"""What is where in a module: its definitions, docstrings and comments, by line."""

import ast
import tokenize
from collections import defaultdict
from io import StringIO
from itertools import pairwise

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Outline:
    """What is where in a module. Lines are counted from 1, as editors do.

    Attributes
    ----------
    lines, html : list of str
        The file's lines, plain and coloured.
    opening : str
        The module's docstring.
    spans : dict
        Qualified name of a function, class or assignment → its first line, from the comment above it on, and its last.
    headings : dict
        First line of a function or class → its name.
    depths : dict
        First line of what begins a row by itself → 0 if it stands in the module, 1 if in a class, and so on.
    comments, docstrings : dict
        First line of a row → text.
    assigned : dict
        Line of an assignment → the names it gives.
    hidden : set of int
        The lines of comments and docstrings.
    """

    def __init__(self, source: str):
        self.lines = source.splitlines()
        self.html = highlight(source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).splitlines()
        self.spans: dict[str, tuple[int, int]] = {}
        self.headings: dict[int, str] = {}
        self.depths: dict[int, int] = {}
        self.comments: dict[int, str] = {}
        self.docstrings: dict[int, str] = {}
        self.assigned: dict[int, list[str]] = defaultdict(list)
        self.hidden: set[int] = set()
        self._below_comment: dict[int, int] = {}  # the line after a comment → the comment's first
        for block in self._comment_blocks(source):
            text = [self.lines[line - 1].strip().removeprefix("#").removeprefix(" ") for line in block]
            self.comments[block[0]] = "\n".join(text)
            self.hidden.update(block)
            self._below_comment[block[-1] + 1] = block[0]
        tree = ast.parse(source)
        self.opening = self._take_docstring(tree)
        self._walk(tree.body)

    def find(self, name: str, text: str | None) -> int:
        """The first line of `name`, or its one line of code that contains `text`; LookupError if there is none."""
        if name != "module" and name not in self.spans:
            raise LookupError(f"no {name!r} in this module; it has {', '.join(self.spans)}")
        first, last = self.spans.get(name, (1, len(self.lines)))
        code = [line for line in range(first, last + 1) if line not in self.hidden and self.lines[line - 1]]
        if text is None:
            return first if name in self.spans else code[0]
        found = [line for line in code if text in self.lines[line - 1]]
        if len(found) != 1:
            raise LookupError(f"expected one line of code of {name!r} with {text!r}, found {len(found)}")
        return found[0]

    def _comment_blocks(self, source: str) -> list[list[int]]:
        """The lines that hold nothing but a comment, neighbours together."""
        blocks: list[list[int]] = []
        for token in tokenize.generate_tokens(StringIO(source).readline):
            line = token.start[0]
            if token.type == tokenize.COMMENT and self.lines[line - 1].strip() == token.string:
                if blocks and blocks[-1][-1] == line - 1:
                    blocks[-1].append(line)
                else:
                    blocks.append([line])
        return blocks

    def _take_docstring(self, node: ast.AST) -> str:
        """The docstring of a module, class or function, whose lines are hidden from now on."""
        docstring = ast.get_docstring(node) or ""
        if docstring:
            self.hidden.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        return docstring

    def _walk(self, body: list[ast.stmt], owner: tuple[str, ...] = ()) -> None:
        """Note what the statements of a module or class define, and which of them begin a row."""
        for before, node in pairwise([None, *body]):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            first = self._below_comment.get(first, first)
            if isinstance(node, DEFINITIONS) or isinstance(before, DEFINITIONS):
                self.depths[first] = len(owner)
            for name in defined_names(node):
                qualified = ".".join((*owner, name))
                if qualified in self.spans:  # a setter after its getter, a name assigned anew
                    continue
                self.spans[qualified] = (first, node.end_lineno)
                if isinstance(node, DEFINITIONS):
                    self.headings[first] = qualified
                else:
                    self.assigned[node.lineno].append(qualified)
            if isinstance(node, DEFINITIONS) and (docstring := self._take_docstring(node)):
                self.docstrings[first] = docstring
            if isinstance(node, ast.ClassDef):
                self._walk(node.body, (*owner, node.name))


def defined_names(node: ast.stmt) -> list[str]:
    """The names that a function, a class or an assignment gives; none for other statements."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=[ast.Tuple(elts=targets)]) | ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []
