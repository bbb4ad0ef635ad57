"""Sphinx: the pages are Markdown, the reference is made from docstrings, and nothing is fetched from the network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import fasthyper

project = "fasthyper"
author = "The fasthyper authors"
copyright = author
version = release = fasthyper.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "py:obj"  # a name between single backticks in a docstring is a link where there is something to link to

autodoc_member_order = "bysource"
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
    name: f"{module}.{name}"
    for module, names in (("fasthyper.nn", fasthyper.nn.__all__), ("fasthyper", fasthyper.__all__))
    for name in names
}
"""Public names that a page or a docstring may write without their module."""


class LinkNames(SphinxTransform):
    """Turn inline code that is a documented name, such as `HyperLinear` or `torch.compile`, into a link."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Wrap each such literal in a reference, which stays plain code where nothing is found."""
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().removesuffix("()").removeprefix("@")
            target = LINKED.get(name, name)
            inside = (nodes.reference, nodes.title, addnodes.pending_xref)
            if target.startswith(("fasthyper.", "torch.")) and not isinstance(literal.parent, inside):
                reference = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=target, refexplicit=False, refwarn=False
                )
                reference["refdoc"] = self.env.docname
                literal.replace_self(reference)
                reference += literal


def use_public_name(app: Sphinx, env: Any, node: addnodes.pending_xref, content: Any) -> None:
    """Look up a class of torch by its public name: signatures have that of the module in which it is defined."""
    target = node.get("reftarget", "")
    if target.startswith("torch.nn.modules."):
        node["reftarget"] = f"torch.nn.{target.rpartition('.')[2]}"


def setup(app: Sphinx) -> None:
    """Register both."""
    app.add_transform(LinkNames)
    app.connect("missing-reference", use_public_name, priority=400)  # before intersphinx, which has 500
