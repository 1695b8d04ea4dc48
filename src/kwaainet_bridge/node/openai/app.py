"""The routes of OpenAI's reference that are served here. Imported when somebody asks for the first time."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import structlog
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import BridgeError, CheckpointError, InvalidRequest
from kwaainet_bridge.node.generating import TextModels
from kwaainet_bridge.node.openai.answers import Answer
from kwaainet_bridge.node.openai.bodies import ApiError, ChatRequest, CompletionRequest, read_body
from kwaainet_bridge.node.openai.limits import Limits

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Clock = Callable[[], float]


def make_app(models: TextModels, limits: Limits, *, clock: Clock = time.time) -> Starlette:
    """The endpoint. ``clock`` gives seconds since 1970."""
    endpoint = _Endpoint(models, limits, clock)
    return Starlette(
        routes=[
            Route("/v1/models", endpoint.list_models),
            Route("/v1/models/{name:path}", endpoint.one_model),
            Route("/v1/completions", endpoint.completions, methods=["POST"]),
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        ],
        exception_handlers={ApiError: _tell, HTTPException: _tell_http},
    )


async def _tell(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status)


async def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return await _tell(request, ApiError(error.status_code, error.detail))


class _Endpoint:
    def __init__(self, models: TextModels, limits: Limits, clock: Clock) -> None:
        self._models = models
        self._limits = limits
        self._clock = clock
        self._began = int(clock())
        self._tokenizing = trio.CapacityLimiter(1)

    async def list_models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe(name) for name in self._models.names]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._models.names:
            raise _unknown(name)
        return JSONResponse(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "swarm"}

    async def completions(self, request: Request) -> Response:
        asked = read_body(CompletionRequest, await _body(request))
        return await self._respond(request, asked, _Completion(self._clock, asked.model))

    async def chat(self, request: Request) -> Response:
        asked = read_body(ChatRequest, await _body(request))
        return await self._respond(request, asked, _Chat(self._clock, asked.model))

    async def _respond(
        self, request: Request, asked: CompletionRequest | ChatRequest, shape: _Shape
    ) -> Response:
        if asked.stream:
            events = self._events(asked, shape)
            try:
                first = await anext(events)  # what goes wrong until then is told as an error
            except BaseException:
                await events.aclose()
                raise
            return EventStream(first, events)
        with self._limits.request():
            return await _unless_left(request, lambda: self._whole(asked, shape))

    async def _whole(self, asked: CompletionRequest | ChatRequest, shape: _Shape) -> Response:
        answer = await self._answer(asked)
        with _Told():
            text = await answer.whole()
        return JSONResponse(shape.whole(text, answer))

    async def _events(
        self, asked: CompletionRequest | ChatRequest, shape: _Shape
    ) -> AsyncGenerator[str, None]:
        with self._limits.request():
            answer = await self._answer(asked)
            begun = False
            try:
                with _Told():
                    async with aclosing(answer.pieces()) as pieces:
                        async for piece in pieces:
                            yield _event(shape.piece(piece, first=not begun))
                            begun = True
                yield _event(shape.end(answer))
                if asked.includes_usage:
                    yield _event(shape.usage(answer))
            except ApiError as e:
                if not begun:
                    raise
                yield _event(e.body)
            yield "data: [DONE]\n\n"

    async def _answer(self, asked: CompletionRequest | ChatRequest) -> Answer:
        try:
            model = await self._models.get(asked.model)
        except KeyError:
            raise _unknown(asked.model) from None
        except CheckpointError as e:
            raise ApiError(400, str(e), param="model") from e
        # a long prompt takes most of a second to become tokens, and a chat template is anybody's program
        work = partial(Answer, model, asked)
        answer: Answer = await trio.to_thread.run_sync(  # type: ignore[call-arg]  # the stubs of trio-typing are older than trio
            work, abandon_on_cancel=True, limiter=self._tokenizing
        )
        return answer


class _Told:
    """Errors of the swarm as clients are told of them."""

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, InvalidRequest):
            raise ApiError(400, str(error)) from error
        if isinstance(error, BridgeError):
            log.info("an answer failed", reason=str(error))
            raise ApiError(503, f"the swarm cannot answer now: {error}", code="swarm_unavailable") from error


class _Shape:
    """How answers of one kind are written."""

    prefix: str
    kind: str
    piece_kind: str

    def __init__(self, clock: Clock, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(clock()), "model": model}

    def choice(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def change(self, text: str, *, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        return self._written(self.kind, self.choice(text), answer.finish_reason) | {"usage": answer.usage}

    def piece(self, text: str, *, first: bool) -> dict[str, Any]:
        return self._written(self.piece_kind, self.change(text, first=first), None)

    def end(self, answer: Answer) -> dict[str, Any]:
        return self._written(self.piece_kind, self.change("", first=False), answer.finish_reason)

    def usage(self, answer: Answer) -> dict[str, Any]:
        return self._head | {"object": self.piece_kind, "choices": [], "usage": answer.usage}

    def _written(self, kind: str, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, "finish_reason": reason} | said
        return self._head | {"object": kind, "choices": [choice]}


class _Completion(_Shape):
    prefix, kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def change(self, text: str, *, first: bool) -> dict[str, Any]:  # noqa: ARG002  # chats tell their role first
        return {"text": text}


class _Chat(_Shape):
    prefix, kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def change(self, text: str, *, first: bool) -> dict[str, Any]:
        return {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})}


def _unknown(name: str) -> ApiError:
    return ApiError(
        404, f"no model {name[:200]!r} here: see /v1/models", code="model_not_found", param="model"
    )


async def _body(request: Request) -> bytes:
    body = bytearray()
    async with aclosing(request.stream()) as chunks:
        while True:
            try:
                with trio.fail_after(defaults.WEB_IDLE_SECONDS):
                    body += await anext(chunks)
            except StopAsyncIteration:
                return bytes(body)
            except trio.TooSlowError:
                raise ApiError(
                    408, f"nothing came for {defaults.WEB_IDLE_SECONDS} s: send it whole"
                ) from None
            if len(body) > defaults.OPENAI_BODY_BYTES:
                raise ApiError(413, f"the request has more than {defaults.OPENAI_BODY_BYTES} bytes")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


class EventStream(StreamingResponse):
    """Events until the client leaves: what they hold is free then, also if it leaves while one is on its way."""

    def __init__(self, first: str, events: AsyncGenerator[str, None]) -> None:
        self._events = _after(first, events)
        self._rest = events
        super().__init__(self._events, media_type="text/event-stream")

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._rest), aclosing(self._events):
            await super().stream_response(send)


async def _after(first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


async def _unless_left(request: Request, work: Callable[[], Awaitable[Response]]) -> Response:
    """What ``work`` returns; it is cancelled when the client leaves, and the answer is then nobody's."""
    response: Response = Response(status_code=499)
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            response = await work()
        except ApiError as e:
            response = JSONResponse(e.body, status_code=e.status)
        nursery.cancel_scope.cancel()
    return response
