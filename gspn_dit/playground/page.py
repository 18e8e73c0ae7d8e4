"""The playground's page, of Gradio's components."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.errors import UserError
from gspn_dit.playground.drawing import drawings, read_settings, write_files
from gspn_dit.playground.sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image

FIRST_CLASSES = 10
"""Chosen when the page opens."""
CACHE_SECONDS = (600, 3600)
"""How often Gradio's copies of pictures are looked at, and their age when they are deleted."""
CSS = """
.gradio-container { max-width: 90rem !important; margin: auto; }
.picture img { image-rendering: pixelated; }
.picture .image-container { padding-top: 2.3rem; }
footer { display: none !important; }
"""


def import_gradio() -> Any:
    """Return Gradio, told to report nothing to anybody; raises UserError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the playground needs Gradio ({error}); pip install 'gspn-dit[playground]'") from None
    return gradio


def build_page(sources: Sequence[Source], links: Sequence[tuple[str, str]], folder: Path) -> Any:
    """Return the page, a `gradio.Blocks`.

    Args:
        sources: what can draw; the first one is loaded now, and chosen when the page opens.
        links: (title, address) of pages that can be opened from this one.
        folder: where files are written that can be downloaded.
    """
    gr = import_gradio()
    subject, titles = sources[0].subject, _different_titles(sources)
    with gr.Blocks(title="GSPN-DiT playground", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.Markdown("# GSPN-DiT playground")
        gr.HTML(" · ".join(f'<a href="{address}" target="_blank">{title}</a>' for title, address in links))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                subjects = _subject_input(gr, sources[0].class_names)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", min_width=100, elem_id="draw")
                    stop = gr.Button("Stop", min_width=100, elem_id="stop")
                chosen = gr.CheckboxGroup(titles, value=titles[:1], label="Weights", visible=len(titles) > 1)
                per_subject = gr.Slider(1, 16, value=6, step=1, label=f"Images per {subject}")
                guidance = gr.Slider(0, 10, value=1.5, step=0.1, label="Guidance (1: none)")
                steps = gr.Slider(1, 250, value=30, step=1, label="Steps")
                seed = gr.Number(0, precision=0, label="Seed")
                with gr.Accordion("Size", open=False, visible=sources[0].any_size), gr.Row():
                    height = gr.Number(0, precision=0, label="Height (0: as trained)", min_width=100)
                    width = gr.Number(0, precision=0, label="Width (0: as trained)", min_width=100)
            with gr.Column(scale=3):
                state = gr.Markdown("Press **Draw**.", elem_id="state")
                with gr.Row():
                    pictures = [_picture(gr, number, title) for number, title in enumerate(titles)]
                with gr.Row():
                    files = [
                        gr.DownloadButton(f"Download the {name}", interactive=False, elem_id=name)
                        for name in ("grid", "settings")
                    ]

        def draw(names: Any, weights: list[str], *values: Any) -> Iterator[dict[Any, Any]]:
            """Yield updates of the components while the pictures form."""
            try:
                settings = read_settings(names, *values)
                picked = [number for number, title in enumerate(titles) if title in weights]
                if not picked:
                    raise UserError("there is nothing to draw with; choose some weights")
                yield {
                    state: "Loading …",
                    **{picture: gr.update(value=None, visible=n in picked) for n, picture in enumerate(pictures)},
                    **{button: gr.update(interactive=False) for button in files},
                }
                grids: dict[str, Image] = {}
                for place, step, grid in drawings([sources[number] for number in picked], settings):
                    title = titles[picked[place]]
                    grids[title] = grid
                    yield {pictures[picked[place]]: grid, state: f"{title}: step {step} of {settings.steps}"}
                paths = write_files(folder, settings, [sources[number] for number in picked], grids)
                yield {
                    state: f"{len(settings.rows)} images, seed {settings.seed}, {settings.steps} steps",
                    **{button: gr.update(value=path, interactive=True) for button, path in zip(files, paths)},
                }
            except (UserError, ValueError) as error:
                yield {state: "Nothing was drawn."}
                raise gr.Error(str(error), duration=None, title="This cannot be drawn", print_exception=False) from None

        inputs, outputs = [subjects, chosen, per_subject, seed, guidance, steps, height, width], [*pictures, *files]
        # One drawing at a time: beside another it would be no faster.
        asked = start.click(lambda: "Waiting …", None, state, queue=False, show_progress="hidden")
        drawing = asked.then(draw, inputs, [state, *outputs], show_progress="hidden", concurrency_limit=1)
        stop.click(lambda: "Stopped.", None, state, cancels=[drawing], show_progress="hidden")
    return page


def _subject_input(gr: Any, class_names: list[str]) -> Any:
    if not class_names:
        return gr.Textbox(lines=3, label="Prompts, one a line", elem_id="subjects")
    first = class_names[:FIRST_CLASSES]
    return gr.Dropdown(class_names, value=first, multiselect=True, label="Classes", elem_id="subjects")


def _picture(gr: Any, number: int, title: str) -> Any:
    return gr.Image(
        label=title,
        visible=number == 0,
        interactive=False,
        format="png",
        elem_id=f"picture-{number}",
        elem_classes="picture",
        buttons=["download", "fullscreen"],
    )


def _different_titles(sources: Sequence[Source]) -> list[str]:
    """Return a title for each source; where runs share a name it is their path that tells them apart."""
    count = Counter(source.title for source in sources)
    return [source.title if count[source.title] == 1 else source.long_title for source in sources]
