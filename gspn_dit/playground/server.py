"""The playground's server: its page, and those of the runs, for this machine alone unless another host is named."""

from __future__ import annotations

import html
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_dit.checkpoint import is_builtin
from gspn_dit.errors import UserError
from gspn_dit.playground.page import CSS, build_page, import_gradio
from gspn_dit.playground.sources import Source

# What the page may load: nothing that does not come from here. Gradio's own scripts are inline and compile others.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'"
)


def run_pages(checkpoints: Sequence[str]) -> list[tuple[str, Path]]:
    """Return (title, file) of the run page and the report of each checkpoint's run, where they were written."""
    found = []
    for checkpoint in dict.fromkeys(checkpoints):
        place = Path(checkpoint).resolve()
        run = place.parent.parent if place.parent.name == "checkpoints" else place
        for title, file in (("run", run / "index.html"), ("report", run / "report" / "index.html")):
            if not is_builtin(checkpoint) and file.is_file():
                found.append((f"{run.name}: {title}", file))
    return found


def create_app(sources: Sequence[Source], pages: Sequence[tuple[str, Path]], folder: Path) -> Any:
    """Return the ASGI application, with the pages of runs at /pages/0, /pages/1, …"""
    gr = import_gradio()
    from fastapi import FastAPI, Request
    from fastapi.responses import FileResponse

    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def from_here_alone(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CONTENT_POLICY
        return response

    for number, (_, file) in enumerate(pages):
        app.add_api_route(f"/pages/{number}", lambda file=file: FileResponse(file, media_type="text/html"))
    links = [(html.escape(title), f"/pages/{number}") for number, (title, _) in enumerate(pages)]
    page = build_page(sources, links, folder)
    page.queue(api_open=False)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(app, page, "/", theme=theme, css=CSS, ssr_mode=False, allowed_paths=[str(folder)])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; raises UserError where it cannot. Port 0 is a free one."""
    try:
        return socket.create_server((host, port), reuse_port=False)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; give another --port or --host") from None


def serve(sources: Sequence[Source], pages: Sequence[tuple[str, Path]], host: str, port: int) -> None:
    """Serve the page until a signal asks to end. Raises UserError where nothing can be served there."""
    import_gradio()
    import uvicorn

    with listen(host, port) as server, tempfile.TemporaryDirectory(prefix="gspn-playground-") as folder:
        app = create_app(sources, pages, Path(folder))
        print(f"open http://{host}:{server.getsockname()[1]} in a browser; Ctrl-C stops", flush=True)
        # An open page keeps a connection, for whose end the server would wait.
        settings = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        uvicorn.Server(settings).run([server])
