"""Sphinx: the pages are Markdown, the reference is made from docstrings, and nothing is fetched from the network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import fasthyper
import fasthyper.experiments

project = "fasthyper"
author = "The fasthyper authors"
copyright = author
version = release = fasthyper.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "py:obj"  # a name between single backticks in a docstring is a link if it is documented

napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100

# The names of other projects that the pages and docstrings use, and where they are documented: version 1 of Sphinx's
# inventories, which is plain text.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", "inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable/", "inventories/torch.inv"),
}

html_theme = "furo"
html_title = f"fasthyper {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

LINKED = {
    name: f"{module.__name__}.{name}"
    for module in (fasthyper.experiments, fasthyper.nn, fasthyper)
    for name in module.__all__
}
"""Public names that a page or a docstring may write without their module."""


class LinkNames(SphinxTransform):
    """Turn inline code that is a documented name, such as `HyperLinear` or `torch.compile`, into a link."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Wrap each such literal in a reference; it stays plain code if its target is not found."""
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().removesuffix("()")
            target = public(name)
            inside = (nodes.reference, nodes.title, addnodes.pending_xref)
            if target.startswith(("fasthyper.", "torch.")) and not isinstance(literal.parent, inside):
                reference = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=target, refexplicit=False, refwarn=False
                )
                reference["refdoc"] = self.env.docname
                literal.replace_self(reference)
                reference += literal


class TrimExamples(SphinxTransform):
    """Drop the empty line at the end of an example in Markdown; it is there because doctest needs it."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Trim each block of code."""
        for block in self.document.findall(nodes.literal_block):
            block.children = [nodes.Text(block.astext().rstrip())]
            block.rawsource = block.astext()


def public(name: str) -> str:
    """Return the full name of an object in our reference, or in torch's."""
    first, dot, rest = name.partition(".")
    if name.startswith("torch.nn.modules."):  # where it is defined, as signatures have it
        return f"torch.nn.{name.rpartition('.')[2]}"
    return f"torch.{name}" if first == "nn" and dot else LINKED.get(first, first) + dot + rest


def resolve(app: Sphinx, env: Any, node: addnodes.pending_xref, content: Any) -> Any:
    """Resolve a reference by its public name; intersphinx then resolves those of torch."""
    node["reftarget"] = target = public(node.get("reftarget", ""))
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def mark_up(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Change the lines of a docstring that napoleon and reStructuredText would read in another sense.

    An indented formula is code, not a quotation. "I." is the size I, not the first item of a list. The description of
    a result or of an attribute may contain a colon; the words before it are not a type. A name may be followed by the
    letter s.
    """
    found: list[str] = []
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        in_section = any(re.fullmatch(r"\w+:", earlier) for earlier in found)
        if line.startswith("    ") and not before.strip() and not in_section:
            inside = bool(found) and next((t for t in reversed(found) if t.strip()), "").startswith("    ")
            found += [] if inside else ["::", ""]
        if (before.strip() == "Returns:" or (what == "attribute" and not number)) and ": " in line:
            line = re.sub(r"^(\s*)", r"\1: ", line)
        line = re.sub(r"(?<!`)`([^`]+)`(?=\w)", r"`\1`\\ ", line)
        found.append(re.sub(r"^(\s+\w+: )([A-Z])(?=[.,])", r"\1\\\2", line))
    lines[:] = found


def shorten(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any) -> Any:
    """Leave out defaults that have no literal, such as `<factory>`: Sphinx could not read the signature."""
    return (re.sub(r"<[^<>]*>", "...", signature), returns) if signature else None


def setup(app: Sphinx) -> None:
    """Register the transforms and the handlers of events."""
    app.add_transform(LinkNames)
    app.add_transform(TrimExamples)
    app.connect("autodoc-process-docstring", mark_up, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten)
    app.connect("missing-reference", resolve, priority=400)  # before intersphinx, which has 500
