"""The command line: what it accepts, what it refuses in one line, what it hands to each service, and how fast it is."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import trivium
from trivium import cli, flag_values, process
from trivium.config import AdapterModule, ExecutorConfig, GatewayConfig, SchedulerConfig, ServedModel
from trivium.demo import BUNDLED_MODELS
from trivium.errors import ConfigurationError
from trivium.supervisor import ServeConfig, build_children

SOURCE_ROOT = str(Path(trivium.__file__).parents[1])
COMMANDS = ("serve", "gateway", "tokenizer", "scheduler", "executor")
LISTEN = ("--listen", "unix:/run/x.sock")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in typer.main.get_command(cli.app).commands.values():  # type: ignore[attr-defined]
        for parameter in command.params:
            if parameter.envvar:
                monkeypatch.delenv(parameter.envvar, raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run a command with its service replaced; returns the arguments that the service's `serve` received."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    exit_codes: list[int] = []

    async def serve(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    def run_service(name: str, run: process.Serve, **settings: Any) -> int:
        asyncio.run(run(asyncio.Event()))  # type: ignore[arg-type]
        return 5

    monkeypatch.setattr(cli, "run_service", run_service)
    monkeypatch.setattr(cli, "end_process", exit_codes.append)
    for name in ("trivium.tokenizer.server", "trivium.scheduler.server", "trivium.executor.server"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(serve=serve))
    monkeypatch.setitem(sys.modules, "trivium_gateway.app", types.SimpleNamespace(serve=serve))

    def call(*args: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cli.main(args)
        assert exit_codes.pop() == 5, "the exit code of the service is the one of the process"
        return calls[-1]

    return call


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records that torch was forbidden, instead of forbidding it to the tests that follow."""
    calls: list[str] = []
    monkeypatch.setattr("trivium.tokenizer.torch_free.forbid_torch", lambda: calls.append("torch"))
    return calls


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServeConfig]:
    """Run `trivium serve` with the supervisor replaced; returns the settings that it received."""
    configs: list[ServeConfig] = []
    monkeypatch.setattr("trivium.supervisor.serve", lambda config: configs.append(config) or 7)
    monkeypatch.setattr(cli, "configure_logging", lambda *args: None)

    def call(*args: str) -> ServeConfig:
        assert cli.main(("serve", *args)) == 7, "the exit code of the supervisor is the one of the command"
        return configs[-1]

    return call


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line with which a command line is refused."""
    assert cli.main(args) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("trivium: error: ") and errors.count("\n") == 1
    return errors.removeprefix("trivium: error: ").rstrip("\n")


def test_serve_without_arguments_serves_the_bundled_models(configured: Callable[..., ServeConfig]) -> None:
    config = configured()
    assert config.models == tuple(ServedModel(name, name) for name in BUNDLED_MODELS)
    assert (config.host, config.port, config.api_key, config.revision) == ("127.0.0.1", 8000, None, None)


def test_serve_hands_on_that_nothing_is_to_be_recorded(configured: Callable[..., ServeConfig]) -> None:
    assert configured("m", "--enforce-eager").engine_flags[-1] == "--enforce-eager"
    assert "--enforce-eager" not in configured("m").engine_flags


def test_serve_hands_its_engine_flags_to_the_executors(configured: Callable[..., ServeConfig]) -> None:
    config = configured(
        "t5=hub/t5", "hub/bart", "--port", "0", "--dtype", "float32", "--max-model-len", "99", "--num-threads", "3",
        "--kv-cache-memory", "2GiB", "--api-key", "k", "--revision", "main", "--device", "cpu", "--max-num-seqs", "5",
        "--swap-space", "1.5", "--gpu-memory-utilization", "0.8", "--quantization", "int8",
        "--generation-config", "none", "--tensor-parallel-size", "2",
    )  # fmt: skip
    assert config.models == (ServedModel("t5", "hub/t5"), ServedModel("hub/bart", "hub/bart"))
    assert (config.port, config.api_key) == (0, "k")
    flags = dict(zip(config.engine_flags[::2], config.engine_flags[1::2], strict=True))
    assert flags == {
        "--dtype": "float32",
        "--device": "cpu",
        "--revision": "main",
        "--max-model-len": "99",
        "--max-num-seqs": "5",
        "--max-num-batched-tokens": "2048",
        "--kv-cache-memory": str(2 * 2**30),
        "--gpu-memory-utilization": "0.8",
        "--swap-space": "1.5",
        "--quantization": "int8",
        "--num-threads": "3",
        "--tensor-parallel-size": "2",
        "--generation-config": "none",
    }


def test_lora_modules_take_values_up_to_the_next_flag(configured: Callable[..., ServeConfig]) -> None:
    config = configured("base", "--enable-lora", "--lora-modules", "a=/x", "b=/y", "--max-loras", "3")
    assert config.models == (ServedModel("base", "base"),)
    assert config.lora_modules == (AdapterModule("a", "/x", "base"), AdapterModule("b", "/y", "base"))
    assert config.adapter_flags == ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "3")
    assert configured("base").adapter_flags == ()


def test_each_lora_module_goes_to_the_executor_of_its_base(configured: Callable[..., ServeConfig]) -> None:
    module = '{"name": "a", "path": "/x", "base_model_name": "two"}'
    children = build_children(configured("one", "two", "--enable-lora", "--lora-modules", module), "/run")
    flags = {child.name: child.argv for child in children}
    assert '{"name": "a", "path": "/x"}' in flags["executor two"]
    assert "--lora-modules" not in flags["executor one"] and "--enable-lora" in flags["executor one"]
    assert "--enable-lora" not in flags["scheduler two"]


def test_soft_prompts_go_to_the_executor_of_their_base(configured: Callable[..., ServeConfig]) -> None:
    flags = ("--enable-lora", "--lora-modules", "a=/x", "--enable-prompt-adapter", "--prompt-adapters", "p=/y", "q=/z")
    config = configured("base", *flags, "--max-prompt-adapter-token", "99")
    assert config.prompt_adapters == (AdapterModule("p", "/y", "base"), AdapterModule("q", "/z", "base"))
    limits = ("--max-prompt-adapters", "8", "--max-prompt-adapter-token", "99")
    assert config.adapter_flags[5:] == ("--enable-prompt-adapter", *limits)
    argv = next(child.argv for child in build_children(config, "/run") if child.name == "executor base")
    given = [json.loads(argv[place + 1]) for place, part in enumerate(argv) if part == "--prompt-adapters"]
    assert given == [{"name": "p", "path": "/y"}, {"name": "q", "path": "/z"}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("one", "--lora-modules", "a=/x"), "--lora-modules needs --enable-lora"),
        (("one", "two", "--enable-lora", "--lora-modules", "a=/x"), "'a' must name its base_model_name"),
        (("one", "--enable-lora", "--lora-modules", "one=/x"), "model name 'one' is given twice"),
        (("one", "--enable-lora", "--lora-modules", "a=/x", "a=/y"), "model name 'a' is given twice"),
        (("one", "--enable-lora", "--lora-modules", "a"), "must be NAME=SOURCE or a JSON object, got 'a'"),
        (("one", "--enable-lora", "--lora-modules", '{"name": "a"}'), "has name, path and base_model_name"),
        (("one", "--enable-lora", "--lora-modules", "{"), "is not valid JSON"),
        (
            ("one", "--enable-lora", "--lora-modules", '{"name": "a", "path": "x", "base_model_name": "b"}'),
            "base_model_name 'b' of adapter 'a' is not served",
        ),
        (("one", "--prompt-adapters", "a=/x"), "--prompt-adapters needs --enable-prompt-adapter"),
        (
            ("one", "--enable-lora", "--lora-modules", "a=/x", "--enable-prompt-adapter", "--prompt-adapters", "a=/y"),
            "model name 'a' is given twice",
        ),
    ],
)
def test_lora_flags_that_make_no_sense_end_with_one_line(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *flags]) == process.EXIT_CONFIGURATION
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_serve_counts_the_start_from_the_first_moment(configured: Callable[..., ServeConfig]) -> None:
    before = time.monotonic()
    assert before <= configured().started_at <= time.monotonic()


def test_gateway_hands_over_its_routes(served: Callable[..., Any]) -> None:
    routes = ("--model", "a=unix:/run/s0", "--model", "org/b=scheduler-1:50052")
    args, kwargs = served("gateway", *routes, "--tokenizer", "[::1]:50051", "--port", "81", "--drain-timeout", "7")
    assert args == () and isinstance(kwargs.pop("stop"), asyncio.Event)
    assert kwargs == {
        "models": {"a": "unix:/run/s0", "org/b": "scheduler-1:50052"},
        "tokenizer": "[::1]:50051",
        "host": "127.0.0.1",
        "port": 81,
        "config": GatewayConfig(drain_timeout_s=7.0),
    }


GATEWAY = ("gateway", "--model", "a=unix:/run/s0", "--tokenizer", "unix:/run/t")


@pytest.mark.parametrize(
    ("setting", "value"), [("enable_prompt_embeds", True), ("strict", True), ("max_requests_per_minute", 7)]
)
def test_what_clients_may_do_is_said_by_flag_or_environment_to_the_gateway(
    setting: str,
    value: object,
    served: Callable[..., Any],
    configured: Callable[..., ServeConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = setting.replace("_", "-")
    flag = (f"--{name}",) if value is True else (f"--{name}", str(value))

    def of_gateway(*flags: str) -> object:
        return getattr(served(*GATEWAY, *flags)[1]["config"], setting)

    def of_serve(*flags: str) -> object:
        """What the gateway that `trivium serve` starts is told."""
        (child,) = [child for child in build_children(configured(*flags), "/run") if child.name == "gateway"]
        return getattr(served(*child.argv[4:])[1]["config"], setting)

    off = getattr(GatewayConfig(), setting)
    assert (of_gateway(), of_gateway(*flag), of_serve(), of_serve(*flag)) == (off, value, off, value)
    monkeypatch.setenv(f"TRIVIUM_{setting.upper()}", str(int(value)))  # type: ignore[call-overload]
    assert (of_gateway(), of_serve()) == (value, value)


def test_calls_of_tools_are_read_by_the_parser_of_each_model(
    served: Callable[..., Any], configured: Callable[..., ServeConfig]
) -> None:
    gateway = ("gateway", "--model", "a=unix:/run/s0", "--model", "b=unix:/run/s1", "--tokenizer", "unix:/run/t")
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--tool-call-parser", "b=llama3_json")
    assert served(*gateway, *flags)[1]["config"].tool_parsers == {"": "hermes", "b": "llama3_json"}
    children = build_children(configured("a", "b", *flags[:3]), "/run")
    assert [child.name for child in children if "--tool-call-parser" in child.argv] == ["gateway"]
    argv = children[-1].argv
    assert served(*argv[argv.index("gateway") :])[1]["config"].tool_parsers == {"": "hermes"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--enable-auto-tool-choice",), "--enable-auto-tool-choice needs --tool-call-parser"),
        (("--tool-call-parser", "hermes"), "--tool-call-parser needs --enable-auto-tool-choice"),
        (("--enable-auto-tool-choice", "--tool-call-parser", "granite"), "must be one of hermes, llama3_json"),
        (("--enable-auto-tool-choice", "--tool-call-parser", "z=hermes"), "the model 'z' is not served"),
        (("--enable-auto-tool-choice", *("--tool-call-parser", "hermes") * 2), "given twice for all models"),
    ],
)
def test_parsers_of_calls_that_make_no_sense_end_with_one_line(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = ("gateway", "--model", "a=unix:/run/s0", "--tokenizer", "unix:/run/t")
    for command in (("serve", "one"), gateway):
        assert message in refused(capsys, *command, *flags)


def test_tokenizer_hands_over_its_models_and_needs_no_torch(served: Callable[..., Any], forbidden: list[str]) -> None:
    (models, listen, _), _ = served("tokenizer", "a=/models/a", "org/b", *LISTEN)
    assert models == (ServedModel("a", "/models/a"), ServedModel("org/b", "org/b"))
    assert listen == "unix:/run/x.sock"
    assert forbidden == ["torch"]


def test_scheduler_hands_over_its_peers_and_limits(served: Callable[..., Any]) -> None:
    peers = ("--model", "a", "--executor", "e:1", "--tokenizer", "t:2")
    (*addresses, config, _), _ = served("scheduler", *peers, *LISTEN, "--max-plans-in-flight", "3")
    assert addresses == ["a", "e:1", "t:2", "unix:/run/x.sock"]
    assert config == SchedulerConfig(max_waiting_requests=4096, max_plans_in_flight=3)


def test_serve_hands_its_queue_flags_to_the_schedulers(configured: Callable[..., ServeConfig]) -> None:
    flags = ("--queue-timeout", "3", "--scheduling-policy", "priority", "--no-enable-prefix-caching")
    config = configured(*flags, "--max-waiting-requests", "7", "--max-waiting-tokens", "9")
    assert config.scheduler_flags == (
        *("--max-waiting-requests", "7", "--max-waiting-tokens", "9", "--queue-timeout", "3.0"),
        *("--scheduling-policy", "priority", "--no-enable-prefix-caching"),
    )


def test_executor_without_flags_uses_the_defaults_of_its_settings(served: Callable[..., Any]) -> None:
    (config, listen, _), _ = served("executor", "a=/models/a", *LISTEN)
    assert config == ExecutorConfig(model="/models/a", served_model_name="a")
    assert listen == "unix:/run/x.sock"


def test_executor_hands_over_every_flag(served: Callable[..., Any]) -> None:
    flags = ("--dtype", "float", "--device", "cpu", "--revision", "r", "--max-model-len", "9", "--max-num-seqs", "8")
    flags += ("--max-num-batched-tokens", "7", "--kv-cache-memory", "512MiB", "--num-threads", "6")
    flags += (
        "--num-local-executors",
        "5",
        "--gpu-memory-utilization",
        "0.5",
        "--swap-space",
        "0.25",
        "--quantization",
        "int8",
        "--enforce-eager",
    )
    flags += ("--generation-config", "/etc/generation", "--tensor-parallel-size", "4")
    flags += ("--enable-lora", "--lora-modules", "x=/x", "y=/y", "--max-lora-rank", "64", "--max-loras", "2")
    (config, *_), _ = served("executor", "a", *LISTEN, *flags)
    assert config == ExecutorConfig(
        model="a",
        served_model_name="a",
        dtype="float",
        device="cpu",
        revision="r",
        max_model_len=9,
        max_num_seqs=8,
        max_num_batched_tokens=7,
        kv_cache_memory_bytes=512 * 2**20,
        gpu_memory_utilization=0.5,
        swap_space_gib=0.25,
        quantization="int8",
        enforce_eager=True,
        num_threads=6,
        num_local_executors=5,
        tensor_parallel_size=4,
        generation_config="/etc/generation",
        enable_lora=True,
        lora_modules=(AdapterModule("x", "/x", "a"), AdapterModule("y", "/y", "a")),
        max_lora_rank=64,
        max_loras=2,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_also_an_environment_variable(command: str) -> None:
    options = [
        parameter
        for parameter in typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
        if parameter.param_type_name == "option"
    ]
    assert options
    for option in options:
        (flag,) = option.opts
        assert option.envvar == "TRIVIUM_" + flag.removeprefix("--").upper().replace("-", "_")


def test_a_flag_wins_over_the_environment(served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVIUM_MAX_NUM_SEQS", "11")
    monkeypatch.setenv("TRIVIUM_KV_CACHE_MEMORY", "1KiB")
    monkeypatch.setenv("TRIVIUM_LISTEN", "unix:/run/env.sock")
    (config, listen, _), _ = served("executor", "a")
    assert (config.max_num_seqs, config.kv_cache_memory_bytes, listen) == (11, 1024, "unix:/run/env.sock")
    (config, *_), _ = served("executor", "a", "--max-num-seqs", "12")
    assert config.max_num_seqs == 12


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("serve", "--prot", "1"), ("--prot", "--port")),
        (("serv",), ("serv",)),
        (("serve", "--port", "seventy"), ("--port", "TRIVIUM_PORT", "integer")),
        (("serve", "--port", "65536"), ("--port", "65535")),
        (("serve", "--log-level", "loud"), ("--log-level", "'loud'", "'warning'")),
        (("serve", "--kv-cache-memory", "2 bananas"), ("--kv-cache-memory", "'2 bananas'")),
        (("serve", "--kv-cache-memory", "0"), ("--kv-cache-memory", "'0'")),
        (("serve", "--api-key", " "), ("--api-key", "empty")),
        (("serve", "a=x", "a=y"), ("'a'", "2 times")),
        (("serve", "a="), ("NAME=SOURCE", "'a='")),
        (("serve", "/no/such/model"), ("/no/such/model", "no directory")),
        (("executor", *LISTEN), ("Missing argument",)),
        (("executor", "a"), ("Missing option", "--listen")),
        (("executor", "a", *LISTEN, "--max-num-seqs", "0"), ("--max-num-seqs", "1")),
        (("executor", "a", *LISTEN, "--kv-cache-memory", "0KiB"), ("--kv-cache-memory", "'0KiB'")),
        (("serve", "--swap-space", "-1"), ("--swap-space", "0")),
        (("executor", "a", *LISTEN, "--swap-space", "inf"), ("swap_space", "inf")),
        (("executor", "a", *LISTEN, "--quantization", "int3"), ("quantization", "int3")),
        (("executor", "a", *LISTEN, "--gpu-memory-utilization", "0"), ("gpu_memory_utilization", "0")),
        (("serve", "--gpu-memory-utilization", "1.5"), ("--gpu-memory-utilization", "1")),
        (("tokenizer", *LISTEN), ("Missing argument",)),
        (("tokenizer", "a", "a", *LISTEN), ("'a'", "2 times")),
        (("gateway", "--tokenizer", "t:1"), ("Missing option", "--model")),
        (("gateway", "--model", "a", "--tokenizer", "t:1"), ("NAME=SCHEDULER_ADDRESS", "'a'")),
        (("gateway", "--model", "a=b", "--tokenizer", "t:1"), ("'b'", "HOST:PORT")),
        (("gateway", "--model", "a=b:1", "--model", "a=b:2", "--tokenizer", "t:1"), ("'a'", "twice")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_command_line_is_refused_in_one_line(
    args: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *args)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "address", ["unix:/run/x.sock", "localhost:1", "0.0.0.0:65535", "a-b.svc.local:50051", "[::]:9"]
)
def test_an_address_is_a_unix_socket_or_host_and_port(address: str) -> None:
    assert flag_values.parse_address(address) == address


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "localhost:", ":50051", "localhost:0", "localhost:65536", "::1:50051", "http://x:1", "unix:x",
     "unix:", "unix:/" + "x" * 107, "a b:1", "x:1\n"],
)  # fmt: skip
def test_any_other_address_is_refused(address: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"HOST:PORT|absolute path|107 bytes"):
        flag_values.parse_address(address)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", 1), ("512MiB", 512 * 2**20), ("2GiB", 2 * 2**30), ("2gib", 2 * 2**30), ("3 KB", 3000), ("1TiB", 2**40)],
)
def test_memory_sizes(text: str, expected: int) -> None:
    assert flag_values.parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1.5GiB", "GiB", "1G", "1 PiB", "0", "\u0663"])
def test_other_memory_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="512MiB"):
        flag_values.parse_memory(text)


def test_a_bundled_name_and_a_hub_id_are_not_looked_up_as_paths() -> None:
    for source in (*BUNDLED_MODELS, "org/name"):
        flag_values.check_local_source(ServedModel(source, source))


def test_a_file_is_no_model_directory(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ConfigurationError, match="there is no directory"):
        flag_values.check_local_source(ServedModel("m", str(tmp_path / "model")))


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=lambda args: " ".join(args) or "-")
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        f"import sys\nsys.path.insert(0, {SOURCE_ROOT!r})\nfrom trivium.cli import main\n"
        f"code = main([*{command!r}, '--help'])\n"
        "heavy = {'torch', 'grpc', 'transformers', 'numpy', 'uvloop', 'rich'} & set(sys.modules)\n"
        "sys.exit(code or str(heavy) if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage: trivium" in result.stdout


def test_version_and_no_command_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trivium {trivium.__version__}\n"
    assert cli.main([]) == 0
    output = capsys.readouterr().out
    assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("module", ["trivium", "trivium.cli"])
def test_the_package_runs_as_a_module(module: str) -> None:
    code = [sys.executable, "-m", module, "serve", "--qqq"]
    result = subprocess.run(code, env={"PYTHONPATH": SOURCE_ROOT}, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "trivium: error: No such option: --qqq\n"
