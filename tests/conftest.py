"""What all tests share."""

import os

# Before torch is imported, here and in every process that a test starts: of small models one thread is the fastest,
# and several processes of many threads each stand in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402

from data.prepare import prepare  # noqa: E402


@pytest.fixture(autouse=True)
def empty_folder(tmp_path_factory, monkeypatch):
    """Each test runs in an empty folder: it must not see the out/ and data/ of the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Text with something to learn, prepared: lines of counting."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(3000)))
    prepare([str(folder / "text.txt")], str(folder / "tokens"))
    return folder / "tokens"
