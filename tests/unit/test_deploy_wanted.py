"""What make's variables may say, and what is told where a cluster runs otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from deploy import wanted
from deploy.readiness import ClusterError
from deploy.state import Cluster
from deploy.wanted import Wanted, check_environment, check_machine, differences, inherited, read, unused_variables

RUNNING = Cluster(
    router=("r",),
    scheduler=("s",),
    redis=None,
    model="smollm2",
    model_argument="/d",
    backend="torch",
    quantization=None,
)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"workers": "abc"}, "WORKERS=abc: a number is needed"),
        ({"workers": "1.5"}, "WORKERS=1.5: a number is needed"),
        ({"workers": "0"}, "WORKERS=0: at least 1 is needed"),
        ({"workers": "-2"}, "WORKERS=-2: at least 1 is needed"),
        ({"runtime": "foo"}, "RUNTIME=foo: must be one of processes, docker"),
        ({"backend": "foo"}, "BACKEND=foo: must be one of"),
        ({"quantization": "int4"}, "QUANTIZATION=int4: must be one of none, int8"),
        ({"model": "mock", "backend": "torch"}, "MODEL=mock BACKEND=torch: a mock has no weights"),
        ({"model": "mock:a", "backend": "cuda"}, "MODEL=mock:a BACKEND=cuda"),
        ({"model": "mock", "quantization": "int8"}, "QUANTIZATION=int8: the mock backend has none"),
        ({"backend": "cuda", "quantization": "int8"}, "QUANTIZATION=int8: the cuda backend has none"),
    ],
)
def test_what_no_variable_may_say(variables: dict[str, str], text: str) -> None:
    with pytest.raises(ClusterError, match=text.replace("*", "[*]")):
        read(**variables)


def test_what_was_not_said_is_none() -> None:
    assert read() == Wanted()
    said = read(model="mock", workers="2", backend="mock", quantization="none", runtime="docker")
    assert said == Wanted(model="mock", workers=2, backend="mock", quantization="none", runtime="docker")


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "safetensors"):
        with pytest.raises(ClusterError, match=f"MODEL={tmp_path}: holds no .*{name}"):
            check_machine(str(tmp_path), None)
        (tmp_path / (name if "." in name else f"model.{name}")).touch()
    check_machine(str(tmp_path), None)
    check_machine("ORG/NAME", "torch")  # nothing is fetched
    with pytest.raises(ClusterError, match=r"did you mean smollm2\?"):
        check_machine("smolm2", None)
    with pytest.raises(ClusterError, match="no such directory"):
        check_machine(str(tmp_path / "none"), None)


def test_cuda_without_a_device_or_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted, "has_cuda_device", lambda: False)
    monkeypatch.setattr(wanted, "has_cuda_packages", lambda: False)
    with pytest.raises(ClusterError, match="BACKEND=cuda needs more packages"):
        check_machine("smollm2", "cuda")
    monkeypatch.setattr(wanted, "has_cuda_packages", lambda: True)
    with pytest.raises(ClusterError, match="BACKEND=cuda: the driver tells of no CUDA device"):
        check_machine("smollm2", "cuda")
    monkeypatch.setattr(wanted, "has_cuda_device", lambda: True)
    check_machine("smollm2", "cuda")


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("OCTAVO_QUANTIZATION", "int4", "the worker can't use an OCTAVO_ variable .* --quantization: 'int4'"),
        ("OCTAVO_MAX_ROWS", "many", "the worker .* --max-rows: 'many'"),
        ("OCTAVO_RUN_AHEAD", "99", "the scheduler .* --run-ahead"),
        ("OCTAVO_API_KEYS", "/no-such-keys", "the router .* --api-keys /no-such-keys"),
        ("OCTAVO_API_KEY_LIST", "short", "the router .*OCTAVO_API_KEY_LIST: line 1"),
        ("OCTAVO_CLUSTER_TOKEN_FILE", "/no-such-token", "the scheduler .*/no-such-token"),
    ],
)
def test_the_environment_is_checked_as_the_services_will(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str
) -> None:
    check_environment()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ClusterError, match=text):
        check_environment()


def test_variables_that_nothing_takes_are_told() -> None:
    assert unused_variables({"OCTAVO_MAX_ROWS": "8", "OCTAVO_CACHE": "/c", "OCTAVO_SCHEDULER": "a:1", "X": "1"}) == []
    environ = {"OCTAVO_MAX_MODLE_LEN": "9", "OCTAVO_LISTEN": "h:1", "OCTAVO_HTTP_LISTEN": ""}
    listen, typo = unused_variables(environ)
    assert typo.endswith("did you mean OCTAVO_MAX_MODEL_LEN?")
    assert listen.startswith("OCTAVO_LISTEN is not used")


def test_an_address_in_the_environment_is_nothing_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_METRICS", "0.0.0.0:9101")
    monkeypatch.setenv("OCTAVO_HTTP_LISTEN", "nonsense")
    check_environment()


def test_a_worker_added_later_has_the_settings_of_the_environment() -> None:
    keys = {"OCTAVO_API_KEY": "a-key", "OCTAVO_API_KEY_LIST": "a-key team"}  # they would stand in a file
    assert inherited({"OCTAVO_MAX_ROWS": "8", "PATH": "x", **keys}) == {"OCTAVO_MAX_ROWS": "8"}


@pytest.mark.parametrize(
    "same",
    [
        Wanted(),
        Wanted(model="smollm2", workers=2, backend="torch", quantization="none", runtime="processes"),
        Wanted(backend="auto"),
    ],
)
def test_nothing_is_told_of_what_runs_as_asked(same: Wanted) -> None:
    assert differences(same, RUNNING, 2) == ""


def test_another_model_than_make_up_starts_by_itself_is_told() -> None:
    mock = dataclasses.replace(RUNNING, model="mock", backend="mock")
    told = differences(Wanted(), mock, 1)
    assert "mock runs" in told and "make worker MODEL=smollm2\n" in told
    assert differences(Wanted(model="mock"), mock, 1) == ""
    assert "smollm2" not in differences(Wanted(workers=2), mock, 1)  # it is the number that was asked for


def test_each_difference_is_told_with_what_to_do() -> None:
    told = differences(Wanted(workers=3, quantization="int8", backend="cuda"), RUNNING, 1)
    assert told.splitlines() == [
        "Nothing was changed: WORKERS=3 was asked for, 1 runs; BACKEND=cuda was asked for, torch runs; "
        "QUANTIZATION=int8 was asked for, none runs.",
        "To serve that as well: make worker BACKEND=cuda QUANTIZATION=int8",
        "To have that instead: make down, then make up WORKERS=3 BACKEND=cuda QUANTIZATION=int8",
    ]
    told = differences(Wanted(workers=2), RUNNING, 1)
    assert "To add one: make worker\n" in told
    assert "make worker" not in differences(Wanted(workers=1), RUNNING, 2)  # one too many
    unquantized = differences(Wanted(quantization="none"), dataclasses.replace(RUNNING, quantization="int8"), 1)
    assert "QUANTIZATION=none was asked for, int8 runs" in unquantized
    assert "make worker" not in differences(Wanted(runtime="docker"), RUNNING, 1)
