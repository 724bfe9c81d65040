from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from quantkit.benchmark.energy import Package, meter
from quantkit.benchmark.watch import Sample, Watch, use


def test_use_is_of_the_window_alone() -> None:
    """By hand: two processes, of which one starts in the window."""
    samples = [
        Sample(0.0, {1: (5.0, 1.0)}, 100.0),
        Sample(10.0, {1: (6.0, 2.0)}, 200.0),
        Sample(14.0, {1: (8.0, 3.0), 2: (1.0, 0.5)}, 320.0),
        Sample(20.0, {1: (20.0, 9.0), 2: (9.0, 9.0)}, 999.0),
    ]
    found = use(samples, 10.0, 15.0)
    assert found is not None
    assert found.cpu == pytest.approx((2.0 + 1.0) / 4.0)
    assert found.busy == pytest.approx((2.0 + 1.0) / 4.0)  # process 1: computed 2 s, waited 1 s
    assert found.joules == pytest.approx(120.0 * 5 / 4)
    assert use(samples, 30.0, 40.0) is None
    assert use([], 0.0, 1.0) is None


def test_a_busy_process_is_seen() -> None:
    import subprocess
    import sys

    argv = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(argv) as process:
        try:
            with Watch(process.pid, None) as watch:
                start = time.time()
                time.sleep(1.5)
            found = watch.use(start, time.time())
        finally:
            process.kill()
    assert found is not None
    # However many others want the cores, it computes or waits for one.
    assert found.busy > 0.8
    assert found.joules is None


def powercap(directory: Path, name: str, energy: int, full: int = 1000) -> Path:
    path = directory / f"intel-rapl:{name}"
    path.mkdir(parents=True)
    (path / "name").write_text(f"package-{name}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text(f"{full}\n")
    return path


def test_a_counter_that_begins_anew(tmp_path: Path) -> None:
    path = powercap(tmp_path, "0", 900)
    package = Package(path)
    assert package.joules() == 0.0
    (path / "energy_uj").write_text("950\n")
    assert package.joules() == pytest.approx(50e-6)
    (path / "energy_uj").write_text("49\n")  # 100 more: over 1000, which is full, to 49
    assert package.joules() == pytest.approx(150e-6)


def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_packages_are_added_and_their_parts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_gpu(tmp_path, monkeypatch)
    first, second = powercap(tmp_path, "0", 0), powercap(tmp_path, "1", 0)
    core = powercap(tmp_path, "0:0", 0)
    (core / "name").write_text("core\n")
    with meter(tmp_path) as found:
        assert found is not None
        for path, energy in ((first, 100), (second, 20), (core, 90)):
            (path / "energy_uj").write_text(f"{energy}\n")
        assert found.joules() == pytest.approx(120e-6)


def test_no_meter_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(tmp_path, monkeypatch)
    with meter(tmp_path) as found:
        assert found is None


def test_gpus_by_their_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of 100 and 200 W, as a stand-in for nvidia-smi tells every 50 ms."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *loop*) while :; do echo 100.0; echo 200.0; sleep 0.05; done;; esac\n'
        "echo 100.0\necho 200.0\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with meter(tmp_path / "no-powercap") as found:
        assert found is not None
        deadline = time.monotonic() + 20
        while found.joules() == 0.0 and time.monotonic() < deadline:
            time.sleep(0.01)
        joules, start = found.joules(), time.monotonic()
        time.sleep(1.0)
        watts = (found.joules() - joules) / (time.monotonic() - start)
    assert watts == pytest.approx(300.0, rel=0.05)
