"""The page of `actvar demo`, by gradio. Nothing on it comes from another host."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from actvar.reports.demo.drawing import Drawing, Drawn
from actvar.reports.demo.subjects import ALL, Classes, Texts

HOST, PORT = "127.0.0.1", 7860
FONTS = ["system-ui", "sans-serif"]


def caption(drawn: Drawn) -> str:
    """Return the text below a picture, in Markdown."""
    first = f"**{drawn.title}**: {1e3 * drawn.seconds:.1f} ms"
    return "  \n".join([first, *drawn.lines])  # two spaces: a new line, not a new paragraph


def answers(drawing: Drawing, *values: Any) -> list[Any]:
    """Return pictures and texts in the order of the page, for the values of its controls.

    Args:
        drawing: draws the images.
        values: arguments of the request of the drawing's subject, then the position of the slider.

    Returns:
        a picture and a text for each way, then the picture of the updated tokens, or None, and a text about it.
    """
    *asked, stop = values
    found: list[Any] = []
    ways = drawing.draw(drawing.subject.request(*asked), drawing.stops[int(stop)])
    for drawn in ways:
        found += [drawn.picture, caption(drawn)]
    tinted = ways[-1].tinted
    about = "All blocks update all tokens." if tinted is None else "The stronger the tint, the more blocks updated it."
    return [*found, tinted, f"**updated tokens**: {about}"]


def page(drawing: Drawing, title: str) -> Any:
    """Return the page as `gradio.Blocks`.

    Args:
        drawing: draws the images.
        title: of the page.

    Raises:
        ImportError: gradio is not installed.
    """
    gr = _gradio()

    def about(stop: float) -> str:
        name = drawing.stops[int(stop)]
        return f"**{name}**: {'; '.join(drawing.describe(name).splitlines())}"

    def draw(*values: Any) -> list[Any]:
        try:
            found = answers(drawing, *values)
        except (TypeError, ValueError, OSError, ImportError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        found[-2] = gr.Image(found[-2], visible=found[-2] is not None)
        return found

    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}\nThe same seed in three ways. Each is drawn twice, and the second time counts.")
        with gr.Row():
            asked = _controls(gr, drawing.subject)
            last = len(drawing.stops) - 1
            stops = ", ".join(f"{number}: {name}" for number, name in enumerate(drawing.stops))
            first = drawing.stops.index("near") if "near" in drawing.stops else last
            stop = gr.Slider(0, last, value=first, step=1, label="preset", info=stops)
        chosen = gr.Markdown(about(first))
        button = gr.Button("Draw", variant="primary")
        outputs: list[Any] = []
        with gr.Row():
            for name in ("dense", "accelerated", "preset", "updated tokens"):
                with gr.Column(min_width=240):
                    picture = gr.Image(
                        label=name, show_label=False, interactive=False, buttons=["fullscreen", "download"]
                    )
                    outputs += [picture, gr.Markdown()]
        controls = [*asked, stop]
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}
        button.click(draw, controls, outputs, api_name="draw", **one_at_a_time)
        stop.change(about, stop, chosen, api_name="about", **one_at_a_time)
    return blocks


def _controls(gr: Any, subject: Classes | Texts) -> list[Any]:
    """Put the controls on the page whose values are the arguments of the subject's request, and return them."""
    if isinstance(subject, Classes):
        what = [gr.Dropdown([ALL, *subject.names], value=ALL, label="class")]
    else:
        aspects, first = subject.aspects, subject.first
        what = [
            gr.Textbox("\n".join(first.prompts), lines=3, label="prompts, one in each line"),
            gr.Dropdown(aspects, value=aspects[0] if aspects else None, label="aspect", visible=bool(aspects)),
            gr.Slider(0.1, 2, value=first.tau, step=0.1, label="temperature"),
        ]
    seed = gr.Number(0, label="seed", precision=0)
    return [*what, seed, gr.Slider(0, 8, value=subject.first.cfg, step=0.1, label="guidance")]


def serve(drawing: Drawing, title: str, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        drawing, title: as in `page`.
        host: address to listen on; `HOST` is for this machine alone.
        port: number of the port.

    Raises:
        ImportError: gradio is not installed.
        OSError: the port is taken.
    """
    blocks, gr = page(drawing, title), _gradio()
    theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
    blocks.launch(server_name=host, server_port=port, share=False, quiet=True, theme=theme, footer_links=[])


def _gradio() -> Any:
    """Return the module, or raise an ImportError that says what to install."""
    try:
        return import_module("gradio")
    except ImportError as error:
        raise ImportError(f"{error}; install what the page needs: pip install 'actvar[demo]'") from error
