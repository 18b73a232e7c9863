"""Self-contained HTML pages: one style for light, dark and print, nothing fetched from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from confide.privacy.files import write_atomically

__all__ = ["write_page"]


def write_page(template: Path, context: dict[str, Any], path: Path, *, mode: int = 0o644) -> None:
    """Render a Jinja template (everything escaped) with the common style, and write it atomically.

    Raises:
        OSError: The page cannot be written.
    """
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    rendered = environment.from_string(template.read_text(encoding="utf-8"))
    # Markup: the style sheet is part of this package.
    write_atomically(path, rendered.render({**context, "css": Markup(css)}).encode(), mode=mode)  # noqa: S704
