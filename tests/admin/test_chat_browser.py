"""The chat page in a real browser, with a real node: answers, their end, what goes wrong, and a restart.

What the browser showed is kept in ``build/dashboard/``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import trio
from admin_support import asking, free_port, served, until
from browser_support import IN_BROWSER, PHONE, TOKEN, Look, in_browser, tcp_config
from node_support import running_node
from starlette.responses import StreamingResponse

from kwaainet_bridge.admin_address import TcpAddress
from kwaainet_bridge.errors import NetworkError
from kwaainet_bridge.node.openai import answers
from kwaainet_bridge.node.openai.sharing import SharedApp
from kwaainet_bridge.node.state import NodeState, Phase

AUSTEN = Path(__file__).parents[2] / "src" / "kwaainet_bridge" / "models" / "austen"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
FIRST, SECOND = "Who is Mr. Bennet?", "And his wife?"

pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> str:
    """The embedded model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(AUSTEN, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return str(folder)


def chat_config(folder: Path, model: str, **more):
    """A node with all of the model, whose endpoint listens beside the admin side."""
    section = {"name": model, "dht_prefix": "chatty", "throughput": 1.0, "threads": 1, "blocks": "0:8"}
    openai = {"listen": f"127.0.0.1:{free_port()}"} | more
    return tcp_config(folder, "node", model=section, openai=openai)


class Chat(Look):
    """The chat page."""

    def __init__(self, started, address: TcpAddress, **options) -> None:
        super().__init__(started, address, path="/chat", **options)

    def set(self, *, most: int, temperature: float = 0) -> None:
        self.page.fill("#temperature", str(temperature))
        self.page.fill("#most", str(most))

    def say(self, text: str) -> None:
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button).click()

    def answer(self, n: int = -1) -> str:
        """All that was answered, exactly."""
        return self.page.locator(".answer").nth(n).evaluate("e => e.textContent")

    def begins(self, turn: int) -> None:
        """Wait for the first text of an answer."""
        self.page.wait_for_function("n => document.querySelectorAll('.answer')[n]?.textContent", arg=turn - 1)

    def ends(self, turn: int, note: str) -> None:
        """Wait until the answer is whole and this is noted beside it."""
        self.waits(f".turn:nth-child({turn}):not(.running) .note", note)

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.id")


async def test_a_conversation_with_a_node(tmp_path, chatty):
    """Answers are those of the endpoint itself; whoever stops one frees the server; it fits a phone and a screen."""
    config = chat_config(tmp_path, chatty, models=[chatty, "austen"])
    async with running_node(config) as node:
        await node.serving()
        endpoint = f"http://{config.openai.listen}"
        sessions = lambda: node.served.open_sessions  # noqa: E731

        async def expected(path: str, **asked) -> str:
            """What the endpoint gives at its own address."""
            async with asking(config.admin_address) as client:
                body = {"model": chatty, "temperature": 0} | asked
                (choice,) = (await client.post(f"{endpoint}/v1/{path}", json=body)).json()["choices"]
                return choice["text"] if "text" in choice else choice["message"]["content"]

        def asked_there(path: str, **asked) -> str:
            return trio.from_thread.run(lambda: expected(path, **asked))

        def look(started) -> None:
            screen = Chat(started, config.admin_address)
            screen.waits("#phase", "serving")
            screen.page.wait_for_selector("#send:enabled")
            options = screen.page.eval_on_selector_all("#model option", "all => all.map(e => e.value)")
            assert options == [chatty, "austen"]
            screen.set(most=12)
            screen.say(FIRST)
            screen.ends(1, r"^12 tokens, [\d.]+ tokens/s; ended at the most tokens")
            turns = [{"role": "user", "content": FIRST}]
            said = asked_there("chat/completions", messages=turns, max_tokens=12)
            assert screen.answer() == said != ""
            assert screen.focused() == "message"

            # the second question comes with the first; Shift+Enter does not send
            screen.page.fill("#message", "And his")
            screen.page.press("#message", "Shift+Enter")
            assert screen.page.input_value("#message") == "And his\n"
            screen.say(SECOND)
            screen.ends(2, "^12 tokens")
            turns += [{"role": "assistant", "content": said}, {"role": "user", "content": SECOND}]
            assert screen.answer() == asked_there("chat/completions", messages=turns, max_tokens=12)
            screen.shot("chat-screen-light")

            # as a text: all so far is the beginning
            screen.press("Begin anew")
            assert screen.page.locator(".turn").count() == 0
            screen.page.select_option("#mode", "text")
            screen.say("It is a truth")
            screen.ends(1, "^12 tokens")
            assert screen.answer() == asked_there("completions", prompt="It is a truth", max_tokens=12)

            # stopped by the key and by the button, at the server, too
            screen.set(most=1500, temperature=0.7)
            for n, stop in enumerate((lambda: screen.page.keyboard.press("Escape"), stop_button(screen)), 2):
                screen.say("Mr. Darcy")
                screen.begins(n)
                assert trio.from_thread.run_sync(sessions) == 1
                if n == 2:
                    screen.shot("chat-answering")
                stop()
                screen.ends(n, "^stopped$")
                trio.from_thread.run(until, nobody)
                assert screen.answer() != ""
                assert screen.focused() == "message"

            # too much for the model, and a model that knows no conversations
            screen.set(most=10**6)
            screen.say("Jane")
            screen.waits(".wrong", "the model takes 2048 together")
            screen.waits(".wrong", "What helps: Begin anew, or have fewer tokens at most")
            screen.set(most=5)
            screen.page.select_option("#mode", "chat")
            screen.page.select_option("#model", "austen")
            screen.press("Send again")
            screen.waits(".wrong", "austen has no chat template")
            screen.press("Go on with the text")
            screen.waits(".wrong", "the swarm cannot answer now")  # which serves blocks of the other one
            screen.waits(".wrong", "What helps: The page Node tells under Networks")
            screen.shot("chat-wrong")
            screen.page.select_option("#model", chatty)
            screen.press("Send again")
            screen.ends(4, "^5 tokens")

            # the tab keeps it, another one does not have it
            before = screen.text("#talk")
            screen.page.reload()
            screen.page.wait_for_selector("#send:enabled")
            assert screen.text("#talk") == before
            assert screen.page.input_value("#model") == chatty
            assert screen.page.input_value("#mode") == "text"
            phone = Chat(started, config.admin_address, size=PHONE, dark=True)
            phone.page.wait_for_selector("#send:enabled")
            assert phone.page.locator(".turn").count() == 0
            phone.set(most=40)
            phone.say("<b>Who</b> " + "was" * 60)
            phone.ends(1, "tokens/s")
            assert phone.text(".asked").startswith("<b>Who</b>")
            assert phone.fits()
            phone.shot("chat-phone-dark")
            phone.page.emulate_media(color_scheme="light")
            phone.shot("chat-phone-light")
            assert phone.wrong == []
            assert all("status of 400" in wrong or "status of 503" in wrong for wrong in screen.wrong)

        async def nobody() -> bool:
            return sessions() == 0

        await in_browser(look)


def stop_button(chat: Chat):
    return lambda: chat.page.click("#stop")


async def test_errors_in_the_middle_and_a_restart(tmp_path, chatty, monkeypatch):
    """A swarm that fails, and a node that goes in the middle of an answer: said so, and asked again."""
    config = chat_config(tmp_path, chatty)
    restart, stopped, again, done = (trio.Event() for _ in range(4))
    generate = answers.generate
    after = {"then": fails}

    class Breaking:
        """What follows the fourth token; like what it stands for, it may be left at any of them."""

        def __init__(self, *given, **more) -> None:
            self.tokens, self.count = generate(*given, **more), 0

        def __aiter__(self) -> Breaking:
            return self

        async def __anext__(self) -> list[int]:
            if self.count == 4:
                await after["then"]()
            self.count += 1
            return await anext(self.tokens)

    monkeypatch.setattr(answers, "generate", Breaking)

    def look(started) -> None:
        page = Chat(started, config.admin_address)
        page.page.wait_for_selector("#send:enabled")
        page.set(most=9)
        page.say(FIRST)
        page.waits(".wrong", "the swarm cannot answer now: the server of 0:8 is gone")
        page.waits(".wrong", "What helps: .*Networks")
        part = page.answer()
        assert part != ""
        page.shot("chat-error-in-the-middle")
        after["then"] = trio.lowlevel.checkpoint
        page.press("Send again")
        page.ends(1, "^9 tokens")
        whole = page.answer()
        assert whole.startswith(part)
        assert whole != part
        assert page.page.locator(".wrong").count() == 0

        # the node goes while it answers
        after["then"] = trio.sleep_forever
        page.say(SECOND)
        page.begins(2)
        trio.from_thread.run_sync(restart.set)
        trio.from_thread.run(stopped.wait)
        page.waits(".turn:nth-child(2) .wrong", "The answer broke off")
        page.waits(".turn:nth-child(2) .wrong", "What helps: .*Once it says live above, send again")
        page.waits("#link", r"^not connected since .*\d")
        part = page.answer()
        assert part != ""
        page.press("Send again")
        page.waits(".wrong", "The node cannot be reached")
        assert page.answer() == part
        page.shot("chat-not-connected")
        after["then"] = trio.lowlevel.checkpoint
        trio.from_thread.run_sync(again.set)
        page.waits("#link", "^live")
        page.waits("#phase", "serving")
        page.press("Send again")
        page.ends(2, "^9 tokens")
        assert page.answer(0) == whole
        assert all("ERR_" in wrong or "status of 50" in wrong for wrong in page.wrong)
        trio.from_thread.run_sync(done.set)

    async with trio.open_nursery() as nursery:
        async with running_node(config) as node:
            await node.serving()
            nursery.start_soon(in_browser, look)
            await restart.wait()
        stopped.set()
        await again.wait()
        async with running_node(config) as node:
            await node.serving()
            await done.wait()


async def fails() -> None:
    raise NetworkError("the server of 0:8 is gone")


async def test_an_endpoint_that_is_off_and_tokens(tmp_path):
    """The page says which key turns the endpoint on; nothing is told without the token."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    with_token, without = (TcpAddress("127.0.0.1", free_port()) for _ in range(2))
    state = NodeState()
    other = "fedcba9876543210"

    def look(started) -> None:
        page = Chat(started, with_token, size=PHONE)
        page.page.wait_for_selector("#ask:not([hidden])")
        assert page.text("#token-key") == "admin.token_file"
        assert not page.page.is_visible("#main")
        page.page.fill("#token", TOKEN)
        page.page.press("#token", "Enter")
        page.waits("#none", "The OpenAI endpoint of this node is off|the OpenAI endpoint of this node is off")
        page.waits("#none pre", r"openai:\s+listen: 127\.0\.0\.1:8000")
        assert page.page.is_disabled("#send")
        assert page.fits()
        page.shot("chat-off")

        starting = Chat(started, without)
        starting.waits("#none", "the node is starting")
        trio.from_thread.run_sync(set_endpoint)
        starting.page.wait_for_selector("#ask:not([hidden])")
        assert starting.text("#token-key") == "openai.token_file"
        for given in ("not the one that it is", other):
            starting.page.fill("#token", given)
            starting.page.press("#token", "Enter")
            if given != other:
                starting.page.wait_for_selector("#refused:not([hidden])")
        starting.page.wait_for_selector("#send:enabled")
        assert starting.page.is_hidden("#none")
        starting.say("Hello")
        starting.waits(".wrong", "The answer broke off")
        assert starting.answer() == HOSTILE
        assert starting.page.eval_on_selector_all("img, body script", "all => all.length") == 0

    def set_endpoint() -> None:
        state.openai = SharedApp(lambda: broken, token=other)
        state.enter(Phase.SERVING)

    async with (
        served(with_token, token_file=file),
        served(without, state=state, openai=True),
    ):
        await in_browser(look)


HOSTILE = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>"


async def broken(scope, receive, send) -> None:
    """An endpoint with one model, whose answers never end as they should."""
    if scope["path"] == "/v1/models":
        said = json.dumps({"data": [{"id": "m"}]})
    else:
        chunk = {"choices": [{"delta": {"content": HOSTILE}, "finish_reason": None}]}
        said = f"data: {json.dumps(chunk)}\n\n"
    await StreamingResponse(iter([said]))(scope, receive, send)
