"""What may be asked of the local endpoint, and where that may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kwaainet_bridge.errors import ConfigError, Refusal
from kwaainet_bridge.kwaai.mux_endpoint import MuxEndpoint

LOCAL = "http://127.0.0.1:8080"
ENDPOINT = MuxEndpoint(url=LOCAL, paths=["/v1/models", "/v1/models/*", "/v1/chat/completions", "/health*"])


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/models/meta-llama/Llama-3.1-8B",
        "/v1/models/llama3:8b",
        "/v1/chat/completions",
        "/health",
        "/healthz/deep",
    ],
)
def test_offered_paths(path):
    ENDPOINT.check("GET", path)
    ENDPOINT.check("POST", path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "v1/models",
        "/v1",
        "/v1/",
        "/V1/models",
        "/v1/models2",
        "/v1/chat/completions/",
        "/v1/chat/completions/x",
        "/v1/chat",
        "/admin",
        "/v1/models/../../admin",
        "/v1/models/..",
        "/v1/models/.",
        "/./v1/models",
        "/v1//models",
        "//v1/models",
        "//other.example/v1/models",
        "http://other.example/v1/models",
        "/v1/models?x=1",
        "/v1/models?",
        "/v1/models#x",
        "/v1/models/%2e%2e/admin",
        "/v1/models/%2E%2E%2fadmin",
        "/v1/models/x;y",
        "/v1/models/x\\..\\..\\admin",
        "/v1/models/x y",
        "/v1/models/x\r\nHost: other",
        "/v1/models/x\n",
        "/v1/models/x\x00",
        "/v1/models/\u2024\u2024/admin",
        "/v1/models/\uff0e\uff0e/admin",
        "/v1/models\n",
        "@other.example/v1/models",
        ":80/v1/models",
    ],
)
def test_paths_that_are_not(path):
    with pytest.raises(Refusal, match=r"is not a plain path|is not offered here"):
        ENDPOINT.check("GET", path)


@pytest.mark.parametrize("method", ["DELETE", "PUT", "get", "", "CONNECT", "GET ", "GET /x HTTP/1.1\r\n"])
def test_methods(method):
    with pytest.raises(Refusal, match="is not allowed here, only GET and POST"):
        ENDPOINT.check(method, "/v1/models")


@given(st.text(max_size=30))
def test_what_is_passed_on_is_on_the_list_however_it_is_read(text):
    from urllib.parse import unquote, urljoin, urlsplit

    path = "/v1/models/" + text
    try:
        ENDPOINT.check("GET", path)
    except Refusal:
        return
    parts = urlsplit(urljoin(LOCAL, path))
    assert (parts.netloc, parts.path, parts.query) == ("127.0.0.1:8080", path, "")
    assert unquote(path) == path
    assert parts.path.startswith("/v1/models/")


@pytest.mark.parametrize(
    "url", [LOCAL, LOCAL + "/", "http://localhost:1", "http://[::1]:80", "https://127.8.8.8"]
)
def test_endpoints_of_this_machine(url):
    MuxEndpoint(url=url, paths=["/*"])


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8080",
        "ftp://127.0.0.1",
        "http://",
        "http://127.0.0.1:99999",
        "http://user:word@127.0.0.1",
        "http://127.0.0.1/v1",
        "http://127.0.0.1?x",
        "http://127.0.0.1#x",
        "http://[::1",
    ],
)
def test_addresses_that_are_none(url):
    with pytest.raises(ConfigError, match="mux endpoint"):
        MuxEndpoint(url=url, paths=["/x"], remote=True)


@pytest.mark.parametrize(
    "url", ["http://192.168.1.1", "http://example.org", "http://0.0.0.0:80", "http://localhost.example"]
)
def test_another_machine_must_be_allowed(url):
    with pytest.raises(ConfigError, match="is not on this machine"):
        MuxEndpoint(url=url, paths=["/x"])
    MuxEndpoint(url=url, paths=["/x"], remote=True)


@pytest.mark.parametrize("path", ["x", "", "*", "/a*b", "/a**", "/../x", "/a?b", "//", "/a b"])
def test_rules_that_are_none(path):
    with pytest.raises(ConfigError, match="is no path"):
        MuxEndpoint(url=LOCAL, paths=["/fine", path])


def test_other_mistakes():
    with pytest.raises(ConfigError, match="no paths are allowed"):
        MuxEndpoint(url=LOCAL, paths=[])
    with pytest.raises(ConfigError, match="must fit into a frame"):
        MuxEndpoint(url=LOCAL, paths=["/x"], answer_bytes=1 << 30)
