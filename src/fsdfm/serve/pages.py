"""Pages that bring their own script and style, and may load nothing else."""

from __future__ import annotations

import base64
import re
from importlib import resources

from fastapi.responses import Response

from fsdfm.core.files import digest
from fsdfm.generate.trace import with_look


def page_of(name: str) -> Response:
    """A page of ours, which may use its own script and style, this server, and nothing else.

    Args:
        name: of its file in this package.
    """
    html = with_look((resources.files("fsdfm.serve") / name).read_text("utf-8"))
    rules = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"]
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        allowed = base64.b64encode(bytes.fromhex(digest([inside]))).decode()
        rules.append(f"{tag}-src 'sha256-{allowed}'")
    headers = {
        "Content-Security-Policy": "; ".join([*rules, "frame-ancestors 'none'"]),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(html, headers=headers, media_type="text/html")
