"""What clients ask for, read and checked, and how errors are told: both as OpenAI's reference has them."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kwaainet_bridge import defaults
from kwaainet_bridge.errors import InvalidRequest
from kwaainet_bridge.hivemind.client import Sampling

T = TypeVar("T", bound=BaseModel)

UNSUPPORTED: Final = (
    *("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "audio", "best_of", "echo", "suffix"),
    *("frequency_penalty", "presence_penalty"),
)
"""What would change the answer and is not done here: refused where it is set to anything but nothing."""


_NO_TEMPERATURE: Final = 1e-6
"""Up to there the likeliest token wins in any case, and what is divided by less may be no number any more."""


class ApiError(Exception):
    """What a client is told in the place of an answer."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def turn(self) -> dict[str, str]:
        """As chat templates take it."""
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of requests have in common. What is not known here is ignored, as user and metadata are."""

    model_config = ConfigDict(extra="allow")

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    n: Literal[1] = 1
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None  # as torch takes them
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {key: value for key, value in given.items() if value is not None}
        for key in UNSUPPORTED:
            if kept.get(key):
                raise ValueError(f"{key} is not supported here: leave it out")
        if isinstance(kept.get("stop"), str):
            kept["stop"] = [kept["stop"]]
        return kept

    @property
    def sampling(self) -> Sampling:
        try:
            return Sampling(
                do_sample=self.temperature > _NO_TEMPERATURE,
                temperature=self.temperature if self.temperature > _NO_TEMPERATURE else 1.0,
                top_k=self.top_k,
                top_p=self.top_p,
                repetition_penalty=self.repetition_penalty,
            )
        except InvalidRequest as e:
            raise ApiError(400, str(e)) from e

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Asked):
    """POST /v1/completions."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]

    @property
    def most_tokens(self) -> int:
        return self.max_tokens or defaults.COMPLETION_TOKENS


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_format(self) -> ChatRequest:
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError("response_format other than text is not supported here: leave it out")
        return self

    @property
    def most_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or defaults.CHAT_TOKENS


def read_body(kind: type[T], body: bytes) -> T:
    """Raises ApiError that names the key."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}: {message}" if where else message, param=where or None) from e
