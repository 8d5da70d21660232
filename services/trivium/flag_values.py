"""What stands on a command line, read and checked: sizes, addresses, models, adapters, keys."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import typer

from trivium.config import TOOL_CALL_PARSERS, AdapterModule, ServedModel
from trivium.errors import ConfigurationError

MAX_SOCKET_PATH_BYTES = 107
_MEMORY = re.compile(r"(\d+)\s*(?:([KMGT])(i?)B)?", re.IGNORECASE | re.ASCII)
_HOST_AND_PORT = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def parse_memory(text: str) -> int:
    """Bytes of `512MiB`, `2GiB`, `2GB` or a plain number."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"expected bytes or a size such as 512MiB or 2GiB, got {text!r}")
    number, unit, binary = match.groups()
    num_bytes = int(number)
    for _ in range(" KMGT".index((unit or " ").upper())):
        num_bytes *= 1024 if binary else 1000
    return num_bytes


def parse_address(text: str) -> str:
    """`text` itself if it is `unix:/absolute/path` or `host:port`."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/"):
            raise typer.BadParameter(f"a Unix socket needs an absolute path, as in unix:/run/x.sock, got {text!r}")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise typer.BadParameter(f"a Unix socket path has at most {MAX_SOCKET_PATH_BYTES} bytes, got {text!r}")
        return text
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None or not 0 < int(match[1]) < 65536:
        raise typer.BadParameter(f"expected unix:/path or HOST:PORT, got {text!r}")
    return text


def parse_models(texts: Sequence[str]) -> tuple[ServedModel, ...]:
    """The models named on a command line. Raises ConfigurationError on an empty part or a name given twice."""
    models = tuple(ServedModel.parse(text) for text in texts)
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"model name {name!r} is given {names.count(name)} times")
    return models


def parse_routes(texts: Sequence[str]) -> dict[str, str]:
    """model name -> scheduler address, of `NAME=ADDRESS` texts."""
    routes: dict[str, str] = {}  # model name -> scheduler address
    for text in texts:
        name, _, address = text.partition("=")
        if not name or not address:
            raise ConfigurationError(f"--model must be NAME=SCHEDULER_ADDRESS, got {text!r}")
        if name in routes:
            raise ConfigurationError(f"model name {name!r} is given twice")
        routes[name] = parse_address(address)
    return routes


def parse_adapters(
    texts: Sequence[str], models: Sequence[ServedModel], *, taken: Iterable[str] = ()
) -> tuple[AdapterModule, ...]:
    """The adapters of one kind that a command line names, each with its base model. taken: names of the other kind.

    Raises ConfigurationError for a name that is given twice, and for an adapter whose base is not clear.
    """
    modules = []
    served = [model.name for model in models]
    known = {*served, *taken}
    for module in map(AdapterModule.parse, texts):
        if module.name in known:
            raise ConfigurationError(f"model name {module.name!r} is given twice")
        known.add(module.name)
        if module.base is None and len(served) > 1:
            raise ConfigurationError(
                f"adapter {module.name!r} must name its base_model_name, because several models are served"
            )
        if module.base not in (None, *served):
            raise ConfigurationError(f"base_model_name {module.base!r} of adapter {module.name!r} is not served")
        modules.append(replace(module, base=module.base or served[0]))
    return tuple(modules)


def parse_tool_parsers(texts: Sequence[str], models: Collection[str], *, is_enabled: bool) -> dict[str, str]:
    """Model -> name of the parser of its calls, of NAME or MODEL=NAME texts; "" is for all other models.

    Raises ConfigurationError.
    """
    if is_enabled and not texts:
        raise ConfigurationError("--enable-auto-tool-choice needs --tool-call-parser")
    if texts and not is_enabled:
        raise ConfigurationError("--tool-call-parser needs --enable-auto-tool-choice")
    parsers: dict[str, str] = {}
    for text in texts:
        model, _, name = text.rpartition("=")
        if name not in TOOL_CALL_PARSERS:
            raise ConfigurationError(f"--tool-call-parser must be one of {', '.join(TOOL_CALL_PARSERS)}, got {name!r}")
        if model and model not in models:
            raise ConfigurationError(f"--tool-call-parser {text}: the model {model!r} is not served")
        if model in parsers:
            raise ConfigurationError(f"--tool-call-parser is given twice for {model or 'all models'}")
        parsers[model] = name
    return parsers


def spread_values(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """`args` with `flag A=1 B=2` as `flag A=1 flag B=2`, for each of `flags`: it takes values up to the next flag."""
    spread: list[str] = []
    flag = ""  # whose values these are
    for arg in args:
        if arg.startswith("-"):
            flag = arg if arg in flags else ""
        elif flag and spread[-1] != flag:
            spread.append(flag)
        spread.append(arg)
    return spread


def check_local_source(model: ServedModel) -> None:
    """Raise ConfigurationError if the source is a path that cannot be a checkpoint; a hub id is not looked up."""
    looks_like_path = model.source.startswith(("/", "./", "../", "~"))
    if looks_like_path and not Path(model.source).is_dir():
        raise ConfigurationError(f"model {model.name!r}: there is no directory {model.source}")


def command_flags(**settings: object) -> tuple[str, ...]:
    """Command-line flags for the settings that are not None: `max_num_seqs=8` as `--max-num-seqs 8`."""
    return tuple(
        part
        for name, value in settings.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    )


def check_api_key(api_key: str | None) -> None:
    if api_key is not None and not api_key.strip():
        raise ConfigurationError("--api-key must not be empty")
