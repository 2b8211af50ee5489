"""What all tests share."""

import os

# This stands before torch is imported, here and in every process that a test starts. One thread is
# the fastest for small models, and processes of many threads stand in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.prepare import prepare
from data.script import run_script
from tests.runs import SHORT, start_process
from train import main


def pytest_collection_modifyitems(items):
    """Tests with the marker gpu are skipped where there is no CUDA GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_xdist_auto_num_workers(config):
    """One test at a time where they need a GPU, else one on each core."""
    return 1 if config.option.markexpr == "gpu" else None


@pytest.fixture(autouse=True)
def empty_folder(tmp_path_factory, monkeypatch):
    """Each test runs in an empty folder: it must not see the out/ and data/ of the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The name of a text with something to learn: lines of counting."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(3000)))
    return str(path)


@pytest.fixture(scope="session")
def data(text, tmp_path_factory):
    """The folder of this text's tokens."""
    folder = tmp_path_factory.mktemp("data") / "tokens"
    prepare([text], str(folder))
    return folder


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """The folder of a run of 30 steps that nothing disturbed, with its checkpoints at 20 and 30."""
    out = tmp_path_factory.mktemp("whole")
    main([*SHORT, "--data", str(data), "--out", str(out)])
    return out


@pytest.fixture
def halves(whole, tmp_path):
    """A copy of `whole` for a test to disturb."""
    return shutil.copytree(whole, tmp_path / "halves")


@pytest.fixture
def strict_disk(monkeypatch):
    """A disk on which a file, or a folder, gets its last name only after its content is there, and
    on which this name comes to the disk, too."""
    fsync, synced, named = os.fsync, set(), set()

    def remember(number):
        fsync(number)
        synced.add(os.fstat(number).st_ino)
        named.discard(os.fstat(number).st_ino)

    def check(rename):
        def strict(source, target):
            files = [source, *Path(source).iterdir()] if os.path.isdir(source) else [source]
            assert {os.stat(file).st_ino for file in files} <= synced
            rename(source, target)
            named.add(os.stat(Path(target).parent).st_ino)

        return strict

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "rename", check(os.rename))
    monkeypatch.setattr(os, "replace", check(os.replace))
    yield
    assert not named


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function that runs the `main` of a script in this process, with these words after its name.
    It returns what runs.run_process would return, without the seconds in which a process starts."""

    def run(main, *words, stdin=b""):
        monkeypatch.setattr(sys, "argv", [main.__code__.co_filename, *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_script(main)
        return subprocess.CompletedProcess(words, end.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def start():
    """runs.start_process; what still runs when the test ends is killed."""
    processes = []

    def start(*args, **how):
        processes.append(start_process(*args, **how))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
