"""The doctor's checks against real sockets, directories, processes and packages."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedllm_flwr.commands.doctor import (
    Check,
    captured_by_proxy,
    check_assets,
    check_commands,
    check_devices,
    check_disk,
    check_hub,
    check_lines,
    check_local_superlink,
    check_loopback,
    check_packages,
    check_quantization,
    check_ray,
    check_sandbox,
    exit_status,
    package_check,
    quantization_error,
    run_checks,
    verdict,
)
from fedllm_flwr.evaluation.sandbox.bubblewrap import why_refused
from fedllm_flwr.flower.names import version

OK, WARN, FAIL = (
    Check(status, status, "detail\nof it", "do this") for status in ("ok", "warn", "fail")
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_only_a_failure_makes_the_exit_status_one() -> None:
    assert exit_status([OK, WARN]) == 0
    assert exit_status([OK, FAIL, WARN]) == 1
    assert exit_status([]) == 0


def test_text_has_one_line_per_finding_and_per_remedy() -> None:
    assert [line.split() for line in check_lines(Check("python", "ok", "3.11"))] == [
        ["ok", "python", "3.11"]
    ]
    first, remedy = check_lines(WARN)
    assert first.split() == ["warn", "warn", "detail", "of", "it"]
    assert remedy.strip() == "do this"
    assert remedy.index("do") == first.index("detail")
    assert verdict([OK, WARN, FAIL]) == "Not ready: fail failed."
    assert verdict([OK, WARN]) == "Ready, with warnings: warn."
    assert verdict([OK]) == "Ready."


def test_this_environment_meets_the_requirements() -> None:
    python, packages = check_packages()

    assert (python.status, packages.status) == ("ok", "ok")
    assert ".".join(map(str, sys.version_info[:3])) in python.detail


@pytest.mark.parametrize(
    ("requirement", "detail"),
    [
        ("numpy>=1,<1.1", r"numpy \S+, wanted <1.1,>=1"),
        ("no-such-package-at-all>=2", "no-such-package-at-all is not installed"),
    ],
)
def test_a_package_out_of_range_fails_with_a_remedy(requirement: str, detail: str) -> None:
    check = package_check(requirement)

    assert check is not None
    assert check.status == "fail"
    assert re.fullmatch(detail, check.detail)
    assert check.remedy.startswith(f"pip install '{requirement.split('>')[0]}")
    assert package_check("numpy>=1") is None


def test_devices_name_the_cpu_threads() -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    first = check_devices()[0]

    assert first.name == "cpu"
    assert first.detail.startswith(f"{usable} CPU threads")


def test_quantization_computes_what_it_should() -> None:
    pytest.importorskip("bitsandbytes")
    # Rounding to 16 levels of normal weights loses about a tenth, to 255 levels far less.
    assert 0.02 < quantization_error("nf4", "cpu") < 0.2
    assert 0.0005 < quantization_error("int8", "cpu") < 0.02
    assert [check.status for check in check_quantization()] == ["ok", "ok"]


def test_commands_are_found_beside_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    [check] = check_commands()
    assert (check.status, version() in check.detail) == ("ok", True)
    monkeypatch.setattr("fedllm_flwr.commands.doctor.version", lambda: "1.36.0")
    [check] = check_commands()
    assert (check.status, "servers and sites take 1.31 or 1.42" in check.detail) == ("warn", True)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    [check] = check_commands()
    assert (check.status, "flower-superlink" in check.detail) == ("fail", True)


def test_loopback_works_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert check_loopback()[0].status == "ok"
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "example.org")
    [check] = check_loopback()
    assert (check.status, check.remedy) == ("warn", "export no_proxy=127.0.0.1,localhost")


@pytest.mark.parametrize(
    ("environment", "captured"),
    [
        ({}, None),
        ({"https_proxy": "http://p"}, "https_proxy"),
        ({"https_proxy": "http://p", "no_proxy": "localhost, 127.0.0.1"}, None),
        ({"http_proxy": "http://p", "no_proxy": ","}, "http_proxy"),
        ({"no_proxy": "x"}, None),
        # As a gRPC client on this interface behaves:
        ({"HTTP_PROXY": "http://p"}, None),
        ({"http_proxy": "http://p", "no_proxy": "localhost"}, "http_proxy"),
        ({"http_proxy": "http://p", "NO_PROXY": "127.0.0.1"}, "http_proxy"),
        ({"http_proxy": "http://p", "no_proxy": "127.0.0.0/8"}, None),
        ({"http_proxy": "http://p", "no_proxy": "*"}, "http_proxy"),
    ],
)
def test_proxy_variables(environment: dict[str, str], captured: str | None) -> None:
    assert captured_by_proxy(environment) == captured


def test_no_superlink() -> None:
    assert check_local_superlink(free_port())[0].status == "ok"


def test_a_foreign_program_on_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        [check] = check_local_superlink(server.getsockname()[1])

    assert check.status == "warn"
    assert "FLWR_LOCAL_CONTROL_API_PORT" in check.remedy


@pytest.mark.parametrize("own", [True, False])
def test_a_superlink_that_stayed_behind(tmp_path: Path, own: bool) -> None:
    """A process named as flwr run names its daemon, listening where that does."""
    if not own and sys.prefix == sys.base_prefix:
        pytest.skip("no other Python is at hand outside a virtual environment")
    port = free_port()
    script = tmp_path / "flower-superlink"
    script.write_text(
        "import socket, sys, time\n"
        "server = socket.create_server(('127.0.0.1', int(sys.argv[-1].rpartition(':')[2])))\n"
        "time.sleep(60)\n"
    )
    python = sys.executable if own else os.path.realpath(sys.executable)
    process = subprocess.Popen([python, str(script), "--control-api-address", f"127.0.0.1:{port}"])
    try:
        deadline = time.monotonic() + 20
        while check_local_superlink(port)[0].detail.startswith("no local"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        [check] = check_local_superlink(port)
    finally:
        process.kill()
        process.wait()

    if own:
        assert check == Check(
            "superlink",
            "ok",
            f"flwr run's local SuperLink of this environment is running (process {process.pid})",
        )
    else:
        assert (check.status, check.remedy) == ("warn", f"kill {process.pid}")


def test_disk_that_can_and_cannot_be_written(tmp_path: Path) -> None:
    [check] = check_disk(tmp_path / "not" / "yet" / "there")
    assert check.name == "disk"
    assert f"free in {tmp_path}" in check.detail
    assert not (tmp_path / "not").exists()

    file = tmp_path / "file"
    file.write_text("")
    [check] = check_disk(file / "run")
    assert (check.status, "cannot write" in check.detail) == ("fail", True)


def test_missing_assets_are_named(tmp_path: Path) -> None:
    [check] = check_assets(tmp_path)
    assert check.status == "fail"
    for name in ("tiny/config.json", "tiny/model.safetensors", "demo/train.jsonl"):
        assert name in check.detail
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    for name in ("tiny/tokenizer.json", "demo/test.jsonl"):
        (tmp_path / name).write_bytes(b"12")
    assert check_assets(tmp_path)[0] == Check(
        "demo", "ok", "embedded model and data present (10 B)"
    )


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    [check] = check_hub()

    assert check.status == "warn"
    assert "model.path" in check.remedy


def test_ray_that_does_not_start_in_time_is_ended() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    [check] = check_ray(limit_s=0.5)

    assert check.status == "warn"
    assert check.detail == "did not start within 0.5 s"
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.slow
def test_ray_starts() -> None:
    assert check_ray() == [Check("ray", "ok", "starts and answers")]


def test_quick_leaves_out_ray_and_the_hub(tmp_path: Path) -> None:
    names = [check.name for check in run_checks(quick=True, output_dir=tmp_path)]

    assert {"python", "packages", "cpu", "gpu", "flower", "ports", "superlink", "disk"} <= set(
        names
    )
    assert not {"ray", "hub"} & set(names)


def test_sandbox_says_what_contains_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = check_sandbox()

    assert check.name == "sandbox"
    assert check.status == ("ok" if why_refused() is None else "warn")

    monkeypatch.setenv("PATH", "/nowhere")
    why_refused.cache_clear()
    try:
        (check,) = check_sandbox()
    finally:
        why_refused.cache_clear()
    assert (check.status, check.detail) == (
        "warn",
        "generated code cannot be run: bubblewrap is not installed",
    )
    assert check.remedy.startswith("apt-get install bubblewrap")
