"""HTML pages that are one file each, need no network, and have a table that can be sorted and filtered."""

from __future__ import annotations

import base64
import math
from pathlib import Path

import jinja2

FOLDER = Path(__file__).with_name("pages")
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}


def template(name: str) -> jinja2.Template:
    """One of `pages/`, with the filter `number`, that escapes what it is given and fails on a name it was not given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    return environment.get_template(name)


def number(value: float | None, digits: int = 0) -> str:
    """A number with that many decimals and commas between thousands; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def data_uri(path: Path) -> str:
    """A picture as the text that a page holds it in."""
    return f"data:{MEDIA[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
