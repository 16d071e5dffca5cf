"""The page of ``make demo``, laid out with Gradio; ``demo_model`` starts it in the page's own environment.

``python -m experiments.demo_page FD HOST PORT``: FD is this side of the pair that the model answers on. Here
is no logic: what is shown comes from ``demo_desk`` through ``demo_link``, as markup from ``demo_html``. The
page loads nothing from elsewhere, and its own headers forbid it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

# Before Gradio is imported: it reads them once.
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
}  # fmt: skip

try:
    import gradio as gr
    from starlette.middleware import Middleware
except ImportError as missing:
    sys.exit(
        f"error: {sys.executable} has no Gradio ({missing}): make demo makes an environment that has it"
    )

from experiments import demo_html
from experiments.demo_link import Link, RefusedError

USER, OWN = "A user of the data", "A history of my own"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'self'"
)
CLICKED = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-item]");
  if (button) trigger("click", {item: button.dataset.item});
});
"""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}


class OwnPolicy:
    """Answers carry a policy by which browsers load nothing from elsewhere."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self.app(scope, receive, told)


class Page:
    """The layout.

    Args:
        ask: the model's process.
    """

    def __init__(self, ask: Callable[..., Any]) -> None:
        self.ask, self.about = ask, ask("about")

    def blocks(self) -> gr.Blocks:
        """All of it."""
        about = self.about
        with gr.Blocks(title=f"{about['experiment']}", analytics_enabled=False) as page:
            gr.HTML(demo_html.head(about), js_on_load=None)
            items = gr.State([])
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=300):
                    self._choices()
                with gr.Column(scale=3, min_width=320):
                    self.shown = gr.HTML(js_on_load=None, elem_id="answer", min_height=200)
            self._connect(page, items)
        return page

    def _choices(self) -> None:
        """What one picks, on the left."""
        about = self.about
        first = about["first_users"]
        self.whose = gr.Radio(
            [USER, OWN], value=USER, label="Whose history", visible=about["histories"], elem_id="whose"
        )  # fmt: skip
        with gr.Column(visible=True) as self.of_user:
            self.user = gr.Dropdown(
                first, value=first[0], label="User (pick one, or type an id)", allow_custom_value=True,
                elem_id="user",
            )  # fmt: skip
            with gr.Row():
                self.another = gr.Button(
                    "Somebody else", size="sm", min_width=100, elem_id="another"
                )
                self.change = gr.Button(
                    "Change this history", size="sm", min_width=100, visible=about["histories"],
                    elem_id="change",
                )  # fmt: skip
        with gr.Column(visible=False) as self.of_own:
            self.search = gr.Textbox(
                label="Search titles",
                max_length=100,
                placeholder="part of a title",
                elem_id="search",
            )
            self.found = gr.HTML(js_on_load=CLICKED, elem_id="found")
            self.chosen = gr.HTML(demo_html.chosen([]), js_on_load=CLICKED, elem_id="chosen")
            self.clear = gr.Button("Start anew", size="sm", elem_id="clear")
        with gr.Column(visible=about["requests"]):
            self.words = gr.Textbox(
                label="What are you looking for? (Enter asks)", max_length=about["request_letters"],
                placeholder="something light for the evening", elem_id="request",
            )  # fmt: skip
        self.k = gr.Slider(1, about["most"], value=10, step=1, label="Items of a list", elem_id="k")
        self.unseen = gr.Checkbox(True, label="Leave out what the history holds", elem_id="unseen")

    def _connect(self, page: gr.Blocks, items: gr.State) -> None:
        """What happens when something is picked."""
        asked = [self.whose, self.user, items, self.k, self.words, self.unseen]
        look: dict[str, Any] = {"fn": self.look, "inputs": asked, "outputs": self.shown, **PRIVATE}
        page.load(**look)
        changes = [self.user.change, self.k.change, self.unseen.change, self.words.submit]
        gr.on(changes, **look, trigger_mode="always_last")
        self.whose.change(
            lambda whose: (gr.Group(visible=whose == USER), gr.Group(visible=whose == OWN)),
            self.whose, [self.of_user, self.of_own], **PRIVATE,
        ).then(**look)  # fmt: skip
        self.another.click(self.somebody, None, self.user, **PRIVATE)
        self.search.input(
            self.find, self.search, self.found, **{**PRIVATE, "show_progress": "hidden"},
            trigger_mode="always_last",
        )  # fmt: skip
        history = [items, self.chosen]
        self.found.click(self.add, items, history, **PRIVATE).then(**look)
        self.chosen.click(self.take_out, items, history, **PRIVATE).then(**look)
        self.clear.click(lambda: self._kept([]), None, history, **PRIVATE).then(**look)
        self.change.click(self.copied, self.user, [*history, self.whose], **PRIVATE)

    # What is answered ------------------------------------------------------------------------------------

    def look(
        self, whose: str, user: str | None, items: list[str], k: float, words: str, unseen: bool
    ) -> str:
        """The right side."""
        own = whose == OWN and self.about["histories"]
        if own and not items:
            return demo_html.notice(
                "Build a history on the left: search titles, and click what to add."
            )
        who = {"history": items} if own else {"user": user or ""}
        request = words if self.about["requests"] else ""
        try:
            view = self.ask("look", **who, k=int(k), request=request or "", keep_seen=not unseen)
        except RefusedError as error:
            return demo_html.notice(str(error))
        return demo_html.answer(view)

    def find(self, words: str) -> str:
        """Titles like some words."""
        return demo_html.found(self.ask("find", words=words), words)

    def somebody(self) -> str:
        """Another user, drawn at random."""
        user: str = self.ask("somebody", number=int.from_bytes(os.urandom(4), "big"))
        return user

    def add(self, items: list[str], event: gr.EventData) -> tuple[list[str], str]:
        """One more item behind a history."""
        return self._kept([*items, str(event.item)])

    def take_out(self, items: list[str], event: gr.EventData) -> tuple[list[str], str]:
        """A history without one."""
        return self._kept([item for item in items if item != str(event.item)])

    def copied(self, user: str | None) -> tuple[list[str], str, Any]:
        """A user's history as one's own, to be changed."""
        try:
            items = self.ask("history", user=user or "")
        except RefusedError:
            items = []
        return *self._kept(items), OWN

    def _kept(self, items: list[str]) -> tuple[list[str], str]:
        try:
            items = list(dict.fromkeys(items))
            return items, demo_html.chosen(self.ask("cards", items=items))
        except RefusedError as error:
            return [], demo_html.notice(str(error))


def main(descriptor: str, host: str, port: str) -> int:
    """Serve the page until the model's process ends."""
    link = Link(socket.socket(fileno=int(descriptor)), lambda: os._exit(0))
    theme = gr.themes.Default(
        primary_hue="blue", font=FONTS, font_mono=("ui-monospace", "monospace")
    )
    page = Page(link).blocks()
    page.queue(default_concurrency_limit=8, max_size=64)
    try:
        page.launch(
            server_name=host, server_port=int(port), share=False, quiet=True, inbrowser=False, theme=theme,
            css=demo_html.STYLE, footer_links=[], pwa=False, ssr_mode=False, mcp_server=False,
            max_file_size=1, allowed_paths=[], prevent_thread_lock=True, enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(OwnPolicy)]},
        )  # fmt: skip
    except OSError as error:
        print(f"error: {host}:{port} cannot be served: {error}", file=sys.stderr)  # noqa: T201
        return 2
    link("ready")
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
