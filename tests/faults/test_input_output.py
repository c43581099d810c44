"""Reads that fail or are slow in the middle of a decode; a disk that is full, a quota, a limit."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.common import ROOT, Victim, save_model

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parent / "shim.c"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compiled shim; it has to fail a read to be believed."""
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", SOURCE, "-o", library, "-ldl"], check=True)
    code = (
        "import os; fd = os.open('probe.bin', os.O_RDWR | os.O_CREAT);"
        " os.preadv(fd, [bytearray(1)], 0)"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code],
        cwd=library.parent,
        env={
            **os.environ,
            "LD_PRELOAD": str(library),
            "SHIM_FILE": "probe.bin",
            "SHIM_READ_ERRNO": str(errno.EIO),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Input/output error" in seen.stderr
    return str(library)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture(scope="module")
def victim(shim: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with Victim(tmp_path_factory.mktemp("cache"), LD_PRELOAD=shim) as started:
        yield started


@pytest.fixture(scope="module")
def reference(
    victim: Victim, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A store, and the tokens of an undisturbed decode from it."""
    store = tmp_path_factory.mktemp("reference") / "store"
    ended = victim.run("decode", model, store)
    assert ended["status"] == 0, ended
    return store, ended["said"]


@pytest.mark.parametrize("after", [1, 7, 40, 90])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_read_that_fails_is_one_sentence(
    number: int, after: int, victim: Victim, model: Path, reference: tuple[Path, str]
) -> None:
    store, tokens = reference
    failing = {
        "SHIM_FILE": str(store / "experts.bin"),
        "SHIM_READ_ERRNO": str(number),
        "SHIM_AFTER": str(after),
        "SHIM_COUNT": "1",
    }
    ended = victim.run("decode", model, store, environment=failing)
    assert ended["status"] == 2, ended
    assert os.strerror(number) in ended["said"]
    assert victim.run("decode", model, store)["said"] == tokens


def test_slow_reads_give_the_same_tokens(
    victim: Victim, model: Path, reference: tuple[Path, str]
) -> None:
    store, tokens = reference
    slow = {"SHIM_FILE": str(store / "experts.bin"), "SHIM_DELAY_MS": "20"}
    ended = victim.run("decode", model, store, environment=slow)
    assert (ended["status"], ended["said"]) == (0, tokens)
    assert ended["seconds"] > 0.2


@pytest.mark.parametrize("after", [0, 3, 30])
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "disk became full"),
        (errno.EDQUOT, "disk became full"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_write_that_fails_leaves_nothing(
    number: int, expected: str, after: int, victim: Victim, model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    failing = {
        "SHIM_FILE": str(store / "experts.bin.partial"),
        "SHIM_WRITE_ERRNO": str(number),
        "SHIM_AFTER": str(after),
    }
    ended = victim.run("pack", model, store, environment=failing)
    assert ended["status"] == 2, ended
    assert expected in ended["said"]
    assert not store.exists()


def test_a_limit_on_the_size_of_files(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from specmoe_compile.cli.main import run;"
        "sys.exit(run(['pack', *sys.argv[1:]]))"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))

    done = subprocess.run(
        [sys.executable, "-c", code, str(model), "--store-dir", str(tmp_path / "store")],
        cwd=ROOT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "ulimit -f" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "store").exists()


def with_mounts(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the shell whose mounts nobody else sees; `arguments` are $0, $1, ..."""
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("mebibytes", [1, 6, 12])
def test_a_disk_that_is_full(mebibytes: int, model: Path, tmp_path: Path) -> None:
    """A tmpfs in a mount namespace of its own; the last size holds the store and not its margin."""
    place = tmp_path / "small"
    place.mkdir()
    script = (
        f"mount -t tmpfs -o size={mebibytes}M none {place} || exit 77;"
        f" {sys.executable} -m specmoe_compile.cli.main pack {model} --store-dir {place}/store;"
        f' status=$?; echo "left:" $(find {place} -mindepth 1); exit $status'
    )
    done = with_mounts(script)
    if done.returncode in (1, 77) and "Operation not permitted" in done.stderr:
        pytest.skip("mounting is not permitted here")
    assert done.returncode == 2, done.stderr
    assert "free" in done.stderr.splitlines()[-1]
    assert done.stdout.splitlines()[-1] == "left:"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_complete_store_on_a_read_only_mount_is_used(
    model: Path, reference: tuple[Path, str]
) -> None:
    store, tokens = reference
    code = (
        "import sys; from tests.faults.victim import work;"
        " print(work({'what': 'decode', 'model': sys.argv[1], 'store': sys.argv[2]}))"
    )
    script = (
        f"mount --bind {store} {store} && mount -o remount,ro,bind {store} || exit 77;"
        f' if touch {store}/x; then exit 1; fi; exec {sys.executable} -c "$0" {model} {store}'
    )
    done = with_mounts(script, code)
    if done.returncode in (1, 77) and "not permitted" in done.stderr:
        pytest.skip("mounting is not permitted here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == tokens


def test_json_to_a_full_device(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "specmoe_compile.cli.main", "pack", str(model)]
    done = subprocess.run(
        [*command, "--store-dir", str(tmp_path / "store"), "--json", "/dev/full"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "specmoe: No space left on device."
    assert json.loads((tmp_path / "store" / "header.json").read_text())["complete"]
