"""B1 to B27: bodies, media types, framing, heads, paths and keys; B62, B76 to B80: the life of a connection."""

from __future__ import annotations

from hostile.row import (
    CHAT,
    COMPLETIONS,
    KEY,
    Call,
    Door,
    Refusal,
    Row,
    Taken,
    bad,
    cases,
    completion,
    to,
)  # fmt: skip

BODY = b'{"model":"llama","prompt":"a","max_tokens":2}'
OPEN = b'{"model":"llama","prompt":"a","max_tokens":2,'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LOCKED_HEAD = HEAD + b"Authorization: Bearer " + KEY.encode() + b"\r\n"
JSON, DEEP = bad("invalid_json"), bad("json_too_deep")
TYPE, ENCODING = bad("invalid_type"), bad("invalid_encoding")
LENGTH = Refusal(400, "invalid_content_length", closes=True)
HTTP = Refusal(400, "invalid_http", closes=True)
HEADERS = Refusal(431, "headers_too_large", closes=True)
HOST = bad("invalid_host", "Host")
LOCK = Refusal(401, "invalid_api_key", headers=("www-authenticate",))


def with_length(length: bytes, head: bytes = HEAD) -> bytes:
    return head + b"Content-Length: " + length + b"\r\n\r\n"


def echoes(text: str) -> Taken:
    return Taken(lambda answer: answer["choices"][0]["text"].startswith(text))


def of_type(media_type: str, **headers: str) -> Call:
    return to(COMPLETIONS, BODY, Content_Type=media_type, **headers)


def get(path: str, method: str = "GET", **headers: str) -> Call:
    return Call(path, None, tuple((name.replace("_", "-"), value) for name, value in headers.items()), method)


def with_host(host: bytes) -> bytes:
    return b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"


def bodies(number: str, *given: tuple[str, bytes, Refusal | Taken]) -> list[Row]:
    return [
        Row(f"{number} {name} {path}", to(path, body), answer)
        for name, body, answer in given
        for path in (COMPLETIONS, CHAT)
        if path == COMPLETIONS or (answer not in (Taken(),) and b'"prompt"' not in body)
    ]


ROWS: list[Row] = [
    *bodies("B1", ("empty", b"", JSON)),
    *bodies("B2", ("truncated", b"{", JSON), ("and more", BODY + b" x", JSON), ("raw NUL", OPEN + b'"x":"\0"}', JSON)),
    *bodies("B3", ("array", b"[]", TYPE), ("text", b'"a"', TYPE), ("number", b"1", TYPE), ("null", b"null", TYPE)),
    *bodies(
        "B4",
        *((name, OPEN + b'"temperature":' + name.encode() + b"}", JSON) for name in ("NaN", "Infinity", "-Infinity")),
    ),
    *bodies("B5", ("10,000 digits", OPEN + b'"seed":' + b"1" * 10_000 + b"}", JSON)),
    *bodies(
        "B6",
        ("100,000 lists", b"[" * 100_000, DEEP),
        ("100,000 objects", b'{"a":' * 100_000, DEEP),
        ("65 levels", OPEN + b'"x":' + b"[" * 64 + b"]" * 64 + b"}", DEEP),
        ("64 levels", OPEN + b'"x":' + b"[" * 63 + b"]" * 63 + b"}", Taken()),
    ),
    *bodies("B7", ("byte order mark", b"\xef\xbb\xbf" + BODY, Taken())),
    *bodies(
        "B8",
        ("UTF-16 with BOM", BODY.decode().encode("utf-16"), ENCODING),
        ("UTF-16 without", BODY.decode().encode("utf-16-le"), ENCODING),
        ("GBK", OPEN + '"x":"中文"}'.encode("gbk"), ENCODING),
        ("latin-1", OPEN + '"x":"é"}'.encode("latin-1"), ENCODING),
        ("raw surrogate", OPEN + b'"x":"\xed\xa0\x80"}', ENCODING),
    ),
    *bodies(
        "B9",
        ("half", b'{"model":"llama","prompt":"\\ud800"}', bad("invalid_unicode", "prompt")),
        ("halves in wrong order", b'{"model":"llama","prompt":"\\udc00\\ud800 x"}', bad("invalid_unicode", "prompt")),
        ("in a list", b'{"model":"llama","prompt":["a","\\udfff"]}', bad("invalid_unicode", "prompt")),
        ("a pair", b'{"model":"llama","prompt":"\\ud83d\\ude00","max_tokens":2,"echo":true}', echoes("😀")),
    ),
    *cases("B10", ("NUL and control characters", completion(prompt="a\0b\x01\x7f", echo=True), echoes("a\0b\x01\x7f"))),
    *bodies("B11", ("duplicate keys: the last", b'{"model":"none","prompt":"a","model":"llama"}', Taken())),
    *cases("B12", ("unknown field", completion(odd={"a": [1]}), Taken())),
    *cases(
        "B12",
        ("unknown field, strict", to(COMPLETIONS, OPEN + b'"odd":1}', Authorization=f"Bearer {KEY}"),
         bad("unknown_field", "odd")),
        door=Door.LOCKED,
    ),
    *cases(
        "B13",
        ("text", of_type("text/plain"), bad("unsupported_media_type", None, 415)),
        ("form", of_type("application/x-www-form-urlencoded"), bad("unsupported_media_type", None, 415)),
        ("multipart", of_type("multipart/form-data; boundary=x"), bad("unsupported_media_type", None, 415)),
        ("charset", of_type("application/json; charset=utf-16"), ENCODING),
        ("none", Call(COMPLETIONS, BODY, ()), Taken()),
    ),
    *cases(
        "B14",
        ("gzip", of_type("application/json", Content_Encoding="gzip"), bad("unsupported_encoding", None, 415)),
        ("br", of_type("application/json", Content_Encoding="br"), bad("unsupported_encoding", None, 415)),
    ),
    *cases("B15", ("by length", with_length(b"67108865"), bad("content_too_large", None, 413))),
    *cases(
        "B16",
        ("by chunks",
         LOCKED_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"100000\r\n" + bytes(2**20) + b"\r\n") * 9,
         bad("content_too_large", None, 413)),
        door=Door.LOCKED,
    ),
    *cases(
        "B17",
        ("abc", with_length(b"abc") + BODY, LENGTH),
        ("-1", with_length(b"-1") + BODY, LENGTH),
        ("30 digits", with_length(b"9" * 30), LENGTH),
        ("two", HEAD + b"Content-Length: 45\r\nContent-Length: 46\r\n\r\n" + BODY, LENGTH),
    ),
    *cases(
        "B18",
        ("length and chunks", HEAD + b"Content-Length: 45\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY, LENGTH),
        ("chunks and length", HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 45\r\n\r\n" + BODY, LENGTH),
    ),
    *cases(
        "B19",
        ("a million chunks", CHUNKED + b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n",
         Refusal(400, "too_many_chunks", closes=True)),
        ("60,000 chunks", CHUNKED + b"1\r\nx\r\n" * 60_000 + b"0\r\n\r\n", JSON),
        ("no chunk", CHUNKED + b"zz\r\n", HTTP),
    ),
    *cases(
        "B20",
        ("1 MiB", HEAD + b"X: " + b"a" * 2**20, HEADERS),
        ("66 kB", HEAD + b"X: " + b"a" * 66_000 + b"\r\n\r\n", HEADERS),
        ("10,000 headers", HEAD + b"X: a\r\n" * 10_000 + b"\r\n", HEADERS),
        ("trailer", CHUNKED + b"1\r\nx\r\n0\r\nX: " + b"a" * 2**20, HEADERS),
        ("chunk extension", CHUNKED + b"1;" + b"a" * 2**20, HEADERS),
    ),
    *cases("B21", ("100 kB", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
                   Refusal(414, "uri_too_long", closes=True))),
    *cases(
        "B22",
        *((f"{method} {path}", get(path, method), bad("method_not_allowed", None, 405, "allow"))
          for method, path in (("GET", COMPLETIONS), ("DELETE", CHAT), ("POST", "/v1/models"), ("PUT", "/version"))),
    ),
    *cases(
        "B23",
        *((path, get(path), bad("not_found", None, 404))
          for path in ("/", "/v1", "/docs", f"{COMPLETIONS}/", "//v1/completions", "/v1/../v1/models",
                       "/v1/%2e%2e/v1/models")),
    ),
    *cases(
        "B24",
        ("none", get("/v1/models"), LOCK),
        ("wrong", get("/v1/models", Authorization="Bearer wrong"), LOCK),
        ("bearer", get("/v1/models", Authorization=f"bearer {KEY}"), LOCK),
        ("upper case", get("/v1/models", Authorization=f"Bearer {KEY.upper()}"), LOCK),
        ("in the query", get(f"/v1/models?api_key={KEY}"), LOCK),
        ("of another header", get("/v1/models", X_Api_Key=KEY), LOCK),
        ("unknown path", get("/nowhere"), LOCK),
        ("right", get("/v1/models", Authorization=f"Bearer {KEY}"), Taken()),
        door=Door.LOCKED,
    ),
    *cases(
        "B25",
        *((repr(host[:8]), with_host(host), HOST)
          for host in (b"a/#@b", b"a\r\nHost: b", b"x" * 10_240, b"a b", b"", b"\xc3\xbc")),
    ),
    *cases(
        "B26",
        ("Expect, wrong key",
         with_length(b"45", HEAD + b"Authorization: Bearer x\r\nExpect: 100-continue\r\n"), LOCK),
        door=Door.LOCKED,
    ),
    *cases(
        "B27",
        ("HTTP/0.9", b"GET /\r\n\r\n", HOST),
        ("HTTP/3.0", b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", HTTP),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), HTTP),
        ("noise", b"\0\xff\0\xff\r\n\r\n", HTTP),
    ),
    *cases(
        "B62",
        *((f"{len(value)} characters", to(COMPLETIONS, BODY, X_Request_Id=value),
           bad("invalid_request_id", "X-Request-Id"))
          for value in ("x" * 129, "x" * 10_240, "a\tb", "😀".encode().decode("latin-1"))),
        ("CRLF", HEAD + b"X-Request-Id: a\r\n b\r\nContent-Length: 45\r\n\r\n" + BODY, HTTP),
        ("in the body", completion(request_id="x" * 129), bad("invalid_request_id", "request_id")),
        ("an ordinary one", to(COMPLETIONS, BODY, X_Request_Id="mine 1"), Taken()),
    ),
    *cases(
        "B77",
        ("WebSocket", b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
         bad("upgrade_not_supported")),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", HTTP),
    ),
]  # fmt: skip
