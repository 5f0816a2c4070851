"""The Hub's token is sent over https only, also after redirects."""

import huggingface_hub
import pytest
from httpx2 import Client, MockTransport, Request, Response

from megatron_bipe.data import hub

ANSWERS = {
    "https://hub.test/a": "https://hub.test/b",
    "https://hub.test/b": "http://hub.test/c",
    "http://hub.test/c": "http://hub.test:443/d",
    "http://plain.test/a": "https://plain.test/b",
}


def requests_of(client: Client, url: str) -> dict[str, str | None]:
    """Follow redirects from a URL; return the token of each request."""
    seen = {}

    def answer(request: Request) -> Response:
        seen[str(request.url)] = request.headers.get("authorization")
        target = ANSWERS.get(str(request.url))
        return Response(302, headers={"Location": target}) if target else Response(200)

    client._transport = MockTransport(answer)
    client._mounts = {}
    client.get(url, headers={"Authorization": "Bearer hf_x"})
    return seen


def test_protected_client_sends_the_token_over_https_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.protect_token()
    client = huggingface_hub.get_session()
    try:
        seen = requests_of(client, "https://hub.test/a")
        assert seen["https://hub.test/a"] == seen["https://hub.test/b"] == "Bearer hf_x"
        assert seen["http://hub.test/c"] is None
        assert len(seen) == 4 and not any(token for url, token in seen.items() if url.startswith("http:"))
        assert not any(requests_of(client, "http://plain.test/a").values())
        assert "http://plain.test" in caplog.text
    finally:
        huggingface_hub.close_session()
