"""What values.schema.json refuses, and that it says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"gatway": {}}, "'gatway'"),
        ({"models": []}, "/models"),
        ({"models": [{"source": "x"}]}, "/models/0"),
        ({"models": [{"name": "a=b"}]}, "/models/0/name"),
        ({"models": [{"name": "--flag"}]}, "/models/0/name"),
        ({"models": [{"name": "a", "gpu": 1}]}, "/models/0"),
        ({"models": [{"name": "a", "gpus": "one"}]}, "/models/0/gpus"),
        ({"models": [{"name": "a", "engine": {"maxNumSeqs": 0}}]}, "/models/0/engine/maxNumSeqs"),
        ({"models": [{"name": "a", "engine": {"tensorParallelSize": 0}}]}, "/models/0/engine/tensorParallelSize"),
        ({"models": [{"name": "a", "lora": {"modules": {"b": ""}}}]}, "/models/0/lora/modules/b"),
        ({"models": [{"name": "a", "engine": {"kvCacheMemory": "2 GB"}}]}, "/models/0/engine/kvCacheMemory"),
        ({"models": [{"name": "a", "engine": {"maxModelLength": 9}}]}, "/models/0/engine"),
        ({"models": [{"name": "a", "resources": {"limits": {"memory": "4 GB"}}}]}, "/models/0/resources/limits/memory"),
        ({"gateway": {"replicas": "3"}}, "/gateway/replicas"),
        ({"gateway": {"service": {"port": 65536}}}, "/gateway/service/port"),
        ({"gateway": {"service": {"type": "ExternalName"}}}, "/gateway/service/type"),
        ({"image": {"digest": "sha256:123"}}, "/image/digest"),
        ({"image": {"pullPolicy": "always"}}, "/image/pullPolicy"),
        ({"logLevel": "loud"}, "/logLevel"),
        ({"apiKey": {"value": "secret"}}, "/apiKey"),
        ({"drain": {"preStopSeconds": -1}}, "/drain/preStopSeconds"),
        ({"scheduler": {"maxPlansInFlight": 0}}, "/scheduler/maxPlansInFlight"),
        ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "/commonLabels"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_value_is_refused_with_its_path(chart: helm_python.Chart, values: dict[str, Any], path: str) -> None:
    with pytest.raises(helm_python.HelmValuesError) as caught:
        chart.validate_schema(values)
    assert path in str(caught.value)


def test_the_schema_knows_every_default_and_only_those(chart: helm_python.Chart, chart_path: Path) -> None:
    schema = chart.schema
    assert schema is not None
    assert set(schema["properties"]) - {"global"} == set(yaml.safe_load((chart_path / "values.yaml").read_text()))
    assert '"$ref": "http' not in (chart_path / "values.schema.json").read_text(), "an installation may have no network"
