"""The site: `nox -s docs`. Pages are Markdown beside this file; references.py makes the rest from the code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import references

import drivetrain

project = "Drivetrain"
author = "The Drivetrain developers"
copyright = author
version = release = drivetrain.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]
myst_heading_anchors = 3
smartquotes = False  # 'ep' is what one types
default_role = "code"  # docstrings have single backticks
autodoc_typehints = "none"  # signatures of many arguments are for reading the source
napoleon_use_ivar = True  # attributes that a docstring describes are described once
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"Drivetrain {release}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]

# Links to other sites are followed, except without a network: LINKCHECK_OFFLINE=1.
linkcheck_ignore = [r"https?://"] if os.environ.get("LINKCHECK_OFFLINE") else []
linkcheck_timeout, linkcheck_retries = 30, 2
linkcheck_allowed_redirects = {r"https?://.*": r"https?://.*"}  # what leads on leads somewhere


def setup(app: Any) -> None:
    """Write the generated pages, and put the links of repository pages right."""
    app.connect("config-inited", lambda app, config: references.write(Path(app.srcdir) / "generated"))
    app.connect("source-read", references.fill)
