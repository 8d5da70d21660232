"""The chart, rendered by the real Helm engine: valid objects, real command lines, references that resolve."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import typer
import yaml

from trivium import __version__, cli
from trivium.config import AdapterModule
from trivium.demo import BUNDLED_MODELS
from trivium.flag_values import parse_tool_parsers

KUBERNETES_VERSIONS = ("1.29", "1.31", "1.34", "1.37")  # the oldest that Chart.yaml allows ... the newest known
DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
PORTS = {"gateway": 8000, "tokenizer": 50051, "scheduler": 50052, "executor": 50053}

ODD_NAMES = (
    "meta-llama/Llama-3.2-1B", "meta-llama-llama-3-2-1b", "META-LLAMA/llama-3.2-1b", "1.5B", "模型", "a" * 200,
    "a" * 199, "it's", "50%", '"quoted"', "{{braces}}", "trailing-", "x_y.z:latest", "true", "12345678",
)  # fmt: skip
VALUE_SETS: dict[str, tuple[str, dict[str, Any]]] = {  # id -> (release name, values)
    "default": ("demo", {}),
    "odd-names": (
        "1-very-long.release-name-that-fills-all-of-the-53-bytes",
        {"models": [{"name": n} for n in ODD_NAMES]},
    ),
    "engine-flags": (
        "trivium",
        {
            "models": [
                {
                    "name": "a",
                    "source": "/cache/a",
                    "engine": {
                        "dtype": "float32",
                        "device": "cpu",
                        "revision": "1e10",
                        "maxModelLen": 2**31,
                        "maxNumSeqs": 8,
                        "maxNumBatchedTokens": 10_000_000,
                        "kvCacheMemory": "2GiB",
                        "gpuMemoryUtilization": 0.85,
                        "swapSpace": 4,
                        "numThreads": 0,
                        "enforceEager": True,
                        "tensorParallelSize": 2,
                    },
                    "lora": {"modules": {"sql": "/cache/sql", "a=b": "hub/x"}, "maxLoraRank": 64, "maxLoras": 2},
                    "promptAdapters": {"modules": {"pirate": "/cache/p"}, "maxPromptAdapterToken": 64},
                }
            ],
            "scheduler": {"maxWaitingRequests": 1_000_000, "maxPlansInFlight": 3},
            "logLevel": "debug",
        },
    ),
    "gpus-and-secrets": (
        "gpu",
        {
            "models": [
                {
                    "name": "big",
                    "gpus": 2,
                    "engine": {"tensorParallelSize": 2},
                    "toolCallParser": "llama3_json",
                    "resources": {"requests": {"cpu": "8"}, "limits": {"memory": "64Gi"}},
                    "nodeSelector": {"gpu": "h200"},
                    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                },
                {"name": "small", "toolCallParser": "hermes"},
            ],
            "image": {"registry": "registry.example", "repository": "team/trivium", "digest": "sha256:" + "0" * 64},
            "imagePullSecrets": [{"name": "pull"}],
            "apiKey": {"existingSecret": "keys"},
            "huggingFace": {"existingSecret": "hub"},
            "cache": {"existingClaim": "models"},
            "gateway": {
                "replicas": 3,
                "enablePromptEmbeds": True,
                "strict": True,
                "maxRequestsPerMinute": 1_000_000,
                "service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}},
            },
            "tokenizer": {"replicas": 2},
            "drain": {"preStopSeconds": 0, "graceSeconds": 100},
            "serviceAccount": {"create": False, "name": "existing"},
            "commonLabels": {"team": "nlp"},
            "podAnnotations": {"note": "x"},
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
        },
    ),
}


class _StrictLoader(yaml.SafeLoader):
    """YAML without the habit of taking the last of two equal keys."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    assert len(keys) == len(set(keys)), f"a key is given twice: {keys}"
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


@dataclass(frozen=True)
class Release:
    """What one set of values renders to."""

    name: str
    values: dict[str, Any]
    objects: tuple[dict[str, Any], ...]
    notes: str

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        return [each for each in self.objects if each["kind"] in kinds]

    def workloads(self, component: str | None = None) -> list[dict[str, Any]]:
        found = self.of_kind("Deployment", "StatefulSet")
        return [each for each in found if component in (None, component_of(each))]

    def model_names(self) -> list[str]:
        return [model["name"] for model in self.values["models"]]


def component_of(thing: dict[str, Any]) -> str:
    return str(thing["metadata"]["labels"]["app.kubernetes.io/component"])


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(workload)["containers"]
    assert isinstance(container, dict)
    return container


def parse(container: dict[str, Any]) -> dict[str, Any]:
    """The parameters that the real command line parser reads from a container; `command` is the subcommand."""
    program, name, *rest = [*container["command"], *container["args"]]
    assert program == "trivium" and all(isinstance(part, str) for part in rest)
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    return {"command": name, **command.make_context(name, list(rest)).params}


def render(chart: helm_python.Chart, release_name: str, values: dict[str, Any]) -> Release:
    chart.validate_schema(values)
    files = chart.render(values, name=release_name, namespace="models")
    notes = files.pop("trivium/templates/NOTES.txt")
    objects = tuple(
        document for text in files.values() for document in yaml.load_all(text, Loader=_StrictLoader) if document
    )
    return Release(release_name, chart.merge_values(values), objects, notes)


@pytest.fixture(scope="session")
def releases(chart: helm_python.Chart) -> dict[str, Release]:
    return {name: render(chart, release_name, values) for name, (release_name, values) in VALUE_SETS.items()}


@pytest.fixture(params=list(VALUE_SETS))
def release(releases: dict[str, Release], request: pytest.FixtureRequest) -> Release:
    return releases[request.param]


def test_lint_has_nothing_to_say_but_the_icon(chart_path: Path) -> None:
    report = helm_python.lint(chart_path, strict=True)
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]
    assert report["errors"] == []


def test_the_chart_installs_the_version_of_this_source_tree(chart: helm_python.Chart) -> None:
    assert chart.metadata["appVersion"] == __version__


def test_the_default_models_are_the_bundled_ones(releases: dict[str, Release]) -> None:
    assert sorted(releases["default"].model_names()) == sorted(BUNDLED_MODELS)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_object_is_valid_strictly(release: Release, version: str) -> None:
    for each in release.objects:
        kubernetes_validate.validate(each, version, strict=True)


def test_there_is_one_scheduler_and_one_executor_per_model(release: Release) -> None:
    components = sorted(component_of(workload) for workload in release.workloads())
    per_model = ["executor", "scheduler"] * len(release.values["models"])
    assert components == sorted(["gateway", "tokenizer", *per_model])
    assert all(each["kind"] == "StatefulSet" for each in release.workloads("scheduler"))


def test_names_are_unique_and_valid(release: Release) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in release.objects]
    assert len(names) == len(set(names))
    for kind, name in names:
        assert DNS_LABEL.fullmatch(name) and len(name) <= 52, (kind, name)
    assert {each["metadata"]["namespace"] for each in release.objects} == {"models"}


def test_readable_model_names_stay_readable(releases: dict[str, Release]) -> None:
    names = {each["metadata"]["name"] for each in releases["gpus-and-secrets"].workloads("executor")}
    assert names == {"gpu-trivium-executor-big", "gpu-trivium-executor-small"}


def test_every_service_selects_exactly_the_pods_of_one_workload(release: Release) -> None:
    services = release.of_kind("Service")
    assert len(services) == len(release.workloads())
    for service in services:
        selector = service["spec"]["selector"].items()
        selected = [
            each for each in release.workloads() if selector <= each["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert [each["metadata"]["name"] for each in selected] == [service["metadata"]["name"]]
        (port,) = service["spec"]["ports"]
        container_ports = {port["name"]: port["containerPort"] for port in container_of(selected[0])["ports"]}
        assert container_ports[port["targetPort"]] == PORTS[component_of(service)]
        if component_of(service) != "gateway":
            assert service["spec"]["clusterIP"] == "None"
            # clients of a headless service reach the pod itself, so its port must be the container's
            assert port["port"] == container_ports[port["targetPort"]]


def test_every_workload_selects_its_own_pods(release: Release) -> None:
    selectors = []
    for workload in release.workloads():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        selector = workload["spec"]["selector"]["matchLabels"]
        assert selector.items() <= labels.items()
        assert not any(key.startswith("helm.sh/") for key in labels), "a new chart version would restart every pod"
        selectors.append(tuple(sorted(selector.items())))
    assert len(selectors) == len(set(selectors))


def test_a_stateful_set_names_a_headless_service_that_exists(release: Release) -> None:
    services = {each["metadata"]["name"]: each["spec"] for each in release.of_kind("Service")}
    for workload in release.of_kind("StatefulSet"):
        assert services[workload["spec"]["serviceName"]]["clusterIP"] == "None"


def test_every_command_line_is_accepted_by_the_real_parser(release: Release) -> None:
    for workload in release.workloads():
        parsed = parse(container_of(workload))
        assert parsed["command"] == component_of(workload)
        assert parsed["log_level"] == release.values["logLevel"]


def test_addresses_lead_to_the_services_of_the_same_model(release: Release) -> None:
    by_address = {
        f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}": (
            component_of(service),
            service["metadata"]["labels"].get("trivium/model"),
        )
        for service in release.of_kind("Service")
    }
    labels_by_model = {}  # model name -> the label of its pods
    for workload in release.workloads("scheduler"):
        parsed = parse(container_of(workload))
        label = labels_by_model[parsed["model"]] = workload["metadata"]["labels"]["trivium/model"]
        assert by_address[parsed["executor"]] == ("executor", label)
        assert by_address[parsed["tokenizer"]] == ("tokenizer", None)
    (gateway,) = release.workloads("gateway")
    parsed = parse(container_of(gateway))
    routes = cli.parse_routes(parsed["model"])
    assert list(routes) == release.model_names() and set(routes) == set(labels_by_model)
    for name, address in routes.items():
        assert by_address[address] == ("scheduler", labels_by_model[name])
    assert by_address[parsed["tokenizer"]] == ("tokenizer", None)
    assert parsed["host"] == "0.0.0.0"


def test_tokenizer_and_executors_serve_the_models_of_the_values(release: Release) -> None:
    expected = [(model["name"], model.get("source", model["name"])) for model in release.values["models"]]
    (tokenizer,) = release.workloads("tokenizer")
    served = cli.parse_models(parse(container_of(tokenizer))["models"])
    assert [(model.name, model.source) for model in served] == expected
    executors = [cli.parse_models([parse(container_of(each))["model"]])[0] for each in release.workloads("executor")]
    assert [(model.name, model.source) for model in executors] == expected


def test_services_listen_where_their_ports_and_probes_are(release: Release) -> None:
    for workload in release.workloads():
        container, component = container_of(workload), component_of(workload)
        parsed = parse(container)
        listen = parsed["listen"] if component != "gateway" else f"{parsed['host']}:{parsed['port']}"
        (port,) = container["ports"]
        assert listen == f"0.0.0.0:{PORTS[component]}" and port["containerPort"] == PORTS[component]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if component == "gateway":
                assert container[probe]["httpGet"]["port"] == port["name"]
            else:
                assert container[probe]["grpc"]["port"] == PORTS[component]


def test_liveness_asks_the_process_and_readiness_the_service(release: Release) -> None:
    for workload in release.workloads():
        container, component = container_of(workload), component_of(workload)
        live, ready = container["livenessProbe"], container["readinessProbe"]
        if component == "gateway":
            assert (live["httpGet"]["path"], ready["httpGet"]["path"]) == ("/health/live", "/health/ready")
        else:
            service = f"trivium.v1.{component.capitalize()}"
            assert (live["grpc"]["service"], ready["grpc"]["service"]) == ("", service)


def test_an_executor_gets_the_time_that_it_needs_to_load(chart: helm_python.Chart) -> None:
    release = render(chart, "demo", {"executor": {"startupSeconds": 601}})
    for workload in release.workloads("executor"):
        probe = container_of(workload)["startupProbe"]
        assert probe["grpc"]["service"] == "trivium.v1.Executor"
        assert 601 <= probe["periodSeconds"] * probe["failureThreshold"] < 610
        assert workload["spec"]["progressDeadlineSeconds"] > 601


def test_engine_flags_arrive_exactly(releases: dict[str, Release]) -> None:
    release = releases["engine-flags"]
    parsed = parse(container_of(release.workloads("executor")[0]))
    expected = {"dtype": "float32", "device": "cpu", "revision": "1e10", "max_model_len": 2**31, "max_num_seqs": 8}
    expected |= {"max_num_batched_tokens": 10_000_000, "kv_cache_memory": 2 * 2**30, "num_threads": 0}
    expected |= {"tensor_parallel_size": 2, "enforce_eager": True}
    expected |= {"gpu_memory_utilization": 0.85, "swap_space": 4.0}
    expected |= {"enable_lora": True, "max_lora_rank": 64, "max_loras": 2}
    assert {name: parsed[name] for name in expected} == expected
    assert (parsed["enable_prompt_adapter"], parsed["max_prompt_adapter_token"]) == (True, 64)
    assert [AdapterModule.parse(text) for text in parsed["prompt_adapters"]] == [AdapterModule("pirate", "/cache/p")]
    modules = [AdapterModule.parse(text) for text in parsed["lora_modules"]]
    assert modules == [AdapterModule("a=b", "hub/x"), AdapterModule("sql", "/cache/sql")]
    parsed = parse(container_of(release.workloads("scheduler")[0]))
    assert (parsed["max_waiting_requests"], parsed["max_plans_in_flight"]) == (1_000_000, 3)


def test_the_gateway_is_told_what_clients_may_do(release: Release) -> None:
    (gateway,) = release.workloads("gateway")
    parsed, wanted = parse(container_of(gateway)), release.values["gateway"]
    assert parsed["enable_prompt_embeds"] is wanted["enablePromptEmbeds"]
    assert parsed["strict"] is wanted["strict"]
    assert parsed["max_requests_per_minute"] == wanted["maxRequestsPerMinute"]


def test_calls_are_read_as_each_model_writes_them(release: Release) -> None:
    (gateway,) = release.workloads("gateway")
    parsed = parse(container_of(gateway))
    models = {model["name"]: model.get("toolCallParser") for model in release.values["models"]}
    expected = {name: parser for name, parser in models.items() if parser is not None}
    found = parse_tool_parsers(parsed["tool_call_parser"], models, is_enabled=parsed["enable_auto_tool_choice"])
    assert found == expected


def test_variables_for_the_command_are_flags_that_it_has(release: Release) -> None:
    for workload in release.workloads():
        container = container_of(workload)
        command = typer.main.get_command(cli.app).commands[container["args"][0]]  # type: ignore[attr-defined]
        known = {parameter.envvar for parameter in command.params}
        given = {each["name"] for each in container.get("env", ()) if each["name"].startswith("TRIVIUM_")}
        assert given <= known
        # a Service called "trivium" would be injected as TRIVIUM_PORT=tcp://...
        assert pod_of(workload)["enableServiceLinks"] is False


def test_threads_follow_the_cpu_request_unless_they_are_set(releases: dict[str, Release]) -> None:
    for name, is_derived in (("default", True), ("engine-flags", False)):
        for workload in releases[name].workloads("executor"):
            env = {each["name"]: each for each in container_of(workload)["env"]}
            assert ("TRIVIUM_NUM_THREADS" in env) is is_derived
            if is_derived:
                field = env["TRIVIUM_NUM_THREADS"]["valueFrom"]["resourceFieldRef"]
                assert field == {"containerName": "executor", "resource": "requests.cpu", "divisor": "1"}


def test_gpus_are_added_to_the_limits_of_one_model_only(releases: dict[str, Release]) -> None:
    executors = {each["metadata"]["name"]: each for each in releases["gpus-and-secrets"].workloads("executor")}
    big, small = (executors[f"gpu-trivium-executor-{name}"] for name in ("big", "small"))
    assert container_of(big)["resources"] == {
        "requests": {"cpu": "8"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": 2},
    }
    assert "nvidia.com/gpu" not in container_of(small)["resources"]["limits"]
    assert pod_of(big)["nodeSelector"] == {"gpu": "h200", "kubernetes.io/os": "linux"}
    assert pod_of(big)["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}, {"operator": "Exists"}]
    assert pod_of(small)["nodeSelector"] == {"kubernetes.io/os": "linux"}


def test_secrets_are_referred_to_and_reach_only_who_needs_them(releases: dict[str, Release]) -> None:
    expected = {"gateway": {"TRIVIUM_API_KEY": "keys"}, "scheduler": {}}
    for workload in releases["gpus-and-secrets"].workloads():
        secrets = {
            each["name"]: each["valueFrom"]["secretKeyRef"]["name"]
            for each in container_of(workload).get("env", ())
            if "secretKeyRef" in each.get("valueFrom", {})
        }
        assert secrets == expected.get(component_of(workload), {"HF_TOKEN": "hub"})
    assert not releases["gpus-and-secrets"].of_kind("Secret")


def test_pods_are_locked_down(release: Release) -> None:
    for workload in release.workloads():
        pod, container = pod_of(workload), container_of(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is False
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]


def test_every_mount_has_its_volume_and_tmp_is_writable(release: Release) -> None:
    for workload in release.workloads():
        mounts = {mount["name"]: mount["mountPath"] for mount in container_of(workload)["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod_of(workload)["volumes"]}
        assert mounts["tmp"] == "/tmp"
        assert ("cache" in mounts) is (component_of(workload) in ("tokenizer", "executor"))


def test_the_service_account_of_the_pods_exists_or_is_named(releases: dict[str, Release]) -> None:
    for name, expected in (("default", "demo-trivium"), ("gpus-and-secrets", "existing")):
        release = releases[name]
        assert {pod_of(workload)["serviceAccountName"] for workload in release.workloads()} == {expected}
        accounts = release.of_kind("ServiceAccount")
        assert [account["metadata"]["name"] for account in accounts] == ([expected] if name == "default" else [])
        assert not any(account["automountServiceAccountToken"] for account in accounts)


def test_a_pod_may_live_longer_than_its_drain(release: Release) -> None:
    drain = release.values["drain"]
    for workload in release.workloads():
        sleep_s = container_of(workload).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert sleep_s == (drain["preStopSeconds"] if component_of(workload) == "gateway" else 0)
        assert pod_of(workload)["terminationGracePeriodSeconds"] > sleep_s + drain["graceSeconds"]


def test_a_digest_wins_over_a_tag(chart: helm_python.Chart, releases: dict[str, Release]) -> None:
    def images(release: Release) -> set[str]:
        return {container_of(workload)["image"] for workload in release.workloads()}

    assert images(releases["default"]) == {f"trivium:{__version__}"}
    assert images(releases["gpus-and-secrets"]) == {"registry.example/team/trivium@sha256:" + "0" * 64}
    assert images(render(chart, "demo", {"image": {"tag": "nightly"}})) == {"trivium:nightly"}


def test_notes_hold_a_command_that_can_be_pasted(release: Release) -> None:
    (gateway,) = [each for each in release.of_kind("Service") if component_of(each) == "gateway"]
    assert f"service/{gateway['metadata']['name']} 8000:{gateway['spec']['ports'][0]['port']}" in release.notes
    words = shlex.split(release.notes[release.notes.index("  curl ") :].replace("\\\n", " ").split("\n")[0])
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert json.loads(words[-1])["model"] == release.model_names()[0]
    has_key = bool(release.values["apiKey"]["existingSecret"])
    assert ("Authorization: Bearer $TRIVIUM_API_KEY" in words) is has_key
    assert ("Anyone who reaches" in release.notes) is not has_key


@pytest.mark.parametrize(("gpus", "ranks"), [(2, None), (1, 2), (2, 4)])
def test_gpus_and_ranks_that_disagree_are_refused(chart: helm_python.Chart, gpus: int, ranks: int | None) -> None:
    engine = {} if ranks is None else {"tensorParallelSize": ranks}
    match = f'"a" has gpus {gpus} and engine.tensorParallelSize {ranks or 1}'
    with pytest.raises(helm_python.HelmError, match=match):
        chart.render({"models": [{"name": "a", "gpus": gpus, "engine": engine}]}, name="demo")


def test_ranks_on_gpus_have_shared_memory_and_no_other_pod_has(chart: helm_python.Chart) -> None:
    models = [
        {"name": "two", "gpus": 2, "engine": {"tensorParallelSize": 2}},
        {"name": "one", "gpus": 1},
        {"name": "cpu", "engine": {"tensorParallelSize": 2}},
    ]
    for workload in render(chart, "demo", {"models": models}).workloads("executor"):
        mounts = {each["mountPath"] for each in container_of(workload)["volumeMounts"]}
        assert ("/dev/shm" in mounts) is ("-two" in workload["metadata"]["name"])


def test_a_model_named_twice_is_refused(chart: helm_python.Chart) -> None:
    with pytest.raises(helm_python.HelmError, match='the name "a" is given twice'):
        chart.render({"models": [{"name": "a"}, {"name": "a", "source": "b"}]}, name="demo")
